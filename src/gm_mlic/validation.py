"""The settings of a run: their sections, and which values they may take.

Checked before anything slow starts; a wrong one is named in one line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gm_mlic.errors import ConfigError
from gm_mlic.runs import NOT_PART_OF_A_RUN, decisive, flat_settings

#: A test of a value, and what a good value is, in words.
Rule = tuple[Callable[[Any], bool], str]


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_shard(text: str) -> bool:
    index, slash, shards = text.partition("/")
    return bool(slash) and index.isdecimal() and shards.isdecimal() and int(index) < int(shards)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def _are_named_texts(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(map(is_text, value.values()))


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(is_whole(item) and item >= 0 for item in value)


def whole(minimum: int, maximum: float = math.inf) -> Rule:
    words = f"at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum:g}"
    return lambda v: is_whole(v) and minimum <= v <= maximum, f"a whole number, {words}"


def number(low: float, high: float = math.inf, *, open_low: bool = False) -> Rule:
    words = f"a number {'above' if open_low else 'of at least'} {low:g}" + (
        f" and at most {high:g}" if high < math.inf else ""
    )
    return lambda v: is_number(v) and (v > low if open_low else v >= low) and v <= high, words


def one_of(*choices: str) -> Rule:
    return lambda v: v in choices, f"one of {', '.join(choices)}"


def some_of(*choices: str) -> Rule:
    def is_good(value: Any) -> bool:
        return isinstance(value, list) and len(value) > 0 and all(item in choices for item in value)

    return is_good, f"a list of some of {', '.join(choices)}"


def or_null(rule: Rule) -> Rule:
    test, words = rule
    return lambda v: v is None or test(v), f"{words}, or null"


YES_NO: Rule = (lambda v: isinstance(v, bool), "true or false")
TEXT: Rule = (is_text, "a text")

#: Every setting whose value can be wrong by itself. What only the stages know (does the file exist? does the store have
#: that many instances?) they say themselves.
RULES: Mapping[str, Rule] = {
    "seed": whole(0),
    "dataset.name": TEXT,
    "dataset.root": TEXT,
    "dataset.seed": whole(0),
    "dataset.sizes.train": whole(1),
    "dataset.sizes.val": whole(1),
    "dataset.sizes.test": whole(1),
    "dataset.context_pairs": whole(0, 4),
    "dataset.spatial_pairs": whole(0, 2),
    "dataset.hard_fraction": number(0, 1),
    "dataset.image_size": whole(32),
    "dataset.val_fraction": (lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1"),
    "dataset.download": YES_NO,
    "dataset.mirror": or_null(
        (lambda v: is_text(v) and v.startswith(("http://", "https://")), "an address, as http://HOST/FOLDER")
    ),
    "dataset.unlabeled": one_of("drop", "keep"),
    "dataset.label_order": one_of("name", "id"),
    "dataset.annotations": (
        lambda v: is_text(v) or _are_named_texts(v),
        "a file name, or {train: FILE, val: FILE, test: FILE}",
    ),
    "dataset.folders": or_null((lambda v: _are_named_texts(v), "{train: FOLDER, val: FOLDER, test: FOLDER}")),
    "dataset.labels": or_null((lambda v: is_text(v) or are_texts(v), "a file name or a list of names")),
    "dataset.columns.file": TEXT,
    "dataset.columns.labels": or_null(TEXT),
    "dataset.columns.split": or_null(TEXT),
    "dataset.separator": TEXT,
    "dataset.suffix": (lambda v: isinstance(v, str), "a text, as .jpg"),
    "dataset.ignore_columns": (lambda v: are_texts(v), "a list of column names"),
    "dataset.target_format": one_of("binary", "voc"),
    "dataset.missing": one_of("error", "drop"),
    "dataset.test_fraction": (lambda v: is_number(v) and 0 <= v < 1, "a number of at least 0 and below 1"),
    "detector.name": TEXT,
    "detector.weights": or_null(TEXT),
    "detector.min_size": or_null(whole(32)),
    "detector.max_size": or_null(whole(32)),
    "detector.score_threshold": number(0, 1),
    "detector.nms_threshold": number(0, 1),
    "detector.grid_size": or_null(whole(1)),
    "detector.max_instances": whole(1),
    "detector.trainable": one_of("none", "box_head", "all"),
    "instances.root": TEXT,
    "instances.path": or_null(TEXT),
    "instances.num_augmentations": whole(0),
    "instances.view_size": whole(32),
    "instances.batch_size": whole(1),
    "instances.num_workers": whole(0),
    "instances.overwrite": YES_NO,
    "instances.shard": or_null(
        (lambda v: isinstance(v, str) and _is_shard(v), "i/n with 0 <= i < n, as in instances.shard=0/4")
    ),
    "instances.online": YES_NO,
    "embedding.name": one_of("hashed", "glove"),
    "embedding.path": or_null(TEXT),
    "embedding.dim": whole(1),
    "embedding.oov": one_of("error", "zeros", "hashed", "skip_words"),
    "graph.m": whole(1),
    "graph.num_neighbors": whole(1),
    "graph.num_label_neighbors": or_null(whole(1)),
    "graph.labels_per_class": or_null(whole(1)),
    "graph.layout": one_of("dense", "sparse"),
    "model.name": TEXT,
    "model.k": whole(1),
    "model.width": or_null(whole(1)),
    "model.encoder_width": or_null(whole(1)),
    "model.widths": (
        lambda v: v is None or (isinstance(v, list) and len(v) > 0 and all(is_whole(w) and w > 0 for w in v)),
        "a list of whole numbers, one for each of the k blocks, or null",
    ),
    "model.fusion": one_of("concat", "product"),
    "model.norm": one_of("none", "encoder", "all"),
    "model.edge_types": some_of("spatial", "semantic", "matches"),
    "model.gradient_checkpointing": YES_NO,
    "model.tau": number(0, 1),
    "model.p": (lambda v: is_number(v) and 0 <= v < 1, "a number of at least 0 and below 1"),
    "model.steps": whole(1),
    "model.layers": whole(1),
    "model.heads": whole(1),
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
    "optimizer.step_size": whole(1),
    "optimizer.gamma": number(0, 1, open_low=True),
    "optimizer.pct_start": (lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1"),
    "trainer.max_epochs": whole(1),
    "trainer.batch_size": whole(1),
    "trainer.num_workers": or_null(whole(0)),
    "trainer.precision": one_of("32-true", "16-mixed", "bf16-mixed"),
    "trainer.accelerator": one_of("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.devices": (
        lambda v: v == "auto" or (is_whole(v) and (v > 0 or v == -1)) or _are_indices(v),
        "a number of devices, -1 or auto for all, or a list of their indices",
    ),
    "trainer.num_nodes": whole(1),
    "trainer.strategy": TEXT,
    "trainer.compile": YES_NO,
    "trainer.deterministic": (lambda v: isinstance(v, bool) or v == "auto", "true, false or auto"),
    "trainer.gradient_clip_val": or_null(number(0, open_low=True)),
    "trainer.instance_graph_warmup_epochs": or_null(whole(0)),
    "trainer.checkpoint_every_n_minutes": or_null(number(0)),
    "trainer.ema_decay": or_null((lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1")),
    "trainer.early_stopping": or_null(whole(1)),
    "logger.name": one_of("csv", "wandb"),
    "logger.project": TEXT,
    "logger.entity": or_null(TEXT),
    "logger.offline": YES_NO,
    "logger.group": or_null(TEXT),
    "logger.tags": (are_texts, "a list of texts"),
    "logger.log_model": YES_NO,
    "run_dir": TEXT,
    "overwrite": YES_NO,
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


#: Settings that are a name of something registered, and which names there are at the moment: programs register their
#: own (docs/add_model.md). Looked at last, for importing the stages takes seconds.
NAMES: Mapping[str, Callable[[], Iterable[str]]] = {
    "dataset.name": _datasets,
    "detector.name": _detectors,
    "model.name": _models,
}


def section(config: DictConfig, key: str) -> dict[str, Any]:
    """A section of the config as a plain dict, resolved."""
    value = OmegaConf.to_container(config[key], resolve=True)
    assert isinstance(value, dict)
    return {str(k): v for k, v in value.items()}


def run_identity(config: DictConfig) -> dict[str, Any]:
    """All settings that decide the outcome of a run, resolved."""
    resolved: dict[str, Any] = {}
    for key in map(str, config):
        if key in NOT_PART_OF_A_RUN[""]:  # not resolved: run_dir is named after the identity
            continue
        node = config._get_node(key)
        resolved[key] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else config[key]
    return decisive(resolved)


def changed_settings(before: DictConfig, now: DictConfig) -> list[str]:
    """The settings (``key=before -> now``) in which two configs describe different runs."""
    a, b = (flat_settings(run_identity(config)) for config in (before, now))
    return [f"{key}={a.get(key)} -> {b.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def check(
    config: DictConfig,
    rules: Mapping[str, Rule] = RULES,
    names: Mapping[str, Callable[[], Iterable[str]]] = NAMES,
    *,
    complete: bool = True,
) -> None:
    """Raise :class:`~gm_mlic.errors.ConfigError` at the first setting that has no value, or one that cannot work.

    Args:
        config: a composed config.
        rules: of single values.
        names: settings that are the name of something registered.
        complete: whether every setting has to have a value.
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
    """Raise :class:`~gm_mlic.errors.ConfigError` at the first value that cannot work by itself, naming what can."""
    for key, (is_good, words) in rules.items():
        value = OmegaConf.select(config, key, default=_ABSENT)
        if value is _ABSENT:
            continue
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        if not is_good(value):
            raise ConfigError(f"{key}={_as_typed(value)}: expected {words}.")


