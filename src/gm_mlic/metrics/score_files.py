"""Score and target files (``.npz``, ``.csv``, ``.pt``) of any model."""

from __future__ import annotations

import contextlib
import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gm_mlic.errors import ArgumentError, DataError
from gm_mlic.io import atomic_write
from gm_mlic.metrics.functional import check_scores
from gm_mlic.safe_load import load_arrays, load_tensors
from gm_mlic.targets import TargetFormat, check_target_format, first_other_value, normalize_targets

#: Headers of a first CSV column with image ids, even if its values are numbers.
_ID_HEADERS = ("", "id", "ids", "image", "image_id", "file", "file_name", "filename")


@dataclass(frozen=True)
class Table:
    """Content of one file: values (N, C), optional mask of difficult labels, optional row and column names."""

    path: Path
    values: Tensor
    difficult: Tensor | None = None
    ids: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ScoredImages:
    """Aligned scores of one or several models, with targets.

    Attributes:
        scores: (N, C) per score file, with rows in the order of the targets.
        targets: (N, C) bool mask of present labels; False for difficult ones.
        difficult: (N, C) bool, or None if the target file has no such mask.
        ids: the N image ids, if a file has them.
        labels: the C names, if a file has them.
        target_format: format of the target file: ``binary`` or ``voc``.
    """

    scores: tuple[Tensor, ...]
    targets: Tensor
    difficult: Tensor | None = None
    ids: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None
    target_format: TargetFormat = "binary"


def read_scored_images(
    scores: Sequence[str | Path],
    targets: str | Path,
    target_format: TargetFormat = "binary",
    *,
    allow_all_present: bool = False,
) -> ScoredImages:
    """Read score files and a target file.

    Rows are matched by image id if both files have ids, else by order. Label names must be equal, in order.

    Args:
        scores: one file per model, see :func:`read_table`.
        targets: target file; it may be one of the ``scores`` if that contains both.
        target_format: ``binary`` (default) for {0, 1}; ``voc`` for {1, 0, -1}, where 0 is difficult.
        allow_all_present: with ``voc``, accept targets without any -1 (default: ``False``).

    Raises:
        DataError: if a file cannot be read, has invalid values, repeats ids or labels, or does not match the others.
        ArgumentError: if ``target_format`` is unknown.
    """
    check_target_format(target_format)
    truth = read_table(targets, "targets")
    tables = [read_table(path, "scores") for path in scores]
    with _named(truth.path):
        present, difficult = normalize_targets(
            truth.values, truth.difficult, target_format, allow_all_present=allow_all_present
        )
    labels = check_label_lists([(truth.path, truth.labels), *((table.path, table.labels) for table in tables)])
    aligned = tuple(_align(table, truth) for table in tables)
    ids = next((table.ids for table in (truth, *tables) if table.ids is not None), None)
    return ScoredImages(aligned, present, difficult, ids, labels, target_format)


def write_scored_images(
    path: Path,
    scores: Tensor,
    targets: Tensor,
    ids: Sequence[str],
    labels: Sequence[str],
    difficult: Tensor | None = None,
) -> None:
    """Write scores and targets to an ``.npz`` file for :func:`read_scored_images`.

    Args:
        path: output file.
        scores: (N, C).
        targets: (N, C) in {0, 1}; written as int8.
        ids: the N image ids.
        labels: the C names.
        difficult: (N, C) bool, or None.
    """
    present, difficult = normalize_targets(targets, difficult)
    masks: dict[str, Any] = {} if difficult is None else {"difficult": difficult.cpu().numpy()}
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez_compressed(
            file,
            scores=scores.cpu().numpy(),
            targets=present.to(torch.int8).cpu().numpy(),
            **masks,
            ids=np.array(ids, dtype=np.str_),
            labels=np.array(labels, dtype=np.str_),
        )


