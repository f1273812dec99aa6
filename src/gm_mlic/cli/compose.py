"""Config composition with Hydra: the options of ``conf/`` and of the registries."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from gm_mlic.cli.settings import COMMANDS, WITHOUT_FOLDER, fields_of
from gm_mlic.config import SECTIONS, finish, finished_copy, run_identity, settings_of_section, unknown
from gm_mlic.errors import ConfigError
from gm_mlic.registry import Registry, import_plugins, is_built_in
from gm_mlic.schema import Setting, as_typed

CONFIG_MODULE = "gm_mlic.conf"


def compose(
    command: str,
    overrides: Sequence[str] = (),
    folders: Sequence[Path] = (),
    return_hydra_config: bool = False,
    *,
    complete: bool = False,
) -> DictConfig:
    """Compose and check the config of ``gm-mlic COMMAND OVERRIDES``.

    Args:
        command, overrides: as on the command line.
        folders: further folders of configs.
        return_hydra_config: keep the ``hydra`` section.
        complete: whether all settings must have a value.

    Raises:
        ConfigError: for an unknown or missing key, or an invalid value.
    """
    return check(command, _composed(command, overrides, folders, return_hydra_config), complete=complete)


def check_jobs(command: str, overrides: Sequence[str], folders: Sequence[Path] = ()) -> None:
    """Check all jobs of a multirun, as :func:`compose`. Of a search, whose jobs are unknown before it runs, the first
    values are checked.
    """
    parse = OverridesParser.create().parse_overrides
    fixed = [override.input_line for override in parse(list(overrides)) if not override.is_sweep_override()]
    sweeper = _composed(command, fixed, folders, True).hydra.sweeper
    grid = parse([*(f"{key}={values}" for key, values in (sweeper.params or {}).items()), *overrides])
    is_search = sweeper._target_ != BasicSweeperConf._target_
    for number, job in enumerate([_first_job(grid)] if is_search else BasicSweeper.split_arguments(grid, None)[0]):
        config = _composed(command, job, folders, True)
        config.hydra.job.num = number
        HydraConfig.instance().set_config(config)  # for interpolations as in run_dir=runs/${hydra:job.num}
        check(command, config, complete=command != "plan")


def _first_job(grid: Sequence[Override]) -> list[str]:
    """The overrides, with the first value of each list or interval."""
    return [
        f"{o.get_key_element()}={o.value().start if o.is_interval_sweep() else next(o.sweep_string_iterator())}"
        if o.is_sweep_override()
        else str(o.input_line)
        for o in grid
    ]


def _composed(command: str, overrides: Sequence[str], folders: Sequence[Path], return_hydra_config: bool) -> DictConfig:
    prepare(command, overrides)
    given = [_added_if_unknown(command, override) for override in overrides]
    if folders:
        paths = [f"'file://{folder.absolute()}'" for folder in folders]
        given.append(f"hydra.searchpath=[{','.join(paths)}]")
    GlobalHydra.instance().clear()
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        config: DictConfig = hydra_compose(command, overrides=given, return_hydra_config=return_hydra_config)
    if return_hydra_config:
        task: Any = OmegaConf.to_container(config.hydra.overrides.task)  # interpolations are not resolved yet
        config.hydra.overrides.task = [override.removeprefix("++") for override in task]
    return config


def _added_if_unknown(command: str, override: str) -> str:
    """``++KEY=VALUE`` for a setting of a section: an unknown one is reported by :func:`finish` instead of Hydra."""
    setting = re.match(r"(?!hydra\b)(\w+)(\.[\w.]+)?=({?)", override)
    if setting is None:
        return override
    known = [*fields_of(command), *COMMANDS[command].groups]
    if setting[1] not in known:
        raise ConfigError(unknown(setting[1], known))
    return f"++{override}" if setting[2] or setting[3] else override


def check(command: str, config: DictConfig, *, complete: bool = True) -> DictConfig:
    """Complete and check a composed config, which is changed, as :func:`compose`; returns it."""
    OmegaConf.set_struct(config, False)
    for group, default in COMMANDS[command].groups.items():  # Hydra leaves out a group without an option
        if group in SECTIONS and config.get(group) is None:
            if default is not None:
                raise ConfigError(f"{group} has no value: set it with {group}=OPTION.")
            config[group] = None
    finish(config, fields_of(command), complete=complete)
    strategy = OmegaConf.select(config, "trainer.strategy", default="auto")
    if strategy != "auto":
        from gm_mlic.training.trainer import strategies

        if strategy not in strategies():
            raise ConfigError(f"trainer.strategy={strategy}: expected one of {', '.join(strategies())}.")
    if complete:
        COMMANDS[command].exclusions(config)  # type: ignore[arg-type]
    return config


def prepare(command: str, overrides: Sequence[str] = ()) -> None:
    """Import plugins, and register the resolvers and options of a command with Hydra."""
    given = [override for override in overrides if re.match(r"\+*plugins=", override)]
    for plugins in OverridesParser.create().parse_overrides(given):
        if not isinstance(plugins.value(), list):
            module = plugins.value() or "MODULE"
            raise ConfigError(f"plugins={as_typed(plugins.value())}: expected a list: plugins=[{module}].")
        import_plugins(list(map(str, plugins.value())))
    OmegaConf.register_new_resolver("gm_mlic.digest", _digest, replace=True)
    OmegaConf.register_new_resolver("gm_mlic.absolute", lambda path: str(Path(path).absolute()), replace=True)
    OmegaConf.register_new_resolver("gm_mlic.evaluation_of", _evaluation_of, replace=True)
    store = ConfigStore.instance()
    # Hydra copies the store in each composition, which would take a third of its time, and does not change it.
    store.__deepcopy__ = lambda memo: store  # type: ignore[attr-defined]
    store.store(name=command, node=_primary(command))
    for group in COMMANDS[command].groups:
        kind = SECTIONS.get(group)
        if kind is not None:
            _store_options(group, kind.builders() if isinstance(kind, Registry) else ())


@functools.cache
def _store_options(group: str, registered: tuple[Any, ...]) -> None:
    """Register the options of a group, again only if what is registered has changed."""
    store = ConfigStore.instance()
    for option, build in registered:
        if option in _files(group) and not is_built_in(build):
            raise ConfigError(
                f"The {group} {option} of a plugin has the name of a preset of gm-mlic: choose another name."
            )
    for option in _names(group):
        # Files of conf/ extend an option of this name: `defaults: [_NAME]`.
        for name in {f"_{option}", option} - _files(group):
            store.store(group=group, name=name, node=_node(group, option))


def options(group: str) -> list[str]:
    """Options of a config group."""
    return sorted({*_names(group), *_files(group)})


def _names(group: str) -> list[str]:
    """Options of a group that the code defines."""
    kind = SECTIONS.get(group)
    return kind.names() if isinstance(kind, Registry) else ["default"] if kind else []


@functools.cache
def _files(group: str) -> frozenset[str]:
    folder = Path(str(importlib.resources.files(CONFIG_MODULE)))
    return frozenset(file.stem for file in (folder / group).glob("*.yaml"))


def _node(group: str, option: str) -> dict[str, Any]:
    """Settings of an option that the code defines, with their defaults."""
    kind = SECTIONS[group]
    if not isinstance(kind, Registry):
        return _defaults(settings_of_section(group))
    node = {"name": option, **_defaults(settings_of_section(group, option))}
    if group == "dataset":  # each selects its detector
        detector = kind.attribute(option, "detector", "resnet50_fpn")
        node["defaults"] = ["_self_", {"override /detector@_global_.detector": detector}]
    return node


def _defaults(settings: Mapping[str, Setting]) -> dict[str, Any]:
    return {name: dict(s.default) if isinstance(s.default, Mapping) else s.default for name, s in settings.items()}


def _primary(command: str) -> dict[str, Any]:
    """The config of a command: its groups and settings, and where Hydra writes."""
    kind, without = COMMANDS[command], command in WITHOUT_FOLDER
    groups = [{group: option} for group, option in kind.groups.items()]
    log = {"override hydra/job_logging": "console" if without else "gm_mlic"}
    defaults = [*groups, "_self_", log] if kind.changed else ["_self_", *groups, log]
    each = "" if command in ("train", "extract", "demo", "dataset", "train-detector") else "/${hydra:job.num}"
    hydra: dict[str, Any] = {"job": {"name": command}, "run": {"dir": "." if without else "${run_dir}"}}
    if without:
        hydra["output_subdir"] = None
    else:
        # Folder of multirun.yaml. Each job has its own run_dir, so multiruns resume like single runs.
        folder = "runs/multirun/${now:%Y-%m-%d_%H-%M-%S}"
        hydra["sweep"] = {"dir": folder, "subdir": "${gm_mlic.absolute:${run_dir}}" + each}
    if command == "train":
        hydra["callbacks"] = {"sweep_folder": {"_target_": "gm_mlic.cli.commands.SweepFolder"}}
    return {"defaults": defaults, **_defaults(fields_of(command)), **kind.changed, "hydra": hydra}


# Resolvers


def _digest(*sections: str, _root_: DictConfig) -> str:
    """Hash of the settings of a config, or of some sections, as eight hex digits."""
    import_plugins(_root_.get("plugins") or ())  # in processes of a launcher
    content = run_identity(finished_copy(_root_))
    chosen = {key: content[key] for key in sections or content}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _evaluation_of(checkpoint: str | None, scores: str | None) -> str:
    """Output folder of an evaluation: in the run folder of a checkpoint, or named after the file of scores."""
    if checkpoint is not None:
        return str(Path(checkpoint).parent.parent / "eval")
    return f"runs/eval-{Path(scores).stem}" if scores is not None else "runs/eval"
