"""KD-WSD: a classifier that learns from a weakly supervised detector, which is trained beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, max_pool2d, mse_loss
from torch_geometric.data import HeteroData

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import Composite, HeLinear, LogitLinear, WholeImageModel, location_output, to_map
from gm_mlic.nn.output import ModelOutput
from gm_mlic.registry import register_model
from gm_mlic.schema import Fraction, Positive, checked

#: Sides of the windows, as parts of the map's side.
SIDES = (1.0, 0.5, 0.25)
#: Temperatures of the teacher's two softmaxes and of the student's sigmoid, for prediction-level distillation.
TEACHER, STUDENT = 0.5, 5.0


def windows(X: Tensor) -> Tensor:
    """The maximum of each channel in square windows of a map, as proposals.

    Sides are those of ``SIDES``, rounded to cells. Windows are half a side apart, and the last ones may extend over
    the border.

    Args:
        X: (B, d, G, G).

    Returns:
        (B, R, d).
    """
    sides = [max(1, round(part * X.shape[-1])) for part in SIDES]
    pooled = [max_pool2d(X, side, stride=max(1, side // 2), ceil_mode=True).flatten(2) for side in sides]
    return torch.cat(pooled, dim=2).transpose(1, 2)


def detection_log_scores(classes: Tensor, proposals: Tensor) -> Tensor:
    r"""Log-probabilities of labels by the two streams of a WSDDN (Bilen & Vedaldi, CVPR 2016).

    .. math::
        p_c = \sum_r \underset{c}{\mathrm{softmax}}(x_{rc}) \; \underset{r}{\mathrm{softmax}}(y_{rc})

    Args:
        classes: x, (B, R, C).
        proposals: y, (B, R, C).

    Returns:
        (B, C), the logarithms of p.
    """
    return (classes.log_softmax(dim=2) + proposals.log_softmax(dim=1)).logsumexp(dim=1)


class RegionFeatures(Composite):
    """Features of regions: a map of its own, and two layers on what is pooled from it.

    Args:
        in_channels: of the map.
        channels: d, of all layers.
        dropout: after both layers.

    Shapes:
        - **map:** (..., in_channels) to (..., d), for each cell
        - **input:** pooled cells (..., d)
        - **output:** (..., d)
    """

    def __init__(self, in_channels: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.map = nn.Sequential(HeLinear(in_channels, channels), nn.ReLU())
        self.layers = nn.Sequential(
            HeLinear(channels, channels),
            nn.ReLU(),
            nn.Dropout(dropout),
            HeLinear(channels, channels),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, pooled: Tensor) -> Tensor:
        features: Tensor = self.layers(pooled)
        return features


@register_model("kd_wsd")
class KDWSD(WholeImageModel):
    r"""KD-WSD, from "Multi-Label Image Classification via Knowledge Distillation from Weakly-Supervised Detection".

    Liu et al., ACM Multimedia 2018.

    .. math::
        v_r &= \mathrm{FC}^T(\mathrm{pool}_r(\mathrm{Conv}^T(X))), \qquad
            p_c = \sum_r \underset{c}{\mathrm{softmax}}(x_{rc} / T) \; \underset{r}{\mathrm{softmax}}(y_{rc} / T),
            \qquad x_r, y_r = \mathrm{Linear}(v_r) \text{ (teacher)} \\
        u_r &= \mathrm{FC}^S(\mathrm{pool}_r(\mathrm{Conv}^S(X))), \qquad
            s_c = w_c^\top u_0 + b_c \text{ (student)} \\
        L &= L_{cls}(s, y) + L_{cls}(\mathrm{logit}(p^{T=1}), y) + \frac{1}{R d} \sum_r |u_r - v_r|^2
            + \mathrm{BCE}(\sigma(s / 5), p^{T=0.5})

    r are windows of the map (``windows``), 0 is the whole map, and FC are two linear layers, each with a ReLU. The
    teacher is a weakly supervised detector (WSDDN): it learns to find the windows of labels from labels of images.
    The third term distills its features of windows (feature level), the fourth its probabilities (prediction level).
    No gradient of these flows into the teacher. In evaluation there is no teacher; the logits are the student's. The
    match logits are the scores of each location as a region.

    The networks and losses were compared with the definitions that the authors published, not with the paper's text.
    Different here: teacher and student are trained together, not one after the other (the authors train the teacher,
    then the features of the student, then its predictions). Both read the same features of one layer; the authors have
    a VGG-16 each, with images of 672 and 224 pixels. Proposals are windows of three sizes, instead of 500 edge boxes,
    and regions are pooled to one cell instead of 7 x 7. The feature loss is a mean over channels, not a sum.

    Args:
        instance_dim: D, size of a location's feature.
        num_labels: C.
        width: d, size of all layers (default: 512; the authors': 512 for the map, 4096 for FC).
        dropout: after each layer of FC (default: 0.5, the authors').
        map_size: cells along each side of X (default: 14, the authors' for the student). A grid of this size is not
            resampled.

    Shapes:
        - **input:** an assignment graph or a batch of them; only its instances are used
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; in training, ``auxiliary`` are the logits of the teacher, and
          ``loss`` is the sum of both distillation losses
    """

    @checked
    def __init__(
        self,
        instance_dim: Positive,
        num_labels: Positive,
        width: Positive = 512,
        dropout: Fraction = 0.5,
        map_size: Positive = 14,
    ) -> None:
        super().__init__(instance_dim, num_labels, width=width, map_size=map_size)
        self.map_size = map_size
        self.teacher = RegionFeatures(instance_dim, width, dropout)
        self.classes = LogitLinear(width, num_labels)
        self.proposals = LogitLinear(width, num_labels)
        self.student = RegionFeatures(instance_dim, width, dropout)
        self.classifier = LogitLinear(width, num_labels)

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        f = self.student.map(batch.x)
        S = to_map(f, batch.box, batch.mask, self.map_size)
        logits = self.classifier(self.student(S.amax(dim=(2, 3))))
        auxiliary, loss = None, None
        if self.training:
            T = to_map(self.teacher.map(batch.x), batch.box, batch.mask, self.map_size)
            v, u = self.teacher(windows(T)).to(logits.dtype), self.student(windows(S)).to(logits.dtype)
            classes, proposals = self.classes(v), self.proposals(v)
            log_p = detection_log_scores(classes, proposals).clamp(max=-torch.finfo(logits.dtype).eps)
            auxiliary = (log_p - torch.log1p(-log_p.exp()),)
            soft = detection_log_scores(classes / TEACHER, proposals / TEACHER).exp().detach().clamp(max=1)
            loss = mse_loss(u, v.detach()) + binary_cross_entropy_with_logits(logits / STUDENT, soft)
        return location_output(logits, self.classifier(self.student(f)), batch, auxiliary=auxiliary, loss=loss)
