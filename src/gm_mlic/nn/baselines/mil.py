"""Baseline without graphs: a classifier of single instances, max-pooled over the image."""

from __future__ import annotations

from torch import nn
from torch_geometric.data import HeteroData

from gm_mlic.errors import check_positive
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.graphs.schema import standardize_boxes
from gm_mlic.nn.baselines._common import as_batch
from gm_mlic.nn.mlp import ConcatMLP, Decoder
from gm_mlic.nn.output import ModelOutput, max_pool_instances
from gm_mlic.registry import register_model


@register_model("mil_max")
class MILMax(nn.Module):
    r"""Max-pooled per-instance classifier.

    .. math::
        s_i = \mathrm{Dec}(\mathrm{Enc}([f_i, \sqrt{12} (B_i - 1/2)])) \in \mathbb{R}^C, \qquad
        p_c = \sigma(\max_i s_{ic})

    Multiple-instance learning as in HCP (Wei et al., 2015), on the instances of GM-MLIC: same features and boxes, same
    pooling, no graph and no word vectors. The difference between GM-MLIC and this model is the effect of the graphs.

    Args:
        instance_dim: size of an instance's feature.
        num_labels: C.
        width: size of the hidden layer (default: 512).

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are read
        - **output:** :class:`~gm_mlic.nn.ModelOutput`

    Raises:
        ArgumentError: for a size below 1.
    """

    def __init__(self, instance_dim: int, num_labels: int, width: int = 512) -> None:
        super().__init__()
        check_positive(instance_dim=instance_dim, num_labels=num_labels, width=width)
        self.instance_dim, self.num_labels, self.width = instance_dim, num_labels, width
        self.encoder = ConcatMLP([instance_dim, 4], width, width, norm=True)
        self.decoder = Decoder([width], width, num_labels)

    def reset_parameters(self) -> None:
        self.encoder.reset_parameters()
        self.decoder.reset_parameters()

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        """Score every label of every image."""
        batch = as_batch(data, self.num_labels, self.instance_dim, complete=False)
        match_logits = self.decoder(self.encoder(batch.x, standardize_boxes(batch.box)))
        return max_pool_instances(match_logits, batch)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.instance_dim}, {self.num_labels}, width={self.width})"
