"""Validation of the settings of all commands, in addition to those of a run (:mod:`gm_mlic.validation`)."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gm_mlic import validation
from gm_mlic.errors import ConfigError
from gm_mlic.validation import (
    BOOLEAN,
    STRING,
    Rule,
    are_strings,
    integer,
    is_integer,
    is_string,
    number,
    one_of,
    or_null,
    some_of,
)


def _is_address(value: Any) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return isinstance(value, str)


RULES: Mapping[str, Rule] = {
    **validation.RULES,
    "device": one_of("auto", "cpu", "cuda"),
    "devices": integer(1),
    "epochs": integer(1),
    "batch_size": integer(1),
    "lr": number(0, open_low=True),
    "weight_decay": number(0),
    "num_workers": or_null(integer(0)),
    "check": BOOLEAN,
    "splits": (
        lambda v: isinstance(v, list) and len(v) > 0 and all(name in ("train", "val", "test") for name in v),
        "a list of train, val and test",
    ),
    "bench.cases": some_of("voc2007", "coco2014", "nuswide", "large"),
    "bench.fusions": some_of("concat", "product"),
    "bench.executions": some_of("sparse", "dense", "compiled", "checkpointed"),
    "bench.batch": integer(1),
    "bench.k": integer(1),
    "bench.norm": one_of("none", "encoder", "all"),
    "bench.precision": one_of("float32", "bfloat16"),
    "bench.repeats": (
        lambda v: isinstance(v, list) and len(v) == 2 and all(is_integer(n) and n > 0 for n in v),
        "two integers of at least 1: rounds of forward passes and of training steps",
    ),
    "bench.curves": (
        lambda v: isinstance(v, list) and all(name in ("m", "C", "k", "batch") for name in v),
        "a list of some of m, C, k and batch",
    ),
    "bench.growth_batch": integer(1),
    "bench.shares": BOOLEAN,
    "images": (
        lambda v: is_string(v) or (are_strings(v) and len(v) > 0),
        "a file, a folder, a pattern, or a list of them",
    ),
    "host": (_is_address, "an IP address, e.g. 127.0.0.1"),
    "port": (lambda v: is_integer(v) and 0 <= v <= 65535, "an integer from 0 to 65535"),
    "image": STRING,
    "label": or_null(STRING),
    "top": integer(1),
    "threshold": number(0, 1),
    "labels": or_null((lambda v: is_string(v) or (are_strings(v) and len(v) > 0), "names, e.g. [cat,zebra crossing]")),
    "pictures": BOOLEAN,
    "out": or_null(STRING),
    "format": one_of("pretrained", "torch", "onnx"),
    "part": one_of("network", "detector", "all"),
    "size": or_null(
        (lambda v: isinstance(v, list) and len(v) == 2 and all(is_integer(n) and n >= 32 for n in v), "[HEIGHT,WIDTH]")
    ),
    "license": or_null(STRING),
    "push": or_null((lambda v: isinstance(v, str) and v.count("/") == 1, "USER/NAME")),
    "private": BOOLEAN,
    "calibrate": BOOLEAN,
    "bootstrap": integer(0),
    "target_format": one_of("binary", "voc"),
    "allow_all_present": BOOLEAN,
}


def _strategies() -> Iterable[str]:
    from gm_mlic.training.trainer import strategies

    return strategies()


NAMES: Mapping[str, Callable[[], Iterable[str]]] = {**validation.NAMES, "trainer.strategy": _strategies}


def check(config: DictConfig, *, complete: bool = True) -> None:
    """Validate the config of any command; see :func:`gm_mlic.validation.check`."""
    validation.check(config, RULES, NAMES, complete=complete)
    if OmegaConf.select(config, "bootstrap", default=None) is not None:
        _check_evaluation(lambda key: OmegaConf.select(config, key, default=None))


def check_values(config: DictConfig) -> None:
    """Validate single values of the config of any command; see :func:`gm_mlic.validation.check_values`."""
    validation.check_values(config, RULES)


def _check_evaluation(get: Callable[[str], Any]) -> None:
    """Check the settings of ``gm-mlic eval``, which needs a checkpoint or files."""
    if (get("checkpoint") is None) == (get("scores") is None):
        raise ConfigError("set either checkpoint=FILE, or scores=FILE and targets=FILE.")
    if get("checkpoint") is not None:
        for key in ("targets", "against", "val_scores", "val_targets"):
            if get(key) is not None:
                raise ConfigError(f"{key}={get(key)} needs scores=FILE instead of checkpoint.")
        return
    if get("targets") is None:
        raise ConfigError("targets has no value: set it with targets=FILE (may be the same file as scores).")
    for key in ("val_scores", "val_targets"):
        if get("calibrate") and get(key) is None:
            raise ConfigError(f"calibrate=true fits thresholds on validation images: set {key}=FILE.")
        if not get("calibrate") and get(key) is not None:
            raise ConfigError(f"{key}={get(key)} needs calibrate=true.")
