"""C-Tran: a transformer encoder over locations and labels, trained with some labels given."""

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
from gm_mlic.schema import Fraction, Positive, Probability, checked

#: Logit of a label that is given in training; its cross-entropy is below 1e-8, its gradient zero.
GIVEN = 20.0


def random_known(unknown: Tensor, share: float) -> Tensor:
    """Labels that are given in a step of training: of each image a random number, from 0 to ``share`` C, of them.

    Args:
        unknown: (B, C) bool, labels that are never given.
        share: largest part of labels that are given.

    Returns:
        (B, C) bool.
    """
    B, C = unknown.shape
    count = torch.randint(int(share * C) + 1, (B, 1), device=unknown.device)
    rank = torch.rand(B, C, device=unknown.device).argsort(dim=1).argsort(dim=1)
    return (rank < count) & ~unknown


@register_model("c_tran")
class CTran(WholeImageModel):
    r"""C-Tran, from "General Multi-label Image Classification with Transformers" (Lanchantin et al., CVPR 2021).

    .. math::
        H_0 &= \mathrm{LN}([f_1, \ldots, f_M, l_1 + t_1, \ldots, l_C + t_C]) \\
        H_l &= \mathrm{EncoderLayer}(H_{l-1}), \qquad l = 1, \ldots, L \\
        s_c &= w_c^\top H_{L,M+c} + b_c

    :math:`l_c` is a learned embedding of label c, and :math:`t_c` one of its state: a learned vector for positive, one
    for negative, and zero for unknown. Without targets, all labels are unknown.

    *Label mask training:* in training mode, a random part of an image's labels, at most 1 - ``unknown`` of them, is
    given by their states, and only the others enter the loss: the logits of given labels are replaced by +-20 with the
    sign of their targets, of which the loss and its gradient are zero. The targets are those of the graphs. Difficult
    labels (VOC) are always unknown. The mean over labels thus includes zeros for given labels; the authors' code sums.

    The match logits are the attention of labels to locations in the last layer. Neither positions, word vectors nor
    co-occurrences are used, as in the authors' code, in which the state of unknown labels is a fixed random vector. The
    formulas and defaults were compared with that code, not with the paper's text.

    Args:
        instance_dim: D, size of a location's feature.
        num_labels: C.
        width: d of the transformer, a multiple of ``heads``; default D without projection, as in the authors' code
            (2048 for ResNet-101). The layers' MLPs have d hidden units.
        layers: L, number of encoder layers (default: 3, the authors').
        heads: heads of each attention (default: 4, the authors').
        dropout: probability of dropout (default: 0.1, the authors').
        unknown: smallest part of labels that is unknown in training (default: 0.25, the authors'); 1 disables label
            mask training.

    Shapes:
        - **input:** an assignment graph or a batch of them; its instances are used, and in training its targets
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; ``label_states`` are :math:`H_L` of the labels
    """

    @checked
    def __init__(
        self,
        instance_dim: Positive,
        num_labels: Positive,
        width: Positive | None = None,
        layers: Positive = 3,
        heads: Positive = 4,
        dropout: Fraction = 0.1,
        unknown: Probability = 0.25,
    ) -> None:
        projected, width = width is not None, instance_dim if width is None else width
        super().__init__(instance_dim, num_labels, width=width, layers=layers)
        self.unknown = unknown
        self.project = LeCunLinear(instance_dim, width) if projected else nn.Identity()
        self.labels = nn.Embedding(num_labels, width)
        self.states = nn.Embedding(2, width)  # absent, present
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            DecoderLayer(width, heads, dropout, width, self_attention=False) for _ in range(layers)
        )
        self.classifiers = LabelClassifiers(num_labels, width)

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        B, M = batch.mask.shape
        x = self.project(batch.x)
        labels = self.labels.weight.expand(B, -1, -1)
        known = present = torch.zeros(B, self.num_labels, dtype=torch.bool, device=x.device)
        if self.training and batch.y is not None and self.unknown < 1:
            present = batch.y > 0
            difficult = torch.zeros_like(present) if batch.difficult is None else batch.difficult
            known = random_known(difficult, 1 - self.unknown)
            labels = labels + self.states(present.long()) * known[..., None]
        H = self.norm(torch.cat([x, labels.to(x.dtype)], dim=1))
        mask = torch.cat([batch.mask, batch.mask.new_ones(B, self.num_labels)], dim=1)
        for layer in self.layers:
            H, attention = layer(H, H, None, mask)
        states = H[:, M:]
        logits = self.classifiers(states)
        logits = torch.where(known, torch.where(present, GIVEN, -GIVEN).to(logits.dtype), logits)
        return location_output(logits, attention[:, :M, M:], batch, states)
