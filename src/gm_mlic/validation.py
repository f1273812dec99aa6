"""Validation of the settings of a run, before any slow stage starts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gm_mlic.errors import ConfigError
from gm_mlic.runs import NOT_PART_OF_A_RUN, decisive, flat_settings

#: Test of a value, and description of valid values.
Rule = tuple[Callable[[Any], bool], str]


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_shard(text: str) -> bool:
    index, slash, shards = text.partition("/")
    return bool(slash) and index.isdecimal() and shards.isdecimal() and int(index) < int(shards)


def is_string(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_string, value))


def _are_named_strings(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(map(is_string, value.values()))


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(is_integer(item) and item >= 0 for item in value)


def integer(minimum: int, maximum: float = math.inf) -> Rule:
    words = f"of at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum:g}"
    return lambda v: is_integer(v) and minimum <= v <= maximum, f"an integer {words}"


def number(low: float, high: float = math.inf, *, open_low: bool = False) -> Rule:
    words = f"a number {'above' if open_low else 'of at least'} {low:g}" + (
        f" and at most {high:g}" if high < math.inf else ""
    )
    return lambda v: is_number(v) and (v > low if open_low else v >= low) and v <= high, words


def one_of(*choices: str) -> Rule:
    return lambda v: v in choices, f"one of {', '.join(choices)}"


def some_of(*choices: str) -> Rule:
    def is_valid(value: Any) -> bool:
        return isinstance(value, list) and len(value) > 0 and all(item in choices for item in value)

    return is_valid, f"a list of some of {', '.join(choices)}"


def or_null(rule: Rule) -> Rule:
    test, words = rule
    return lambda v: v is None or test(v), f"{words}, or null"


BOOLEAN: Rule = (lambda v: isinstance(v, bool), "true or false")
STRING: Rule = (is_string, "a string")

#: Rules of single settings. The stages check the rest, such as the existence of files.
RULES: Mapping[str, Rule] = {
    "seed": integer(0),
    "dataset.name": STRING,
    "dataset.root": STRING,
    "dataset.seed": integer(0),
    "dataset.sizes.train": integer(1),
    "dataset.sizes.val": integer(1),
    "dataset.sizes.test": integer(1),
    "dataset.context_pairs": integer(0, 4),
    "dataset.spatial_pairs": integer(0, 2),
    "dataset.hard_fraction": number(0, 1),
    "dataset.image_size": integer(32),
    "dataset.val_fraction": (lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1"),
    "dataset.download": BOOLEAN,
    "dataset.mirror": or_null(
        (lambda v: is_string(v) and v.startswith(("http://", "https://")), "a URL, e.g. http://HOST/FOLDER")
    ),
    "dataset.unlabeled": one_of("drop", "keep"),
    "dataset.label_order": one_of("name", "id"),
    "dataset.annotations": (
        lambda v: is_string(v) or _are_named_strings(v),
        "a file name, or {train: FILE, val: FILE, test: FILE}",
    ),
    "dataset.folders": or_null((lambda v: _are_named_strings(v), "{train: FOLDER, val: FOLDER, test: FOLDER}")),
    "dataset.labels": or_null((lambda v: is_string(v) or are_strings(v), "a file name or a list of names")),
    "dataset.columns.file": STRING,
    "dataset.columns.labels": or_null(STRING),
    "dataset.columns.split": or_null(STRING),
    "dataset.separator": STRING,
    "dataset.suffix": (lambda v: isinstance(v, str), "a string, e.g. .jpg"),
    "dataset.ignore_columns": (lambda v: are_strings(v), "a list of column names"),
    "dataset.target_format": one_of("binary", "voc"),
    "dataset.missing": one_of("error", "drop"),
    "dataset.test_fraction": (lambda v: is_number(v) and 0 <= v < 1, "a number of at least 0 and below 1"),
    "detector.name": STRING,
    "detector.weights": or_null(STRING),
    "detector.min_size": or_null(integer(32)),
    "detector.max_size": or_null(integer(32)),
    "detector.score_threshold": number(0, 1),
    "detector.nms_threshold": number(0, 1),
    "detector.grid_size": or_null(integer(1)),
    "detector.max_instances": integer(1),
    "detector.trainable": one_of("none", "box_head", "all"),
    "instances.root": STRING,
    "instances.path": or_null(STRING),
    "instances.num_augmentations": integer(0),
    "instances.view_size": integer(32),
    "instances.batch_size": integer(1),
    "instances.num_workers": or_null(integer(0)),
    "instances.overwrite": BOOLEAN,
    "instances.shard": or_null(
        (lambda v: isinstance(v, str) and _is_shard(v), "i/n with 0 <= i < n, e.g. instances.shard=0/4")
    ),
    "instances.online": BOOLEAN,
    "embedding.name": one_of("hashed", "glove"),
    "embedding.path": or_null(STRING),
    "embedding.dim": integer(1),
    "embedding.oov": one_of("error", "zeros", "hashed", "skip_words"),
    "graph.m": integer(1),
    "graph.views": integer(1, 6),
    "graph.num_neighbors": integer(1),
    "graph.num_label_neighbors": or_null(integer(1)),
    "graph.labels_per_class": or_null(integer(1)),
    "graph.layout": one_of("dense", "sparse"),
    "model.name": STRING,
    "model.k": integer(1),
    "model.width": or_null(integer(1)),
    "model.encoder_width": or_null(integer(1)),
    "model.widths": (
        lambda v: v is None or (isinstance(v, list) and len(v) > 0 and all(is_integer(w) and w > 0 for w in v)),
        "a list of k integers, one per block, or null",
    ),
    "model.fusion": one_of("concat", "product"),
    "model.norm": one_of("none", "encoder", "all"),
    "model.edge_types": some_of("spatial", "semantic", "matches"),
    "model.prior": BOOLEAN,
    "model.linear": BOOLEAN,
    "model.class_words": BOOLEAN,
    "model.components": or_null(integer(1)),
    "model.shrinkage": number(0),
    "model.ridge": number(0),
    "model.pooling": one_of("max", "logsumexp"),
    "model.gradient_checkpointing": BOOLEAN,
    "model.tau": number(0, 1),
    "model.p": (lambda v: is_number(v) and 0 <= v < 1, "a number of at least 0 and below 1"),
    "model.steps": integer(1),
    "model.layers": integer(1),
    "model.heads": integer(1),
    "model.dropout": (lambda v: is_number(v) and 0 <= v < 1, "a number of at least 0 and below 1"),
    "loss.beta": number(0),
    "loss.difficult": one_of("positive", "negative", "ignore"),
    "metrics.convention": one_of("mlgcn", "ssgrl", "ctran", "asl", "mmpretrain", "voc11"),
    "metrics.threshold": or_null(number(0, 1)),
    "optimizer.name": one_of("sgd", "adamw"),
    "optimizer.lr": number(0, open_low=True),
    "optimizer.detector_lr": or_null(number(0, open_low=True)),
    "optimizer.momentum": number(0, 1),
    "optimizer.weight_decay": number(0),
    "optimizer.lr_scheduler": one_of("step", "onecycle"),
    "optimizer.step_size": integer(1),
    "optimizer.gamma": number(0, 1, open_low=True),
    "optimizer.pct_start": (lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1"),
    "trainer.max_epochs": integer(1),
    "trainer.min_steps": integer(0),
    "trainer.batch_size": integer(1),
    "trainer.num_workers": or_null(integer(0)),
    "trainer.precision": one_of("32-true", "16-mixed", "bf16-mixed"),
    "trainer.accelerator": one_of("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.devices": (
        lambda v: v == "auto" or (is_integer(v) and (v > 0 or v == -1)) or _are_indices(v),
        "a number of devices, -1 or auto for all, or a list of device indices",
    ),
    "trainer.num_nodes": integer(1),
    "trainer.strategy": STRING,
    "trainer.compile": BOOLEAN,
    "trainer.deterministic": (lambda v: isinstance(v, bool) or v == "auto", "true, false or auto"),
    "trainer.gradient_clip_val": or_null(number(0, open_low=True)),
    "trainer.instance_graph_warmup_epochs": or_null(integer(0)),
    "trainer.checkpoint_every_n_minutes": or_null(number(0)),
    "trainer.ema_decay": or_null((lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1")),
    "trainer.checkpoint": one_of("best", "last"),
    "trainer.early_stopping": or_null(integer(1)),
    "logger.name": one_of("csv", "wandb"),
    "logger.project": STRING,
    "logger.entity": or_null(STRING),
    "logger.offline": BOOLEAN,
    "logger.group": or_null(STRING),
    "logger.tags": (are_strings, "a list of strings"),
    "logger.log_model": BOOLEAN,
    "run_dir": STRING,
    "overwrite": BOOLEAN,
}


def _datasets() -> Iterable[str]:
    from gm_mlic.datasets import known_datasets

    return sorted(known_datasets())


def _detectors() -> Iterable[str]:
    from gm_mlic.detection.faster_rcnn import ARCHITECTURES
    from gm_mlic.detection.grid import CLASSIFIERS

    return (*ARCHITECTURES, *CLASSIFIERS)


def _models() -> Iterable[str]:
    from gm_mlic.registry import list_models

    return list_models()


#: Settings that are registered names, with functions that return the names; programs may register more
#: (docs/add_model.md). Checked last, since importing the stages takes seconds.
NAMES: Mapping[str, Callable[[], Iterable[str]]] = {
    "dataset.name": _datasets,
    "detector.name": _detectors,
    "model.name": _models,
}


def section(config: DictConfig, key: str) -> dict[str, Any]:
    """Section of the config as a resolved, plain dict."""
    value = OmegaConf.to_container(config[key], resolve=True)
    assert isinstance(value, dict)
    return {str(k): v for k, v in value.items()}


def run_identity(config: DictConfig) -> dict[str, Any]:
    """Resolved settings that determine the result of a run."""
    resolved: dict[str, Any] = {}
    for key in map(str, config):
        if key in NOT_PART_OF_A_RUN[""]:  # not resolved: run_dir depends on the identity
            continue
        node = config._get_node(key)
        resolved[key] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else config[key]
    return decisive(resolved)


def changed_settings(before: DictConfig, now: DictConfig) -> list[str]:
    """Settings (``key=before -> now``) in which two configs describe different runs."""
    a, b = (flat_settings(run_identity(config)) for config in (before, now))
    return [f"{key}={a.get(key)} -> {b.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def check(
    config: DictConfig,
    rules: Mapping[str, Rule] = RULES,
    names: Mapping[str, Callable[[], Iterable[str]]] = NAMES,
    *,
    complete: bool = True,
) -> None:
    """Validate a config.

    Args:
        config: the composed config.
        rules: rules of single values.
        names: settings that are registered names.
        complete: whether all settings must have a value.

    Raises:
        ConfigError: for the first missing or invalid value.
    """
    check_values(config, rules)
    for key in rules if complete else ():
        parent = _parent(config, key)
        if parent is not None and OmegaConf.is_missing(parent, key.rpartition(".")[2]):
            raise ConfigError(f"{key} has no value: set it with {key}=VALUE.")
    _check_together(config)
    for key, registered in names.items():
        value = OmegaConf.select(config, key, default=_ABSENT)
        if value is not _ABSENT and value not in (known := list(registered())):
            raise ConfigError(f"{key}={value}: expected one of {', '.join(known)}.")


def check_values(config: DictConfig, rules: Mapping[str, Rule] = RULES) -> None:
    """Validate single values; raises :class:`~gm_mlic.errors.ConfigError` for the first invalid one."""
    for key, (is_valid, words) in rules.items():
        value = OmegaConf.select(config, key, default=_ABSENT)
        if value is _ABSENT:
            continue
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        if not is_valid(value):
            raise ConfigError(f"{key}={_as_typed(value)}: expected {words}.")


def _as_typed(value: Any) -> str:
    """Value in the syntax of YAML and the command line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_as_typed, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_as_typed(item)}' for key, item in value.items())}}}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


