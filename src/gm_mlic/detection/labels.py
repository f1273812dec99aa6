"""Names of a detector's classes, and the labels that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gm_mlic.errors import ArgumentError

#: Class names that are no labels, as in torchvision's list of the COCO classes.
BACKGROUND, NO_CLASS = "__background__", "N/A"
UNUSED = (BACKGROUND, NO_CLASS)


def read_labels(labels: str | Path | Sequence[str], where: str = "the class names") -> tuple[str, ...]:
    """Class names from a list (``where`` is its place for messages), or a text file with one name per line.

    Raises:
        ArgumentError: if the file cannot be read, or a name is empty or repeated, except :data:`UNUSED`.
    """
    if isinstance(labels, (str, Path)):
        where = f"the class names of {labels}"
        try:
            lines = Path(labels).expanduser().read_text(encoding="utf-8").rstrip().splitlines()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not a UTF-8 text file"
            raise ArgumentError(
                "labels", f"is {labels}: cannot read it ({reason}): expected a list, or a file with a name per line."
            ) from error
        labels = [line.strip() for line in lines]
    used = [name for name in labels if name not in UNUSED]
    if not used:
        raise ArgumentError("labels", f"has no names: {where} are empty.")
    for name in used:
        if not isinstance(name, str) or not name.strip():
            raise ArgumentError("labels", f"has the empty name {name!r} in {where}.")
        if used.count(name) > 1:
            raise ArgumentError("labels", f"has {name!r} more than once in {where}.")
    return tuple(labels)


def label_of_class(names: Sequence[str], first_class: int = 0) -> tuple[tuple[str, ...], Tensor]:
    """Labels: names without :data:`UNUSED` and repetitions; and the label index of each class number, -1 for none.

    The names are those of the classes first_class, first_class + 1, ...
    """
    labels = tuple(dict.fromkeys(name for name in names if name not in UNUSED))
    index = [-1] * first_class + [labels.index(name) if name in labels else -1 for name in names]
    return labels, torch.tensor(index)
