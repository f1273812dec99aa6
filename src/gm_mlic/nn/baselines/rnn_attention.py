"""RNN-Attention: an LSTM that looks at one region of the map after the other, by a spatial transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample
from torch_geometric.data import HeteroData

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import HeLinear, LeCunLinear, WholeImageModel, location_output, to_map
from gm_mlic.nn.output import ModelOutput
from gm_mlic.registry import register_model
from gm_mlic.schema import Positive, checked

#: Largest scale without penalty, smallest scale without penalty (alpha and beta of the paper).
LARGEST, SMALLEST = 0.5, 0.1
#: Weights of the anchor and the positive constraint among the constraints, and of all constraints in the loss.
ANCHOR, POSITIVE, CONSTRAINTS = 0.01, 0.1, 0.1


def sample_region(X: Tensor, region: Tensor, size: int) -> Tensor:
    """A region of a map, by bilinear interpolation between the centers of cells; zero outside of the map.

    Args:
        X: (B, d, G, G).
        region: (B, 4) as (s_x, s_y, t_x, t_y): half sizes and center, where the map is [-1, 1] x [-1, 1].
        size: cells along each side of the result.

    Returns:
        (B, d, size, size).
    """
    steps = (torch.arange(size, device=X.device, dtype=X.dtype) + 0.5) * (2 / size) - 1
    cells = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)
    scale, center = region[:, None, None, :2], region[:, None, None, 2:]
    return grid_sample(X, scale * cells + center, mode="bilinear", padding_mode="zeros", align_corners=False)


def anchors(count: int) -> Tensor:
    """(K, 2), points that the centers of the regions should be near: the map's center, the others on a circle."""
    angles = 2 * math.pi * (torch.arange(count - 1) + 0.5) / max(1, count - 1)
    circle = math.sqrt(0.5) * torch.stack([angles.cos(), angles.sin()], dim=1)
    return torch.cat([torch.zeros(1, 2), circle])


def region_constraints(regions: Tensor) -> Tensor:
    r"""Penalty of the regions of an image, :math:`L_S + 0.01 L_A + 0.1 L_P`, a sum over K regions.

    .. math::
        L_A &= \tfrac{1}{2} ((t_x - c_x)^2 + (t_y - c_y)^2) \text{ (anchor constraint)} \\
        L_S &= \max(|s_x| - \alpha, 0)^2 + \max(|s_y| - \alpha, 0)^2 \text{ (scale constraint)} \\
        L_P &= \max(\beta - s_x, 0) + \max(\beta - s_y, 0) \text{ (positive constraint)}

    Args:
        regions: (B, K, 4) as (s_x, s_y, t_x, t_y).

    Returns:
        scalar, the mean over images.
    """
    scale, center = regions[..., :2], regions[..., 2:]
    anchor = (center - anchors(regions.shape[1]).to(center)).square() / 2
    large = (scale.abs() - LARGEST).clamp(min=0).square()
    negative = (SMALLEST - scale).clamp(min=0)
    return (large + ANCHOR * anchor + POSITIVE * negative).sum(dim=(1, 2)).mean()


