"""Target formats, and the treatment of difficult labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from gm_mlic.errors import ArgumentError, DataError

TargetFormat = Literal["binary", "voc"]
#: Treatment of difficult image-label pairs (VOC) in the loss and in metrics.
DifficultRule = Literal["positive", "negative", "ignore"]

Table = TypeVar("Table", Tensor, np.ndarray)


def normalize_targets(
    targets: Table,
    difficult: Table | None = None,
    target_format: TargetFormat = "binary",
    *,
    allow_all_present: bool = False,
    validate_args: bool = True,
) -> tuple[Table, Table | None]:
    """Convert targets to a mask of present labels and a mask of difficult labels.

    Args:
        targets: (N, C) tensor or array of bool, integers or floats. ``binary``: 1 is present, 0 absent. ``voc``: 1 is
            present, 0 difficult, -1 absent.
        difficult: (N, C) bool mask of difficult pairs, with ``binary`` only; their targets are ignored.
        target_format: ``binary`` (default) or ``voc``.
        allow_all_present: with ``voc``, accept targets without any -1 (default: ``False``, since they are usually in
            {0, 1}, and absent labels would count as difficult).
        validate_args: check the values of ``targets`` (default: ``True``). The check synchronizes with the GPU and is
            skipped under ``torch.compile``.

    Returns:
        ``present`` (N, C) bool, False for difficult pairs; ``difficult`` (N, C) bool, or None if not given
        (``binary``).

    Raises:
        ArgumentError: if the format is unknown, or ``difficult`` is not bool, has another shape, or is given with
            ``voc``.
        DataError: if values do not match the format.
    """
    check_target_format(target_format)
    if difficult is not None:
        _check_mask(targets, difficult, target_format)
    if validate_args and not torch.compiler.is_compiling():
        _check_values(targets, target_format, allow_all_present)
    present = targets == 1
    if target_format == "voc":
        return present, targets == 0
    return (present, None) if difficult is None else (present & ~difficult, difficult)


def positives_and_counted(present: Table, difficult: Table | None, rule: DifficultRule) -> tuple[Table, Table | None]:
    """Apply the rule for difficult pairs to the masks of :func:`normalize_targets`.

    Returns:
        Masks of positives and of counted pairs (None: all). All positives are counted.
    """
    if difficult is None:
        return present, None
    return present | difficult if rule == "positive" else present, ~difficult if rule == "ignore" else None


def as_table(name: str, values: Any, device: torch.device | None = None) -> Tensor:
    """Tensor of an array or a nested list, on ``device``; tensors are returned unchanged.

    Raises:
        DataError: if the values are not numbers, or rows differ in length.
    """
    if isinstance(values, Tensor):
        return values
    try:
        return torch.tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name} must be a tensor, an array or a list of equally long rows, got {type(values).__name__}."
        ) from error


def check_target_format(target_format: str) -> None:
    """Raise :class:`~gm_mlic.errors.ArgumentError` unless it is ``binary`` or ``voc``."""
    if target_format not in get_args(TargetFormat):
        raise ArgumentError("target_format", f"is {target_format!r}: choose binary (1, 0) or voc (1, 0, -1).")


def first_other_value(targets: Tensor | np.ndarray, allowed: Sequence[int]) -> Any:
    """First value of ``targets`` that is not ``allowed``, or None."""
    if targets.dtype in (torch.bool, np.dtype(bool)) and {0, 1} <= set(allowed):
        return None
    if not _is_signed(targets):  # torch compares unsigned integers with -1 modulo their size
        allowed = [value for value in allowed if value >= 0]
    fits: Any = targets == allowed[0]
    for value in allowed[1:]:
        fits |= targets == value
    if bool(fits.all()):
        return None
    return targets.reshape(-1)[fits.reshape(-1).tolist().index(False)].item()


def _is_signed(targets: Tensor | np.ndarray) -> bool:
    return targets.dtype.is_signed if isinstance(targets, Tensor) else targets.dtype.kind not in "ub"


def _check_mask(targets: Tensor | np.ndarray, difficult: Tensor | np.ndarray, target_format: str) -> None:
    if target_format == "voc":
        raise ArgumentError("difficult", "requires target_format='binary': in 'voc', a target of 0 is difficult.")
    dtype, shape = getattr(difficult, "dtype", type(difficult).__name__), getattr(difficult, "shape", ())
    if dtype not in (torch.bool, np.dtype(bool)) or shape != targets.shape:
        raise ArgumentError("difficult", f"must be a bool mask {tuple(targets.shape)}, got {dtype} {tuple(shape)}.")


def _check_values(targets: Tensor | np.ndarray, target_format: str, allow_all_present: bool) -> None:
    voc = target_format == "voc"
    other = first_other_value(targets, (1, 0, -1) if voc else (1, 0))
    if other is not None:
        advice = "use 1 (present), 0 (difficult) and -1 (absent)" if voc else "use 1 (present) and 0 (absent)"
        advice += f"; {targets.dtype} has no -1." if voc and not _is_signed(targets) else "."
        if other == -1:
            advice = "pass target_format='voc' if 0 means difficult and -1 absent, or write absent labels as 0."
        raise DataError(f"targets contain {other:g}: {advice}")
    if not voc or allow_all_present or 0 in targets.shape:
        return
    if not (_is_signed(targets) and bool((targets == -1).any())):
        raise DataError(
            "targets contain no -1, so no label is absent: pass target_format='binary' if 0 means absent, or "
            "allow_all_present=True."
        )
