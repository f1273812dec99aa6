"""Which values a setting may take. Checked before anything slow starts; a wrong one is named in one line."""

from __future__ import annotations

import ipaddress
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gm_mlic.errors import ConfigError
from gm_mlic.runs import NOT_PART_OF_A_RUN

#: A test of a value, and what a good value is, in words.
Rule = tuple[Callable[[Any], bool], str]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_shard(text: str) -> bool:
    index, slash, shards = text.partition("/")
    return bool(slash) and index.isdecimal() and shards.isdecimal() and int(index) < int(shards)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_address(value: Any) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_named_texts(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(map(_is_text, value.values()))


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(_is_whole(item) and item >= 0 for item in value)


def _whole(minimum: int, maximum: float = math.inf) -> Rule:
    words = f"at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum:g}"
    return lambda v: _is_whole(v) and minimum <= v <= maximum, f"a whole number, {words}"


def _number(low: float, high: float = math.inf, *, open_low: bool = False) -> Rule:
    words = f"a number {'above' if open_low else 'of at least'} {low:g}" + (
        f" and at most {high:g}" if high < math.inf else ""
    )
    return lambda v: _is_number(v) and (v > low if open_low else v >= low) and v <= high, words


def _one_of(*choices: str) -> Rule:
    return lambda v: v in choices, f"one of {', '.join(choices)}"


def _some_of(*choices: str) -> Rule:
    def is_good(value: Any) -> bool:
        return isinstance(value, list) and len(value) > 0 and all(item in choices for item in value)

    return is_good, f"a list of some of {', '.join(choices)}"


def _or_null(rule: Rule) -> Rule:
    test, words = rule
    return lambda v: v is None or test(v), f"{words}, or null"


_YES_NO: Rule = (lambda v: isinstance(v, bool), "true or false")
_TEXT: Rule = (_is_text, "a text")

#: Every setting whose value can be wrong by itself. What only the stages know (does the file exist? does the store have
#: that many instances?) they say themselves.
RULES: Mapping[str, Rule] = {
    "seed": _whole(0),
    "dataset.name": _TEXT,
    "dataset.root": _TEXT,
    "dataset.seed": _whole(0),
    "dataset.sizes.train": _whole(1),
    "dataset.sizes.val": _whole(1),
    "dataset.sizes.test": _whole(1),
    "dataset.company_pairs": _whole(0, 4),
    "dataset.spatial_pairs": _whole(0, 2),
    "dataset.hard": _number(0, 1),
    "dataset.image_size": _whole(32),
    "dataset.val_fraction": (lambda v: _is_number(v) and 0 < v < 1, "a number between 0 and 1"),
    "dataset.download": _YES_NO,
    "dataset.mirror": _or_null(
        (lambda v: _is_text(v) and v.startswith(("http://", "https://")), "an address, as http://HOST/FOLDER")
    ),
    "dataset.unlabelled": _one_of("drop", "keep"),
    "dataset.label_order": _one_of("name", "id"),
    "dataset.annotations": (
        lambda v: _is_text(v) or _are_named_texts(v),
        "a file name, or {train: FILE, val: FILE, test: FILE}",
    ),
    "dataset.folders": _or_null((lambda v: _are_named_texts(v), "{train: FOLDER, val: FOLDER, test: FOLDER}")),
    "dataset.labels": _or_null((lambda v: _is_text(v) or _are_texts(v), "a file name or a list of names")),
    "dataset.columns.file": _TEXT,
    "dataset.columns.labels": _or_null(_TEXT),
    "dataset.columns.split": _or_null(_TEXT),
    "dataset.separator": _TEXT,
    "dataset.suffix": (lambda v: isinstance(v, str), "a text, as .jpg"),
    "dataset.ignore_columns": (lambda v: _are_texts(v), "a list of column names"),
    "dataset.target_format": _one_of("binary", "voc"),
    "dataset.missing": _one_of("error", "drop"),
    "dataset.test_fraction": (lambda v: _is_number(v) and 0 <= v < 1, "a number of at least 0 and below 1"),
    "detector.arch": _TEXT,
    "detector.weights": _or_null(_TEXT),
    "detector.min_size": _or_null(_whole(32)),
    "detector.max_size": _or_null(_whole(32)),
    "detector.score_threshold": _number(0, 1),
    "detector.nms_threshold": _number(0, 1),
    "detector.grid": _or_null(_whole(1)),
    "detector.max_instances": _whole(1),
    "detector.trainable": _one_of("none", "box_head", "all"),
    "instances.root": _TEXT,
    "instances.path": _or_null(_TEXT),
    "instances.views": _whole(0),
    "instances.view_size": _whole(32),
    "instances.batch_size": _whole(1),
    "instances.workers": _whole(0),
    "instances.overwrite": _YES_NO,
    "instances.shard": _or_null(
        (lambda v: isinstance(v, str) and _is_shard(v), "i/n with 0 <= i < n, as in instances.shard=0/4")
    ),
    "instances.online": _YES_NO,
    "embedding.source": _one_of("hashed", "glove"),
    "embedding.path": _or_null(_TEXT),
    "embedding.dim": _whole(1),
    "embedding.oov": _one_of("error", "zeros", "hashed", "skip_words"),
    "graph.m": _whole(1),
    "graph.neighbours": _whole(1),
    "graph.label_neighbours": _or_null(_whole(1)),
    "graph.candidates": _or_null(_whole(1)),
    "model.name": _TEXT,
    "model.k": _whole(1),
    "model.width": _or_null(_whole(1)),
    "model.encoder_width": _or_null(_whole(1)),
    "model.widths": (
        lambda v: v is None or (isinstance(v, list) and len(v) > 0 and all(_is_whole(w) and w > 0 for w in v)),
        "a list of whole numbers, one for each of the k blocks, or null",
    ),
    "model.fusion": _one_of("concat", "product"),
    "model.norm": _one_of("none", "encoder", "all"),
    "model.execution": _one_of("auto", "structured", "explicit"),
    "model.label_graph": _YES_NO,
    "model.instance_graph": _YES_NO,
    "model.matching_edges": _YES_NO,
    "model.recompute": _YES_NO,
    "model.tau": _number(0, 1),
    "model.p": (lambda v: _is_number(v) and 0 <= v < 1, "a number of at least 0 and below 1"),
    "model.steps": _whole(1),
    "model.layers": _whole(1),
    "model.heads": _whole(1),
    "model.dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a number of at least 0 and below 1"),
    "loss.beta": _number(0),
    "loss.difficult": _one_of("positive", "negative", "ignore"),
    "metrics.preset": _one_of("mlgcn", "ssgrl", "ctran", "asl", "mmpretrain", "voc11"),
    "metrics.threshold": _or_null(_number(0, 1)),
    "optimizer.name": _one_of("sgd", "adamw"),
    "optimizer.lr": _number(0, open_low=True),
    "optimizer.detector_lr": _or_null(_number(0, open_low=True)),
    "optimizer.momentum": _number(0, 1),
    "optimizer.weight_decay": _number(0),
    "optimizer.schedule": _one_of("step", "onecycle"),
    "optimizer.step_epochs": _whole(1),
    "optimizer.gamma": _number(0, 1, open_low=True),
    "optimizer.warmup": (lambda v: _is_number(v) and 0 < v < 1, "a number between 0 and 1"),
    "trainer.max_epochs": _whole(1),
    "trainer.batch_size": _whole(1),
    "trainer.num_workers": _or_null(_whole(0)),
    "trainer.precision": _one_of("32-true", "16-mixed", "bf16-mixed"),
    "trainer.accelerator": _one_of("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.devices": (
        lambda v: v == "auto" or (_is_whole(v) and (v > 0 or v == -1)) or _are_indices(v),
        "a number of devices, -1 or auto for all, or a list of their indices",
    ),
    "trainer.num_nodes": _whole(1),
    "trainer.strategy": _TEXT,
    "trainer.compile": _YES_NO,
    "trainer.deterministic": (lambda v: isinstance(v, bool) or v == "auto", "true, false or auto"),
    "trainer.gradient_clip_val": _or_null(_number(0, open_low=True)),
    "trainer.instance_graph_after": _or_null(_whole(0)),
    "trainer.save_minutes": _or_null(_number(0)),
    "trainer.ema": _or_null((lambda v: _is_number(v) and 0 < v < 1, "a number between 0 and 1")),
    "trainer.early_stopping": _or_null(_whole(1)),
    "logger.name": _one_of("csv", "wandb"),
    "logger.project": _TEXT,
    "logger.entity": _or_null(_TEXT),
    "logger.offline": _YES_NO,
    "logger.group": _or_null(_TEXT),
    "logger.tags": (_are_texts, "a list of texts"),
    "logger.checkpoint": _YES_NO,
    "run_dir": _TEXT,
    "accelerator": _one_of("auto", "cpu", "gpu", "cuda", "mps"),
    "devices": _whole(1),
    "epochs": _whole(1),
    "batch_size": _whole(1),
    "lr": _number(0, open_low=True),
    "weight_decay": _number(0),
    "num_workers": _whole(0),
    "overwrite": _YES_NO,
    "check": _YES_NO,
    "splits": (
        lambda v: isinstance(v, list) and len(v) > 0 and all(name in ("train", "val", "test") for name in v),
        "a list of train, val and test",
    ),
    "bench.cases": _some_of("voc2007", "coco2014", "nuswide", "large"),
    "bench.fusions": _some_of("concat", "product"),
    "bench.executions": _some_of("plain", "structured", "compiled", "recomputed"),
    "bench.batch": _whole(1),
    "bench.k": _whole(1),
    "bench.norm": _one_of("none", "encoder", "all"),
    "bench.precision": _one_of("float32", "bfloat16"),
    "bench.repeats": (
        lambda v: isinstance(v, list) and len(v) == 2 and all(_is_whole(n) and n > 0 for n in v),
        "two whole numbers, at least 1: rounds of forward passes and of training steps",
    ),
    "bench.curves": (
        lambda v: isinstance(v, list) and all(name in ("m", "C", "k", "batch") for name in v),
        "a list of some of m, C, k and batch",
    ),
    "bench.growth_batch": _whole(1),
    "bench.shares": _YES_NO,
    "images": (
        lambda v: _is_text(v) or (_are_texts(v) and len(v) > 0),
        "a file, a folder, a pattern, or a list of them",
    ),
    "host": (_is_address, "an address, as 127.0.0.1"),
    "port": (lambda v: _is_whole(v) and 0 <= v <= 65535, "a whole number from 0 to 65535"),
    "image": _TEXT,
    "label": _or_null(_TEXT),
    "top": _whole(1),
    "threshold": _number(0, 1),
    "labels": _or_null((lambda v: _is_text(v) or (_are_texts(v) and len(v) > 0), "names, as [cat,zebra crossing]")),
    "pictures": _YES_NO,
    "to": _TEXT,
    "format": _one_of("pretrained", "torch", "onnx"),
    "part": _one_of("network", "detector", "all"),
    "size": _or_null(
        (lambda v: isinstance(v, list) and len(v) == 2 and all(_is_whole(n) and n >= 32 for n in v), "[HEIGHT,WIDTH]")
    ),
    "licence": _or_null(_TEXT),
    "push": _or_null((lambda v: isinstance(v, str) and v.count("/") == 1, "USER/NAME")),
    "private": _YES_NO,
    "calibrate": _YES_NO,
    "bootstrap": _whole(0),
    "target_format": _one_of("binary", "voc"),
    "allow_all_present": _YES_NO,
}


def _datasets() -> Iterable[str]:
    from gm_mlic.training.build import known_datasets

    return sorted(known_datasets())


def _detectors() -> Iterable[str]:
    from gm_mlic.detection.faster_rcnn import ARCHITECTURES
    from gm_mlic.detection.grid import CLASSIFIERS

    return (*ARCHITECTURES, *CLASSIFIERS)


def _models() -> Iterable[str]:
    from gm_mlic.nn import list_models

    return list_models()


def _strategies() -> Iterable[str]:
    from lightning.pytorch.strategies import StrategyRegistry

    return ("auto", *StrategyRegistry.available_strategies())


#: Settings that are a name of something registered, and which names there are at the moment: programs register their
#: own (docs/add_model.md). Looked at last, for importing the stages takes seconds.
NAMES: Mapping[str, Callable[[], Iterable[str]]] = {
    "dataset.name": _datasets,
    "detector.arch": _detectors,
    "model.name": _models,
    "trainer.strategy": _strategies,
}


def run_identity(config: DictConfig) -> dict[str, Any]:
    """All settings that decide the outcome of a run, resolved."""
    identity: dict[str, Any] = {}
    for key in map(str, config):
        if key in NOT_PART_OF_A_RUN[""]:
            continue
        node = config._get_node(key)
        value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else config[key]
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if k not in NOT_PART_OF_A_RUN.get(key, ())}
        identity[key] = value
    return identity


