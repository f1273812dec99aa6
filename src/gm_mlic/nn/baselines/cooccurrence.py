"""Co-occurrence statistics of labels in the training images, for the label graphs of baselines."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gm_mlic.errors import ConfigError


@runtime_checkable
class LabelStatistics(Protocol):
    """A model with statistics of the training targets among its buffers."""

    def fit(self, targets: Tensor) -> None:
        """Compute the statistics from the ``targets`` (N, C) of the training images."""
        ...


def conditional_probabilities(targets: Tensor, num_labels: int) -> Tensor:
    r"""How often label j is there where label i is: :math:`P_{ij} = P(L_j | L_i) = M_{ij} / N_{ij}`.

    :math:`M_{ij}` counts the images with both, :math:`N_{ij}` those with i of which it is known whether they have j.
    A target of 0 ("difficult" in VOC) is not known, and counts for neither. A label without images has zeros.

    Args:
        targets: (N, C) in {1, 0, -1}: present, not known, absent.
        num_labels: C, as the model has it.

    Returns:
        (C, C) float32, the diagonal 0.

    Raises:
        ConfigError: for targets of another shape.
    """
    if targets.ndim != 2 or targets.shape[1] != num_labels:
        raise ConfigError(f"The targets have shape {tuple(targets.shape)}, the model has {num_labels} labels.")
    present = (targets > 0).double()
    both = present.T @ present
    known = present.T @ (targets != 0).double()
    return torch.where(known > 0, both / known.clamp(min=1), 0).fill_diagonal_(0).float()
