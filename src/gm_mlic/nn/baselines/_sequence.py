"""Labels as sequences: paths of labels, their loss, and scores of labels at the steps of a path.

A path of an image is a sequence of labels that ends with END, which has the index C.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from gm_mlic.graphs.batch import AssignmentBatch

#: Target of the steps after END, which have no loss.
NO_TARGET = -100


def present_labels(batch: AssignmentBatch) -> Tensor:
    """(B, C) bool, the labels of the images' paths. Difficult labels (VOC) are not part of them."""
    assert batch.y is not None
    return batch.y > 0 if batch.difficult is None else (batch.y > 0) & ~batch.difficult


def label_paths(present: Tensor, rank: Tensor, steps: int) -> Tensor:
    """The labels of each image by ascending rank, at most ``steps`` of them, then END.

    Args:
        present: (B, C) bool.
        rank: (C,) int64, a permutation of 0, ..., C - 1.
        steps: at most C.

    Returns:
        (B, T + 1) int64, ``NO_TARGET`` after END. T is the largest number of labels of an image of the batch, or
        ``steps`` in a compiled graph, whose shapes do not depend on values.
    """
    C = present.shape[1]
    count = present.sum(dim=1, keepdim=True).clamp(max=steps)
    longest = steps if torch.compiler.is_compiling() else int(count.max())
    labels = torch.where(present, rank, rank + C).argsort(dim=1)[:, :longest]
    step = torch.arange(longest + 1, device=present.device)
    end = torch.where(step == count, C, NO_TARGET)
    return torch.where(step < count, pad(labels, (0, 1)), end)


def path_loss(scores: Tensor, paths: Tensor, batch: AssignmentBatch) -> Tensor:
    """Cross-entropy of the next label or END, the mean over all steps of all images up to END.

    Difficult labels (VOC) are unknown: the softmax excludes them.

    Args:
        scores: (B, T + 1, C + 1).
        paths: (B, T + 1).
        batch: with ``difficult``, or None for none.

    Returns:
        scalar.
    """
    if batch.difficult is not None:
        scores = scores.masked_fill(pad(batch.difficult, (0, 1))[:, None], float("-inf"))
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), paths.flatten(), ignore_index=NO_TARGET)


def log_odds(scores: Tensor) -> Tensor:
    r"""Logarithm of :math:`p / (1 - p)` for p the softmax of scores (..., V), finite and exact also for p near 1."""
    top = scores.argmax(dim=-1, keepdim=True)
    others = scores.scatter(-1, top, float("-inf")).logsumexp(dim=-1, keepdim=True)
    log_p = scores.log_softmax(dim=-1)
    # All but the largest p are at most 1/2; without the limit, the gradient at the largest could be NaN.
    result = log_p - torch.log1p(-log_p.exp().clamp(max=0.5))
    return result.scatter(-1, top, scores.gather(-1, top) - others)
