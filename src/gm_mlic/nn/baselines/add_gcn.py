"""ADD-GCN: attention maps give a vector for each label, and these vectors the label graph of an image."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch_geometric.data import HeteroData

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import (
    SLOPE,
    DynamicAdjacency,
    GCNLayer,
    LabelClassifiers,
    LeCunLinear,
    LogitLinear,
    WholeImageModel,
    init_uniform,
    location_output,
)  # fmt: skip
from gm_mlic.nn.output import ModelOutput
from gm_mlic.registry import register_model
from gm_mlic.schema import Positive, checked


@register_model("add_gcn")
class ADDGCN(WholeImageModel):
    r"""ADD-GCN, from "Attention-Driven Dynamic Graph Convolutional Network" (Ye et al., ECCV 2020).

    .. math::
        m_{ic} &= u_c^\top f_i, \qquad v_c = \sum_i \sigma(m_{ic}) \, \mathrm{Linear}(f_i)
            \text{ (semantic attention module)} \\
        H &= V + \mathrm{LeakyReLU}(A_s V W_s) \text{ (static GCN)} \\
        Z &= V + \mathrm{LeakyReLU}(A_d H W_d) \text{ (dynamic GCN)} \\
        s_c &= \tfrac{1}{2} ( \max_i m_{ic} + w_c^\top z_c + b_c )

    :math:`A_s` is learned and the same for all images. :math:`A_d` is ``DynamicAdjacency`` of H and its mean over
    labels. Neither word vectors nor co-occurrences are used. The match logits are the class activation map
    :math:`m_{ic}`.

    The formulas were compared with the authors' code, not with the paper's text. Both sums with V, and the maximum, are
    those of the code, and so is the initialization, uniform in :math:`\pm 1 / \sqrt{\mathrm{fan\ in}}`. Left out are
    its batch normalization of the global vector, with which a batch of one image could not be trained, its biases in
    the GCN, and its second LeakyReLU in each layer of the GCN.

    Args:
        instance_dim: D, size of a location's feature.
        num_labels: C.
        width: size of a label's vector (default: 1024, the authors').

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are used
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; ``label_states`` are Z
    """

    @checked
    def __init__(self, instance_dim: Positive, num_labels: Positive, width: Positive = 1024) -> None:
        super().__init__(instance_dim, num_labels, width=width)
        self.activation = LogitLinear(instance_dim, num_labels, bias=False)
        self.project = LeCunLinear(instance_dim, width)
        self.static_adjacency = nn.Parameter(torch.empty(num_labels, num_labels))
        self.static_conv = GCNLayer(width, width)
        self.dynamic_adjacency = DynamicAdjacency(width, width, num_labels)
        self.dynamic_conv = GCNLayer(width, width)
        self.classifiers = LabelClassifiers(num_labels, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_uniform(*self.children())
        nn.init.uniform_(self.static_adjacency, -1 / math.sqrt(self.num_labels), 1 / math.sqrt(self.num_labels))

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        maps = self.activation(batch.x).masked_fill(~batch.mask[..., None], float("-inf"))
        V = maps.sigmoid().transpose(1, 2) @ self.project(batch.x)
        H = V + nn.functional.leaky_relu(self.static_conv(V, self.static_adjacency), SLOPE)
        A = self.dynamic_adjacency(H, H.mean(dim=1))
        Z = V + nn.functional.leaky_relu(self.dynamic_conv(H, A), SLOPE)
        return location_output((maps.amax(dim=1) + self.classifiers(Z)) / 2, maps, batch, Z)
