"""SRN: attention maps of all labels, and convolutions over these maps."""

from __future__ import annotations

from torch import nn
from torch_geometric.data import HeteroData

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import LogitLinear, WholeImageModel, from_map, location_output, mean_pool, to_map
from gm_mlic.nn.output import ModelOutput
from gm_mlic.registry import register_model
from gm_mlic.schema import Positive, checked

#: Filters of the last convolution for each of its input maps.
FILTERS = 4


def block(in_channels: int, out_channels: int, size: int) -> tuple[nn.Module, ...]:
    """A convolution that keeps the size of the map, batch normalization and a ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU()


@register_model("srn")
class SRN(WholeImageModel):
    r"""SRN, from "Learning Spatial Regularization with Image-level Supervisions" (Zhu et al., CVPR 2017).

    .. math::
        Z &= f_{att}(X), \qquad a_{ic} = \underset{i}{\mathrm{softmax}} \; z_{ic}
            \text{ (attention maps, section 3.2)} \\
        S &= \mathrm{Conv}_{1 \times 1}(X) \text{ (confidence maps)}, \qquad
            \hat y^{att}_c = \sum_i a_{ic} s_{ic} \\
        U &= \sigma(S) \odot A, \qquad \hat y^{sr} = f_{sr}(U) \text{ (spatial regularization, section 3.2)} \\
        \hat y^{cls}_c &= u_c^\top ( \frac{1}{M} \sum_i f_i ) + d_c, \qquad
            s = \tfrac{1}{2} ( \hat y^{cls} + \hat y^{sr} )

    :math:`f_{att}` has convolutions of 1 x 1, 3 x 3 and 1 x 1 cells, :math:`f_{sr}` two of 1 x 1 and one of the whole
    map, with four filters for each single input map, and a linear layer. Batch normalization and a ReLU follow each
    convolution, but only a ReLU the one of the whole map, and nothing the last of :math:`f_{att}`. X is the map of the
    locations (``to_map``), on which the sums over i run. The match logits are the weighted attention U. The training
    loss is applied to :math:`\hat y^{att}, \hat y^{cls}` and :math:`\hat y^{sr}` as well.

    The paper's text was not available: formulas, sections and sizes are written from memory of it; the layers were
    compared with third-party implementations, not with the authors' code. Decided here: the paper trains the three
    scores one after the other, then all layers together; this model trains all at once. The convolution of the whole
    map has no batch normalization, since it has one value per image and channel, and a batch may have one image. The
    paper computes X and :math:`\hat y^{cls}` from two layers of a ResNet-101; graphs have the features of one layer,
    which is used for both.

    Args:
        instance_dim: D, size of a location's feature.
        num_labels: C.
        width: channels between the convolutions (default: 512, the paper's).
        map_size: cells along each side of X (default: 14, the paper's). A grid of this size is not resampled.

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are used
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; ``auxiliary`` are :math:`\hat y^{att}, \hat y^{cls}` and
          :math:`\hat y^{sr}`
    """

    @checked
    def __init__(
        self, instance_dim: Positive, num_labels: Positive, width: Positive = 512, map_size: Positive = 14
    ) -> None:
        super().__init__(instance_dim, num_labels, width=width, map_size=map_size)
        self.map_size = map_size
        self.attention = nn.Sequential(
            *block(instance_dim, width, 1),
            *block(width, width, 3),
            nn.Conv2d(width, num_labels, 1, bias=False),  # a constant cancels in the softmax
        )
        self.confidence = LogitLinear(instance_dim, num_labels)
        self.regularization = nn.Sequential(
            *block(num_labels, width, 1),
            *block(width, width, 1),
            nn.Conv2d(width, FILTERS * width, map_size, groups=width),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.regularized = LogitLinear(FILTERS * width, num_labels)
        self.classifier = LogitLinear(instance_dim, num_labels)

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        X = to_map(batch.x, batch.box, batch.mask, self.map_size)
        A = self.attention(X).flatten(2).softmax(dim=2)
        S = self.confidence(X.flatten(2).transpose(1, 2)).transpose(1, 2)
        U = (S.sigmoid() * A).unflatten(2, X.shape[2:])
        classified = self.classifier(mean_pool(batch.x, batch.mask))
        regularized = self.regularized(self.regularization(U))
        return location_output(
            (classified + regularized) / 2,
            from_map(U, batch.box),
            batch,
            auxiliary=((A * S).sum(dim=2), classified, regularized),
        )
