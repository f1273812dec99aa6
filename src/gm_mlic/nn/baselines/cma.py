"""CMA: attention by the cosine between locations and embeddings of a label graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch_geometric.data import HeteroData

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import (
    LabelClassifiers,
    WholeImageModel,
    conditional_probabilities,
    location_output,
)  # fmt: skip
from gm_mlic.nn.mlp import ConcatMLP
from gm_mlic.nn.output import ModelOutput
from gm_mlic.registry import register_model
from gm_mlic.schema import Positive, Probability, checked

#: Gradient steps and learning rate of the embedding of the label graph.
STEPS, RATE = 500, 0.02


def similarity_loss(e: Tensor, A: Tensor, threshold: float) -> Tensor:
    r"""How far cosines of label embeddings are from the weights of a label graph.

    .. math::
        L = \sum_{i \ne j} o_{ij} (\cos(e_i, e_j) - A_{ij})^2, \qquad
        o_{ij} = \begin{cases} 0 & A_{ij} < \alpha \text{ and } \cos(e_i, e_j) < \alpha \\ 1 & \text{else} \end{cases}

    Args:
        e: (C, d) embeddings.
        A: (C, C), symmetric.
        threshold: :math:`\alpha`, below which weights and cosines are treated as equal.

    Returns:
        scalar.
    """
    unit = normalize(e, dim=1)
    cosine = unit @ unit.T
    counted = (threshold <= A) | (threshold <= cosine.detach())
    return ((cosine - A).square() * counted.fill_diagonal_(False)).sum()


@register_model("cma")
class CMA(WholeImageModel):
    r"""CMA, from "Cross-Modality Attention with Semantic Graph Embedding" (You et al., AAAI 2020).

    .. math::
        e &= \underset{e}{\mathrm{argmin}} \; L(e, A) \text{ (similarity_loss: adjacency-based similarity graph
            embedding)} \\
        v_i &= \mathrm{MLP}(f_i) \text{ (cross-modality transformer)} \\
        z_{ic} &= \mathrm{ReLU}(\cos(v_i, e_c)), \qquad a_{ic} = z_{ic} / \sum_i z_{ic} \text{ (cross-modality
            attention)} \\
        h_c &= \sum_i a_{ic} v_i, \qquad s_c = w_c^\top h_c + b_c

    A is the mean of :math:`P(L_{c'} | L_c)` and :math:`P(L_c | L_{c'})`, counted on the training images. :meth:`fit`
    counts and computes e, by gradient steps from random embeddings. Until then e is random. It is a buffer, and part of
    checkpoints. Where no cosine of a label is positive, its attention is uniform. The match logits are the cosines.

    Not checked against the paper: of its text, only the abstract and a summary were available. From these are the three
    modules and their order; the formulas are written from memory. Decided here: A, the sizes of the MLP and e,
    embeddings without word vectors, and the uniform attention. The multi-scale version (MS-CMA) needs several layers of
    the backbone and is not implemented.

    Args:
        instance_dim: D, size of a location's feature.
        num_labels: C.
        width: size of v and e (default: 256), and of the MLP's hidden layer.
        threshold: :math:`\alpha`, below which co-occurrences are treated as none (default: 0.1).

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are used
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; ``label_states`` are h
    """

    embeddings: Tensor

    @checked
    def __init__(
        self, instance_dim: Positive, num_labels: Positive, width: Positive = 256, threshold: Probability = 0.1
    ) -> None:
        super().__init__(instance_dim, num_labels, width=width)
        self.threshold = threshold
        self.transform = ConcatMLP([instance_dim], width, width)
        self.classifiers = LabelClassifiers(num_labels, width)
        self.register_buffer("embeddings", torch.randn(num_labels, width))

    def fit(self, targets: Tensor, difficult: Tensor | None = None) -> None:
        """Set the embeddings from targets (N, C) in {0, 1} of the training images; difficult ones are left out."""
        P = conditional_probabilities(targets, self.num_labels, difficult)
        A = ((P + P.T) / 2).to(self.embeddings.device)
        start = torch.randn(self.embeddings.shape, generator=torch.Generator().manual_seed(0))
        e = start.to(self.embeddings.device).requires_grad_()
        optimizer = torch.optim.Adam([e], lr=RATE)
        with torch.enable_grad():
            for _ in range(STEPS):
                optimizer.zero_grad()
                similarity_loss(e, A, self.threshold).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        self.embeddings.copy_(e.detach())

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        v = self.transform(batch.x)
        cosine = normalize(v, dim=-1) @ normalize(self.embeddings, dim=-1).to(v.dtype).T
        z = torch.relu(cosine).masked_fill(~batch.mask[..., None], 0)
        # Uniform where no cosine is positive: otherwise the label would get no gradient from this image.
        z = torch.where(z.any(dim=1, keepdim=True), z, batch.mask[..., None].to(z.dtype))
        attention = z / z.sum(dim=1, keepdim=True)
        h = attention.transpose(1, 2) @ v
        return location_output(self.classifiers(h), cosine, batch, h)
