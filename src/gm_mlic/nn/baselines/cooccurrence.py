"""Co-occurrence statistics of labels in the training images, for the label graphs of baselines."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gm_mlic.errors import ConfigError
from gm_mlic.targets import normalise_targets


@runtime_checkable
class LabelStatistics(Protocol):
    """A model with statistics of the training targets among its buffers."""

    def fit(self, targets: Tensor, difficult: Tensor | None = None) -> None:
        """Compute the statistics from targets (N, C) in {0, 1} and difficult (N, C) bool of the training images."""
        ...


def conditional_probabilities(targets: Tensor, num_labels: int, difficult: Tensor | None = None) -> Tensor:
    r"""How often label j is there where label i is: :math:`P_{ij} = P(L_j | L_i) = M_{ij} / N_{ij}`.

    :math:`M_{ij}` counts the images with both, :math:`N_{ij}` those with i of which it is known whether they have j.
    Difficult labels (VOC) are not known, and count for neither. A label without images has zeros.

    Args:
        targets: (N, C) in {0, 1}.
        num_labels: C, as the model has it.
        difficult: (N, C) bool, or None.

    Returns:
        (C, C) float32, the diagonal 0.

    Raises:
        ConfigError: for targets of another shape.
        DataError: for other targets.
    """
    if targets.ndim != 2 or targets.shape[1] != num_labels:
        raise ConfigError(f"The targets have shape {tuple(targets.shape)}, the model has {num_labels} labels.")
    mask, difficult = normalise_targets(targets, difficult)
    present = mask.double()
    both = present.T @ present
    known = present.T @ (torch.ones_like(mask) if difficult is None else ~difficult).double()
    return torch.where(known > 0, both / known.clamp(min=1), 0).fill_diagonal_(0).float()
