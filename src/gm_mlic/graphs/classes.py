"""Labels of detected classes: candidate matching edges, and the confidence of matches."""

from __future__ import annotations

import torch
from torch import Tensor

from gm_mlic.errors import ConfigError


def label_candidates(
    detected_label: Tensor, score: Tensor, present: Tensor, labels_per_class: int, class_to_label: Tensor | None = None
) -> Tensor:
    r"""For each detector class, the labels with the highest lift :math:`P(c \mid d) / P(c)` in the training images.

    The label with the name of the class comes first, if there is one. The others are ranked by

    .. math::
        \mathrm{lift}_{dc} = \frac{1}{r_c} \cdot \frac{\sum_n s_{nd} [c \in n] + r_c}{\sum_n s_{nd} + 1}

    with :math:`s_{nd}` the largest confidence of an instance of class d in image n, and :math:`r_c` the label ratio, as
    in eq. 15. The added terms are one pseudo-image with average labels. The lift of a frequent label is bounded by
    :math:`1 / r_c`, which is why the class's own label is included first. A class that is never detected gets all
    labels.

    Args:
        detected_label: (N, M) int64, the detector's class of each instance, -1 for none.
        score: (N, M), its confidence.
        present: (N, C) bool, the labels of each image.
        labels_per_class: number of candidates of each class.
        class_to_label: (D,) int64, the label with the name of each detector class, -1 for none. Default: no
            class has one, and D is the largest detected class plus one.

    Returns:
        (D, C) bool.

    Raises:
        ConfigError: if no instance has a class.
    """
    N, C = present.shape
    if int(detected_label.max()) < 0:
        raise ConfigError("Candidate labels need detected classes, and no instance has one.")
    D = int(detected_label.max()) + 1 if class_to_label is None else len(class_to_label)
    strength = score.new_zeros(N, D + 1)  # the last column is for instances without a class
    strength.scatter_reduce_(1, torch.where(detected_label < 0, D, detected_label), score, "amax")
    strength, y = strength[:, :D].double(), present.double()
    share = y.mean(dim=0).clamp(min=1 / (2 * N))
    lift = (strength.t() @ y + share) / (strength.sum(dim=0)[:, None] + 1) / share
    if class_to_label is not None:
        named = (class_to_label >= 0).nonzero().flatten()
        lift[named, class_to_label[named]] = float("inf")
    best = lift.argsort(dim=1, descending=True, stable=True)[:, :labels_per_class]
    return torch.zeros(D, C, dtype=torch.bool).scatter_(1, best, True) | (strength.sum(dim=0) == 0)[:, None]


def candidate_edges(table: Tensor, detected_label: Tensor | None, mask: Tensor) -> Tensor:
    """The matching edges to candidate labels: (..., M, C) bool.

    An instance without a class has edges to all labels. A label that is a candidate of no instance has an edge from the
    least confident one, since each label needs a match logit.

    Args:
        table: (D, C) bool, from :func:`label_candidates`.
        detected_label: (..., M) int64, -1 for none.
        mask: (..., M) bool, False where padded; the instances of each image come first, the most confident first.

    Raises:
        ConfigError: without ``detected_label``, or for a class that the table does not have.
    """
    if detected_label is None:
        raise ConfigError("Candidates need the detected_label of each instance.")
    allowed = (_rows(table, detected_label) | (detected_label < 0)[..., None]) & mask[..., None]
    isolated = ~allowed.any(dim=-2, keepdim=True)
    last = torch.arange(mask.shape[-1], device=mask.device) == mask.sum(dim=-1, keepdim=True) - 1
    return allowed | (isolated & last[..., None])


def class_confidence(table: Tensor, detected_label: Tensor | None, score: Tensor | None) -> Tensor:
    r"""The detector's confidence in each match: :math:`q_{ic} = s_i` where the class of instance i is label c, else 0.

    Args:
        table: (D, C) bool, the labels that each detector class is.
        detected_label: (..., M) int64, -1 for none.
        score: (..., M), the confidence of each instance.

    Returns:
        (..., M, C), with the dtype of ``score``.

    Raises:
        ConfigError: without ``detected_label`` or ``score``, or for a class that the table does not have.
    """
    if detected_label is None or score is None:
        raise ConfigError("Class labels need the detected_label and score of each instance.")
    return (_rows(table, detected_label) & (detected_label >= 0)[..., None]) * score[..., None]


def _rows(table: Tensor, detected_label: Tensor) -> Tensor:
    """The row of each instance's class; row 0 for -1."""
    if not torch.compiler.is_compiling() and int(detected_label.max()) >= table.shape[0]:
        raise ConfigError(
            f"An instance is of the detector's class {int(detected_label.max())}, but the table is of classes 0 to "
            f"{table.shape[0] - 1}: use the detector that the model was trained with."
        )
    return table[detected_label.clamp(min=0)]
