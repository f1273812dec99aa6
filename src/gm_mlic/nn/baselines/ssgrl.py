"""SSGRL: label-specific attention, then message passing over the co-occurrence graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import (
    Composite,
    LabelClassifiers,
    LeCunLinear,
    WholeImageModel,
    conditional_probabilities,
    location_output,
)  # fmt: skip
from gm_mlic.nn.output import ModelOutput
from gm_mlic.registry import register_model
from gm_mlic.schema import Positive, checked


class SemanticDecoupling(Composite):
    r"""A feature for each label, by attention guided by its word vector (the paper's semantic decoupling).

    .. math::
        a_{ic} = \underset{i}{\mathrm{softmax}} \;
            p^\top \tanh ( (U^\top f_i) \odot (V^\top w_c) ), \qquad f_c = \sum_i a_{ic} f_i

    The paper has :math:`P^\top \tanh(\cdot) + b` and a linear :math:`f_a` behind it. Two linear maps in a row are
    equal to one, the vector p, and constants cancel in the softmax: the same functions with fewer parameters, and
    without a state of length d for each location and label.

    Args:
        instance_dim: D, size of a location's feature.
        label_dim: D_l, size of a label's vector.
        width: d, size of the projections.

    Shapes:
        - **input:** f (B, M, D), mask (B, M), w (C, D_l)
        - **output:** label features (B, C, D), attention (B, M, C), which sums to 1 over the present locations
    """

    def __init__(self, instance_dim: int, label_dim: int, width: int) -> None:
        super().__init__()
        self.U = LeCunLinear(instance_dim, width, bias=False)
        self.V = LeCunLinear(label_dim, width, bias=False)
        self.p = LeCunLinear(width, 1, bias=False)

    def forward(self, x: Tensor, mask: Tensor, label_vectors: Tensor) -> tuple[Tensor, Tensor]:
        fused = torch.tanh(self.U(x)[:, :, None] * self.V(label_vectors))
        scores = self.p(fused).squeeze(-1).masked_fill(~mask[..., None], float("-inf"))
        attention = scores.softmax(dim=1).to(x.dtype)
        return attention.transpose(1, 2) @ x, attention

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.U.in_features}, {self.V.in_features}, {self.U.out_features})"


class GGNNStep(Composite):
    r"""One step of a gated graph network (Li et al., ICLR 2016), as in the paper's semantic interaction.

    .. math::
        m_c &= [ \sum_{c'} A_{cc'} h_{c'}, \; \sum_{c'} A_{c'c} h_{c'} ] \\
        z_c, r_c &= \sigma(W [m_c, h_c] + b) \\
        \tilde h_c &= \tanh(W' [m_c, r_c \odot h_c] + b') \\
        h_c &\leftarrow (1 - z_c) \odot h_c + z_c \odot \tilde h_c

    (``torch.nn.GRUCell`` applies r after a linear map of h instead.)

    Args:
        channels: d, length of a label's state.

    Shapes:
        - **input:** h (B, C, d), A (C, C)
        - **output:** (B, C, d)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.gates = LeCunLinear(3 * channels, 2 * channels)
        self.candidate = LeCunLinear(3 * channels, channels)

    def forward(self, h: Tensor, adjacency: Tensor) -> Tensor:
        messages = torch.cat([adjacency @ h, adjacency.T @ h], dim=-1)
        z, r = torch.sigmoid(self.gates(torch.cat([messages, h], dim=-1))).chunk(2, dim=-1)
        new = torch.tanh(self.candidate(torch.cat([messages, r * h], dim=-1)))
        return (1 - z) * h + z * new

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.channels})"


@register_model("ssgrl")
class SSGRL(WholeImageModel):
    r"""SSGRL, from "Learning Semantic-Specific Graph Representation for Multi-Label Image Recognition"
    (Chen et al., ICCV 2019).

    .. math::
        h^0_c &= f_c \text{, from } \mathrm{SemanticDecoupling} \\
        h^t &= \mathrm{GGNNStep}(h^{t-1}, A), \qquad t = 1, \ldots, T \\
        o_c &= \tanh(f_o([h^T_c, h^0_c])), \qquad s_c = w_c^\top o_c + b_c

    :math:`A_{cc'} = P(L_{c'} | L_c)`, counted on the training images; its diagonal is zero. The match logits are
    the attention :math:`a_{ic}`.

    A is zero until :meth:`fit` sets it from the training targets. It is a buffer, and part of checkpoints.

    Args:
        instance_dim: D, size of a location's feature, and of a label's state.
        label_dim: D_l, size of a label's vector.
        num_labels: C.
        width: width of the attention (default: 1024, the paper's).
        steps: T, number of message-passing steps (default: 3, the paper's).

    Shapes:
        - **input:** an assignment graph or a batch of them; only instances and label vectors are used
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; ``label_states`` are :math:`h^T`
    """

    adjacency: Tensor

    @checked
    def __init__(
        self,
        instance_dim: Positive,
        label_dim: Positive,
        num_labels: Positive,
        width: Positive = 1024,
        steps: Positive = 3,
    ) -> None:
        super().__init__(instance_dim, num_labels, label_dim, width=width, steps=steps)
        self.steps = steps
        self.decoupling = SemanticDecoupling(instance_dim, label_dim, width)
        self.conv = GGNNStep(instance_dim)
        self.out = LeCunLinear(2 * instance_dim, instance_dim)
        self.classifiers = LabelClassifiers(num_labels, instance_dim)
        self.register_buffer("adjacency", torch.zeros(num_labels, num_labels))

    def fit(self, targets: Tensor, difficult: Tensor | None = None) -> None:
        """Set the label graph from targets (N, C) in {0, 1} of the training images; difficult ones are left out."""
        self.adjacency.copy_(conditional_probabilities(targets, self.num_labels, difficult))

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        first, attention = self.decoupling(batch.x, batch.mask, batch.label_vectors)
        h = first
        for _ in range(self.steps):
            h = self.conv(h, self.adjacency)
        logits = self.classifiers(torch.tanh(self.out(torch.cat([h, first], dim=-1))))
        return location_output(logits, attention, batch, h)
