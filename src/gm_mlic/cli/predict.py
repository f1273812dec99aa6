"""Command ``gm-mlic predict``: labels and argmax boxes of photos, as tables, JSON Lines, CSV and pictures."""

from __future__ import annotations

import csv
import glob
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL import Image
from rich.console import Console

from gm_mlic.datasets.images import IMAGE_SUFFIXES, read_image
from gm_mlic.device import require_device
from gm_mlic.errors import DataError
from gm_mlic.io import Progress
from gm_mlic.reporting.annotated_images import annotated
from gm_mlic.reporting.tables import text_table
from gm_mlic.zoo import LabelPrediction, Prediction, Predictor

log = logging.getLogger(__name__)

#: Number of photos in the printed table; the files have all.
_PRINTED = 20
#: Lowest probability of labels in pictures; predicted labels are always drawn.
_DRAWN = 0.01
#: Characters of the photo's name in the name of its picture: file names are limited to 255 bytes.
_STEM = 60
#: File names may contain invalid Unicode; such bytes are escaped (\udcff).
_UTF_8: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
#: Predictions and pictures in the run folder.
_LINES, _PICTURES = "predictions.jsonl", "pictures"
COLUMNS = ("image", "label", "probability", "predicted", "x1", "y1", "x2", "y2", "instance")


def predict(config: DictConfig) -> dict[str, str]:
    """Predict photos, write the files and print the labels of the first photos.

    Returns unreadable photos, with the reason.
    """
    photos = find_photos([config.images] if isinstance(config.images, str) else list(config.images))
    predictor = load(config)
    if config.labels is not None:
        predictor = for_labels(predictor, config)
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_pictures(folder)
    skipped: dict[str, str] = {}
    printed: list[tuple[str, str]] = []
    with (
        (folder / _LINES).open("w", buffering=1, **_UTF_8) as lines,  # flushed before each picture is drawn
        (folder / "predictions.csv").open("w", newline="", **_UTF_8) as rows,
    ):
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(COLUMNS)
        done = 0
        bar = Progress("photos", "photos", len(photos))
        for prediction in bar.track(predictor(photos, config.batch_size, skipped)):
            found = prediction.top(max(config.top, len(prediction.above(config.threshold))))
            line = _as_dict(prediction, found, config.threshold)
            if config.pictures:
                line["picture"] = f"{_PICTURES}/{done:05d}-{Path(str(prediction.photo)).stem[:_STEM]}.jpg"
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            for item in found:
                box = [f"{v:.1f}" for v in item.box]
                predicted = int(item.probability >= config.threshold)
                writer.writerow(
                    [prediction.photo, item.label, f"{item.probability:.6f}", predicted, *box, item.instance]
                )
            if done < _PRINTED:
                labels = ", ".join(f"{item.label} {item.probability:.2f}" for item in found)
                printed.append((str(prediction.photo), labels))
            if config.pictures:
                least = min(_DRAWN, config.threshold)
                drawn = [(item.label, item.probability, item.box) for item in found if item.probability >= least]
                assert prediction.photo is not None
                (folder / _PICTURES).mkdir(exist_ok=True)
                annotated(read_image(prediction.photo), drawn).save(folder / line["picture"], quality=90)
            done += 1
    for reason in skipped.values():
        log.warning("left out: %s", reason)
    if not done:
        raise DataError(f"None of the {len(photos)} photos can be read. The first: {next(iter(skipped.values()))}")
    title = f"top labels of {min(len(photos), _PRINTED)} photos"
    Console(highlight=False, markup=False).print(text_table(title, ("photo", "labels"), printed, texts=2))
    written = [_LINES, "predictions.csv", *([f"{_PICTURES}/"] if config.pictures else [])]
    print(f"{done} of {len(photos)} photos; folder: {folder} ({', '.join(written)})")
    return skipped


def load(config: DictConfig) -> Predictor:
    """The model of ``config.checkpoint`` on its device, with the files of ``config.detector``."""
    moved = {name: value for name, value in config.detector.items() if value is not None}
    device = config.get("device", "cpu")
    return Predictor.load(config.checkpoint, require_device(device), **moved)


def for_labels(predictor: Predictor, config: DictConfig) -> Predictor:
    """Predictor for the ``labels`` of ``config``, a list or a comma-separated string."""
    names = config.labels.split(",") if isinstance(config.labels, str) else list(config.labels)
    return predictor.with_labels([name for name in (str(name).strip() for name in names) if name], **new_labels(config))


def new_labels(config: DictConfig) -> dict[str, str]:
    """Settings of the embedding of new labels; empty for that of training."""
    return {} if config.embedding.path is None else {"name": "glove", "path": config.embedding.path}


def find_photos(names: Sequence[str]) -> list[Path]:
    """Photos of files, folders and glob patterns, without duplicates; files of a folder are sorted by name.

    A name may be several, separated by commas.

    Raises:
        DataError: for a name without photos.
    """
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    suffixes = IMAGE_SUFFIXES | readable
    photos: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in suffixes and _is_file(file)]
        elif path.exists():
            found = [path]
        else:
            matched = map(Path, sorted(glob.glob(name, recursive=True)))  # noqa: PTH207 - may be absolute
            found = [file for file in matched if file.is_file()]
            if not found and "," in name:
                found = find_photos([part.strip() for part in name.split(",") if part.strip()])
        if not found:
            problem = "the folder has no photos" if path.is_dir() else "no such file, folder or pattern with files"
            raise DataError(f"images={name}: {problem}.")
        photos.update(dict.fromkeys(found))
    return list(photos)


def _is_file(path: Path) -> bool:
    """Whether a path is a file or a broken link, which is reported instead of ignored."""
    return path.is_file() or not path.exists()


def _as_dict(prediction: Prediction, found: Sequence[LabelPrediction], threshold: float) -> dict[str, Any]:
    return {
        "image": str(prediction.photo),
        "width": prediction.size[0],
        "height": prediction.size[1],
        "predicted": [item.label for item in found if item.probability >= threshold],
        "labels": [
            asdict(item) | {"probability": round(item.probability, 6), "box": [round(v, 1) for v in item.box]}
            for item in found
        ],
    }


def _remove_pictures(folder: Path) -> None:
    """Remove the pictures listed in the predictions of ``folder``, which are about to be replaced."""
    try:
        content = (folder / _LINES).read_text(**_UTF_8)
    except OSError:
        return
    for line in content.splitlines():
        try:
            name = json.loads(line)["picture"]
        except (ValueError, KeyError, TypeError):
            continue
        # The file is not trusted: only names of pictures in the picture folder are removed.
        if isinstance(name, str) and re.fullmatch(rf"{_PICTURES}/\d{{5,}}-[^/\\]*\.jpg", name):
            (folder / name).unlink(missing_ok=True)
