"""Detector weights: torchvision's by name, the shipped ones, and files; read without unpickling, written atomically."""

from __future__ import annotations

import json
import logging
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn
from torchvision.models import ResNet101_Weights, WeightsEnum
from torchvision.models.detection import (
    FasterRCNN_MobileNet_V3_Large_FPN_Weights,
    FasterRCNN_ResNet50_FPN_V2_Weights,
    FasterRCNN_ResNet50_FPN_Weights,
)

from gm_mlic.errors import ArgumentError, WeightsError
from gm_mlic.safe_load import load_tensors

log = logging.getLogger(__name__)

#: The weights of scenes_tiny that come with the package.
SCENES_WEIGHTS = Path(__file__).parent / "weights" / "scenes_tiny.safetensors"
#: Names in :attr:`Checkpoint.categories` that are no labels; torchvision's COCO detectors have both.
BACKGROUND, UNUSED = "__background__", "N/A"

_COCO: dict[str, WeightsEnum] = {
    "fasterrcnn_resnet50_fpn": FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    "fasterrcnn_resnet50_fpn_v2": FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    "fasterrcnn_mobilenet_v3_large_fpn": FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1,
}
#: What the classifiers, which serve as backbones of a grid, learnt to tell apart. Published baselines began from these.
_IMAGENET: dict[str, WeightsEnum] = {"resnet101": ResNet101_Weights.IMAGENET1K_V1}
_COCO_CATEGORIES = tuple(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
_CLASS_SCORES = "roi_heads.box_predictor.cls_score.weight"


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a detector, and what must be known to build it.

    Attributes:
        source: where they come from, for messages.
        tensors: the ``state_dict``; None for random weights.
        categories: name of each class, the background first; ``N/A`` for a class that was never trained.
        min_size: input size that the weights were trained with; None where unknown.
        max_size: likewise.
    """

    source: str
    tensors: dict[str, Tensor] | None
    categories: tuple[str, ...]
    min_size: int | None = None
    max_size: int | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes that are labels."""
        return tuple(name for name in self.categories if name not in (BACKGROUND, UNUSED))

    def check_labels(self, labels: Sequence[str]) -> None:
        """Raise :class:`~gm_mlic.errors.WeightsError` unless these are the labels of the weights, in their order."""
        if self.labels != tuple(labels):
            pairs = zip(self.labels, labels, strict=False)
            mismatch = next((f"{a!r} where {b!r} is asked for" for a, b in pairs if a != b), None)
            raise WeightsError(
                f"The weights {self.source} were trained for other labels "
                f"({mismatch or f'{len(self.labels)} of them, not {len(labels)}'}): leave `labels` out, or train on "
                "these labels with gm-mlic train-detector."
            )


def read_checkpoint(arch: str, weights: str | Path | None, labels: Sequence[str] | None) -> Checkpoint:
    """Find and read the weights that :func:`~gm_mlic.detection.faster_rcnn.build_extractor` was asked for.

    Raises:
        ConfigError: if weights of that name do not exist for ``arch``.
        WeightsError: if they are missing, cannot be read, or belong to another architecture.
    """
    if weights is None:
        if labels is not None:
            return Checkpoint("random weights", None, (BACKGROUND, *labels))
        if arch in _COCO:
            return Checkpoint("random weights", None, _COCO_CATEGORIES)
        shipped = _read_safetensors(SCENES_WEIGHTS, arch)
        return Checkpoint("random weights", None, shipped.categories)
    if weights == "coco":
        checkpoint = _download_coco(arch)
    elif weights == "scenes":
        if arch != "scenes_tiny":
            raise ArgumentError("weights", f"is 'scenes', which is for `name='scenes_tiny'`, not for {arch}.")
        checkpoint = _read_safetensors(SCENES_WEIGHTS, arch)
    else:
        checkpoint = _read_file(Path(weights).expanduser(), arch, labels)
    return checkpoint


def read_classifier(arch: str, weights: str | Path | None) -> Checkpoint:
    """Find and read a classifier's weights, without its last layer.

    Args:
        arch: ``resnet101``.
        weights: None for random ones, ``imagenet`` for torchvision's, or a file (.safetensors, .pt, .pth) with a
            ``state_dict`` that has torchvision's names.

    Raises:
        WeightsError: if they are missing, or cannot be read.
    """
    if weights is None:
        return Checkpoint("random weights", None, ())
    source, tensors = str(weights), _download(arch, _IMAGENET[arch]) if weights == "imagenet" else None
    if tensors is None:
        path = _existing(Path(weights).expanduser(), "null, imagenet")
        tensors = _classifier_tensors(path)
    return Checkpoint(source, {key: t for key, t in tensors.items() if not key.startswith("fc.")}, ())


def _classifier_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return _state_dict(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"The weights file {path} cannot be read ({error}): copy it again.") from error
    return tensors


def load_into(detector: nn.Module, checkpoint: Checkpoint, arch: str) -> None:
    """Copy the checkpoint's tensors into the detector.

    Raises:
        WeightsError: naming the first tensor that is missing, not known to the detector, or of another shape.
    """
    tensors = dict(checkpoint.tensors or {})
    expected = detector.state_dict()
    if arch == "fasterrcnn_resnet50_fpn" and not any(key.endswith("num_batches_tracked") for key in tensors):
        # torchvision's COCO weights for this one were trained with frozen batch norm of eps = 0 (torchvision builds it
        # so too); ours adds 1e-5 to the variance, which is taken off here.
        tensors = {key: t - 1e-5 if key.endswith("running_var") else t for key, t in tensors.items()}
    # Counts how often batch norm was updated; frozen batch norm has none, and evaluation does not read it.
    missing = [key for key in expected if key not in tensors and not key.endswith("num_batches_tracked")]
    unknown = [key for key in tensors if key not in expected]
    other = [key for key in expected if key in tensors and tensors[key].shape != expected[key].shape]
    for what, keys in (("lack", missing), ("have the unknown", unknown), ("have another shape of", other)):
        if keys:
            more = f" and {len(keys) - 1} more tensors" if len(keys) > 1 else ""
            raise WeightsError(
                f"The weights {checkpoint.source} do not fit `name={arch!r}`: they {what} {keys[0]}{more}; choose "
                "the architecture that they were trained with."
            )
    detector.load_state_dict(tensors, strict=False)


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write ``path`` (.safetensors), with ``record`` in its header, and the record alone beside it as JSON.

    Both files appear complete or not at all.

    Args:
        path: the weights file.
        tensors: the detector's ``state_dict``.
        record: has at least ``arch``, ``labels``, ``min_size`` and ``max_size``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(record), indent=2, ensure_ascii=False)
    part = path.with_name(path.name + ".part")
    on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    part.write_bytes(serialise(on_cpu, metadata={"gm_mlic": text}))
    part.replace(path)
    part = path.with_name(path.stem + ".json.part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path.with_suffix(".json"))


def _download_coco(arch: str) -> Checkpoint:
    if arch not in _COCO:
        raise ArgumentError("weights", f"is 'coco', which exists for {', '.join(_COCO)}, not for `name={arch!r}`.")
    return Checkpoint(str(_COCO[arch]), _download(arch, _COCO[arch]), _COCO_CATEGORIES)


def _download(arch: str, enum: WeightsEnum) -> dict[str, Tensor]:
    """Fetch torchvision's weights, unless they were before; the hash is in the file's name."""
    # Not enum.get_state_dict(): it unpickles what it fetched, or found in the folder.
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(enum.url).name
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            log.info("Downloading %s to %s", enum.url, file)
            hash_prefix = file.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(enum.url, str(file), hash_prefix, progress=sys.stderr.isatty())
        return dict(load_tensors(file))
    except ValueError as error:
        raise WeightsError(f"The weights file {file} is damaged ({error}): delete it; it is fetched again.") from error
    except (OSError, RuntimeError, HTTPException) as error:  # no network, a full disk, a damaged download
        raise WeightsError(
            f"The weights of {arch} could not be downloaded ({error}): fetch {enum.url} by other means and set "
            f"`weights='/path/to/{Path(enum.url).name}'`."
        ) from error


def _existing(path: Path, names: str) -> Path:
    """``path``, if it can be a weights file; ``names`` are what could be set instead of one."""
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise WeightsError(
            f"`weights` is {str(path)!r}: set {names}, or a path that ends in .safetensors, .pt or .pth."
        )
    if not path.is_file():
        raise WeightsError(f"The weights file {path} does not exist: check `weights`.")
    return path


def _read_file(path: Path, arch: str, labels: Sequence[str] | None) -> Checkpoint:
    _existing(path, "null, coco, scenes")
    return _read_safetensors(path, arch) if path.suffix == ".safetensors" else _read_torch(path, arch, labels)


def _read_safetensors(path: Path, arch: str) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("gm_mlic")
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"The weights file {path} cannot be read ({error}): copy or train it again.") from error
    if header is None:
        raise WeightsError(
            f"The weights file {path} does not name its labels: it was not written by gm-mlic train-detector; "
            "save its tensors with torch.save(state_dict, path) as .pt, and give `labels`."
        )
    try:
        record = json.loads(header)
        found = Checkpoint(
            str(path), tensors, (BACKGROUND, *record["labels"]), int(record["min_size"]), int(record["max_size"])
        )
        theirs = record["arch"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"The weights file {path} has a header without arch, labels, min_size or max_size: write it with "
            "gm-mlic train-detector."
        ) from error
    if theirs != arch:
        raise WeightsError(f"The weights file {path} is for `name={theirs!r}`, not for {arch}.")
    return found


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pt`` or ``.pth``."""
    try:
        tensors = load_tensors(path)
    except (OSError, ValueError) as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise WeightsError(
                f"The weights file {path} holds more than tensors, or is damaged, and is not loaded: save it with "
                "torch.save(model.state_dict(), path)."
            ) from error
        raise WeightsError(f"The weights file {path} cannot be read ({error}): copy it again.") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("model"), dict):  # torchvision's training script
        tensors = tensors["model"]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise WeightsError(f"The weights file {path} holds no state_dict: save torch.save(model.state_dict(), path).")
    return tensors


def _read_torch(path: Path, arch: str, labels: Sequence[str] | None) -> Checkpoint:
    tensors = _state_dict(path)
    if _CLASS_SCORES not in tensors:
        raise WeightsError(f"The weights file {path} lacks {_CLASS_SCORES}: it is no torchvision Faster R-CNN.")
    classes = tensors[_CLASS_SCORES].shape[0]
    if labels is not None and classes == len(labels) + 1:
        return Checkpoint(str(path), tensors, (BACKGROUND, *labels))
    if classes == len(_COCO_CATEGORIES):
        return Checkpoint(str(path), tensors, _COCO_CATEGORIES)
    return Checkpoint(str(path), tensors, (BACKGROUND, *(f"class {i}" for i in range(1, classes))))
