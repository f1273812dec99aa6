"""Detector training on any dataset with boxes, in plain torch; seeded and resumable."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torchvision
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN
from torchvision.ops import remove_small_boxes
from torchvision.transforms.v2.functional import horizontal_flip, horizontal_flip_bounding_boxes
from torchvision.tv_tensors import BoundingBoxFormat

from gm_mlic._version import __version__
from gm_mlic.datasets.base import MultiLabelDataset
from gm_mlic.datasets.images import to_tensor
from gm_mlic.detection.checkpoints import load_into, read_checkpoint, save_checkpoint
from gm_mlic.detection.faster_rcnn import ARCHITECTURES
from gm_mlic.detection.torchvision_detector import build_detector
from gm_mlic.errors import ArgumentError, ConfigError, DataError, UnreadableImage, WeightsError, check_choice
from gm_mlic.io import Progress, atomic_write
from gm_mlic.optim import one_cycle
from gm_mlic.safe_load import load_tensors
from gm_mlic.schema import Natural, NotNegative, Positive, checked

_log = logging.getLogger(__name__)

_PREDICTOR = "roi_heads.box_predictor."
_MIN_SIDE = 1.0  # pixels; thinner boxes are dropped, since torchvision refuses empty ones


@checked
def train_detector(
    train: MultiLabelDataset,
    val: MultiLabelDataset | None,
    name: str,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    epochs: Positive = 8,
    batch_size: Positive = 8,
    lr: Annotated[float, Gt(0)] = 2e-3,
    weight_decay: NotNegative = 1e-3,
    min_size: Annotated[int, Ge(32)] | None = None,
    max_size: Annotated[int, Ge(32)] | None = None,
    seed: int = 0,
    num_workers: Natural = 0,
    device: str | torch.device = "cpu",
    command: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a detector and save its weights (``out``, .safetensors) and record (.json).

    AdamW with a one-cycle learning rate (cosine warm-up over the first 15 % of the steps, then cosine to zero),
    gradient clipping to norm 5, horizontal flips with probability 1/2. Batch norm is trained with random weights and
    frozen with given weights. The state is saved after every epoch with suffix ``.resume.pt``: the same call resumes a
    killed run and gives the same weights as an uninterrupted one.

    Args:
        train: images with boxes. Images without boxes and unreadable ones are skipped and counted.
        val: validation split for AP after each epoch, or None.
        name: one of :data:`~gm_mlic.detection.faster_rcnn.ARCHITECTURES`.
        out: weights file; must end in ``.safetensors``.
        weights: initial weights, see :func:`~gm_mlic.detection.build_extractor`. If their labels differ,
            the last layer (class scores and box offsets) is reinitialized.
        epochs: passes over ``train``.
        batch_size: images per step.
        lr: maximum learning rate; 2e-3 for scenes_tiny, 1e-4 for the others.
        weight_decay: weight decay of AdamW.
        min_size, max_size: input size, see :func:`~gm_mlic.detection.torchvision_detector.build_detector`.
        seed: seed of weights, order, flips and proposal sampling.
        num_workers: number of data-loading processes; 0 loads in this process.
        device: device to train on.
        command: command line to store in the record.
        progress: show progress bars.

    Returns:
        The content of the .json file: arch, labels, min_size, max_size, dataset and its fingerprint, numbers of images
        with and without boxes, settings, ``loss`` (mean) and ``val_ap50`` (COCO AP at IoU 0.5 in percent; None without
        ``val``) per epoch, ``skipped`` images with reasons, versions.

    Raises:
        ConfigError: if the dataset has no boxes, the labels of ``val`` differ, or an argument is invalid.
        DataError: if no image has a box or none can be read.
        WeightsError: if ``weights`` or the saved state of an earlier run cannot be used.
    """
    out = Path(out)
    check_choice("name", name, ARCHITECTURES)
    if out.suffix != ".safetensors":
        raise ArgumentError("out", f"is {out}: expected a name that ends in .safetensors.")
    if val is not None and val.labels != train.labels:
        raise ConfigError(f"The labels of {val.name} ({val.split}) and {train.name} ({train.split}) differ.")
    rows = _rows_with_boxes(train)
    checkpoint = read_checkpoint(name, weights, None)
    sizes = min_size or checkpoint.min_size, max_size or checkpoint.max_size
    detector = build_detector(name, len(train.labels) + 1, *sizes, seed=seed)
    if checkpoint.tensors is not None and checkpoint.categories[1:] != train.labels:
        random = {key: t for key, t in detector.state_dict().items() if key.startswith(_PREDICTOR)}
        checkpoint = replace(checkpoint, tensors=checkpoint.tensors | random)
    load_into(detector, checkpoint, name)
    detector.to(device)
    steps = math.ceil(len(rows) / batch_size)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = one_cycle(optimizer, epochs * steps, pct_start=0.15)
    record: dict[str, Any] = {
        "arch": name,
        "labels": list(train.labels),
        "min_size": detector.transform.min_size[0],
        "max_size": detector.transform.max_size,
        "dataset": train.name,
        "dataset_fingerprint": train.fingerprint,
        "images": len(rows),
        "images_without_boxes": len(train) - len(rows),
        "weights": None if weights is None else str(weights),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "seed": seed,
        "command": command,
        "versions": {"gm_mlic": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    parts = {"detector": detector, "optimizer": optimizer, "schedule": schedule}
    state = out.with_suffix(".resume.pt")
    history: dict[str, Any] = {"loss": [], "val_ap50": [], "skipped": {}}
    if state.exists():
        history = _resume(state, record, parts, device)
    for epoch in range(len(history["loss"]), epochs):
        title = f"epoch {epoch + 1}/{epochs}"
        with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
            torch.manual_seed(1_000_003 * seed + epoch)  # per epoch, so that a run can resume
            flips = torch.rand(len(rows)) < 0.5
            order = torch.randperm(len(rows)).tolist()
            images = _LabeledImages(train, [rows[i] for i in order], flips.tolist())
            detector.train()
            for module in detector.modules():  # statistics of small batches are unreliable
                if weights is not None and isinstance(module, nn.BatchNorm2d):
                    module.eval().requires_grad_(False)
            losses: list[float] = []
            with Progress(title, "images", len(rows), log=_log, show=progress) as bar:
                for batch in _batches(images, batch_size, num_workers, history["skipped"]):
                    losses.append(_step(detector, optimizer, batch, device, title))
                    schedule.step()
                    bar.advance(len(batch), f"loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
        if not losses:
            raise DataError(f"No image of {train.name} ({train.split}) can be read: check the dataset folder.")
        history["loss"].append(sum(losses) / len(losses))
        ap50 = None if val is None else average_precision(detector, val, batch_size, num_workers, device, progress)
        history["val_ap50"].append(ap50)
        shown = "-" if ap50 is None else f"{ap50:.1f} %"
        _log.info("%s: loss %.3f, val AP50 %s", title, history["loss"][-1], shown)
        tensors = {key: part.state_dict() for key, part in parts.items()}
        with atomic_write(state) as file:
            torch.save({"record": json.dumps(record), "history": json.dumps(history), **tensors}, file)
    if history["skipped"]:
        image_id, reason = next(iter(history["skipped"].items()))
        _log.warning("%d unreadable images were skipped, the first: %s: %s", len(history["skipped"]), image_id, reason)
    record |= history
    save_checkpoint(out, detector.state_dict(), record)
    state.unlink(missing_ok=True)
    return record


def average_precision(
    detector: FasterRCNN,
    dataset: MultiLabelDataset,
    batch_size: int = 8,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> float:
    """COCO AP at IoU 0.5 in percent, averaged over the labels that occur; unreadable images are skipped."""
    metric = MeanAveragePrecision(iou_thresholds=[0.5], backend="pycocotools")
    metric.warn_on_many_detections = False
    images = _LabeledImages(dataset, _rows_with_boxes(dataset), None)
    detector.eval()
    with Progress(f"AP on {dataset.split}", "images", len(images), log=_log, show=progress) as bar, torch.no_grad():
        for batch in _batches(images, batch_size, num_workers, {}):
            found = detector([image.to(device) for image, _ in batch])
            on_cpu = [{key: value.cpu() for key, value in of_image.items()} for of_image in found]
            metric.update(on_cpu, [target for _, target in batch])
            bar.advance(len(batch))
    return float(100 * metric.compute()["map_50"])


_Example = tuple[Tensor, dict[str, Tensor]]


class _LabeledImages(Dataset):
    """Float images with torchvision targets (boxes in pixels, labels from 1); id and reason if unreadable."""

    def __init__(self, dataset: MultiLabelDataset, rows: Sequence[int], flips: Sequence[bool] | None) -> None:
        self.dataset, self.rows, self.flips = dataset, rows, flips

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> _Example | tuple[str, str]:
        row = self.rows[k]
        try:
            image = to_tensor(self.dataset.image(row))
        except UnreadableImage as error:
            return self.dataset.ids[row], str(error)
        annotations = self.dataset.boxes(row)
        assert annotations is not None  # see _rows_with_boxes
        boxes, labels = annotations.boxes.float(), annotations.labels + 1
        wide_enough = remove_small_boxes(boxes, _MIN_SIDE)
        boxes, labels = boxes[wide_enough], labels[wide_enough]
        if self.flips is not None and self.flips[k]:
            image = horizontal_flip(image)
            boxes = horizontal_flip_bounding_boxes(boxes, BoundingBoxFormat.XYXY, image.shape[-2:])
        return image, {"boxes": boxes, "labels": labels}


def _rows_with_boxes(dataset: MultiLabelDataset) -> list[int]:
    annotations = {i: found for i in range(len(dataset)) if (found := dataset.boxes(i)) is not None}
    if not annotations:
        raise ConfigError(
            f"The dataset {dataset.name} ({dataset.split}) has no boxes: choose one with box annotations."
        )
    rows = [i for i, found in annotations.items() if len(remove_small_boxes(found.boxes, _MIN_SIDE))]
    if not rows:
        raise DataError(f"No image of {dataset.name} ({dataset.split}) has a box: check its annotations.")
    return rows


def _batches(
    images: _LabeledImages, batch_size: int, num_workers: int, skipped: dict[str, str]
) -> Iterator[list[_Example]]:
    """Non-empty batches of examples; unreadable images are added to ``skipped``."""
    for batch in DataLoader(images, batch_size, num_workers=num_workers, collate_fn=list):
        readable = []
        for first, second in batch:
            if isinstance(first, str):
                skipped[first] = second
            else:
                readable.append((first, second))
        if readable:
            yield readable


def _step(
    detector: FasterRCNN,
    optimizer: torch.optim.Optimizer,
    batch: list[_Example],
    device: str | torch.device,
    title: str,
) -> float:
    targets = [{key: value.to(device) for key, value in target.items()} for _, target in batch]
    loss: Tensor = sum(detector([image.to(device) for image, _ in batch], targets).values())
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ConfigError(f"The detector's loss is {value} in {title}: lower the learning rate.")
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
    optimizer.step()
    return value


def _resume(path: Path, record: dict[str, Any], parts: dict[str, Any], device: str | torch.device) -> dict[str, Any]:
    """Restore ``parts`` from an earlier run with the same settings, and return its history."""
    try:
        state = load_tensors(path, device)
        saved = json.loads(state["record"])
    except Exception as error:
        raise WeightsError(f"{path}, from an unfinished run, cannot be read ({error}): delete it.") from error
    for key, value in record.items():
        if key not in ("command", "versions") and saved.get(key) != value:
            raise ConfigError(
                f"{path} is from an unfinished run with {key}={saved.get(key)}, not {value}: delete it or restore "
                "that setting."
            )
    for key, part in parts.items():
        part.load_state_dict(state[key])
    history: dict[str, Any] = json.loads(state["history"])
    return history
