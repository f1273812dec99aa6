"""TSGCN: classifiers from a label graph of co-occurrences and one of positions in the image."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor
from torch_geometric.data import HeteroData

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import (
    GCNLayer,
    LeCunLinear,
    WholeImageModel,
    conditional_probabilities,
    label_classifiers,
    location_output,
)  # fmt: skip
from gm_mlic.nn.baselines.ml_gcn import reweighted_adjacency
from gm_mlic.nn.output import ModelOutput
from gm_mlic.registry import register_model
from gm_mlic.schema import Positive, checked


def spatial_adjacency(position: Tensor, radius: float) -> Tensor:
    r"""The label graph of an image, by distance: :math:`A_{cc'} = \mathrm{softmax}_{c'} (-|\mu_c - \mu_{c'}|^2 / r^2)`.

    Args:
        position: (B, C, 2), :math:`\mu_c`, divided by image width and height.
        radius: r.

    Returns:
        (B, C, C), whose rows sum to 1.
    """
    distance = (position[:, :, None] - position[:, None]).square().sum(dim=-1)
    return (-distance / radius**2).softmax(dim=-1)


@register_model("tsgcn")
class TSGCN(WholeImageModel):
    r"""TSGCN, after "Joint Input and Output Space Learning for Multi-Label Image Classification" (Xu et al., TMM 2021).

    .. math::
        a_{ic} &= \underset{i}{\mathrm{softmax}} \; u_c^\top f_i, \qquad f_c = \sum_i a_{ic} f_i
            \text{ (label-specific pooling)} \\
        \mathbf{W} &= \mathrm{GCN}(\hat A, Z) + \mathrm{GCN}'(A', Z) \text{ (two streams)} \\
        s_c &= \mathbf{w}_c^\top f_c

    Z are the labels' word vectors. Both GCNs have two layers, as that of the model ml_gcn. :math:`\hat A` is the label
    semantic graph, ``reweighted_adjacency`` of ml_gcn. :math:`A'` is the object spatial graph of the image,
    :func:`spatial_adjacency` of the labels' positions :math:`\mu_c = \sum_i a_{ic} b_i` with :math:`b_i` the center of
    location i. The match logits are the attention :math:`a_{ic}`.

    Not checked against the paper: only its abstract was available. It names the two parts (label-specific pooling, and
    a two-stream GCN over object spatial graphs and label semantic graphs, which gives classifiers). All formulas and
    sizes are decided here, above all the nodes and weights of :math:`A'`: results may differ from the paper's model.

    :math:`\hat A` is the identity until :meth:`fit` sets it from the training targets. It is a buffer, and part of
    checkpoints.

    Args:
        instance_dim: D, size of a location's feature.
        label_dim: D_l, size of a label's vector.
        num_labels: C.
        width: size between the convolutions of both GCNs (default: 1024, as in ML-GCN).
        radius: r of the spatial graph, in image sides (default: 0.25).

    Shapes:
        - **input:** an assignment graph or a batch of them; only instances and label vectors are used
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; ``label_states`` are :math:`f_c`
    """

    adjacency: Tensor

    @checked
    def __init__(
        self,
        instance_dim: Positive,
        label_dim: Positive,
        num_labels: Positive,
        width: Positive = 1024,
        radius: Annotated[float, Gt(0)] = 0.25,
    ) -> None:
        super().__init__(instance_dim, num_labels, label_dim, width=width)
        self.radius = radius
        self.activation = LeCunLinear(instance_dim, num_labels, bias=False)
        self.semantic1, self.semantic2 = GCNLayer(label_dim, width), GCNLayer(width, instance_dim)
        self.spatial1, self.spatial2 = GCNLayer(label_dim, width), GCNLayer(width, instance_dim)
        self.register_buffer("adjacency", torch.eye(num_labels))

    def fit(self, targets: Tensor, difficult: Tensor | None = None) -> None:
        """Set the semantic graph from targets (N, C) in {0, 1} of the training images; difficult ones are left out."""
        self.adjacency.copy_(reweighted_adjacency(conditional_probabilities(targets, self.num_labels, difficult)))

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        scores = self.activation(batch.x).masked_fill(~batch.mask[..., None], float("-inf"))
        attention = scores.softmax(dim=1).to(batch.x.dtype)
        features = attention.transpose(1, 2) @ batch.x
        center = (batch.box[..., :2] + batch.box[..., 2:]).to(batch.x.dtype) / 2
        spatial = spatial_adjacency(attention.transpose(1, 2) @ center, self.radius)
        W = label_classifiers(batch.label_vectors, self.adjacency, self.semantic1, self.semantic2)
        W = W + label_classifiers(batch.label_vectors, spatial, self.spatial1, self.spatial2)
        with torch.autocast(batch.x.device.type, enabled=False):  # rounded logits would be equal
            logits = (W.to(batch.x.dtype) * features.to(batch.x.dtype)).sum(dim=-1)
        return location_output(logits, attention, batch, features)