class Localization(LeCunLinear):
    """The next region from a state; first the whole map, whatever the state is."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 4)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            self.bias.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))


@register_model("rnn_attention")
class RNNAttention(WholeImageModel):
    r"""RNN-Attention, from "Multi-label Image Recognition by Recurrently Discovering Attentional Regions".

    Wang et al., ICCV 2017.

    .. math::
        f_k &= \mathrm{ReLU}(\mathrm{Linear}(\mathrm{ST}(f_I, M_k))), \qquad
            f_I = \mathrm{Conv}_{1 \times 1}(X) \text{ (spatial transformer)} \\
        h_k, c_k &= \mathrm{LSTM}(f_k, (h_{k-1}, c_{k-1})), \qquad z_k = \mathrm{ReLU}(W_{hz} h_k + b_z) \\
        s_k &= W_{zs} z_k + b_s \text{ for } k > 0, \qquad M_{k+1} = W_{zm} z_k + b_m \\
        s_c &= \max_{k=1}^{K} s_{kc} \text{ (category-wise max-pooling)}

    The module has K + 1 steps. :math:`M_0` is the whole map, and step 0 only gives the first region. M has a scale
    and a center for each axis, :math:`[s_x, 0, t_x; 0, s_y, t_y]`. X is the map of the locations (``to_map``).

    *Constraints* (``region_constraints``): centers near anchors, scales of at most 0.5, and positive scales. 0.1 times
    their penalty is added to the training loss.

    The match logits of a label are about the region of its largest score: minus the squared distance of a location
    from the center of the region, in half sizes of it.

    The paper's text was not available: formulas and constants are from memory, and were compared with a third-party
    implementation, not with the authors' code. Decided here: the configured loss replaces the paper's squared distance
    of softmax probabilities; the 1 x 1 convolution to ``width`` channels, which is also the size of f, h and z (the
    paper: VGG-16, 512 channels, and fully connected layers of 4096), and the ReLU of f; regions are sampled with
    ``region_size`` cells instead of being pooled to them; anchors for other K than 5 are on the circle through the
    paper's four.

    Args:
        instance_dim: D, size of a location's feature.
        num_labels: C.
        width: channels of map, regions and LSTM (default: 512).
        regions: K, number of regions (default: 5, the paper's).
        region_size: cells along each side of a sampled region (default: 7).
        map_size: cells along each side of X (default: 14). A grid of this size is not resampled.

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are used
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; ``loss`` is the weighted penalty, None in evaluation
    """

    @checked
    def __init__(
        self,
        instance_dim: Positive,
        num_labels: Positive,
        width: Positive = 512,
        regions: Positive = 5,
        region_size: Positive = 7,
        map_size: Positive = 14,
    ) -> None:
        super().__init__(instance_dim, num_labels, width=width, regions=regions, map_size=map_size)
        self.regions, self.region_size, self.map_size = regions, region_size, map_size
        self.project = LeCunLinear(instance_dim, width)
        self.region = HeLinear(width * region_size**2, width)
        self.lstm = nn.LSTMCell(width, width)
        self.hidden = HeLinear(width, width)
        self.scores = LeCunLinear(width, num_labels)
        self.localization = Localization(width)

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        X = to_map(self.project(batch.x), batch.box, batch.mask, self.map_size)
        with torch.autocast(X.device.type, enabled=False):  # rounded regions would be others, rounded logits equal
            logits, regions = self.look(X.to(batch.x.dtype))
        logits, best = logits.max(dim=1)
        region = regions.gather(1, best[..., None].expand(-1, -1, 4))
        scale, center = region[..., :2].abs().clamp(min=SMALLEST), region[..., 2:]
        place = batch.box[..., :2] + batch.box[..., 2:] - 1
        distance = (place[:, :, None] - center[:, None]) / scale[:, None]
        loss = CONSTRAINTS * region_constraints(regions) if self.training else None
        return location_output(logits, -distance.square().sum(dim=-1), batch, loss=loss)

    def look(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, K, C) and regions (B, K, 4) of maps (B, width, G, G)."""
        h = c = X.new_zeros(X.shape[0], self.lstm.hidden_size)
        region = X.new_tensor([1.0, 1.0, 0.0, 0.0]).expand(X.shape[0], -1)
        scores, regions = [], []
        for k in range(self.regions + 1):
            f = torch.relu(self.region(sample_region(X, region, self.region_size).flatten(1)))
            h, c = self.lstm(f, (h, c))
            z = torch.relu(self.hidden(h))
            if k > 0:
                scores.append(self.scores(z))
                regions.append(region)
            region = self.localization(z)
        return torch.stack(scores, dim=1), torch.stack(regions, dim=1)
