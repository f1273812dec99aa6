"""Input, output, label statistics and classifiers that the baselines share.

The instances of whole-image baselines are a grid of locations (``detector.grid_size``); boxes work as well.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from gm_mlic.errors import ArgumentError, ConfigError
from gm_mlic.graphs.batch import AssignmentBatch, check_sizes
from gm_mlic.nn.mlp import init_linear
from gm_mlic.nn.output import ModelOutput
from gm_mlic.nn.prior import Standardize
from gm_mlic.targets import normalize_targets

#: Slope of LeakyReLU for negative values, in models with a GCN.
SLOPE = 0.2


def as_batch(
    data: HeteroData | AssignmentBatch,
    num_labels: int,
    instance_dim: int | None = None,
    label_dim: int | None = None,
) -> AssignmentBatch:
    """The dense form of ``data``.

    Args:
        data: the graphs.
        num_labels: C of the model.
        instance_dim, label_dim: sizes that the model was built for; None for any size.

    Raises:
        ConfigError: if the graphs have no dense form, or their sizes differ from the model's.
    """
    batch = data if isinstance(data, AssignmentBatch) else AssignmentBatch.from_hetero_data(data)
    check_sizes(batch.x_dict, instance_dim, label_dim)
    if batch.num_labels != num_labels:
        raise ConfigError(f"The graph has {batch.num_labels} labels, the model {num_labels}.")
    return batch


def location_output(
    logits: Tensor,
    values: Tensor,
    batch: AssignmentBatch,
    label_states: Tensor | None = None,
    auxiliary: tuple[Tensor, ...] | None = None,
    loss: Tensor | None = None,
) -> ModelOutput:
    """The output of a whole-image model from label logits (B, C) and a value per location and label (B, M, C)."""
    values = values.masked_fill(~batch.mask[..., None], float("-inf"))
    return ModelOutput(logits, values.detach().argmax(dim=1), label_states, values, auxiliary=auxiliary, loss=loss)


def mean_pool(x: Tensor, mask: Tensor) -> Tensor:
    """The mean (B, d) of values (B, M, d) over the locations of each image."""
    return x.masked_fill(~mask[..., None], 0).sum(dim=1) / mask.sum(dim=1)[:, None]


def to_map(x: Tensor, box: Tensor, mask: Tensor, size: int) -> Tensor:
    """A feature map of ``size`` x ``size`` cells, for convolutions: each cell is the location with the nearest center.

    A grid of this size is copied cell by cell; a grid of another size is resampled.

    Args:
        x: (B, M, d) features of the locations.
        box: (B, M, 4) as (x1, y1, x2, y2), divided by image width and height.
        mask: (B, M) bool, False where padded.
        size: G.

    Returns:
        (B, d, G, G), by row and column.
    """
    steps = (torch.arange(size, device=box.device, dtype=box.dtype) + 0.5) / size
    cells = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).flatten(0, 1)
    center = (box[..., :2] + box[..., 2:]) / 2
    distance = (cells[:, None] - center[:, None]).square().sum(dim=-1).masked_fill(~mask[:, None], float("inf"))
    nearest = distance.argmin(dim=2)[..., None].expand(-1, -1, x.shape[2])
    return x.gather(1, nearest).transpose(1, 2).reshape(-1, x.shape[2], size, size)


def from_map(values: Tensor, box: Tensor) -> Tensor:
    """The values (B, d, G, G) of the cells with the centers of the locations' boxes (B, M, 4): (B, M, d)."""
    size = values.shape[-1]
    column, row = ((box[..., :2] + box[..., 2:]) / 2 * size).long().clamp(0, size - 1).unbind(dim=-1)
    index = (row * size + column)[..., None].expand(-1, -1, values.shape[1])
    return values.flatten(2).transpose(1, 2).gather(1, index)


def reset_parameters(module: nn.Module) -> None:
    """Reset all parameters of a module, or of its submodules if it has no ``reset_parameters``."""
    if isinstance(module, nn.MultiheadAttention):
        module.out_proj.reset_parameters()
        module._reset_parameters()
    elif hasattr(module, "reset_parameters"):
        module.reset_parameters()  # type: ignore[operator]
    else:
        for child in module.children():
            reset_parameters(child)


def init_uniform(*modules: nn.Module) -> None:
    r"""Initialize linear layers as torch does: uniform in :math:`\pm 1 / \sqrt{\mathrm{fan\ in}}`, weights and biases.

    For models that keep the initialization of their authors' code.
    """
    for layer in (layer for module in modules for layer in module.modules()):
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if weight is not None:
            bound = 1 / math.sqrt(weight.shape[0] if isinstance(layer, GCNLayer) else weight[0].numel())
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)


class Composite(nn.Module):
    """A module whose parameters are those of its submodules."""

    def reset_parameters(self) -> None:
        for module in self.children():
            reset_parameters(module)


