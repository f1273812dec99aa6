"""Baseline: global average pooling and a linear classifier."""

from __future__ import annotations

from torch_geometric.data import HeteroData

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import LogitLinear, WholeImageModel, location_output, mean_pool
from gm_mlic.nn.output import ModelOutput
from gm_mlic.registry import register_model
from gm_mlic.schema import Positive, checked


@register_model("gap_linear")
class GAPLinear(WholeImageModel):
    r"""Global average pooling and a linear classifier, from "Deep Residual Learning" (He et al., CVPR 2016, Table 1).

    .. math::
        s_c = w_c^\top ( \frac{1}{M} \sum_i f_i ) + b_c = \frac{1}{M} \sum_i m_{ic}, \qquad
        m_{ic} = w_c^\top f_i + b_c

    On the last feature map of a ResNet-101, this is the baseline "ResNet-101" of the literature. The match logits
    :math:`m_{ic}` are the class activation map (Zhou et al., CVPR 2016, eq. 2).

    Args:
        instance_dim: D, size of a location's feature.
        num_labels: C.

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are used
        - **output:** :class:`~gm_mlic.nn.ModelOutput`
    """

    @checked
    def __init__(self, instance_dim: Positive, num_labels: Positive) -> None:
        super().__init__(instance_dim, num_labels)
        self.classifier = LogitLinear(instance_dim, num_labels)

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        matches = self.classifier(batch.x)
        return location_output(mean_pool(matches, batch.mask), matches, batch)
