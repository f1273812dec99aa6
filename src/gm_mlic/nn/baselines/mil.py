"""Baseline without graphs: a classifier of single instances, pooled over the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from gm_mlic.errors import ArgumentError
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.graphs.schema import standardize_boxes
from gm_mlic.nn.baselines._common import as_batch
from gm_mlic.nn.mlp import ConcatMLP, Decoder
from gm_mlic.nn.output import ModelOutput, Pooling, pool_instances
from gm_mlic.nn.prior import MatchHead
from gm_mlic.registry import register_model
from gm_mlic.schema import NotNegative, Positive, checked


@register_model("mil_max")
class MILMax(nn.Module):
    r"""Pooled per-instance classifier.

    .. math::
        s_i = \mathrm{Dec}(\mathrm{Enc}([f_i, \sqrt{12} (B_i - 1/2)])) \in \mathbb{R}^C, \qquad
        p_c = \sigma(\max_i s_{ic})

    Multiple-instance learning as in HCP (Wei et al., 2015), on the instances of GM-MLIC: same features and boxes, same
    pooling, no graph and no word vectors. The difference between GM-MLIC and this model is the effect of the graphs.

    Args:
        instance_dim: size of an instance's feature.
        num_labels: C.
        width: size of the hidden layer; null: none, only what ``prior`` and ``linear`` add.
        prior, linear, components, shrinkage, ridge, pooling: as for the model gm_mlic, with a one-hot vector for each
            label.

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are used
        - **output:** :class:`~gm_mlic.nn.ModelOutput`

    Raises:
        ArgumentError: for a size below 1, and if nothing is left to compute.
    """

    one_hot: Tensor

    @checked
    def __init__(
        self,
        instance_dim: Positive,
        num_labels: Positive,
        width: Positive | None = 512,
        *,
        prior: bool = False,
        linear: bool = False,
        components: Positive | None = None,
        shrinkage: NotNegative = 0.0,
        ridge: NotNegative = 1000.0,
        pooling: Pooling = "max",
    ) -> None:
        super().__init__()
        self.instance_dim, self.num_labels, self.width, self.pooling = instance_dim, num_labels, width, pooling
        options: dict[str, Any] = {"components": components, "shrinkage": shrinkage, "ridge": ridge}
        self.head = MatchHead(instance_dim, num_labels, prior=prior, linear=linear, **options)
        self.register_buffer("one_hot", torch.eye(num_labels)[None], persistent=False)
        if width is not None:
            self.encoder = ConcatMLP([self.head.out_channels, 4], width, width, norm=True)
            self.decoder = Decoder([width], width, num_labels, zero=prior)
        elif not prior and not linear:
            raise ArgumentError("width", "is None: the model needs a hidden layer, `prior` or `linear`.")

    def reset_parameters(self) -> None:
        self.head.reset_parameters()
        if self.width is not None:
            self.encoder.reset_parameters()
            self.decoder.reset_parameters()

    def fit_features(self, features: Tensor, label_vectors: Tensor, class_vectors: Tensor | None = None) -> None:
        """Compute the statistics of training instances (N, D); the other arguments are not used."""
        if self.head.standardize is not None:
            self.head.standardize.fit(features)

    def penalty(self) -> Tensor | float:
        """What the training loss adds; see :meth:`MatchHead.penalty`."""
        return self.head.penalty()

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = as_batch(data, self.num_labels, self.instance_dim)
        x = self.head.features(batch.x)
        if self.width is None:
            match_logits = x.new_zeros(*batch.mask.shape, self.num_labels)
        else:
            match_logits = self.decoder(self.encoder(x, standardize_boxes(batch.box)))
        return pool_instances(self.head(match_logits, x, self.one_hot, batch), batch, pooling=self.pooling)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.instance_dim}, {self.num_labels}, width={self.width})"