class WholeImageModel(Composite):
    """Base of whole-image models. Their instances are a grid of locations; boxes work as well.

    Features are standardized (:class:`~gm_mlic.nn.Standardize`) by :meth:`fit_features`, since those of a frozen
    backbone have any scale. In the papers, the backbone is trained.

    Args:
        instance_dim: D, size of a location's feature.
        num_labels: C.
        label_dim: D_l, size of a label's vector; None for any size.
        width: of the model's layers; None for none.
        **shown: further arguments that ``repr`` shows.
    """

    input: ClassVar[str] = "grid"

    def __init__(
        self, instance_dim: int, num_labels: int, label_dim: int | None = None, width: int | None = None, **shown: int
    ) -> None:
        super().__init__()
        self.instance_dim, self.num_labels, self.label_dim, self.width = instance_dim, num_labels, label_dim, width
        self._shown = shown if width is None else {"width": width, **shown}
        self.standardize = Standardize(instance_dim)

    def fit_features(self, features: Tensor, label_vectors: Tensor, class_vectors: Tensor | None = None) -> None:
        """Compute mean and deviation of features (N, D) of training locations; the other arguments are not used."""
        self.standardize.fit(features)

    def as_batch(self, data: HeteroData | AssignmentBatch) -> AssignmentBatch:
        """The dense form of ``data``, as of :func:`as_batch`, with standardized features; also refuses edges to
        candidates only.
        """
        batch = as_batch(data, self.num_labels, self.instance_dim, self.label_dim)
        if batch.match_mask.shape[2] > 1:
            raise ConfigError("Whole-image models need complete matching edges: build the graphs without candidates.")
        return replace(batch, x=self.standardize(batch.x))

    def __repr__(self) -> str:
        sizes = [n for n in (self.instance_dim, self.label_dim, self.num_labels) if n is not None]
        shown = [f"{name}={value}" for name, value in self._shown.items()]
        return f"{type(self).__name__}({', '.join([*map(str, sizes), *shown])})"


class LeCunLinear(nn.Linear):
    """A Linear with LeCun normal initialization, for use without a ReLU after it."""

    def reset_parameters(self) -> None:
        init_linear(self)


class HeLinear(nn.Linear):
    """A Linear with the initialization of He et al. (ICCV 2015), for use before a ReLU."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LogitLinear(LeCunLinear):
    """A Linear to logits. Autocast does not apply: rounded logits would be equal, and their order decides rankings."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class LabelClassifiers(nn.Module):
    r"""A linear classifier for each label, on a vector for each label: :math:`s_c = w_c^\top x_c + b_c`.

    Under autocast it keeps the dtype of the parameters, since rounding would make logits equal, and the ranking would
    depend on their order.

    Args:
        num_labels: C.
        channels: d.

    Shapes:
        - **input:** (B, C, d)
        - **output:** (B, C)
    """

    def __init__(self, num_labels: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_labels, channels))
        self.bias = nn.Parameter(torch.empty(num_labels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[1]))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return (x.to(self.weight.dtype) * self.weight).sum(dim=-1) + self.bias

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(str, self.weight.shape))})"