def read_table(path: str | Path, key: Literal["scores", "targets"]) -> Table:
    """Read one file.

    ``.npz``: the array ``key``, optionally ``ids``, ``labels`` and, with targets in {0, 1}, the mask ``difficult``.
    ``.pt``: a dict with the same entries as tensors or lists, loaded with ``weights_only``. ``.csv``: a header with the
    label names, then one line per image. The first column contains ids if its header is empty or one of id, image,
    image_id, file, file_name, or if none of its cells is a number.

    Raises:
        DataError: if the file cannot be read or has duplicate ids or labels.
    """
    path = Path(path)
    with _named(path):
        if path.suffix not in _READERS:
            raise DataError(f"unknown suffix; save {key} as {', '.join(_READERS)}.")
        if not path.is_file():
            raise DataError(f"no such file; set the path of the {key}.")
        table = _READERS[path.suffix](path, key)
        shape = tuple(table.values.shape)
        if len(shape) != 2 or not all(shape) or table.values.is_complex():
            raise DataError(f"{key} have shape {shape}, expected numbers (images, labels).")
        for what, names, size in (("image id", table.ids, shape[0]), ("label", table.labels, shape[1])):
            if names is not None and len(names) != size:
                raise DataError(f"{len(names)} {what}s for {key} of shape {shape}.")
            for name, count in Counter(names).most_common(1):
                if count > 1:
                    raise DataError(f"the {what} {name!r} occurs more than once: {what}s must be unique.")
    return table


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Context manager that adds the path to error messages."""
    try:
        yield
    except (ArgumentError, DataError) as error:
        raise DataError(f"{path}: {error}") from error


def _read_arrays(path: Path, key: str) -> Table:
    """Read an ``.npz`` or ``.pt`` file."""
    try:
        content = (load_arrays if path.suffix == ".npz" else load_tensors)(path)
    except (ValueError, OSError) as error:
        raise DataError(f"not a {path.suffix} file of numbers and strings ({str(error)[:100]}).") from error
    if not isinstance(content, dict):
        raise DataError(f"contains a {type(content).__name__}; save a dict with {key!r}.")
    if key not in content:
        found = ", ".join(map(repr, content)) or "nothing"
        raise DataError(f"has no {key!r} (only {found}); rename the entry to {key!r}.")
    difficult = None
    if key == "targets" and content.get("difficult") is not None:
        mask = _numbers("difficult", content)
        if first_other_value(mask, (0, 1)) is not None:
            raise DataError("difficult must be a mask of bool, or of 1 and 0.")
        difficult = mask.bool()
    return Table(path, _numbers(key, content), difficult, _names("ids", content), _names("labels", content))


def _numbers(key: str, content: Mapping[str, Any]) -> Tensor:
    try:
        return torch.as_tensor(content[key])
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{key} are not an array of numbers.") from error


def _names(key: str, content: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = content.get(key)
    if names is None:
        return None
    names = names.tolist() if hasattr(names, "tolist") else names
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, (str, int)) for name in names):
        raise DataError(f"{key} must be a list of strings or integers.")
    return tuple(map(str, names))


def _read_csv(path: Path, key: str) -> Table:
    firsts: list[str] = []
    rest: list[np.ndarray[Any, Any]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if not header or all(map(_is_number, header)):
                raise DataError("no header; add a first line with the label names.")
            for row in reader:
                if len(row) != len(header):
                    raise DataError(f"line {reader.line_num} has {len(row)} cells, the header {len(header)}.")
                firsts.append(row[0].strip())
                rest.append(_cells(row[1:], key, header[1:], f"line {reader.line_num}"))
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(f"not a CSV file in UTF-8 ({error}).") from error
    values = np.stack(rest) if rest else np.empty((0, len(header) - 1))
    if header[0].lower() in _ID_HEADERS or not any(map(_is_number, firsts)):
        return Table(path, torch.from_numpy(values), None, tuple(firsts), tuple(header[1:]))
    column = [_cells([first], key, header, f"image {i}") for i, first in enumerate(firsts)]
    return Table(path, torch.from_numpy(np.concatenate([np.stack(column), values], axis=1)), labels=tuple(header))


def _cells(cells: list[str], key: str, columns: list[str], where: str) -> np.ndarray[Any, Any]:
    """Numbers of a part of a line."""
    try:
        return np.array(cells, dtype=np.float64)
    except ValueError:
        c = next(c for c, cell in enumerate(cells) if not _is_number(cell))
        raise DataError(
            f"{key} must be numbers, not {cells[c]!r} ({where}, column {columns[c]!r}); image ids must be in a first "
            "column named id."
        ) from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_READERS: Mapping[str, Callable[[Path, str], Table]] = {".npz": _read_arrays, ".csv": _read_csv, ".pt": _read_arrays}


def _align(table: Table, truth: Table) -> Tensor:
    """Scores with rows in the order of the targets."""
    scores = table.values
    with _named(table.path):
        check_scores(scores, truth.values)
        if table.ids is None or truth.ids is None or table.ids == truth.ids:
            return scores
        row = {name: i for i, name in enumerate(table.ids)}
        missing = [name for name in truth.ids if name not in row]
        if missing:
            raise DataError(
                f"no scores for {len(missing)} of the {len(truth.ids)} images in {truth.path}, such as {missing[0]!r}."
            )
    return scores[torch.tensor([row[name] for name in truth.ids])]


def check_label_lists(lists: Sequence[tuple[str | Path, tuple[str, ...] | None]]) -> tuple[str, ...] | None:
    """Common labels of all files that have label names, or None; DataError if labels or their order differ."""
    known = [(path, labels) for path, labels in lists if labels is not None]
    for path, labels in known[1:]:
        first, expected = known[0]
        if labels == expected:
            continue
        if len(labels) != len(expected):
            raise DataError(f"{path}: {len(labels)} labels, {first} has {len(expected)}: they must be equal.")
        c = next(c for c in range(len(labels)) if labels[c] != expected[c])
        what = "the order of the labels differs" if sorted(labels) == sorted(expected) else "the labels differ"
        raise DataError(
            f"{path}: {what} from {first} (label {c} is {labels[c]!r}, expected {expected[c]!r}): make them equal."
        )
    return known[0][1] if known else None
