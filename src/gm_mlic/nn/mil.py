"""The baseline without graphs: a classifier of single instances, max-pooled over the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from gm_mlic.errors import ConfigError
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.graphs.schema import INSTANCE, LABEL, MATCHES
from gm_mlic.nn.gm_mlic import ModelOutput, check_lengths, pool_match_matrix, pool_matches, standardise
from gm_mlic.nn.mlp import MLP, Decoder


class MILMax(nn.Module):
    r"""Max-pooled per-instance classifier.

    .. math::
        s_i = \mathrm{Dec}(\mathrm{Enc}([f_i, \sqrt{12} (B_i - 1/2)])) \in \mathbb{R}^C, \qquad
        p_c = \sigma(\max_i s_{ic})

    Multiple-instance learning as in HCP (Wei et al., 2015), on the instances that GM-MLIC sees: same features and
    boxes, same pooling, no graph and no word vectors; what GM-MLIC gains over it is what the graphs are worth.

    Args:
        instance_dim: length of an instance's feature.
        num_labels: C.
        width: of the hidden layer.

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are read
        - **output:** :class:`~gm_mlic.nn.ModelOutput`
    """

    def __init__(self, instance_dim: int, num_labels: int, width: int = 512) -> None:
        super().__init__()
        if min(instance_dim, num_labels, width) < 1:
            raise ConfigError("model.width, the feature length and the number of labels must be 1 or more.")
        self.num_labels = num_labels
        self.encoder = MLP([instance_dim, 4], width, width, norm=True)
        self.decoder = Decoder([width], width, num_labels)

    def reset_parameters(self) -> None:
        self.encoder.reset_parameters()
        self.decoder.reset_parameters()

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        """Score every label of every image of ``data``."""
        check_lengths(data, self.encoder.lin1.in_channels[0])
        if isinstance(data, AssignmentBatch):
            self._check(data.label_vectors.shape[0])
            there = data.mask if data.matches is None else data.matches
            return pool_match_matrix(self.decoder(self.encoder(data.x, standardise(data.box))), there)
        self._check(data[LABEL].x.shape[0] // int(getattr(data, "num_graphs", 1)))
        scores: Tensor = self.decoder(self.encoder(data[INSTANCE].x, standardise(data[INSTANCE].box)))
        source, target = data[MATCHES].edge_index
        return pool_matches(scores[source, torch.remainder(target, self.num_labels)], data)

    def _check(self, num_labels: int) -> None:
        if num_labels != self.num_labels:
            raise ConfigError(f"The graph has {num_labels} labels, the model {self.num_labels}.")

    def __repr__(self) -> str:
        width = self.encoder.lin1.out_channels
        return f"{type(self).__name__}({self.encoder.lin1.in_channels[0]}, {self.num_labels}, width={width})"
