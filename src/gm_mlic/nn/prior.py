r"""Match logits from the detector's classes and confidences, and a linear classifier that is added to them.

The paper gives each instance "a preliminary class label c with a confidence score s", which the equations do not use.
With :class:`DetectorPrior`, training starts at the detector's own labels and learns corrections.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from torch_geometric.nn.inits import reset
from torch_geometric.utils import scatter

from gm_mlic.errors import ArgumentError, ConfigError
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.graphs.dense import DenseEdges, edge_dot
from gm_mlic.graphs.schema import INSTANCE, LABEL, MATCHES, EdgeType, NodeType
from gm_mlic.schema import NotNegative, Positive, checked


@runtime_checkable
class FeatureStatistics(Protocol):
    """A model with statistics of the training instances among its buffers."""

    def fit_features(self, features: Tensor, label_vectors: Tensor, class_vectors: Tensor | None = None) -> None:
        """Compute the statistics.

        Args:
            features: (N, D_o) features of training instances.
            label_vectors: (C, D_l).
            class_vectors: (D, D_l) word vectors of the detector's classes, zeros where there is none; or None.
        """
        ...


@runtime_checkable
class Penalized(Protocol):
    """A model with a penalty on its parameters, which the training loss adds, divided by N C."""

    def penalty(self) -> Tensor | float: ...


#: Confidence of an instance that is not detected as a label, before training.
FLOOR = 1e-3


def attribute(data: Any, kind: NodeType | EdgeType, key: str, otherwise: str) -> Any:
    """An attribute of the nodes or edges of a type, in a ``HeteroData`` or an ``AssignmentBatch``.

    Raises:
        ConfigError: with the message ``otherwise``, if there is none.
    """
    value = data.collect(key, allow_empty=True).get(kind)
    if value is None:
        raise ConfigError(otherwise)
    return value


def match_confidence(data: Any) -> Tensor:
    """:math:`q_{ic}` of each matching edge: (E,) of a ``HeteroData``, (B, M, C) of an ``AssignmentBatch``."""
    otherwise = "The graph has no confidence of matching edges: give AssignmentGraph class_labels."
    return attribute(data, MATCHES, "confidence", otherwise)  # type: ignore[no-any-return]


def image_mean(x: Tensor, weight: Tensor, data: Any) -> Tensor:
    """The weighted mean of instance features over each image, at each of its instances: the shape of ``x``."""
    if isinstance(data, AssignmentBatch):
        weight = (weight * data.mask)[..., None]
        return ((x * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True)).expand_as(x)
    image = data[INSTANCE].get("batch", torch.zeros(len(x), dtype=torch.int64, device=x.device))
    B = int(getattr(data, "num_graphs", 1))
    mean: Tensor = scatter(x * weight[:, None], image, 0, B) / scatter(weight, image, 0, B)[:, None]
    return mean[image]


class DetectorPrior(nn.Module):
    r"""Match logits by the detector alone.

    .. math::
        s_{ic} = b_c + \begin{cases}
            \alpha \, \mathrm{logit}(q_{ic}) & \text{if instance } i \text{ is detected as label } c \\
            \phi & \text{otherwise}
        \end{cases}
        \qquad b_c = u^\top w_c + b

    :math:`\alpha` (1), :math:`\phi` (the logit of 0.001), u and b (0) are learned. :math:`q_{ic}` is clamped to
    0.001 to 0.999. Within this range, the initial logits rank images as the detector does. The bias is a function of
    the label vector, so that it exists for labels that were not trained.

    Args:
        label_dim: D_l.

    Shapes:
        - **input:** q (E,) or (B, M, C) in [0, 1], 0 where the class is not the label; ``edge_index`` of the matching
          edges; w (B * C, D_l) or (1, C, D_l)
        - **output:** the shape of q
    """

    #: Parameters are stored divided by this: with the learning rate of a network, they learn as many times faster.
    SCALE = 10.0

    def __init__(self, label_dim: int) -> None:
        super().__init__()
        self.alpha, self.floor = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(()))
        self.bias = nn.Linear(label_dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, 1 / self.SCALE)
        nn.init.constant_(self.floor, math.log(FLOOR / (1 - FLOOR)) / self.SCALE)
        nn.init.zeros_(self.bias.weight)
        nn.init.zeros_(self.bias.bias)

    def forward(self, q: Tensor, edge_index: Tensor | DenseEdges, w: Tensor) -> Tensor:
        # bfloat16 has no number between 0.996 and 1.
        wide = torch.promote_types(q.dtype, torch.float32)
        logit = q.to(wide).clamp(FLOOR, 1 - FLOOR).logit().to(w.dtype)
        logit = torch.where(q > 0, self.SCALE * self.alpha * logit, self.SCALE * self.floor)
        return logit + _at_labels(edge_index, self.SCALE * self.bias(w).squeeze(-1))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.bias.in_features})"


class LinearMatch(nn.Module):
    r"""A linear classifier of instances and images, in the space of the label vectors.

    .. math::
        s_{ic} = \langle A x_i + [q_{ic} > 0] \, G x_i + H \bar x, w_c \rangle, \qquad
        \bar x = \sum_i a_i x_i / \sum_i a_i

    with :math:`a_i` the square root of the box's area. A adds to all matches, G to those of an instance and its
    detected label, H to all matches of an image. All three are zero at the start.

    Args:
        in_channels: size of an instance's feature.
        label_dim: D_l.

    Shapes:
        - **input:** x (N, in_channels) or (B, M, in_channels); w (B * C, D_l) or (1, C, D_l); the graphs
        - **output:** (E,) or (B, M, C)
    """

    #: A, G and H are stored divided by this: with the learning rate of a network, they learn as many times faster.
    SCALE = 3.0

    def __init__(self, in_channels: int, label_dim: int) -> None:
        super().__init__()
        self.instance, self.detected, self.image = (nn.Linear(in_channels, label_dim, bias=False) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for lin in (self.instance, self.detected, self.image):
            nn.init.zeros_(lin.weight)

    def forward(self, x: Tensor, w: Tensor, q: Tensor, data: Any) -> Tensor:
        edge_index = data.collect("edge_index")[MATCHES]
        x1, y1, x2, y2 = data.collect("box")[INSTANCE].to(x.dtype).unbind(-1)
        area = ((x2 - x1).clamp(min=0) + 0.02) * ((y2 - y1).clamp(min=0) + 0.02)
        everywhere = self.instance(x) + self.image(image_mean(x, area.sqrt(), data))
        logits = edge_dot(edge_index, everywhere, w) + (q > 0) * edge_dot(edge_index, self.detected(x), w)
        return self.SCALE * logits

    def penalty(self) -> Tensor:
        """The sum of squares of A, G and H."""
        squares = [lin.weight.square().sum() for lin in (self.instance, self.detected, self.image)]
        return self.SCALE**2 * torch.stack(squares).sum()


class Standardize(nn.Module):
    r"""Instance features to mean 0 and deviation 1, without outliers, in the axes of largest variance.

    .. math::
        x' = R \, \mathrm{clamp}((x - \mu) / \sigma, -6, 6)

    :math:`\mu`, :math:`\sigma` and R are buffers that :meth:`fit` computes from training instances.

    Args:
        in_channels: D.
        out_channels: number of principal axes; None for all features, without R.

    Shapes:
        - **input:** (..., D)
        - **output:** (..., out_channels)
    """

    mean: Tensor
    scale: Tensor
    axes: Tensor | None

    @checked
    def __init__(self, in_channels: Positive, out_channels: Positive | None = None) -> None:
        super().__init__()
        if out_channels is not None and out_channels > in_channels:
            raise ArgumentError("out_channels", f"must be 1 to {in_channels}, got {out_channels}.")
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.register_buffer("mean", torch.zeros(in_channels))
        self.register_buffer("scale", torch.ones(in_channels))
        axes = None if out_channels is None else nn.init.orthogonal_(torch.empty(out_channels, in_channels))
        self.register_buffer("axes", axes)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Compute the statistics of features (N, D)."""
        x = x.double()
        self.mean.copy_(x.mean(dim=0))
        self.scale.copy_(1 / x.std(dim=0, correction=0).clamp(min=1e-6))
        if self.axes is not None:
            z = ((x - self.mean) * self.scale).clamp(-6, 6)
            self.axes.copy_(torch.linalg.eigh(z.T @ z).eigenvectors.T.flip(0)[: self.out_channels])

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            z = ((x.to(self.mean.dtype) - self.mean) * self.scale).clamp(-6, 6)
            return z if self.axes is None else linear(z, self.axes)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels})"


