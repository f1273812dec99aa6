"""ML-Decoder: a transformer decoder with one fixed query for each group of labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

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


@register_model("ml_decoder")
class MLDecoder(WholeImageModel):
    r"""ML-Decoder, from "ML-Decoder: Scalable and Versatile Classification Head" (Ridnik et al., 2021).

    .. math::
        F &= \mathrm{ReLU}(\mathrm{Linear}(f)) \\
        Q_1 &= \mathrm{LN}(Q_0 + \mathrm{Dropout}(Q_0)) \\
        Q_2 &= \mathrm{LN}(Q_1 + \mathrm{MultiHead}(Q_1, F, F)) \\
        Q_3 &= \mathrm{LN}(Q_2 + \mathrm{MLP}(Q_2)) \\
        s_c &= w_c^\top Q_{3,k} + b_c, \quad k = \lfloor c / g \rfloor, \quad g = \lceil C / K \rceil
            \text{ (group fully-connected)}

    Each of the K queries decodes a group of g labels, by their order in the dataset, so that the cost of the decoder
    does not grow with C. There is no self-attention of queries. :math:`Q_0` are random and not trained, since the
    projection of queries in the attention is trained; they are a buffer, and part of checkpoints. Neither positions,
    word vectors nor co-occurrences are used. The match logits are the attention of a label's group.

    The formulas and defaults were compared with the authors' code, not with the paper's text. Word vectors as queries
    (zero-shot recognition) are not implemented.

    Args:
        instance_dim: D, size of a location's feature.
        num_labels: C.
        width: d of the decoder (default: 768, the authors'). A multiple of ``heads``.
        groups: largest K (default: 100, the authors'); with fewer labels, each has its own query.
        heads: of the attention (default: 8, the authors').
        hidden: size of the MLP's hidden layer (default: 2048, the authors').
        dropout: probability of dropout (default: 0.1, the authors').

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are used
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; ``label_states`` are :math:`Q_{3,k}` of each label's group
    """

    queries: Tensor
    group: Tensor

    @checked
    def __init__(
        self,
        instance_dim: Positive,
        num_labels: Positive,
        width: Positive = 768,
        groups: Positive = 100,
        heads: Positive = 8,
        hidden: Positive = 2048,
        dropout: Fraction = 0.1,
    ) -> None:
        group = torch.arange(num_labels) // -(-num_labels // min(groups, num_labels))
        K = int(group[-1]) + 1
        super().__init__(instance_dim, num_labels, width=width, groups=K)
        self.project = LeCunLinear(instance_dim, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.layer = DecoderLayer(width, heads, dropout, hidden, self_attention=False)
        self.classifiers = LabelClassifiers(num_labels, width)
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("queries", torch.randn(K, width))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.queries.normal_()

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        F = torch.relu(self.project(batch.x))
        Q = self.norm(self.queries + self.dropout(self.queries.expand(F.shape[0], -1, -1)))
        Q, attention = self.layer(Q, F, None, batch.mask)
        states = Q[:, self.group]
        return location_output(self.classifiers(states), attention[:, :, self.group], batch, states)
