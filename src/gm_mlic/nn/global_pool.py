"""The plainest model of a whole image: features pooled over all of it, and a linear classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from gm_mlic.errors import ConfigError
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.gm_mlic import ModelOutput
from gm_mlic.nn.mlp import OutLinear
from gm_mlic.nn.whole_image import as_batch, winners


class GlobalPool(nn.Module):
    r"""Global average pooling and a linear classifier, from "Deep Residual Learning" (He et al., CVPR 2016, Table 1).

    .. math::
        s_c = w_c^\top \Big( \frac{1}{M} \sum_i f_i \Big) + b_c = \frac{1}{M} \sum_i m_{ic}, \qquad
        m_{ic} = w_c^\top f_i + b_c

    What every other model is compared with in the literature as "ResNet-101". The matches :math:`m_{ic}` are the class
    activation map (Zhou et al., CVPR 2016, eq. 2).

    Args:
        instance_dim: D, length of a location's feature.
        num_labels: C.

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are read
        - **output:** :class:`~gm_mlic.nn.ModelOutput`

    Raises:
        ConfigError: for a setting that cannot work.
    """

    def __init__(self, instance_dim: int, num_labels: int) -> None:
        super().__init__()
        if min(instance_dim, num_labels) < 1:
            raise ConfigError("the feature length and the number of labels must be 1 or more.")
        self.classifier = OutLinear(instance_dim, num_labels)

    def reset_parameters(self) -> None:
        self.classifier.reset_parameters()

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        """Score every label of every image of ``data``."""
        batch = as_batch(data, self.classifier.in_features, self.classifier.out_features)
        with torch.autocast(batch.x.device.type, enabled=False):  # rounded logits would tie
            matches: Tensor = self.classifier(batch.x)
        present = batch.mask[..., None]
        logits = matches.masked_fill(~present, 0).sum(dim=1) / present.sum(dim=1)
        return ModelOutput(logits, winners(matches, batch.mask), matches, batch.mask)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.classifier.in_features}, {self.classifier.out_features})"
