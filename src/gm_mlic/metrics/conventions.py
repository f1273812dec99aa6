"""Published metric conventions: each is a named set of options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from gm_mlic.errors import ArgumentError, check_choice
from gm_mlic.targets import DifficultRule

APRule = Literal["rank", "envelope", "voc11", "sklearn"]


@dataclass(frozen=True)
class Convention:
    """Options of the metrics. The defaults are those of ``mlgcn``.

    Attributes:
        ap: average precision of one label. ``rank``: mean precision at the ranks of the positives; ``envelope``: the
            same with each precision replaced by the maximum at this or a lower rank (VOC 2010 on); ``voc11``: mean of
            that envelope at recalls 0, 0.1, ..., 1 (VOC 2007); ``sklearn``: rank AP with tied scores as one rank. In
            the other three, tied scores are ranked in row order.
        difficult_ap: treatment of difficult image-label pairs (VOC) in AP: ``positive``, ``negative`` or ``ignore``.
        difficult_f1: the same for precision, recall and F1.
        f1: CF1 is the F1 of CP and CR (``f1_of_means``) or the mean F1 over labels (``mean_f1``).
        topk: under ``top3/``, a label must be among the image's 3 highest scores and pass the threshold
            (``threshold``), or only be among the 3 highest (``no_threshold``).
        topk_ties: for scores equal to the third highest, use the first in label order (``stable``) or ``all``.
        threshold: threshold of predicted labels: one number, or one per label. It is rounded to the precision of the
            scores.
        compare: ``ge`` for score >= threshold, ``gt`` for score > threshold.

    Raises:
        ArgumentError: if a value is not listed here.
    """

    ap: APRule = "rank"
    difficult_ap: DifficultRule = "ignore"
    difficult_f1: DifficultRule = "negative"
    f1: Literal["f1_of_means", "mean_f1"] = "f1_of_means"
    topk: Literal["threshold", "no_threshold"] = "threshold"
    topk_ties: Literal["stable", "all"] = "stable"
    threshold: float | tuple[float, ...] = 0.5
    compare: Literal["ge", "gt"] = "ge"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            if field.name != "threshold":
                check_choice(field.name, getattr(self, field.name), get_args(hints[field.name]))
        threshold: Any = self.threshold
        if hasattr(threshold, "tolist"):  # a tensor or an array
            threshold = threshold.tolist()
        if isinstance(threshold, Sequence) and not isinstance(threshold, str):
            threshold = tuple(threshold)
        object.__setattr__(self, "threshold", threshold)
        for value in threshold if isinstance(threshold, tuple) else (threshold,):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ArgumentError("threshold", f"is {value!r}: expected a number in [0, 1], as the scores.")


#: Conventions by name. Options that a source does not define (ssgrl and voc11: F1 and top-3; asl: top-3) are those of
#: mlgcn. In asl, whose targets are {0, 1}, difficult labels are negatives in AP and F1.
CONVENTIONS: dict[str, Convention] = {
    "mlgcn": Convention(),
    "ssgrl": Convention(ap="envelope", difficult_ap="negative"),
    "ctran": Convention(ap="sklearn", difficult_ap="negative", topk_ties="all"),
    "asl": Convention(difficult_ap="negative", f1="mean_f1", threshold=0.8, compare="gt"),
    "mmpretrain": Convention(difficult_f1="ignore", f1="mean_f1", topk="no_threshold"),
    "voc11": Convention(ap="voc11", difficult_f1="ignore"),
}


def get_convention(convention: str | Convention = "mlgcn", **options: Any) -> Convention:
    """Return a convention, with some options replaced.

    Args:
        convention: a key of :data:`CONVENTIONS`, or a :class:`Convention`.
        **options: options of :class:`Convention` to replace.

    Raises:
        ArgumentError: if the convention, an option or a value is unknown.
    """
    if not isinstance(convention, Convention):
        check_choice("convention", convention, CONVENTIONS)
        convention = CONVENTIONS[convention]
    known = [field.name for field in fields(Convention)]
    for option in options:
        if option not in known:
            raise ArgumentError(option, f"is not an option: choose one of {', '.join(known)}.")
    return replace(convention, **options)
