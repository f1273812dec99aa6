"""Query2Label: a transformer decoder with one learned query for each label."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from gm_mlic.errors import ArgumentError
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import (
    DecoderLayer,
    LabelClassifiers,
    LeCunLinear,
    WholeImageModel,
    location_output,
)  # fmt: skip
from gm_mlic.nn.output import ModelOutput
from gm_mlic.registry import register_model
from gm_mlic.schema import Fraction, Positive, checked


def position_encoding(box: Tensor, channels: int) -> Tensor:
    r"""Sines and cosines of the position of a box's center, as in DETR (Carion et al., ECCV 2020, appendix).

    For y and then for x in [0, 1]: :math:`\sin(2 \pi y / \omega_k), \cos(2 \pi y / \omega_k)` with
    :math:`\omega_k = 10000^{4k/d}`, k = 0, ..., d/4 - 1.

    Args:
        box: (..., 4) as (x1, y1, x2, y2), divided by image width and height.
        channels: d, a multiple of 4.

    Returns:
        (..., d).
    """
    center = (box[..., :2] + box[..., 2:]) / 2
    k = torch.arange(channels // 4, device=box.device, dtype=box.dtype)
    angle = 2 * math.pi * center.flip(-1)[..., None] * 10000 ** (-4 * k / channels)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


@register_model("query2label")
class Query2Label(WholeImageModel):
    r"""Query2Label, from "Query2Label: A Simple Transformer Way to Multi-Label Classification" (Liu et al., 2021).

    .. math::
        F &= \mathrm{Linear}(f) \\
        Q_0 &= 0, \qquad Q_l, a = \mathrm{DecoderLayer}(Q_{l-1}, F, q), \qquad l = 1, \ldots, L \\
        s_c &= w_c^\top \mathrm{LN}(Q_L)_c + b_c

    q are learned queries, one for each label, which each layer adds to its states, as in the authors' code; neither
    word vectors nor co-occurrences are used. Positions are encoded by :func:`position_encoding`. The match logits are
    the last layer's attention a. Unlike here, the authors' code has by default one encoder layer before the decoder,
    and its decoder has no self-attention of the queries. Here the first layer has none, since :math:`Q_0` is zero.

    Args:
        instance_dim: D, size of a location's feature.
        num_labels: C.
        width: d of the transformer; default D, as in the paper (2048 for ResNet-101). A multiple of 4 and of
            ``heads``. The layers' MLPs have 4 d hidden units.
        layers: L, number of decoder layers (default: 2, the paper's).
        heads: heads of each attention (default: 4, the paper's).
        dropout: probability of dropout (``DecoderLayer``; default: 0.1, the paper's).

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are used
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; ``label_states`` are :math:`\mathrm{LN}(Q_L)`
    """

    @checked
    def __init__(
        self,
        instance_dim: Positive,
        num_labels: Positive,
        width: Positive | None = None,
        layers: Positive = 2,
        heads: Positive = 4,
        dropout: Fraction = 0.1,
    ) -> None:
        width = instance_dim if width is None else width
        if width % 4:
            raise ArgumentError("width", f"must be a multiple of 4 and of heads={heads}, got {width}.")
        super().__init__(instance_dim, num_labels, width=width, layers=layers)
        self.project = LeCunLinear(instance_dim, width)
        self.queries = nn.Parameter(torch.empty(num_labels, width))
        self.layers = nn.ModuleList(DecoderLayer(width, heads, dropout, self_attention=i > 0) for i in range(layers))
        self.norm = nn.LayerNorm(width)
        self.classifiers = LabelClassifiers(num_labels, width)
        nn.init.normal_(self.queries)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.queries)
        super().reset_parameters()

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        F = self.project(batch.x)
        pos = position_encoding(batch.box, F.shape[-1])
        Q = F.new_zeros(F.shape[0], *self.queries.shape)
        for layer in self.layers:
            Q, attention = layer(Q, F, pos, batch.mask, self.queries)
        Q = self.norm(Q)
        return location_output(self.classifiers(Q), attention, batch, Q)
