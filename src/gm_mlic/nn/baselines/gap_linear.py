"""Baseline: global average pooling and a linear classifier."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from gm_mlic.errors import check_positive
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import Composite, LeCunLinear, as_batch, location_output
from gm_mlic.nn.output import ModelOutput
from gm_mlic.registry import register_model


@register_model("gap_linear")
class GAPLinear(Composite):
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

    input: ClassVar[str] = "grid"

    def __init__(self, instance_dim: int, num_labels: int) -> None:
        super().__init__()
        check_positive(instance_dim=instance_dim, num_labels=num_labels)
        self.classifier = LeCunLinear(instance_dim, num_labels)

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = as_batch(data, self.classifier.out_features, self.classifier.in_features)
        with torch.autocast(batch.x.device.type, enabled=False):  # rounded logits would be equal
            matches: Tensor = self.classifier(batch.x)
        present = batch.mask[..., None]
        logits = matches.masked_fill(~present, 0).sum(dim=1) / present.sum(dim=1)
        return location_output(logits, matches, batch)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.classifier.in_features}, {self.classifier.out_features})"