#: Models without matching edges.
_WITHOUT_EDGES = ("detector_labels", "gap_linear", "ml_gcn", "ssgrl", "query2label")


def _check_together(config: DictConfig) -> None:
    def get(key: str) -> Any:
        return OmegaConf.select(config, key, default=None)

    if get("graph.m") and get("detector.max_instances") and get("graph.m") > get("detector.max_instances"):
        raise ConfigError(
            f"graph.m={get('graph.m')} exceeds the instances per image in the store (detector.max_instances="
            f"{get('detector.max_instances')}): raise detector.max_instances or lower graph.m."
        )
    cells = get("detector.grid_size") and get("detector.grid_size") ** 2
    for key in ("detector.max_instances", "graph.m") if cells else ():
        if get(key) not in (None, cells):
            raise ConfigError(
                f"{key}={get(key)}: detector.grid_size={get('detector.grid_size')} gives {cells} instances; "
                f"set {key}={cells}."
            )
    widths, k = get("model.widths"), get("model.k")
    if widths is not None and k is not None and len(widths) != k:
        raise ConfigError(
            f"model.widths={list(widths)} has {len(widths)} widths, model.k={k}: set one width per block."
        )
    if get("trainer.compile") and get("model.gradient_checkpointing"):
        raise ConfigError(
            "trainer.compile=true and model.gradient_checkpointing=true exclude each other, since the compiler "
            "controls recomputation. Set one of them to false."
        )
    if get("detector.trainable") not in (None, "none") and not get("instances.online"):
        raise ConfigError(
            f"detector.trainable={get('detector.trainable')} needs instances.online=true: stores hold instances of a "
            "frozen detector."
        )
    if get("detector.trainable") not in (None, "none"):
        for key, off, reason in (
            ("model.components", None, "the statistics of its features would not stay valid"),
            ("graph.views", 1, "its photos are detected in one view"),
        ):
            if get(key) not in (None, off):
                raise ConfigError(
                    f"{key}={get(key)} with a detector that is trained: {reason}. Set {key}={_as_typed(off)}."
                )

    if get("graph.labels_per_class") is not None:
        for key, excluded, reason in (
            ("detector.grid_size", get("detector.grid_size") is not None, "a grid has no classes"),
            ("instances.online", bool(get("instances.online")), "candidates are learned from a store"),
            ("model.name", get("model.name") in _WITHOUT_EDGES, "it has no matching edges"),
        ):
            if excluded:
                raise ConfigError(
                    f"graph.labels_per_class={get('graph.labels_per_class')} is incompatible with "
                    f"{key}={_as_typed(get(key))}: {reason}. Set graph.labels_per_class=null."
                )
    after, epochs = get("trainer.instance_graph_warmup_epochs"), get("trainer.max_epochs")
    if "spatial" in (get("model.edge_types") or ()) and after is not None:
        if epochs is not None and after >= epochs:
            raise ConfigError(
                f"trainer.instance_graph_warmup_epochs={after} with trainer.max_epochs={epochs}: the instance graph "
                "would never be trained. Train longer, or remove it with model.edge_types=[semantic,matches]."
            )
        patience = get("trainer.early_stopping")
        if patience is not None and patience <= after:
            raise ConfigError(
                f"trainer.early_stopping={patience} could stop before the instance graph is trained, after {after} "
                "epochs (trainer.instance_graph_warmup_epochs): set a larger value."
            )


_ABSENT = object()


def _parent(config: DictConfig, key: str) -> Any:
    """Section of a dotted key, or None."""
    parent = key.rpartition(".")[0]
    return OmegaConf.select(config, parent) if parent else config
