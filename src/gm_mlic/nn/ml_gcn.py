"""ML-GCN: Multi-Label Image Recognition with Graph Convolutional Networks (Chen et al., CVPR 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch_geometric.data import HeteroData

from gm_mlic.errors import ConfigError
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.gm_mlic import ModelOutput
from gm_mlic.nn.locations import LabelCompany, LocationModel


class MLGCN(LocationModel):
    r"""Classifiers that a graph convolution makes of the labels' vectors, on globally max-pooled features.

    .. math::
        W = \hat A \, h(\hat A Z \Theta_1) \, \Theta_2 \in \mathbb{R}^{C \times D}, \qquad
        s_c = w_c^\top \max_i f_i

    (eq. 2 to 4 of that paper), Z the label vectors, h LeakyReLU of slope 0.2 and :math:`\hat A` the normalised
    re-weighted correlation matrix, :meth:`adjacency`.

    Args:
        instance_dim: D, length of a location's feature.
        num_labels: C.
        label_dim: length of a label's vector.
        width: of the first convolution (default: the paper's 1024).
        threshold: :math:`\tau` of eq. 7, from which labels are neighbours (default: the paper's 0.4).
        neighbour_weight: p of eq. 8, the neighbours' share (default: the paper's 0.2).

    Shapes:
        - **input:** an assignment graph or a batch of them; its instances and label vectors are read
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; match logits are :math:`w_c^\top f_i`

    Raises:
        ConfigError: for a size below 1, or a share out of [0, 1).
    """

    def __init__(
        self,
        instance_dim: int,
        num_labels: int,
        label_dim: int,
        width: int = 1024,
        threshold: float = 0.4,
        neighbour_weight: float = 0.2,
    ) -> None:
        super().__init__(instance_dim, num_labels, label_dim)
        if width < 1 or not 0 <= neighbour_weight < 1:
            raise ConfigError("model.width must be 1 or more, and model.neighbour_weight from 0 to below 1.")
        self.threshold, self.neighbour_weight = threshold, neighbour_weight
        self.company = LabelCompany(num_labels)
        self.conv1 = nn.Linear(label_dim, width, bias=False)
        self.conv2 = nn.Linear(width, instance_dim, bias=False)

    def adjacency(self) -> Tensor:
        r""":math:`\hat A = D^{-1/2} A' D^{-1/2}` of the re-weighted matrix, eq. 7 and 8 there.

        :math:`A_{ij} = [P(L_j \mid L_i) \ge \tau]`, :math:`A'_{ij} = p A_{ij} / \sum_{j \ne i} A_{ij}` and
        :math:`A'_{ii} = 1 - p`; a label without neighbours keeps 1.
        """
        neighbours = (self.company.probability >= self.threshold).to(self.company.probability.dtype)
        neighbours = neighbours * (1 - torch.eye(self.num_labels, device=neighbours.device))
        degree = neighbours.sum(dim=1, keepdim=True)
        own = torch.where(degree > 0, 1 - self.neighbour_weight, 1.0)
        weighted = self.neighbour_weight * neighbours / degree.clamp(min=1) + torch.diag(own.flatten())
        scale = weighted.sum(dim=1).rsqrt()
        return scale[:, None] * weighted * scale

    def classifiers(self, label_vectors: Tensor) -> Tensor:
        """W (C, D)."""
        adjacency = self.adjacency()
        hidden = leaky_relu(adjacency @ self.conv1(label_vectors), 0.2)
        out: Tensor = adjacency @ self.conv2(hidden)
        return out

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        """Score every label of every image of ``data``."""
        batch = self.locations(data)
        W = self.classifiers(batch.label_vectors)
        pooled = batch.x.masked_fill(~batch.mask[..., None], float("-inf")).amax(dim=1)
        return self.output(pooled @ W.T, batch.x @ W.T, batch.mask)