class MatchHead(nn.Module):
    r"""The match logits of a model: the detector's, plus learned corrections.

    .. math::
        s_{ic} = \mathrm{Prior}_{ic} + h_c(\tau) \, \mathrm{Linear}_{ic} + h_c(\tau') \, r_{ic}, \qquad
        h_c(\tau) = n_c / (n_c + \tau)

    with :math:`r_{ic}` the network's logit and :math:`n_c` the number of training images with label c: rare labels stay
    near the detector's logits. Where there are none, because c is not a class of the detector or ``prior`` is false,
    :math:`h_c = 1`. Without any setting it is :math:`s_{ic} = r_{ic}`, the paper's. Under autocast it is computed in
    the dtype of the parameters.

    Args:
        instance_dim: D, size of an instance's feature.
        label_dim: D_l.
        prior: add :class:`DetectorPrior`.
        linear: add :class:`LinearMatch`.
        components: :class:`Standardize` features to at most that many axes; None for features as they are.
        shrinkage: :math:`\tau`; 0 for :math:`h_c = 1`.
        network_shrinkage: :math:`\tau'`; None for :math:`\tau`.
        ridge: :math:`\lambda` of :meth:`penalty`.

    Shapes:
        - **input:** r (E,) or (B, M, C); x (N, D') or (B, M, D'), from :meth:`features`;
          w (B * C, D_l) or (1, C, D_l); the graphs
        - **output:** the shape of r
    """

    center: Tensor

    @checked
    def __init__(
        self,
        instance_dim: int,
        label_dim: int,
        *,
        prior: bool = False,
        linear: bool = False,
        components: Positive | None = None,
        shrinkage: NotNegative = 0.0,
        network_shrinkage: NotNegative | None = None,
        ridge: NotNegative = 1000.0,
    ) -> None:
        super().__init__()
        if (prior or linear) and min(instance_dim, label_dim) < 1:
            raise ArgumentError("prior" if prior else "linear", "needs instance_dim and label_dim, not -1.")
        if components is not None and instance_dim < 1:
            raise ArgumentError("components", "needs instance_dim, not -1.")
        network_shrinkage = shrinkage if network_shrinkage is None else network_shrinkage
        self.shrinkage, self.network_shrinkage, self.ridge = float(shrinkage), float(network_shrinkage), float(ridge)
        self.standardize = None if components is None else Standardize(instance_dim, min(components, instance_dim))
        self.out_channels = instance_dim if self.standardize is None else self.standardize.out_channels
        self.prior = DetectorPrior(label_dim) if prior else None
        self.linear = LinearMatch(self.out_channels, label_dim) if linear else None
        if prior or linear:
            self.register_buffer("center", torch.zeros(label_dim))

    def reset_parameters(self) -> None:
        reset(self.prior)
        reset(self.linear)

    @torch.no_grad()
    def fit(self, features: Tensor, label_vectors: Tensor) -> None:
        """Compute the statistics of training instances (N, D) and labels (C, D_l)."""
        if self.standardize is not None:
            self.standardize.fit(features)
        if self.prior is not None or self.linear is not None:
            self.center.copy_(label_vectors.mean(dim=0))

    def features(self, x: Tensor) -> Tensor:
        """The features that the model computes with."""
        return x if self.standardize is None else self.standardize(x)  # type: ignore[no-any-return]

    def forward(self, r: Tensor, x: Tensor, w: Tensor, data: Any) -> Tensor:
        if self.prior is None and self.linear is None:
            return r
        edge_index = data.collect("edge_index")[MATCHES]
        with torch.autocast(r.device.type, enabled=False):
            q, w = match_confidence(data), self._centered(w)
            s = self._shrunk(r, self.network_shrinkage, edge_index, data)
            if self.linear is not None:
                s = s + self._shrunk(self.linear(x.to(w.dtype), w, q, data), self.shrinkage, edge_index, data)
            return s if self.prior is None else s + self.prior(q, edge_index, w)

    def _shrunk(self, s: Tensor, tau: float, edge_index: Tensor | DenseEdges, data: Any) -> Tensor:
        """Logits times h_c."""
        if self.prior is None or not tau:
            return s
        otherwise = "Shrinkage needs the number of images with each label: give AssignmentGraph label_counts."
        n = attribute(data, LABEL, "count", otherwise).to(torch.promote_types(s.dtype, torch.float32))
        h = 1 - tau / (n + tau)  # 1 where a count is inf
        return s * _at_labels(edge_index, h.to(s.dtype))

    def prior_logits(self, data: Any) -> Tensor | None:
        """The detector's part of the match logits, (E,) or (B, M, C); None without a prior."""
        if self.prior is None:
            return None
        w = self._centered(data.collect("x")[LABEL])
        return self.prior(match_confidence(data), data.collect("edge_index")[MATCHES], w)  # type: ignore[no-any-return]

    def _centered(self, w: Tensor) -> Tensor:
        """Label vectors minus the mean of the training labels, of length 1."""
        w = w.to(self.center.dtype)
        difference = (w - self.center).to(torch.promote_types(w.dtype, torch.float32))
        return normalize(difference, dim=-1).to(w.dtype)

    def penalty(self) -> Tensor | float:
        r""":math:`\lambda / 2` times the sum of squares of the linear classifier; the loss adds it, divided by N C."""
        return 0.0 if self.linear is None else self.ridge / 2 * self.linear.penalty()


def _at_labels(edge_index: Tensor | DenseEdges, x: Tensor) -> Tensor:
    """Values (B * C,) or (1, C) at the label of each matching edge."""
    return x[:, None] if isinstance(edge_index, DenseEdges) else x[edge_index[1]]
