"""Assignment graph of detected instances and label vectors, as ``HeteroData`` (eq. 1 to 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch_geometric.data import HeteroData
from torch_geometric.data.datapipes import functional_transform
from torch_geometric.transforms import BaseTransform

from gm_mlic.errors import ArgumentError, ConfigError
from gm_mlic.graphs.classes import candidate_edges, class_confidence
from gm_mlic.graphs.schema import INSTANCE, LABEL, MATCHES, RELATIONS, SEMANTIC, SPATIAL, EdgeType, edge_table
from gm_mlic.schema import Positive, checked


def knn_edge_index(box: Tensor, num_neighbors: int) -> Tensor:
    """Edges of the instance graph, from the nearest neighbors of each instance to it.

    The distance is that of box centers. There are no self-loops. Among equal distances, the lower index comes first.

    Args:
        box: (M, 4) as (x1, y1, x2, y2).
        num_neighbors: neighbors of each instance; at most M - 1.

    Returns:
        ``edge_index`` (2, M * min(num_neighbors, M - 1)), sorted by target, the nearest source first.
    """
    M = box.shape[0]
    K = min(num_neighbors, M - 1)
    center = (box[:, :2] + box[:, 2:]) / 2
    distance = (center[:, None] - center).square().sum(dim=-1).fill_diagonal_(float("inf"))
    source = distance.argsort(dim=1, stable=True)[:, :K].reshape(-1)
    target = torch.arange(M, device=box.device).repeat_interleave(K)
    return torch.stack([source, target])


def label_neighbors(label_vectors: Tensor, num_neighbors: int | None) -> Tensor | None:
    """The labels from which edges of the label graph lead to each label: (C, K), the most similar by cosine first.

    Args:
        label_vectors: (C, D_l).
        num_neighbors: K; None for all other labels.

    Returns:
        (C, K) int64; None if these are all other labels.
    """
    if num_neighbors is None or num_neighbors >= label_vectors.shape[0] - 1:
        return None
    unit = torch.nn.functional.normalize(label_vectors.double(), dim=1)
    similarity = (unit @ unit.t()).fill_diagonal_(float("-inf"))
    return similarity.argsort(dim=1, descending=True, stable=True)[:, :num_neighbors]


def label_edge_index(num_labels: int, neighbors: Tensor | None = None) -> Tensor:
    """Edges of the label graph: every ordered pair of different labels, or from listed neighbors only.

    Args:
        num_labels: C.
        neighbors: (C, K), the neighbors of each label, from :func:`label_neighbors`; None for all pairs (the paper).

    Returns:
        ``edge_index`` (2, E), sorted by target.
    """
    if neighbors is not None:
        return torch.stack([neighbors.reshape(-1), torch.arange(num_labels).repeat_interleave(neighbors.shape[1])])
    target, source = (~torch.eye(num_labels, dtype=torch.bool)).nonzero().t()
    return torch.stack([source, target])


def check_instances(x: Tensor, box: Tensor) -> None:
    """Raise :class:`ConfigError` for features (..., M, D_o) and boxes (..., M, 4) that are not valid instances."""
    if x.ndim < 2 or box.shape != (*x.shape[:-1], 4):
        problem = f".x must be (M, D_o) and .box (M, 4), got {tuple(x.shape)} and {tuple(box.shape)}"
    elif x.shape[-2] == 0:
        problem = " has no instances: pass at least one, e.g. the whole image"
    else:
        finite, inside = x.isfinite().all(), box.abs().amax() <= 2  # boxes may exceed the image a little
        if bool(finite & inside & (box[..., 2:] >= box[..., :2]).all()):
            return
        problem = ".box must be (x1, y1, x2, y2), divided by image width and height, with x1 <= x2 and y1 <= y2"
        if not (bool(finite) and bool(box.isfinite().all())):
            problem = f".{'box' if bool(finite) else 'x'} holds NaN or infinite values"
    raise ConfigError(f"data['{INSTANCE}']{problem}.")


@functional_transform("assignment_graph")
class AssignmentGraph(BaseTransform):
    r"""Builds the assignment graph of detected instances and label vectors (functional name: ``assignment_graph``).

    Takes a ``HeteroData`` whose ``instance`` store holds ``x`` (M, D_o) and ``box`` (M, 4), (x1, y1, x2, y2)
    divided by image width and height, and adds

    - ``label.x`` (C, D_l): :math:`v^l_i = w_i`;
    - ``instance spatial instance``: from each of the nearest neighbors j to i, :math:`e^o_{ij} = [B_j, B_i]`, source
      box first (eq. 1);
    - ``label semantic label``: between every ordered pair of different labels, :math:`e^l_{ij} = [w_j, w_i]` (eq. 2);
    - ``instance matches label``: every pair, :math:`e^m_{ic} = [v^o_i, v^l_c]` (eq. 3). The same edges serve the
      messages in both directions.

    Label vectors and edge attributes get the dtype of ``instance.x``.

    Args:
        label_vectors: (C, D_l), the word vector of each label.
        m: keep the m first (most confident) instances, times ``views``; None keeps all.
        num_neighbors: of each instance, by distance of box centers (default: 5; not stated in the paper).
        num_label_neighbors: None connects all labels (the paper); a number keeps the nearest of each label by cosine.
        edge_types: the edge types to add, or their names (default: all three). ``matches`` is always added: its edges
            are the pairs that are scored.
        candidates: (D, C) bool, the labels with an edge from instances of each detector class (see
            :func:`label_candidates`). None: all pairs have an edge (the paper).
        class_labels: (D, C) bool, the labels that each of the detector's classes is. Adds ``confidence`` (E,) to the
            matching edges: the score of instances that are detected as the label, 0 on all other edges.
        views: number of views of the image whose instances are in one graph (see
            :class:`~gm_mlic.detection.MultiViewExtractor`; default: 1).
        label_counts: (C,), the number of training images with each label. Adds ``label.count`` (C,). With
            ``class_labels``, the count of a label without a class is infinite: :class:`~gm_mlic.nn.MatchHead` shrinks
            nothing that is learned for it.
        edge_attr: also store the attributes of eq. 2 and 3 (default: ``False``). They repeat node attributes; the model
            computes them if absent. Graphs that store them have no dense form.

    Raises:
        ArgumentError: for label vectors of a wrong shape or with NaN or infinite values, for a number below 1, and for
            an unknown edge type.
        ConfigError: when called, for an image without instances, with NaN or infinite values, or with other boxes.
    """

    @checked
    def __init__(
        self,
        label_vectors: Tensor,
        m: Positive | None = None,
        num_neighbors: Positive = 5,
        num_label_neighbors: Positive | None = None,
        *,
        edge_types: Sequence[str | EdgeType] = RELATIONS,
        candidates: Tensor | None = None,
        class_labels: Tensor | None = None,
        label_counts: Tensor | None = None,
        views: Positive = 1,
        edge_attr: bool = False,
    ) -> None:
        if not isinstance(label_vectors, Tensor) or label_vectors.ndim != 2 or label_vectors.shape[0] == 0:
            raise ArgumentError("label_vectors", f"must be a tensor (C, D_l) with C >= 1, got {_shape(label_vectors)}.")
        invalid = (~torch.isfinite(label_vectors).all(dim=1)).nonzero().flatten().tolist()
        if invalid:
            raise ArgumentError(
                "label_vectors", f"of labels {invalid[:10]} hold NaN or infinite values: correct the embedding file."
            )
        C = label_vectors.shape[0]
        for name, table in (("candidates", candidates), ("class_labels", class_labels)):
            if table is not None and (table.dtype != torch.bool or table.shape[1:] != (C,)):
                raise ArgumentError(
                    name, f"must be a bool table of classes and {C} labels, got {table.dtype} {tuple(table.shape)}."
                )
        if label_counts is not None and (label_counts.shape != (C,) or bool((label_counts < 0).any())):
            raise ArgumentError("label_counts", f"must be {C} numbers of images, got {_shape(label_counts)}.")
        if label_counts is not None and class_labels is not None:
            label_counts = label_counts.float().masked_fill(~class_labels.any(dim=0), torch.inf)
        self.label_vectors = label_vectors
        self.candidates, self.class_labels, self.label_counts = candidates, class_labels, label_counts
        self.m, self.views = None if m is None else m * views, views
        self.num_neighbors, self.num_label_neighbors = num_neighbors, num_label_neighbors
        self.edge_types, self.edge_attr = tuple(edge_table(edge_types)), edge_attr
        self.label_neighbors = label_neighbors(label_vectors, num_label_neighbors)
        self._semantic = label_edge_index(len(label_vectors), self.label_neighbors)

    def forward(self, data: HeteroData) -> HeteroData:
        instances = data[INSTANCE]
        for name in ("x", "box"):
            if name not in instances:
                raise ConfigError(f"AssignmentGraph needs data['{INSTANCE}'].{name}.")
        check_instances(instances.x, instances.box)
        if self.m is not None:
            for name, value in list(instances.items()):
                if isinstance(value, Tensor) and value.ndim > 0:
                    instances[name] = value[: self.m]
        x, box, W = instances.x, instances.box, self.label_vectors.to(instances.x.dtype)
        M, C = x.shape[0], W.shape[0]

        data[LABEL].x = W
        if self.views > 1:
            data.views = self.views
        if self.label_counts is not None:
            data[LABEL].count = self.label_counts.to(x.dtype)
        if SPATIAL in self.edge_types:
            source, target = data[SPATIAL].edge_index = knn_edge_index(box, self.num_neighbors)
            data[SPATIAL].edge_attr = torch.cat([box[source], box[target]], dim=1).to(x.dtype)
        if SEMANTIC in self.edge_types:
            source, target = data[SEMANTIC].edge_index = self._semantic
            if self.edge_attr:
                data[SEMANTIC].edge_attr = torch.cat([W[source], W[target]], dim=1)
        matches = torch.ones(M, C, dtype=torch.bool, device=x.device)
        if self.candidates is not None:
            matches = candidate_edges(self.candidates, instances.get("detected_label"), matches[:, 0])
        source, target = data[MATCHES].edge_index = matches.nonzero().t().contiguous()
        if self.edge_attr:
            data[MATCHES].edge_attr = torch.cat([x[source], W[target]], dim=1)
        if self.class_labels is not None:
            q = class_confidence(self.class_labels, instances.get("detected_label"), instances.get("score"))
            data[MATCHES].confidence = q[source, target].to(x.dtype)
        return data

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(C={self.label_vectors.shape[0]}, m={self.m}, num_neighbors={self.num_neighbors}, "
            f"num_label_neighbors={self.num_label_neighbors})"
        )


def _shape(value: object) -> str:
    return f"{type(value).__name__} {tuple(getattr(value, 'shape', ()))}"
