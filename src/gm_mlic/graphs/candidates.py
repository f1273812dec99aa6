"""Which labels an instance may be, by what the detector took it for: matching edges to these only."""

from __future__ import annotations

import torch
from torch import Tensor

from gm_mlic.errors import ConfigError


def label_candidates(
    detected_label: Tensor, score: Tensor, present: Tensor, candidates: int, own: Tensor | None = None
) -> Tensor:
    r"""The labels that detections of a class speak for most, learnt from training images.

    The first is the label that the class is named after, if there is one. Then, with :math:`s_{nd}` the largest
    confidence of an instance of class d in image n, label c is raised by class d to

    .. math::
        \frac{1}{r_c} \cdot \frac{\sum_n s_{nd} [c \in n] + r_c}{\sum_n s_{nd} + 1}

    times its share :math:`r_c` of all images; those raised most come next. (The added terms are one more image, in
    which labels are as likely as anywhere.) Commonest labels can be raised least, hence the first rule. A class that is
    never detected may be any label.

    Args:
        detected_label: (N, M) int64, the detector's class of each instance, -1 for none.
        score: (N, M), its confidence.
        present: (N, C) bool, the labels of each image.
        candidates: how many labels each class is to have.
        own: (D,) int64, the label that each of the detector's classes is named after, -1 for none; default: none is,
            and D is the largest class that was detected, plus one.

    Returns:
        (D, C) bool.

    Raises:
        ConfigError: if no instance has a class.
    """
    N, C = present.shape
    if int(detected_label.max()) < 0:
        raise ConfigError("graph.candidates: no instance has a class of the detector that could speak for a label.")
    D = int(detected_label.max()) + 1 if own is None else len(own)
    strength = score.new_zeros(N, D + 1)  # the last column takes those that have no class
    strength.scatter_reduce_(1, torch.where(detected_label < 0, D, detected_label), score, "amax")
    seen, y = strength[:, :D].double(), present.double()
    share = y.mean(dim=0).clamp(min=1 / (2 * N))
    raised = (seen.t() @ y + share) / (seen.sum(dim=0)[:, None] + 1) / share
    if own is not None:
        named = (own >= 0).nonzero().flatten()
        raised[named, own[named]] = float("inf")
    best = raised.argsort(dim=1, descending=True, stable=True)[:, :candidates]
    return torch.zeros(D, C, dtype=torch.bool).scatter_(1, best, True) | (seen.sum(dim=0) == 0)[:, None]


def candidate_matches(table: Tensor, detected_label: Tensor, mask: Tensor) -> Tensor:
    """Which matching edges there are: (B, M, C) bool.

    An instance without a class may be any label. A label that no instance of an image may be is joined to its least
    confident instance, for each label needs a match.

    Args:
        table: (D, C) bool, of :func:`label_candidates`.
        detected_label: (B, M) int64.
        mask: (B, M) bool, the instances that there are; each image's stand first, the most confident first.

    Raises:
        ConfigError: for a class that the table does not have.
    """
    if not torch.compiler.is_compiling() and int(detected_label.max()) >= table.shape[0]:
        raise ConfigError(
            f"An instance is of the detector's class {int(detected_label.max())}, but there are candidates for classes "
            f"0 to {table.shape[0] - 1}: use the detector that the candidates were learnt with."
        )
    allowed = (table[detected_label.clamp(min=0)] | (detected_label < 0)[..., None]) & mask[..., None]
    lonely = ~allowed.any(dim=1, keepdim=True)
    last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(dim=1, keepdim=True) - 1
    return allowed | (lonely & last[..., None])
