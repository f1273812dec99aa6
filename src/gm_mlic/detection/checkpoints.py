"""Detector weights: torchvision's, built-in ones and files; read without unpickling, written atomically."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights

from gm_mlic.detection.labels import BACKGROUND, UNUSED
from gm_mlic.errors import ArgumentError, WeightsError
from gm_mlic.io import few, write_file
from gm_mlic.safe_load import load_tensors

log = logging.getLogger(__name__)

#: Built-in weights of scenes_tiny.
SCENES_WEIGHTS = Path(__file__).parent / "weights" / "scenes_tiny.safetensors"

#: Detectors with COCO weights of torchvision: the tensor of their class scores, and its number of rows per class.
_CLASS_SCORES = {
    "fasterrcnn_resnet50_fpn": ("roi_heads.box_predictor.cls_score.weight", 1),
    "fasterrcnn_resnet50_fpn_v2": ("roi_heads.box_predictor.cls_score.weight", 1),
    "fasterrcnn_mobilenet_v3_large_fpn": ("roi_heads.box_predictor.cls_score.weight", 1),
    "retinanet_resnet50_fpn": ("head.classification_head.cls_logits.weight", 9),
    "retinanet_resnet50_fpn_v2": ("head.classification_head.cls_logits.weight", 9),
    "fcos_resnet50_fpn": ("head.classification_head.cls_logits.weight", 1),
    "ssd300_vgg16": ("head.classification_head.module_list.0.weight", 4),
    "ssdlite320_mobilenet_v3_large": ("head.classification_head.module_list.0.1.weight", 6),
}
_COCO: dict[str, WeightsEnum] = {arch: get_model_weights(arch)["COCO_V1"] for arch in _CLASS_SCORES}
#: COCO weights that torchvision loads into frozen batch norm with eps = 0.
_WITHOUT_EPS = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
#: Weights of ResNet-101, as used by published baselines.
_IMAGENET: WeightsEnum = get_model_weights("resnet101")["IMAGENET1K_V1"]
_COCO_CATEGORIES = tuple(_COCO["fasterrcnn_resnet50_fpn"].meta["categories"])


@dataclass(frozen=True)
class Checkpoint:
    """Detector weights with the metadata needed to build the detector.

    Attributes:
        source: origin, for messages.
        tensors: the ``state_dict``; None for random weights.
        categories: class names, background first; ``N/A`` for untrained classes.
        min_size, max_size: input size in training; None if unknown.
    """

    source: str
    tensors: dict[str, Tensor] | None
    categories: tuple[str, ...]
    min_size: int | None = None
    max_size: int | None = None


def read_checkpoint(arch: str, weights: str | Path | None, labels: Sequence[str] | None) -> Checkpoint:
    """Read the ``weights`` of :func:`~gm_mlic.detection.build_extractor`.

    Raises:
        ConfigError: if weights of this name do not exist for ``arch``.
        WeightsError: if the file is missing, cannot be read, or belongs to another architecture or other labels.
    """
    if weights is None:
        known = _COCO_CATEGORIES if arch in _COCO else _read_safetensors(SCENES_WEIGHTS, arch).categories
        return Checkpoint("random weights", None, known if labels is None else (BACKGROUND, *labels))
    if weights == "coco":
        if arch not in _COCO:
            raise ArgumentError("weights", f"is 'coco', which requires one of {', '.join(_COCO)}, not `name={arch!r}`.")
        checkpoint = Checkpoint(str(_COCO[arch]), _download(arch, _COCO[arch]), _COCO_CATEGORIES)
    elif weights == "scenes":
        if arch != "scenes_tiny":
            raise ArgumentError("weights", f"is 'scenes', which requires `name='scenes_tiny'`, not {arch}.")
        checkpoint = _read_safetensors(SCENES_WEIGHTS, arch)
    else:
        path = _existing(weights, "null, coco, scenes")
        is_own = path.suffix == ".safetensors"
        checkpoint = _read_safetensors(path, arch) if is_own else _read_torch(path, arch, labels)
    trained = [name for name in checkpoint.categories if name not in UNUSED]
    if labels is not None and trained != list(labels):
        pairs = zip(trained, labels, strict=False)
        numbers = f"{len(trained)} instead of {len(labels)}"
        mismatch = next((f"{a!r} instead of {b!r}" for a, b in pairs if a != b), numbers)
        raise WeightsError(
            f"The weights {checkpoint.source} were trained for other labels ({mismatch}): omit `labels`, or train on "
            "these labels with gm-mlic train-detector."
        )
    return checkpoint


def read_resnet101(weights: str | Path | None) -> Checkpoint:
    """Read the weights of ResNet-101 without the last layer.

    Args:
        weights: None for random weights, ``imagenet`` for torchvision's, or a file (.safetensors, .pt, .pth) with a
            torchvision ``state_dict``.

    Raises:
        WeightsError: if the file is missing or cannot be read.
    """
    if weights is None:
        return Checkpoint("random weights", None, ())
    if weights == "imagenet":
        tensors = _download("resnet101", _IMAGENET)
    else:
        path = _existing(weights, "null, imagenet")
        tensors = _safetensors(path)[0] if path.suffix == ".safetensors" else _state_dict(path)
    return Checkpoint(str(weights), {key: t for key, t in tensors.items() if not key.startswith("fc.")}, ())


def load_into(detector: nn.Module, checkpoint: Checkpoint, arch: str) -> None:
    """Load the checkpoint's tensors into the detector; nothing for random weights.

    Raises:
        WeightsError: if a tensor is missing, unknown to the detector, or has another shape.
    """
    if checkpoint.tensors is None:
        return
    tensors = checkpoint.tensors
    expected = detector.state_dict()
    if arch in _WITHOUT_EPS and not any(key.endswith("num_batches_tracked") for key in tensors):
        # torchvision's COCO weights of these detectors were trained with frozen batch norm of eps = 0; here eps is
        # 1e-5, so it is subtracted from the variance.
        tensors = {key: t - 1e-5 if key.endswith("running_var") else t for key, t in tensors.items()}
    # num_batches_tracked is absent in frozen batch norm and unused in evaluation.
    wrong = [f"missing {key}" for key in expected if key not in tensors and not key.endswith("num_batches_tracked")]
    wrong += [f"unknown {key}" for key in tensors if key not in expected]
    wrong += [
        f"other shape of {key}" for key in expected if tensors.get(key, expected[key]).shape != expected[key].shape
    ]
    if wrong:
        raise WeightsError(
            f"The weights {checkpoint.source} do not match `name={arch!r}` ({few(wrong, 1)}): set the architecture "
            "that they were trained with."
        )
    detector.load_state_dict(tensors, strict=False)


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write a ``state_dict`` (.safetensors) with ``record`` in its header, and the record as .json beside it.

    Both writes are atomic. The record has at least ``arch``, ``labels``, ``min_size`` and ``max_size``.
    """
    text = json.dumps(dict(record), indent=2, ensure_ascii=False)
    on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_file(path, serialize(on_cpu, metadata={"gm_mlic": text}))
    write_file(path.with_suffix(".json"), text + "\n")