def changed_settings(before: DictConfig, now: DictConfig) -> list[str]:
    """The settings (``key=before -> now``) in which two configs describe different runs."""
    a, b = (_flat(run_identity(config)) for config in (before, now))
    return [f"{key}={a.get(key)} -> {b.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def check(config: DictConfig, *, complete: bool = True) -> None:
    """Raise :class:`~gm_mlic.errors.ConfigError` at the first setting that has no value, or one that cannot work.

    With ``complete=False`` a setting may have no value.
    """
    check_values(config)
    for key in RULES if complete else ():
        section = _section(config, key)
        if section is not None and OmegaConf.is_missing(section, key.rpartition(".")[2]):
            raise ConfigError(f"{key} has no value: set it with {key}=VALUE.")
    _check_together(config)
    for key, names in NAMES.items():
        value = OmegaConf.select(config, key, default=_ABSENT)
        if value is not _ABSENT and value not in (known := list(names())):
            raise ConfigError(f"{key}={value}: expected one of {', '.join(known)}.")


def check_values(config: DictConfig) -> None:
    """Raise :class:`~gm_mlic.errors.ConfigError` at the first value that cannot work by itself, naming what can."""
    for key, (is_good, words) in RULES.items():
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
_WITHOUT_EDGES = ("detector", "resnet101", "ml_gcn", "ssgrl", "query2label")


def _check_together(config: DictConfig) -> None:
    def get(key: str) -> Any:
        return OmegaConf.select(config, key, default=None)

    if get("graph.m") and get("detector.max_instances") and get("graph.m") > get("detector.max_instances"):
        raise ConfigError(
            f"graph.m={get('graph.m')} is more than the store would keep (detector.max_instances="
            f"{get('detector.max_instances')}): raise detector.max_instances or lower graph.m."
        )
    cells = get("detector.grid") and get("detector.grid") ** 2
    for key in ("detector.max_instances", "graph.m") if cells else ():
        if get(key) not in (None, cells):
            raise ConfigError(
                f"{key}={get(key)}: detector.grid={get('detector.grid')} makes {cells} instances; set {key}={cells}."
            )
    widths, k = get("model.widths"), get("model.k")
    if widths is not None and k is not None and len(widths) != k:
        raise ConfigError(
            f"model.widths={list(widths)} has {len(widths)} widths, model.k={k}: give one for each block."
        )
    if get("trainer.compile") and get("model.recompute"):
        raise ConfigError(
            "trainer.compile=true and model.recompute=true do not go together: the compiler chooses by itself what it "
            "keeps. Set one of them to false."
        )
    if get("detector.trainable") not in (None, "none") and not get("instances.online"):
        raise ConfigError(
            f"detector.trainable={get('detector.trainable')} needs instances.online=true: a store holds what the "
            "frozen detector saw."
        )

    if get("graph.candidates") is not None:
        for key, wrong, why in (
            ("detector.grid", get("detector.grid") is not None, "a grid has no classes"),
            ("instances.online", bool(get("instances.online")), "candidates are learnt from a store"),
            ("model.name", get("model.name") in _WITHOUT_EDGES, "it reads no matching edges"),
        ):
            if wrong:
                raise ConfigError(
                    f"graph.candidates={get('graph.candidates')} does not go with {key}={_as_typed(get(key))}: {why}. "
                    "Set graph.candidates=null."
                )
    after, epochs = get("trainer.instance_graph_after"), get("trainer.max_epochs")
    if get("model.instance_graph") and after is not None:
        if epochs is not None and after >= epochs:
            raise ConfigError(
                f"trainer.instance_graph_after={after} with trainer.max_epochs={epochs}: the instance graph would "
                "never be learnt. Train longer, or leave it out altogether with model.instance_graph=false."
            )
        patience = get("trainer.early_stopping")
        if patience is not None and patience <= after:
            raise ConfigError(
                f"trainer.early_stopping={patience} could stop before the instance graph is learnt, which begins after "
                f"{after} epochs (trainer.instance_graph_after): give it more."
            )
    if get("bootstrap") is not None:
        _check_evaluation(get)


def _check_evaluation(get: Callable[[str], Any]) -> None:
    """What ``gm-mlic eval`` is to evaluate: a checkpoint, or files."""
    if (get("checkpoint") is None) == (get("scores") is None):
        raise ConfigError("give either checkpoint=FILE, or scores=FILE and targets=FILE.")
    if get("checkpoint") is not None:
        for key in ("targets", "against", "val_scores", "val_targets"):
            if get(key) is not None:
                raise ConfigError(f"{key}={get(key)} goes with scores=FILE, not with checkpoint.")
        return
    if get("targets") is None:
        raise ConfigError("targets has no value: set it with targets=FILE (it may be the file of scores).")
    for key in ("val_scores", "val_targets"):
        if get("calibrate") and get(key) is None:
            raise ConfigError(f"calibrate=true fits thresholds on validation images: set {key}=FILE.")
        if not get("calibrate") and get(key) is not None:
            raise ConfigError(f"{key}={get(key)} is used with calibrate=true.")


_ABSENT = object()


def _section(config: DictConfig, key: str) -> Any:
    """The section that a dotted key stands in, or None."""
    parent = key.rpartition(".")[0]
    return OmegaConf.select(config, parent) if parent else config
