"""``gm-mlic predict``: labels of photos, as tables, lines of JSON and pictures."""

from __future__ import annotations

import csv
import glob
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gm_mlic.datasets.images import read_image
from gm_mlic.device import require_device
from gm_mlic.errors import DataError
from gm_mlic.reporting.annotated_images import annotated
from gm_mlic.zoo import LabelPrediction, Prediction, Predictor

log = logging.getLogger(__name__)

#: Photos whose labels are shown on the terminal; all are in the files.
_SHOWN = 20
#: Labels less probable than this are written down where top asks for them, but not drawn, unless they are predicted.
_DRAWN = 0.01
#: Of a picture's name, characters that are its photo's: file systems take 255 bytes, and a character may need four.
_STEM = 60
#: Names of files need not be text; bytes that are none are written as Python and JSON escape them (\udcff).
_UTF_8: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
#: In the run folder: what is predicted, and where the pictures are.
_LINES, _PICTURES = "predictions.jsonl", "pictures"
COLUMNS = ("image", "label", "probability", "predicted", "x1", "y1", "x2", "y2", "instance")


def predict(config: DictConfig) -> dict[str, str]:
    """Predict as ``config`` says, write the files and print the first photos' labels.

    Returns:
        Photos that could not be read, with the reason.

    Raises:
        DataError: if there are no photos, or none of them can be read.
        WeightsError: for a checkpoint that cannot be used.
    """
    photos = find_photos([config.images] if isinstance(config.images, str) else list(config.images))
    device = require_device(config.device)
    moved = {} if config.detector.weights is None else {"weights": config.detector.weights}
    predictor = Predictor.load(config.checkpoint, device, **moved)
    if config.labels is not None:
        predictor = for_labels(predictor, config)
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_pictures(folder)
    skipped: dict[str, str] = {}
    table = Table(title=f"first labels of {min(len(photos), _SHOWN)} photos", title_justify="left")
    for head in ("photo", "labels"):
        table.add_column(head, overflow="fold")
    with (
        (folder / _LINES).open("w", buffering=1, **_UTF_8) as lines,  # a picture is known before it is drawn
        (folder / "predictions.csv").open("w", newline="", **_UTF_8) as rows,
    ):
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(COLUMNS)
        done = 0
        for prediction in _with_bar(predictor(photos, config.batch_size, skipped), len(photos)):
            found = _top_or_predicted(prediction, config.top, config.threshold)
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
            if done < _SHOWN:
                table.add_row(str(prediction.photo), ", ".join(f"{f.label} {f.probability:.2f}" for f in found))
            if config.pictures:
                drawn = [item for item in found if item.probability >= min(_DRAWN, config.threshold)]
                _draw(prediction, drawn, folder / line["picture"])
            done += 1
    for reason in skipped.values():
        log.warning("left out: %s", reason)
    if not done:
        raise DataError(f"None of the {len(photos)} photos can be read. The first: {next(iter(skipped.values()))}")
    Console(highlight=False, markup=False).print(table)
    written = [_LINES, "predictions.csv", *([f"{_PICTURES}/"] if config.pictures else [])]
    print(f"{done} of {len(photos)} photos; folder: {folder} ({', '.join(written)})")
    return skipped


def for_labels(predictor: Predictor, config: DictConfig) -> Predictor:
    """``predictor`` for the ``labels`` of ``config``, a list or a text with commas."""
    names = config.labels.split(",") if isinstance(config.labels, str) else list(config.labels)
    read = {} if config.embedding.path is None else {"name": "glove", "path": config.embedding.path}
    return predictor.with_labels([name for name in (str(name).strip() for name in names) if name], **read)


def find_photos(names: Sequence[str]) -> list[Path]:
    """The files that names of files, folders and patterns stand for, each once; a folder's by name.

    Several of them may stand in one text, with commas.

    Raises:
        DataError: for a name that stands for nothing.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
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
            what = "there is no photo in it" if path.is_dir() else "no such file, folder or pattern with files"
            raise DataError(f"images={name}: {what}.")
        photos.update(dict.fromkeys(found))
    return list(photos)


def _is_file(path: Path) -> bool:
    """Also a link to nothing: it is to be reported, not passed over."""
    return path.is_file() or not path.exists()


def _top_or_predicted(prediction: Prediction, top: int, threshold: float) -> list[LabelPrediction]:
    """The ``top`` labels, and what else is predicted."""
    return prediction.top(max(top, len(prediction.above(threshold))))


def _as_dict(prediction: Prediction, found: Sequence[LabelPrediction], threshold: float) -> dict[str, Any]:
    return {
        "image": str(prediction.photo),
        "width": prediction.size[0],
        "height": prediction.size[1],
        "predicted": [item.label for item in found if item.probability >= threshold],
        "labels": [
            {
                "label": item.label,
                "probability": round(item.probability, 6),
                "box": [round(v, 1) for v in item.box],
                "instance": item.instance,
            }
            for item in found
        ],
    }


def _remove_pictures(folder: Path) -> None:
    """Remove the pictures of the predictions that ``folder`` holds and this run replaces; no other file."""
    try:
        content = (folder / _LINES).read_text(**_UTF_8)
    except OSError:
        return
    for line in content.splitlines():
        try:
            name = json.loads(line)["picture"]
        except (ValueError, KeyError, TypeError):
            continue
        # The file may be anybody's by now: nothing but what a picture is called, where pictures are.
        if isinstance(name, str) and re.fullmatch(rf"{_PICTURES}/\d{{5,}}-[^/\\]*\.jpg", name):
            (folder / name).unlink(missing_ok=True)


def _draw(prediction: Prediction, found: Sequence[LabelPrediction], path: Path) -> None:
    assert prediction.photo is not None
    path.parent.mkdir(exist_ok=True)
    labels = [(item.label, item.probability, item.box) for item in found]
    annotated(read_image(prediction.photo), labels).save(path, quality=90)


def _with_bar(predictions: Iterator[Prediction], total: int) -> Iterator[Prediction]:
    console = Console(stderr=True)
    columns = (TextColumn("photos"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield from bar.track(predictions, total=total)
