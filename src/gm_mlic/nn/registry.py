"""Models by name, in the habit of timm: ``list_models("*voc*")``, ``create_model("gm_mlic_voc2007", ...)``."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gm_mlic.errors import ConfigError, WeightsError
from gm_mlic.nn.baselines.detector_labels import DetectorLabels
from gm_mlic.nn.baselines.gap_linear import GAPLinear
from gm_mlic.nn.baselines.mil import MILMax
from gm_mlic.nn.baselines.ml_gcn import MLGCN
from gm_mlic.nn.baselines.query2label import Query2Label
from gm_mlic.nn.baselines.ssgrl import SSGRL
from gm_mlic.nn.gm_mlic import GMMLIC

#: Folders of models that come with this package, as ``gm-mlic export`` writes them.
SHIPPED = Path(__file__).parents[1] / "zoo" / "models"

_REGISTRY: dict[str, Callable[..., nn.Module]] = {}


def register_model(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Decorator: make ``builder`` known to :func:`create_model` under its own name."""
    if builder.__name__ in _REGISTRY:
        raise ValueError(f"A model named {builder.__name__!r} is registered already.")
    _REGISTRY[builder.__name__] = builder
    return builder


def list_models(pattern: str = "*") -> list[str]:
    """Names of all registered models that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(_REGISTRY, pattern))


def model_arguments(name: str) -> list[str]:
    """Names of the arguments that a registered model takes.

    Raises:
        ConfigError: for an unknown name, naming the closest one.
    """
    return list(inspect.signature(_builder(name)).parameters)


def create_model(name: str, pretrained: bool | str | Path = False, **overrides: Any) -> nn.Module:
    """Build a registered model.

    Args:
        name: one of :func:`list_models`.
        pretrained: True: with the weights that come with this package, for the names in :func:`pretrained_models`; a
            folder that ``gm-mlic export`` wrote: with its architecture and weights.
        **overrides: arguments of the model's constructor, over the named preset's or the folder's.

    Raises:
        WeightsError: if there are no such weights, or they do not fit.
        ConfigError: for an unknown name, naming the closest one, or an argument too many or too few, naming it.
    """
    builder = _builder(name)
    if pretrained is False:
        return _build(builder, overrides)
    if pretrained is True and name not in pretrained_models():
        raise WeightsError(
            f"No weights of {name!r} come with this package: there are some of {', '.join(pretrained_models())}. Give "
            "pretrained=FOLDER for others."
        )
    folder = SHIPPED / name if pretrained is True else Path(pretrained)
    try:
        settings = dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"])
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{folder}: no model that gm-mlic export wrote ({reason}).") from error
    del settings["name"]
    model = _build(builder, {**settings, **overrides})
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        odd = str(error).splitlines()[1].strip()
        raise WeightsError(f"{folder}: its weights do not fit {name} with these settings ({odd[:200]}).") from error
    return model


def describe(name: str) -> str:
    """The first line of what a registered model says of itself."""
    lines = (inspect.getdoc(_builder(name)) or "").splitlines()
    return re.sub(r":class:`(\w+)`", r"`\1`", lines[0].rstrip(".")) if lines else ""


def pretrained_models(pattern: str = "*") -> list[str]:
    """Names of all models whose weights come with this package, sorted."""
    return sorted(fnmatch.filter([folder.parent.name for folder in SHIPPED.glob("*/config.json")], pattern))


def _builder(name: str) -> Callable[..., nn.Module]:
    if name not in _REGISTRY:
        close = difflib.get_close_matches(name, _REGISTRY, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"There is no model {name!r}.{hint} Known: {', '.join(list_models())}.")
    return _REGISTRY[name]


def _build(builder: Callable[..., nn.Module], arguments: dict[str, Any]) -> nn.Module:
    """Call ``builder`` if it has all ``arguments``, and they all of its: a TypeError from inside it stays one."""
    parameters = inspect.signature(builder, follow_wrapped=False).parameters.values()
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    unknown = sorted(arguments.keys() - {p.name for p in named}) if len(named) == len(parameters) else []
    missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
    if unknown:
        allowed = ", ".join(p.name for p in named)
        raise ConfigError(f"{builder.__name__} has no argument {unknown[0]!r}. It takes: {allowed}.")
    if missing:
        raise ConfigError(f"{builder.__name__} needs {' and '.join(missing)}.")
    return builder(**arguments)


def _makes(model: Callable[..., nn.Module]) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Decorator: the builder hands what it is given on to ``model``, so it takes what that takes."""

    def mark(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        builder.__wrapped__ = model  # type: ignore[attr-defined]  # where inspect.signature looks
        return builder

    return mark


def _gm_mlic(preset: dict[str, Any], overrides: dict[str, Any]) -> nn.Module:
    return _build(GMMLIC, {**preset, **overrides})


@register_model
@_makes(GMMLIC)
def gm_mlic(**overrides: Any) -> nn.Module:
    """GM-MLIC with every argument of :class:`GMMLIC` to be given."""
    return _gm_mlic({}, overrides)


@register_model
@_makes(GMMLIC)
def gm_mlic_scenes(**overrides: Any) -> nn.Module:
    """GM-MLIC for the built-in scenes and their tiny detector; settings from ``experiments/recipe``."""
    preset = {"instance_dim": 256, "label_dim": 300, "k": 2, "widths": (64, 64), "fusion": "product", "norm": "all"}
    return _gm_mlic(preset, overrides)


@register_model
@_makes(GMMLIC)
def gm_mlic_paper(**overrides: Any) -> nn.Module:
    """GM-MLIC as in the paper: k = 2, widths 512 and 256, 1024-d features, GloVe, plain concatenation."""
    preset = {"instance_dim": 1024, "label_dim": 300, "k": 2, "widths": (512, 256), "fusion": "concat"}
    return _gm_mlic(preset, overrides)


@register_model
@_makes(GMMLIC)
def gm_mlic_voc2007(**overrides: Any) -> nn.Module:
    """GM-MLIC with the paper's settings for VOC 2007."""
    return gm_mlic_paper(**overrides)


@register_model
@_makes(GMMLIC)
def gm_mlic_coco2014(**overrides: Any) -> nn.Module:
    """GM-MLIC with the paper's settings for MS-COCO 2014."""
    return gm_mlic_paper(**overrides)


@register_model
@_makes(GMMLIC)
def gm_mlic_nuswide(**overrides: Any) -> nn.Module:
    """GM-MLIC with the paper's settings for NUS-WIDE."""
    return gm_mlic_paper(**overrides)


@register_model
@_makes(DetectorLabels)
def detector(**overrides: Any) -> nn.Module:
    """The detector's own labels, calibrated, :class:`DetectorLabels`."""
    return _build(DetectorLabels, overrides)


@register_model
@_makes(MILMax)
def mil_max(**overrides: Any) -> nn.Module:
    """The max-pooled per-instance classifier, :class:`MILMax`."""
    return _build(MILMax, overrides)


@register_model
@_makes(GAPLinear)
def resnet101(**overrides: Any) -> nn.Module:
    """Global average pooling and a linear classifier, :class:`GAPLinear`."""
    return _build(GAPLinear, overrides)


@register_model
@_makes(MLGCN)
def ml_gcn(**overrides: Any) -> nn.Module:
    """ML-GCN, :class:`MLGCN`."""
    return _build(MLGCN, overrides)


@register_model
@_makes(SSGRL)
def ssgrl(**overrides: Any) -> nn.Module:
    """SSGRL, :class:`SSGRL`."""
    return _build(SSGRL, overrides)


@register_model
@_makes(Query2Label)
def query2label(**overrides: Any) -> nn.Module:
    """Query2Label, :class:`Query2Label`."""
    return _build(Query2Label, overrides)
