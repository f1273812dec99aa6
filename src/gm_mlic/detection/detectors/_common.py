"""Functions that several detectors share: class names, and the instances of an image without detections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gm_mlic.detection.protocol import Instances
from gm_mlic.errors import ArgumentError

#: Class names that stand for no class, as in torchvision's list of the COCO classes.
UNUSED = ("N/A", "__background__")


def read_labels(labels: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Class names from a list, or a text file with one name per line.

    Raises:
        ArgumentError: if the file cannot be read, or a name is empty or repeated.
    """
    if isinstance(labels, (str, Path)):
        path = Path(labels).expanduser()
        try:
            names = tuple(line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines())
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not a UTF-8 text file"
            raise ArgumentError(
                "labels", f"is {labels}: cannot read it ({reason}): expected a list, or a file with a name per line."
            ) from error
    else:
        names = tuple(labels)
    check_labels(names, f"the class names of {labels}" if isinstance(labels, (str, Path)) else "the class names")
    return names


def check_labels(names: Sequence[str], where: str) -> None:
    """Raise :class:`~gm_mlic.errors.ArgumentError` unless names are non-empty and unique, except :data:`UNUSED`."""
    used = [name for name in names if name not in UNUSED]
    if not used:
        raise ArgumentError("labels", f"has no names: {where} are empty.")
    for name in used:
        if not isinstance(name, str) or not name.strip():
            raise ArgumentError("labels", f"has the empty name {name!r} in {where}.")
        if used.count(name) > 1:
            raise ArgumentError("labels", f"has {name!r} more than once in {where}.")


def label_of_class(names: Sequence[str], first_class: int) -> tuple[tuple[str, ...], Tensor]:
    """Names without :data:`UNUSED`, and the index of each class number among them: (first_class + len(names),), or -1.

    Args:
        names: names of the classes first_class, first_class + 1, ...
        first_class: number of the first class.
    """
    labels = tuple(name for name in names if name not in UNUSED)
    table = torch.full((first_class + len(names),), -1)
    for number, name in enumerate(names, start=first_class):
        if name not in UNUSED:
            table[number] = labels.index(name)
    return labels, table


def whole_image(feature: Tensor) -> Instances:
    """The only instance of an image without detections: the whole image, with score 0 and label -1."""
    return Instances(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.zeros(1), torch.tensor([-1]), feature[None])
