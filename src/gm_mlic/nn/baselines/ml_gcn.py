"""ML-GCN: a graph convolutional network over the labels' word vectors computes the classifiers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import (
    GCNLayer,
    WholeImageModel,
    conditional_probabilities,
    label_classifiers,
    location_output,
)  # fmt: skip
from gm_mlic.nn.output import ModelOutput
from gm_mlic.registry import register_model
from gm_mlic.schema import Fraction, Positive, Probability, checked


def reweighted_adjacency(P: Tensor, tau: float = 0.4, p: float = 0.2) -> Tensor:
    r"""The label graph of ML-GCN, from conditional probabilities.

    .. math::
        A_{ij} = [P_{ij} \ge \tau] \text{ (eq. 7)}, \qquad
        A'_{ij} = \begin{cases} p A_{ij} / \sum_{k \ne i} A_{ik} & i \ne j \\ 1 - p & i = j \end{cases}
        \text{ (eq. 8)}, \qquad \hat A = D^{-1/2} A' D^{-1/2}

    with :math:`D_{ii} = \sum_j A'_{ij}`. A label without neighbors keeps only its self-loop. Unlike eq. 8, the
    authors' code has p = 0.25, self-loops of weight 1, and the transpose of A: the neighbors of a label are those that
    imply it.

    Args:
        P: (C, C), :math:`P_{ij} = P(L_j | L_i)` (eq. 6).
        tau: :math:`\tau`, below which co-occurrences are treated as noise.
        p: weight of the neighbors in a label's new state.

    Returns:
        (C, C), :math:`\hat A`.
    """
    A = (tau <= P).to(P.dtype).fill_diagonal_(0)
    A = p * A / A.sum(dim=1, keepdim=True).clamp(min=1)
    A.fill_diagonal_(1 - p)
    scale = A.sum(dim=1).rsqrt()
    return scale[:, None] * A * scale


@register_model("ml_gcn")
class MLGCN(WholeImageModel):
    r"""ML-GCN, from "Multi-Label Image Recognition with Graph Convolutional Networks" (Chen et al., CVPR 2019).

    .. math::
        x &= \max_i f_i \text{, of each channel (eq. 3)} \\
        \mathbf{W} &= \hat A \; \mathrm{LeakyReLU}(\hat A Z W_0) \; W_1 \text{ (eq. 2 twice)} \\
        s &= \mathbf{W} x \text{ (eq. 4)}

    Z are the labels' word vectors, :math:`\hat A` is :func:`reweighted_adjacency`: co-occurring labels get similar
    classifiers. No activation follows the second convolution, as in the authors' code. The match logits
    :math:`\mathbf{W} f_i` are the class activation map.

    :math:`\hat A` is the identity until :meth:`fit` sets it from the training targets. It is a buffer, and part of
    checkpoints.

    Args:
        instance_dim: D, size of a location's feature.
        label_dim: D_l, size of a label's vector.
        num_labels: C.
        width: size between the two convolutions (default: 1024, the paper's).
        tau: threshold of P(label | other label) for an edge of the label graph (:func:`reweighted_adjacency`; default:
            0.4, the paper's).
        p: weight of the neighbors in the adjacency (default: 0.2, the paper's).

    Shapes:
        - **input:** an assignment graph or a batch of them; only instances and label vectors are used
        - **output:** :class:`~gm_mlic.nn.ModelOutput`
    """

    adjacency: Tensor

    @checked
    def __init__(
        self,
        instance_dim: Positive,
        label_dim: Positive,
        num_labels: Positive,
        width: Positive = 1024,
        tau: Probability = 0.4,
        p: Fraction = 0.2,
    ) -> None:
        super().__init__(instance_dim, num_labels, label_dim, width=width)
        self.tau, self.p = tau, p
        self.conv1 = GCNLayer(label_dim, width)
        self.conv2 = GCNLayer(width, instance_dim)
        self.register_buffer("adjacency", torch.eye(num_labels))

    def fit(self, targets: Tensor, difficult: Tensor | None = None) -> None:
        """Set the label graph from targets (N, C) in {0, 1} of the training images; difficult ones are left out."""
        P = conditional_probabilities(targets, self.num_labels, difficult)
        self.adjacency.copy_(reweighted_adjacency(P, self.tau, self.p))

    def classifiers(self, label_vectors: Tensor) -> Tensor:
        """(C, D), the classifiers of labels with these vectors (C, D_l)."""
        return label_classifiers(label_vectors, self.adjacency, self.conv1, self.conv2)

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        W = self.classifiers(batch.label_vectors)
        pooled = batch.x.masked_fill(~batch.mask[..., None], float("-inf")).amax(dim=1)
        with torch.autocast(pooled.device.type, enabled=False):  # rounded logits would be equal
            W = W.to(pooled.dtype)
            logits, matches = pooled @ W.T, batch.x @ W.T
        return location_output(logits, matches, batch)
