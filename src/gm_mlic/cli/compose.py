"""Compose ``conf/`` with Hydra: the resolvers its files use, and composition without a command line."""

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
#: Cells along the side of a backbone's grid that suit it. 14 is what the last map of a ResNet has at 448 pixels.
#: Of scenes_tiny's 40 x 40 at 160 pixels, 10 x 10 cells of 16 pixels keep what its 8 to 45 pixels large objects need.
_GRIDS = {"scenes_tiny": 10}


def register_resolvers() -> None:
    """Make the ``gm_mlic.*`` resolvers, which the files of ``conf/`` use, known to OmegaConf."""
    OmegaConf.register_new_resolver("gm_mlic.digest", _digest, replace=True)
    OmegaConf.register_new_resolver("gm_mlic.absolute", lambda path: str(Path(path).absolute()), replace=True)
    OmegaConf.register_new_resolver("gm_mlic.evaluation_of", _evaluation_of, replace=True)
    OmegaConf.register_new_resolver("gm_mlic.grid", lambda name: _GRIDS.get(name, 14), replace=True)
    OmegaConf.register_new_resolver("gm_mlic.repeat", _repeat, replace=True)
    OmegaConf.register_new_resolver("gm_mlic.square", _square, replace=True)


def compose(
    config_name: str, overrides: Sequence[str] = (), folders: Sequence[Path] = (), return_hydra_config: bool = False
) -> DictConfig:
    """The config that ``gm-mlic COMMAND OVERRIDES`` runs with.

    Args:
        config_name: a file of ``conf/`` without its suffix, as ``train``.
        overrides: Hydra overrides, as on the command line.
        folders: with more configs.
        return_hydra_config: keep the ``hydra`` section.

    Raises:
        ConfigError: for a key that there is not, or a value that cannot work, naming the key and what it may be.
    """
    register_resolvers()
    if folders:
        places = [f"'file://{folder.absolute()}'" for folder in folders]
        overrides = [*overrides, f"hydra.searchpath=[{','.join(places)}]"]
    GlobalHydra.instance().clear()
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        config: DictConfig = hydra_compose(
            config_name, overrides=list(overrides), return_hydra_config=return_hydra_config
        )
    check_keys(config, config_name)
    check_values(config)
    return config


def _digest(*sections: str, _root_: DictConfig) -> str:
    """Eight hex digits that stand for the settings (all, or only these sections) of the config they are used in."""
    content = run_identity(_root_)
    chosen = {key: content[key] for key in sections or content}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _repeat(value: Any, times: Any) -> list[Any]:
    """``value``, that often; what is no number of times is for the settings' rules to say."""
    return [value] * times if isinstance(times, int) else []


def _square(value: Any) -> Any:
    """``value`` times itself; what is no number is for the settings' rules to say."""
    return value**2 if isinstance(value, int) else value


def _evaluation_of(checkpoint: str | None, scores: str | None) -> str:
    """Where an evaluation goes: into the run folder of ``RUN/checkpoints/NAME.ckpt``, or named after the scores."""
    if checkpoint is not None:
        return str(Path(checkpoint).parent.parent / "eval")
    return f"runs/eval-{Path(scores).stem}" if scores is not None else "runs/eval"
