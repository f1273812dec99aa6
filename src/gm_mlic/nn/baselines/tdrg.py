"""TDRG: a transformer over two scales of the map, and a graph of labels that it guides."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch_geometric.data import HeteroData

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import (
    SLOPE,
    DecoderLayer,
    DynamicAdjacency,
    GCNLayer,
    LabelClassifiers,
    LeCunLinear,
    LogitLinear,
    WholeImageModel,
    from_map,
    init_uniform,
    location_output,
    to_map,
)  # fmt: skip
from gm_mlic.nn.output import ModelOutput
from gm_mlic.registry import register_model
from gm_mlic.schema import Fraction, Positive, checked

#: Part of the cells whose mean is the score of a label under the semantic-aware constraint.
TOP = 0.05
#: Weights of both relations in the logits.
STRUCTURAL, SEMANTIC = 0.7, 0.3


def cross_scale(fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
    r"""Both maps with what they have in common: :math:`X_k + X_1 \odot X_2`, on the cells of the finer one.

    Args:
        fine: (B, d, G, G).
        coarse: (B, d, G', G') with G' <= G, resampled bilinearly to G x G cells and back.

    Returns:
        maps of the same two shapes.
    """
    resized = interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=True)
    common = fine * resized
    return fine + common, interpolate(resized + common, size=coarse.shape[2:], mode="bilinear", align_corners=True)


@register_model("tdrg")
class TDRG(WholeImageModel):
    r"""TDRG, from "Transformer-Based Dual Relation Graph for Multi-Label Image Recognition" (Zhao et al., ICCV 2021).

    .. math::
        X_1, X_2 &= \mathrm{CrossScale}(\mathrm{Conv}_{1 \times 1}(X), \mathrm{Conv}_{3 \times 3, \; stride \; 2}(X)),
            \qquad F_k = \mathrm{Encoder}(X_k) \\
        s^T &= \mathrm{Linear}([\max_i F_{1,i}, \max_i F_{2,i}]) \text{ (structural relation)} \\
        m_{ic} &= u_c^\top x_i, \qquad s^C_c = \text{mean of the largest 5 \% of } m_{ic}
            \text{ (semantic-aware constraint)} \\
        v_c &= [ \sum_i \sigma(m_{ic}) \, \mathrm{Linear}(x_i), \;
            \mathrm{Linear}(\sum_i \sigma(m_{ic}) \, F_{1,i}) ] \\
        G &= V + \mathrm{LeakyReLU}(A V W), \qquad s^G_c = w_c^\top g_c + b_c \text{ (semantic relation)} \\
        s &= 0.7 \, s^T + 0.3 \, s^G

    A is ``DynamicAdjacency`` of V and the means of both :math:`F_k`: the transformer guides the graph of labels. No
    gradient flows from the graph into F. X is the map of the locations (``to_map``). The match logits are the class
    activation map :math:`m_{ic}`. The training loss is applied to :math:`s^T`, :math:`s^G` and :math:`s^C` as well.
    Neither word vectors nor co-occurrences are used.

    The formulas and defaults were compared with the authors' code, not with the paper's text; from the code are the two
    weights, 5 %, the sum with V, the missing position encoding and the initialization of the graph of labels. Decided
    here: the paper has a third scale, from an earlier layer of the backbone; graphs have the features of one layer. The
    MLP has a ReLU instead of a GELU. As in the model add_gcn, there are no batch normalization, no bias and one
    LeakyReLU in the GCN.

    Args:
        instance_dim: D, size of a location's feature.
        num_labels: C.
        width: channels of the transformer, and of each half of a label's vector (default: 512, the authors'). A
            multiple of ``heads``.
        layers: of the encoder, which both scales share (default: 3, the authors').
        heads: of each attention (default: 4, the authors').
        hidden: size of the hidden layer of the encoder's MLPs (default: 2048, the authors').
        dropout: probability of dropout in the encoder (default: 0, the authors').
        map_size: cells along each side of X (default: 14, the authors', for images of 448 pixels). A grid of this size
            is not resampled.

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are used
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; ``label_states`` are G, ``auxiliary`` are :math:`s^T, s^G, s^C`
    """

    @checked
    def __init__(
        self,
        instance_dim: Positive,
        num_labels: Positive,
        width: Positive = 512,
        layers: Positive = 3,
        heads: Positive = 4,
        hidden: Positive = 2048,
        dropout: Fraction = 0.0,
        map_size: Annotated[int, Ge(3)] = 14,
    ) -> None:
        super().__init__(instance_dim, num_labels, width=width, layers=layers, map_size=map_size)
        self.map_size = map_size
        self.fine = nn.Conv2d(instance_dim, width, 1)
        self.coarse = nn.Conv2d(instance_dim, width, 3, stride=2)
        self.layers = nn.ModuleList(
            DecoderLayer(width, heads, dropout, hidden, self_attention=False) for _ in range(layers)
        )
        self.structural = LogitLinear(2 * width, num_labels)
        self.activation = LogitLinear(instance_dim, num_labels, bias=False)
        self.project = LeCunLinear(instance_dim, width)
        self.guidance = LeCunLinear(width, width)
        self.adjacency = DynamicAdjacency(2 * width, 2 * width, num_labels)
        self.conv = GCNLayer(2 * width, 2 * width)
        self.classifiers = LabelClassifiers(num_labels, 2 * width)
        self._init_graph()

    def _init_graph(self) -> None:
        init_uniform(self.activation, self.project, self.guidance, self.adjacency, self.conv, self.classifiers)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._init_graph()

    def encode(self, X: Tensor) -> Tensor:
        """Map (B, d, G, G) to (B, G^2, d), by the transformer encoder."""
        H = X.flatten(2).transpose(1, 2)
        for layer in self.layers:
            H, _ = layer(H, H, None, None)
        return H

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        X = to_map(batch.x, batch.box, batch.mask, self.map_size)
        scales = [self.encode(scale) for scale in cross_scale(self.fine(X), self.coarse(X))]
        structural = self.structural(torch.cat([F.amax(dim=1) for F in scales], dim=-1))
        x = X.flatten(2).transpose(1, 2)
        maps = self.activation(x)

        shares = maps.sigmoid().transpose(1, 2)
        guided = self.guidance((shares @ scales[0]).detach())
        V = torch.cat([shares @ self.project(x), guided], dim=-1)
        A = self.adjacency(V, torch.cat([F.detach().mean(dim=1) for F in scales], dim=-1))
        G = V + nn.functional.leaky_relu(self.conv(V, A), SLOPE)
        semantic = self.classifiers(G)

        constraint = maps.topk(max(1, round(TOP * maps.shape[1])), dim=1).values.mean(dim=1)
        logits = STRUCTURAL * structural + SEMANTIC * semantic
        values = from_map(maps.transpose(1, 2).unflatten(2, X.shape[2:]), batch.box)
        return location_output(logits, values, batch, G, auxiliary=(structural, semantic, constraint))