def _as_typed(value: Any) -> str:
    """A value as YAML and the command line have it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_as_typed, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_as_typed(item)}' for key, item in value.items())}}}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


#: Models of ours that read all instances, or all locations, for every label.
_WITHOUT_EDGES = ("detector_labels", "gap_linear", "ml_gcn", "ssgrl", "query2label")


def _check_together(config: DictConfig) -> None:
    def get(key: str) -> Any:
        return OmegaConf.select(config, key, default=None)

    if get("graph.m") and get("detector.max_instances") and get("graph.m") > get("detector.max_instances"):
        raise ConfigError(
            f"graph.m={get('graph.m')} is more than the store would keep (detector.max_instances="
            f"{get('detector.max_instances')}): raise detector.max_instances or lower graph.m."
        )
    cells = get("detector.grid_size") and get("detector.grid_size") ** 2
    for key in ("detector.max_instances", "graph.m") if cells else ():
        if get(key) not in (None, cells):
            raise ConfigError(
                f"{key}={get(key)}: detector.grid_size={get('detector.grid_size')} makes {cells} instances; "
                f"set {key}={cells}."
            )
    widths, k = get("model.widths"), get("model.k")
    if widths is not None and k is not None and len(widths) != k:
        raise ConfigError(
            f"model.widths={list(widths)} has {len(widths)} widths, model.k={k}: give one for each block."
        )
    if get("trainer.compile") and get("model.gradient_checkpointing"):
        raise ConfigError(
            "trainer.compile=true and model.gradient_checkpointing=true do not go together: the compiler decides what "
            "is recomputed. Set one of them to false."
        )
    if get("detector.trainable") not in (None, "none") and not get("instances.online"):
        raise ConfigError(
            f"detector.trainable={get('detector.trainable')} needs instances.online=true: a store holds what the "
            "frozen detector saw."
        )

    if get("graph.labels_per_class") is not None:
        for key, wrong, why in (
            ("detector.grid_size", get("detector.grid_size") is not None, "a grid has no classes"),
            ("instances.online", bool(get("instances.online")), "candidates are learnt from a store"),
            ("model.name", get("model.name") in _WITHOUT_EDGES, "it reads no matching edges"),
        ):
            if wrong:
                raise ConfigError(
                    f"graph.labels_per_class={get('graph.labels_per_class')} does not go with "
                    f"{key}={_as_typed(get(key))}: {why}. Set graph.labels_per_class=null."
                )
    after, epochs = get("trainer.instance_graph_warmup_epochs"), get("trainer.max_epochs")
    if "spatial" in (get("model.edge_types") or ()) and after is not None:
        if epochs is not None and after >= epochs:
            raise ConfigError(
                f"trainer.instance_graph_warmup_epochs={after} with trainer.max_epochs={epochs}: the instance graph "
                "would never be learnt. Train longer, or leave it out with model.edge_types=[semantic,matches]."
            )
        patience = get("trainer.early_stopping")
        if patience is not None and patience <= after:
            raise ConfigError(
                f"trainer.early_stopping={patience} could stop before the instance graph is learnt, which begins after "
                f"{after} epochs (trainer.instance_graph_warmup_epochs): give it more."
            )


_ABSENT = object()


def _parent(config: DictConfig, key: str) -> Any:
    """The section that a dotted key stands in, or None."""
    parent = key.rpartition(".")[0]
    return OmegaConf.select(config, parent) if parent else config
