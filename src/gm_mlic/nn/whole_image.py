"""What the baselines for whole images share: how they read a batch, and what they say of it.

They read a grid of locations (``detector.grid``); an instance is a location, and so would any box be.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from gm_mlic.errors import ConfigError
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.gm_mlic import check_lengths


def as_batch(
    data: HeteroData | AssignmentBatch, instance_dim: int | None, num_labels: int, label_dim: int | None = None
) -> AssignmentBatch:
    """The dense form of ``data``; lengths that are None are not compared.

    Raises:
        ConfigError: if it has none, or features, labels or label vectors are not those that the model was built for.
    """
    check_lengths(data, instance_dim, label_dim)
    batch = data if isinstance(data, AssignmentBatch) else AssignmentBatch.from_data(data)
    if batch is None or batch.matches is not None:
        raise ConfigError(
            "Models of whole images need complete matching edges (graph.candidates=null), the same labels in each "
            "image, and no edge attributes of their own."
        )
    if batch.label_vectors.shape[0] != num_labels:
        raise ConfigError(f"The graph has {batch.label_vectors.shape[0]} labels, the model {num_labels}.")
    return batch


def winners(matches: Tensor, mask: Tensor) -> Tensor:
    """(B, C): which of the present locations, by ``mask`` (B, M), says most of each label in ``matches`` (B, M, C)."""
    return matches.detach().masked_fill(~mask[..., None], float("-inf")).argmax(dim=1)


class LabelClassifiers(nn.Module):
    r"""A linear classifier for each label, on a vector for each label: :math:`s_c = w_c^\top x_c + b_c`.

    Under autocast it stays in the parameters' own type: logits that are rounded would tie, and ties decide rankings.

    Args:
        num_labels: C.
        channels: d.

    Shapes:
        - **input:** (B, C, d)
        - **output:** (B, C)
    """

    def __init__(self, num_labels: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_labels, channels))
        self.bias = nn.Parameter(torch.empty(num_labels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[1]))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return (x.to(self.weight.dtype) * self.weight).sum(dim=-1) + self.bias

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(str, self.weight.shape))})"
