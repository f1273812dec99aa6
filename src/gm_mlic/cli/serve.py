"""Command ``gm-mlic serve``: a local web page for interactive prediction."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

from omegaconf import DictConfig

from gm_mlic.cli.predict import load, new_labels
from gm_mlic.detection import LookupExtractor
from gm_mlic.errors import ConfigError


def serve(config: DictConfig) -> None:
    """Serve the page until interrupted."""
    try:
        import uvicorn

        from gm_mlic.serving.app import build_app
    except ImportError as error:
        raise ConfigError("gm-mlic serve needs the extra: pip install 'gm-mlic[serve]'.") from error
    predictor = load(config)
    if isinstance(predictor.detector, LookupExtractor):
        raise ConfigError(
            f"The detector {predictor.detector.name} looks instances up by the name of a photo, which an upload does "
            "not have: use gm-mlic predict, or a model of another detector."
        )
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen()  # before the address is printed, so that clients can connect immediately
    except OSError as error:
        problem = f"host={config.host}, port={config.port}: {error.strerror or error}"
        raise ConfigError(f"{problem}. Set another port=NUMBER, or port=0 for any free one.") from error
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{port} (Ctrl-C to stop)", flush=True)
    if not _is_loopback(host):
        print("Every host on the network can use this page; it has no password.", flush=True)
    hosts = [config.host, name, "localhost"] if _is_loopback(host) else ["*"]
    app = build_app(predictor, hosts, new_labels(config))
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off")).run(sockets=[listener])


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback
