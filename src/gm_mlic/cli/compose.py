"""Config composition with Hydra: resolvers of ``conf/``, and composition without a command line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from gm_mlic.cli.config_schema import check_keys
from gm_mlic.cli.validation import check_values
from gm_mlic.validation import run_identity

CONFIG_MODULE = "gm_mlic.conf"
#: Grid size by detector; default 14, the last feature map of a ResNet at 448 pixels. For scenes_tiny (40 x 40 at 160
#: pixels), 10 x 10 cells of 16 pixels suit its objects of 8 to 45 pixels.
_GRIDS = {"scenes_tiny": 10}


def register_resolvers() -> None:
    """Register the ``gm_mlic.*`` resolvers of ``conf/`` with OmegaConf."""
    OmegaConf.register_new_resolver("gm_mlic.digest", _digest, replace=True)
    OmegaConf.register_new_resolver("gm_mlic.absolute", lambda path: str(Path(path).absolute()), replace=True)
    OmegaConf.register_new_resolver("gm_mlic.evaluation_of", _evaluation_of, replace=True)
    OmegaConf.register_new_resolver("gm_mlic.grid", lambda name: _GRIDS.get(name, 14), replace=True)
    OmegaConf.register_new_resolver("gm_mlic.repeat", _repeat, replace=True)
    OmegaConf.register_new_resolver("gm_mlic.square", _square, replace=True)


def compose(
    config_name: str, overrides: Sequence[str] = (), folders: Sequence[Path] = (), return_hydra_config: bool = False
) -> DictConfig:
    """Compose the config of ``gm-mlic COMMAND OVERRIDES``.

    Args:
        config_name: name of a file in ``conf/`` without its suffix, e.g. ``train``.
        overrides: Hydra overrides, as on the command line.
        folders: further folders of configs.
        return_hydra_config: keep the ``hydra`` section.

    Raises:
        ConfigError: for an unknown or missing key, or an invalid value.
    """
    register_resolvers()
    if folders:
        paths = [f"'file://{folder.absolute()}'" for folder in folders]
        overrides = [*overrides, f"hydra.searchpath=[{','.join(paths)}]"]
    GlobalHydra.instance().clear()
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        config: DictConfig = hydra_compose(
            config_name, overrides=list(overrides), return_hydra_config=return_hydra_config
        )
    check_keys(config, config_name)
    check_values(config)
    return config


def _digest(*sections: str, _root_: DictConfig) -> str:
    """Hash of the settings of a config, or of some sections, as eight hex digits."""
    content = run_identity(_root_)
    chosen = {key: content[key] for key in sections or content}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _repeat(value: Any, times: Any) -> list[Any]:
    """List of ``times`` copies of ``value``; empty for an invalid ``times``, which validation reports."""
    return [value] * times if isinstance(times, int) else []


def _square(value: Any) -> Any:
    """Square of ``value``; other types are returned unchanged, validation reports them."""
    return value**2 if isinstance(value, int) else value


def _evaluation_of(checkpoint: str | None, scores: str | None) -> str:
    """Output folder of an evaluation: in the run folder of a checkpoint, or named after the file of scores."""
    if checkpoint is not None:
        return str(Path(checkpoint).parent.parent / "eval")
    return f"runs/eval-{Path(scores).stem}" if scores is not None else "runs/eval"
