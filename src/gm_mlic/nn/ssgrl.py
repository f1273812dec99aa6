"""SSGRL: Learning Semantic-Specific Graph Representation for Multi-Label Image Recognition (Chen et al., ICCV 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from gm_mlic.errors import ConfigError
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.gm_mlic import ModelOutput
from gm_mlic.nn.locations import LabelCompany, LocationModel


class SemanticDecoupling(nn.Module):
    r"""A feature of the image for each label, by attention that the label's vector guides (eq. 2 to 5 of that paper).

    .. math::
        \tilde f_{c,i} = P^\top \tanh((U^\top f_i) \odot (V^\top x_c)) + b, \quad
        a_{c,i} = \operatorname{softmax}_i(w^\top \tilde f_{c,i}), \quad
        f_c = \sum_i a_{c,i} f_i

    :math:`w^\top P^\top` is one vector, and b changes no softmax: they are computed as one.

    Args:
        instance_dim: D, length of a location's feature.
        label_dim: length of a label's vector.
        width: of the joint space.
    """

    def __init__(self, instance_dim: int, label_dim: int, width: int) -> None:
        super().__init__()
        self.U = nn.Linear(instance_dim, width, bias=False)
        self.V = nn.Linear(label_dim, width, bias=False)
        self.attend = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor, mask: Tensor, label_vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C, D) and attention (B, M, C), from x (B, M, D), mask (B, M) and label vectors (C, D_l)."""
        joint = torch.tanh(self.U(x)[:, :, None] * self.V(label_vectors))
        logits = self.attend(joint).squeeze(-1).masked_fill(~mask[..., None], float("-inf"))
        attention = logits.softmax(dim=1)
        return attention.transpose(1, 2) @ x, attention


class GatedGraph(nn.Module):
    r"""Gated recurrent updates over the labels' graph (eq. 6 and 7 there), with weights :math:`a_{cc'}`.

    .. math::
        a_c^t &= [\sum_{c'} a_{cc'} h_{c'}^{t-1}, \sum_{c'} a_{c'c} h_{c'}^{t-1}] \\
        z &= \sigma(W^z a + U^z h), \quad r = \sigma(W^r a + U^r h), \quad
        \tilde h = \tanh(W a + U (r \odot h)), \quad h^t = (1 - z) \odot h + z \odot \tilde h

    Args:
        channels: length of a state.
        steps: T.
    """

    def __init__(self, channels: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.W = nn.Linear(2 * channels, 3 * channels)
        self.U_gates = nn.Linear(channels, 2 * channels, bias=False)
        self.U = nn.Linear(channels, channels, bias=False)

    def forward(self, h: Tensor, weights: Tensor) -> Tensor:
        """H (B, C, d), weights (C, C) -> (B, C, d)."""
        for _ in range(self.steps):
            heard = self.W(torch.cat([weights @ h, weights.T @ h], dim=-1))
            z_a, r_a, h_a = heard.chunk(3, dim=-1)
            z_h, r_h = self.U_gates(h).chunk(2, dim=-1)
            z, r = torch.sigmoid(z_a + z_h), torch.sigmoid(r_a + r_h)
            h = (1 - z) * h + z * torch.tanh(h_a + self.U(r * h))
        return h


class SSGRL(LocationModel):
    r"""Semantic decoupling, then a gated graph over the labels, then a classifier for each.

    .. math:: o_c = \tanh(F_o([h_c^T, f_c])), \qquad s_c = w_c^\top o_c + b_c

    (eq. 8 there), the graph's weights being :math:`P(L_{c'} \mid L_c)` of the training set.

    Args:
        instance_dim: D, length of a location's feature, and of the labels' states.
        num_labels: C.
        label_dim: length of a label's vector.
        width: of the attention's joint space (default: the paper's 1024).
        steps: T (default: the paper's 3).

    Shapes:
        - **input:** an assignment graph or a batch of them; its instances and label vectors are read
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; its matches are the attention weights

    Raises:
        ConfigError: for a size below 1.
    """

    def __init__(self, instance_dim: int, num_labels: int, label_dim: int, width: int = 1024, steps: int = 3) -> None:
        super().__init__(instance_dim, num_labels, label_dim)
        if min(width, steps) < 1:
            raise ConfigError("model.width and model.steps must be 1 or more.")
        self.company = LabelCompany(num_labels)
        self.decoupling = SemanticDecoupling(instance_dim, label_dim, width)
        self.graph = GatedGraph(instance_dim, steps)
        self.out = nn.Linear(2 * instance_dim, instance_dim)
        self.weight = nn.Parameter(torch.empty(num_labels, instance_dim))
        self.bias = nn.Parameter(torch.zeros(num_labels))
        self._reset_classifiers()

    def _reset_classifiers(self) -> None:
        bound = 1 / math.sqrt(self.instance_dim)  # as nn.Linear
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        self._reset_classifiers()

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        """Score every label of every image of ``data``."""
        batch = self.locations(data)
        features, attention = self.decoupling(batch.x, batch.mask, batch.label_vectors)
        states = self.graph(features, self.company.probability)
        outputs = torch.tanh(self.out(torch.cat([states, features], dim=-1)))
        return self.output((outputs * self.weight).sum(dim=-1) + self.bias, attention, batch.mask)
