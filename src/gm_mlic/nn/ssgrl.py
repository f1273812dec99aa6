"""SSGRL: each label looks at the image by itself, then labels that come together talk."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from gm_mlic.errors import ConfigError
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.cooccurrence import conditional_probabilities
from gm_mlic.nn.gm_mlic import ModelOutput
from gm_mlic.nn.mlp import OutLinear
from gm_mlic.nn.whole_image import LabelClassifiers, as_batch, winners


class SemanticDecoupling(nn.Module):
    r"""A feature for each label, from where its word vector points (the paper's semantic decoupling).

    .. math::
        a_{ic} = \underset{i}{\mathrm{softmax}} \;
            p^\top \tanh ( (U^\top f_i) \odot (V^\top w_c) ), \qquad f_c = \sum_i a_{ic} f_i

    The paper has :math:`P^\top \tanh(\cdot) + b` and a linear :math:`f_a` behind it. Two linear maps in a row are one,
    the vector p, and what they add to all locations alike cancels in the softmax: the same functions with fewer
    parameters, and without a state of length d for each location and label.

    Args:
        instance_dim: D, length of a location's feature.
        label_dim: D_l, length of a label's vector.
        width: d, in which the two meet.

    Shapes:
        - **input:** f (B, M, D), mask (B, M), w (C, D_l)
        - **output:** label features (B, C, D), attention (B, M, C), which sums to 1 over the present locations
    """

    def __init__(self, instance_dim: int, label_dim: int, width: int) -> None:
        super().__init__()
        self.U = OutLinear(instance_dim, width, bias=False)
        self.V = OutLinear(label_dim, width, bias=False)
        self.p = OutLinear(width, 1, bias=False)

    def reset_parameters(self) -> None:
        for module in (self.U, self.V, self.p):
            module.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor, label_vectors: Tensor) -> tuple[Tensor, Tensor]:
        met = torch.tanh(self.U(x)[:, :, None] * self.V(label_vectors))
        scores = self.p(met).squeeze(-1).masked_fill(~mask[..., None], float("-inf"))
        attention = scores.softmax(dim=1).to(x.dtype)
        return attention.transpose(1, 2) @ x, attention

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.U.in_features}, {self.V.in_features}, {self.U.out_features})"


class GatedGraphConv(nn.Module):
    r"""One step of a gated graph network (Li et al., ICLR 2016), as in the paper's semantic interaction.

    .. math::
        m_c &= [ \sum_{c'} A_{cc'} h_{c'}, \; \sum_{c'} A_{c'c} h_{c'} ] \\
        z_c, r_c &= \sigma(W [m_c, h_c] + b) \\
        \tilde h_c &= \tanh(W' [m_c, r_c \odot h_c] + b') \\
        h_c &\leftarrow (1 - z_c) \odot h_c + z_c \odot \tilde h_c

    (``torch.nn.GRUCell`` applies r behind a linear map of h instead.)

    Args:
        channels: d, length of a label's state.

    Shapes:
        - **input:** h (B, C, d), A (C, C)
        - **output:** (B, C, d)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.gates = OutLinear(3 * channels, 2 * channels)
        self.candidate = OutLinear(3 * channels, channels)

    def reset_parameters(self) -> None:
        self.gates.reset_parameters()
        self.candidate.reset_parameters()

    def forward(self, h: Tensor, adjacency: Tensor) -> Tensor:
        heard = torch.cat([adjacency @ h, adjacency.T @ h], dim=-1)
        z, r = torch.sigmoid(self.gates(torch.cat([heard, h], dim=-1))).chunk(2, dim=-1)
        new = torch.tanh(self.candidate(torch.cat([heard, r * h], dim=-1)))
        return (1 - z) * h + z * new

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.channels})"


class SSGRL(nn.Module):
    r"""SSGRL, from "Learning Semantic-Specific Graph Representation for Multi-Label Image Recognition"
    (Chen et al., ICCV 2019).

    .. math::
        h^0_c &= f_c \text{, from } \mathrm{SemanticDecoupling} \\
        h^t &= \mathrm{GatedGraphConv}(h^{t-1}, A), \qquad t = 1, \ldots, T \\
        o_c &= \tanh(f_o([h^T_c, h^0_c])), \qquad s_c = w_c^\top o_c + b_c

    :math:`A_{cc'} = P(L_{c'} | L_c)`, counted on the training images; no label is joined to itself. The matches are the
    attention :math:`a_{ic}`.

    Before :meth:`count`, A is zero, and no label hears of another; training calls it, and checkpoints keep what it
    found.

    Args:
        instance_dim: D, length of a location's feature, and of a label's state.
        label_dim: D_l, length of a label's vector.
        num_labels: C.
        width: of the attention (default: 1024, the paper's).
        steps: T (default: 3, the paper's).

    Shapes:
        - **input:** an assignment graph or a batch of them; only instances and label vectors are read
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; ``label_states`` are :math:`h^T`

    Raises:
        ConfigError: for a setting that cannot work.
    """

    adjacency: Tensor

    def __init__(self, instance_dim: int, label_dim: int, num_labels: int, width: int = 1024, steps: int = 3) -> None:
        super().__init__()
        if min(instance_dim, label_dim, num_labels, width, steps) < 1:
            raise ConfigError(
                "model.width, model.steps, both input lengths and the number of labels must be 1 or more."
            )
        self.instance_dim, self.label_dim, self.num_labels, self.steps = instance_dim, label_dim, num_labels, steps
        self.decoupling = SemanticDecoupling(instance_dim, label_dim, width)
        self.conv = GatedGraphConv(instance_dim)
        self.out = OutLinear(2 * instance_dim, instance_dim)
        self.classifiers = LabelClassifiers(num_labels, instance_dim)
        self.register_buffer("adjacency", torch.zeros(num_labels, num_labels))

    def reset_parameters(self) -> None:
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]

    def count(self, targets: Tensor, difficult: Tensor | None = None) -> None:
        """Take the label graph from targets (N, C) in {0, 1} of the training images; difficult ones are left out."""
        self.adjacency.copy_(conditional_probabilities(targets, self.num_labels, difficult))

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        """Score every label of every image of ``data``."""
        batch = as_batch(data, self.instance_dim, self.num_labels, self.label_dim)
        first, attention = self.decoupling(batch.x, batch.mask, batch.label_vectors)
        h = first
        for _ in range(self.steps):
            h = self.conv(h, self.adjacency)
        logits = self.classifiers(torch.tanh(self.out(torch.cat([h, first], dim=-1))))
        return ModelOutput(logits, winners(attention, batch.mask), attention, batch.mask, h)

    def __repr__(self) -> str:
        width = self.decoupling.U.out_features
        return (
            f"{type(self).__name__}({self.instance_dim}, {self.label_dim}, {self.num_labels}, width={width}, "
            f"steps={self.steps})"
        )