def _download(arch: str, enum: WeightsEnum) -> dict[str, Tensor]:
    """Download torchvision's weights unless cached; the file name contains the hash."""
    # Not enum.get_state_dict(), which unpickles the file.
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(enum.url).name
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            log.info("Downloading %s to %s", enum.url, file)
            hash_prefix = file.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(enum.url, str(file), hash_prefix, progress=sys.stderr.isatty())
        return dict(load_tensors(file))
    except ValueError as error:
        raise WeightsError(f"The weights file {file} is damaged ({error}): delete it to download it again.") from error
    except (OSError, RuntimeError, HTTPException) as error:  # no network, a full disk, a damaged download
        raise WeightsError(
            f"The weights of {arch} could not be downloaded ({error}): download {enum.url} manually and set "
            f"`weights='/path/to/{Path(enum.url).name}'`."
        ) from error


def _existing(weights: str | Path, names: str) -> Path:
    """Path of a weights file, which exists; ``names`` lists the alternatives for the message."""
    path = Path(weights).expanduser()
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise WeightsError(
            f"`weights` is {str(path)!r}: expected {names}, or a path that ends in .safetensors, .pt or .pth."
        )
    if not path.is_file():
        raise WeightsError(f"The weights file {path} does not exist: check `weights`.")
    return path


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a ``.safetensors`` file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"The weights file {path} cannot be read ({error}): copy or train it again.") from error


def _read_safetensors(path: Path, arch: str) -> Checkpoint:
    tensors, metadata = _safetensors(path)
    try:
        record = json.loads(metadata["gm_mlic"])
        checkpoint = Checkpoint(
            str(path), tensors, (BACKGROUND, *record["labels"]), int(record["min_size"]), int(record["max_size"])
        )
        trained_arch = record["arch"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"The weights file {path} lacks the header of gm-mlic train-detector (arch, labels, min_size, max_size): "
            "save tensors of other programs with torch.save(state_dict, path) as .pt, and set `labels`."
        ) from error
    if trained_arch != arch:
        raise WeightsError(f"The weights file {path} is for `name={trained_arch!r}`, not {arch}.")
    return checkpoint


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.pt`` or ``.pth`` file."""
    try:
        tensors = load_tensors(path)
    except (OSError, ValueError) as error:
        remedy = "copy it again, or save it with torch.save(model.state_dict(), path)"
        raise WeightsError(f"The weights file {path} cannot be read ({error}): {remedy}.") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("model"), dict):  # torchvision's training script
        tensors = tensors["model"]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise WeightsError(f"The weights file {path} has no state_dict: use torch.save(model.state_dict(), path).")
    return tensors


def _read_torch(path: Path, arch: str, labels: Sequence[str] | None) -> Checkpoint:
    tensors = _state_dict(path)
    key, rows = _CLASS_SCORES.get(arch, _CLASS_SCORES["fasterrcnn_resnet50_fpn"])
    if key not in tensors:
        expected = "Faster R-CNN" if key.startswith("roi_heads.") else arch
        raise WeightsError(f"The weights file {path} lacks {key}: expected a torchvision {expected}.")
    classes = len(tensors[key]) // rows
    if labels is not None and classes == len(labels) + 1:
        return Checkpoint(str(path), tensors, (BACKGROUND, *labels))
    if classes == len(_COCO_CATEGORIES):
        return Checkpoint(str(path), tensors, _COCO_CATEGORIES)
    return Checkpoint(str(path), tensors, (BACKGROUND, *(f"class {i}" for i in range(1, classes))))