class GCNLayer(nn.Module):
    r"""One layer of a graph convolutional network (Kipf & Welling, ICLR 2017): :math:`H' = \hat A H W`.

    Args:
        in_channels: length of a node's state.
        out_channels: length of its new state.

    Shapes:
        - **input:** H (..., C, in_channels), :math:`\hat A` (..., C, C)
        - **output:** (..., C, out_channels)
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight.T, a=SLOPE)

    def forward(self, H: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ (H @ self.weight)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(str, self.weight.shape))})"


def label_classifiers(Z: Tensor, adjacency: Tensor, conv1: GCNLayer, conv2: GCNLayer) -> Tensor:
    r"""Classifiers of labels from their word vectors, as in ML-GCN: :math:`A \, \mathrm{LeakyReLU}(A Z W_0) \, W_1`."""
    W: Tensor = conv2(nn.functional.leaky_relu(conv1(Z, adjacency), SLOPE), adjacency)
    return W


class DynamicAdjacency(Composite):
    r"""The label graph of an image, from the states of its labels (ADD-GCN, Ye et al., ECCV 2020).

    .. math::
        A_{cc'} = \sigma(w_{c'}^\top [g, h_c] + b_{c'}), \qquad
        g = \mathrm{LeakyReLU}(\mathrm{Linear}(\tilde g))

    with :math:`\tilde g` a vector of the whole image.

    Args:
        channels: length of :math:`h_c`.
        global_channels: length of :math:`\tilde g`.
        num_labels: C.

    Shapes:
        - **input:** h (B, C, channels), :math:`\tilde g` (B, global_channels)
        - **output:** (B, C, C)
    """

    def __init__(self, channels: int, global_channels: int, num_labels: int) -> None:
        super().__init__()
        self.whole = LeCunLinear(global_channels, global_channels)
        self.relation = LeCunLinear(global_channels + channels, num_labels)

    def forward(self, h: Tensor, whole: Tensor) -> Tensor:
        g = nn.functional.leaky_relu(self.whole(whole), SLOPE)
        return torch.sigmoid(self.relation(torch.cat([g[:, None].expand(-1, h.shape[1], -1), h], dim=-1)))

    def __repr__(self) -> str:
        channels = self.relation.in_features - self.whole.in_features
        return f"{type(self).__name__}({channels}, {self.whole.in_features}, {self.relation.out_features})"


class DecoderLayer(Composite):
    r"""A layer of a transformer decoder, with LayerNorm after each step (Vaswani et al., NeurIPS 2017, section 3.1).

    .. math::
        Q &\leftarrow \mathrm{LN}(Q + \mathrm{MultiHead}(Q + q, Q + q, Q)) \text{, with self_attention} \\
        Q &\leftarrow \mathrm{LN}(Q + \mathrm{MultiHead}(Q + q, F + \mathrm{pos}, F)) \\
        Q &\leftarrow \mathrm{LN}(Q + \mathrm{MLP}(Q))

    Unlike ``torch.nn.TransformerDecoderLayer`` it adds queries q and positions, as in DETR (Carion et al., ECCV 2020),
    and returns the attention. Without the first step and with F = Q it is a layer of a transformer encoder.

    Args:
        channels: d.
        heads: of both attentions.
        dropout: of attention weights, of the terms added to Q and of the MLP's hidden layer.
        hidden_channels: size of the MLP's hidden layer (default: 4 d).
        self_attention: whether it has the first step.

    Shapes:
        - **input:** Q (B, C, d), F (B, M, d), pos (B, M, d) or None, mask (B, M) bool, False where padded, or None,
          q (C, d) or None
        - **output:** Q (B, C, d), attention (B, M, C), the mean over heads

    Raises:
        ArgumentError: for a model's argument ``width``, d, that is not a multiple of ``heads``.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        dropout: float,
        hidden_channels: int | None = None,
        *,
        self_attention: bool = True,
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ArgumentError("width", f"must be a multiple of heads={heads}, got {channels}.")
        self.self_attention = (
            nn.MultiheadAttention(channels, heads, dropout, batch_first=True) if self_attention else None
        )
        self.cross_attention = nn.MultiheadAttention(channels, heads, dropout, batch_first=True)
        hidden = hidden_channels or 4 * channels
        self.mlp = nn.Sequential(
            HeLinear(channels, hidden), nn.ReLU(), nn.Dropout(dropout), LeCunLinear(hidden, channels)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2 + self_attention))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, Q: Tensor, F: Tensor, pos: Tensor | None, mask: Tensor | None, q: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.self_attention is not None:
            own = Q if q is None else Q + q
            update, _ = self.self_attention(own, own, Q, need_weights=False)
            Q = self.norms[0](Q + self.dropout(update))
        keys, padded = F if pos is None else F + pos, None if mask is None else ~mask
        update, attention = self.cross_attention(Q if q is None else Q + q, keys, F, key_padding_mask=padded)
        Q = self.norms[-2](Q + self.dropout(update))
        Q = self.norms[-1](Q + self.dropout(self.mlp(Q)))
        return Q, attention.transpose(1, 2)


@runtime_checkable
class LabelStatistics(Protocol):
    """A model with statistics of the training targets among its buffers."""

    def fit(self, targets: Tensor, difficult: Tensor | None = None) -> None:
        """Compute the statistics from targets (N, C) in {0, 1} and difficult (N, C) bool of the training images."""
        ...


def present_and_difficult(
    targets: Tensor, num_labels: int, difficult: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Masks (N, C) of present labels, which are not difficult, and of difficult ones, or None.

    Args:
        targets: (N, C) in {0, 1}.
        num_labels: C of the model.
        difficult: (N, C) bool, or None.

    Raises:
        ConfigError: for targets of another shape.
        DataError: for other targets.
    """
    if targets.ndim != 2 or targets.shape[1] != num_labels:
        raise ConfigError(f"The targets have shape {tuple(targets.shape)}, the model has {num_labels} labels.")
    return normalize_targets(targets, difficult)


def conditional_probabilities(targets: Tensor, num_labels: int, difficult: Tensor | None = None) -> Tensor:
    r"""Probability of label j given label i: :math:`P_{ij} = P(L_j | L_i) = M_{ij} / N_{ij}`.

    :math:`M_{ij}` counts the images with both, :math:`N_{ij}` those with i for which j is known.
    Difficult labels (VOC) are unknown, and count for neither. The row of a label without images is zero.

    Args and errors are those of :func:`present_and_difficult`.

    Returns:
        (C, C) float32, the diagonal 0.
    """
    mask, difficult = present_and_difficult(targets, num_labels, difficult)
    present = mask.double()
    both = present.T @ present
    known = present.T @ (torch.ones_like(mask) if difficult is None else ~difficult).double()
    return torch.where(known > 0, both / known.clamp(min=1), 0).fill_diagonal_(0).float()
