"""Query2Label: A Simple Transformer Way to Multi-Label Classification (Liu et al., 2021, arXiv:2107.10834)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from gm_mlic.errors import ConfigError
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.gm_mlic import ModelOutput
from gm_mlic.nn.locations import LocationModel


class DecoderLayer(nn.Module):
    r"""A layer of the transformer decoder (eq. 1 to 3 of that paper): label queries hear each other, then the image.

    .. math::
        Q^{(1)} = \mathrm{MultiHead}(Q, Q, Q), \quad
        Q^{(2)} = \mathrm{MultiHead}(Q^{(1)}, \tilde F, F), \quad
        Q = \mathrm{FFN}(Q^{(2)})

    each with a residual connection and LayerNorm after it; the tilde adds position encodings (labels have none).

    Args:
        width: d.
        heads: of both attentions.
        dropout: of both attentions and the FFN.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.among = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.across = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.ffn = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, q: Tensor, f: Tensor, place: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """New q (B, C, d), and the attention (B, C, M) to the locations."""
        told, _ = self.among(q, q, q, need_weights=False)
        q = self.norms[0](q + self.dropout(told))
        seen, attention = self.across(q, f + place, f, key_padding_mask=~mask)
        q = self.norms[1](q + self.dropout(seen))
        return self.norms[2](q + self.dropout(self.ffn(q))), attention


class Query2Label(LocationModel):
    r"""A query for each label, decoded against the image's locations; a classifier for each (eq. 4 there).

    .. math:: s_c = w_c^\top q_c + b_c

    The queries begin as learnt embeddings of the labels.

    Args:
        instance_dim: D, length of a location's feature; projected to ``width``.
        num_labels: C.
        width: d (the paper's: that of the backbone, 2048).
        layers: of the decoder (default: the paper's 2).
        heads: of each attention (default: the paper's 4).
        dropout: in [0, 1).

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are read
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; its matches are the last layer's attention weights

    Raises:
        ConfigError: for a size below 1, or a width that is no multiple of 4 and of the heads.
    """

    def __init__(
        self,
        instance_dim: int,
        num_labels: int,
        width: int = 256,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(instance_dim, num_labels)
        if min(width, layers, heads) < 1 or width % heads or width % 4 or not 0 <= dropout < 1:
            raise ConfigError(
                f"model.width={width}, layers={layers}, heads={heads}, dropout={dropout}: the width is a multiple of 4 "
                "and of the heads, layers are 1 or more, dropout is below 1."
            )
        self.width = width
        self.project = nn.Linear(instance_dim, width)
        self.labels = nn.Embedding(num_labels, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, dropout) for _ in range(layers))
        self.weight = nn.Parameter(torch.empty(num_labels, width))
        self.bias = nn.Parameter(torch.zeros(num_labels))
        self._reset_classifiers()

    def _reset_classifiers(self) -> None:
        bound = 1 / math.sqrt(self.width)  # as nn.Linear
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                module._reset_parameters()
            elif isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding)):
                module.reset_parameters()
        self._reset_classifiers()

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        """Score every label of every image of ``data``."""
        batch = self.locations(data)
        f, place = self.project(batch.x), place_encoding(batch.box, self.width)
        q = self.labels.weight.expand(len(f), -1, -1)
        attention = f.new_empty(0)
        for layer in self.layers:
            q, attention = layer(q, f, place, batch.mask)
        logits = (q * self.weight).sum(dim=-1) + self.bias
        return self.output(logits, attention.transpose(1, 2), batch.mask)


def place_encoding(boxes: Tensor, width: int) -> Tensor:
    """Sines and cosines of box centres, as DETR has them: boxes (..., 4) in [0, 1] -> (..., width)."""
    centres = 2 * math.pi * (boxes[..., :2] + boxes[..., 2:]) / 2
    steps = torch.arange(width // 4, device=boxes.device, dtype=boxes.dtype)
    angles = centres[..., None] / 10_000 ** (steps / max(width // 4, 1))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
