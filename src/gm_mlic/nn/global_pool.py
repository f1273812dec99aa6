"""The plainest baseline: global average pooling and a linear classifier, as in ResNet (He et al., CVPR 2016)."""

from __future__ import annotations

from torch import nn
from torch_geometric.data import HeteroData

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.gm_mlic import ModelOutput
from gm_mlic.nn.locations import LocationModel, masked_mean


class GlobalPool(LocationModel):
    r""":math:`s_c = w_c^\top \frac{1}{M} \sum_i f_i + b_c`.

    With the cells of ResNet-101's last map as locations it is the ``resnet101`` of the multi-label literature. A
    location's match logit is :math:`w_c^\top f_i + b_c`, the class activation map (Zhou et al., CVPR 2016).

    Args:
        instance_dim: D, length of a location's feature.
        num_labels: C.

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are read
        - **output:** :class:`~gm_mlic.nn.ModelOutput`
    """

    def __init__(self, instance_dim: int, num_labels: int) -> None:
        super().__init__(instance_dim, num_labels)
        self.classifier = nn.Linear(instance_dim, num_labels)

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        """Score every label of every image of ``data``."""
        batch = self.locations(data)
        matches = self.classifier(batch.x)  # the mean of which is the classifier of the mean
        return self.output(masked_mean(matches, batch.mask), matches, batch.mask)
