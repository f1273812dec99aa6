"""What the image-level baselines share: they read locations (cells of a grid, or boxes), and count labels' company."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from gm_mlic.errors import ConfigError
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.gm_mlic import ModelOutput, check_lengths


class LocationModel(nn.Module):
    """A model of C fixed labels over an image's locations.

    Locations are whatever instances the extractor gave: cells of a grid (``detector.grid``), as the models' papers have
    them, or boxes. Of the graph only they and the label vectors are read.

    Args:
        instance_dim: D, length of a location's feature.
        num_labels: C.
        label_dim: length of a label's vector; None for a model that reads none.
    """

    def __init__(self, instance_dim: int, num_labels: int, label_dim: int | None = None) -> None:
        super().__init__()
        if min(instance_dim, num_labels, label_dim or 1) < 1:
            raise ConfigError("The feature length, the vector length and the number of labels must be 1 or more.")
        self.instance_dim, self.num_labels, self.label_dim = instance_dim, num_labels, label_dim

    def locations(self, data: HeteroData | AssignmentBatch) -> AssignmentBatch:
        """``data`` as dense tensors.

        Raises:
            ConfigError: if it has no such form, or other lengths or labels than the model.
        """
        check_lengths(data, self.instance_dim, self.label_dim)
        batch = data if isinstance(data, AssignmentBatch) else AssignmentBatch.from_data(data)
        if batch is None:
            raise ConfigError(f"{type(self).__name__} needs complete matching edges and the same labels in each image.")
        if batch.label_vectors.shape[0] != self.num_labels:
            raise ConfigError(f"The graph has {batch.label_vectors.shape[0]} labels, the model {self.num_labels}.")
        return batch

    def output(self, logits: Tensor, matches: Tensor, mask: Tensor) -> ModelOutput:
        """With the location that says most for each label as its winner.

        Args:
            logits: (B, C).
            matches: (B, M, C), what each location says for each label.
            mask: (B, M), which locations there are.
        """
        winners = matches.detach().masked_fill(~mask[..., None], float("-inf")).argmax(dim=1)
        return ModelOutput(logits, winners, matches, mask)

    def reset_parameters(self) -> None:
        for module in self.children():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.instance_dim}, {self.num_labels})"


class LabelCompany(nn.Module):
    r"""How labels keep company in the training set: :math:`P(L_j \mid L_i) = M_{ij} / N_i`.

    A buffer (``probability``), part of the state dict; zero, no company at all, until :meth:`count`.

    Args:
        num_labels: C.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.register_buffer("probability", torch.zeros(num_labels, num_labels))
        self.probability: Tensor

    def count(self, targets: Tensor) -> None:
        """Count the company in ``targets`` (N, C) in {1, 0, -1}; 0, difficult, counts as neither present nor absent.

        :math:`M_{ij}` is the number of images with both, :math:`N_i` that of images with i in which j is known.
        """
        present, known = (targets == 1).double(), (targets != 0).double()
        both, of = present.T @ present, present.T @ known
        self.probability.copy_(torch.where(of > 0, both / of.clamp(min=1), 0.0))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over locations: x (B, M, ...), mask (B, M) -> (B, ...)."""
    weight = mask.view(*mask.shape, *[1] * (x.dim() - 2)).to(x.dtype)
    return (x * weight).sum(dim=1) / weight.sum(dim=1)
