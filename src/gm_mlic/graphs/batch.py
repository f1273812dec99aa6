"""A batch of assignment graphs as dense tensors.

Matching edges are a mask over (B, M, C) and have no ``edge_index``. The attributes of eq. 2 and 3 are never stored,
since they repeat node attributes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, HeteroData
from torch_geometric.utils import to_dense_batch

from gm_mlic.errors import ConfigError
from gm_mlic.graphs.assignment import label_edge_index
from gm_mlic.graphs.classes import candidate_edges, class_confidence
from gm_mlic.graphs.dense import Bipartite, DenseEdges, NeighborLists, TensorFields
from gm_mlic.graphs.schema import INSTANCE, LABEL, MATCHES, RELATIONS, SEMANTIC, SPATIAL, EdgeType, edge_table


def check_sizes(x_dict: Mapping[str, Tensor], instance_dim: int | None, label_dim: int | None) -> None:
    """Raise :class:`ConfigError` for features of other sizes than a model's; None and -1 accept any size."""
    for what, node_type, size in (("instance features", INSTANCE, instance_dim), ("label vectors", LABEL, label_dim)):
        if node_type not in x_dict:
            raise ConfigError(f"The graph has no {node_type} nodes with features x.")
        length = x_dict[node_type].shape[-1]
        if size not in (None, -1, length):
            raise ConfigError(f"The graph's {what} have length {length}, the model was built for {size}.")


def check_label_counts(counts: Sequence[int]) -> None:
    """Raise :class:`ConfigError` if images of a batch differ in their number of labels."""
    if len(set(counts)) > 1:
        raise ConfigError(f"All images of a batch must have the same number of labels, got {list(counts)}.")


@dataclass(frozen=True, eq=False, repr=False)
class AssignmentBatch(TensorFields):
    """B assignment graphs over the same C labels, padded to M instances.

    It has the dictionaries of a ``HeteroData``: ``x_dict``, ``edge_index_dict`` and ``edge_attr_dict``.

    Attributes:
        x: (B, M, D_o) instance features, zero where padded.
        box: (B, M, 4), (x1, y1, x2, y2) divided by image width and height.
        mask: (B, M) bool, False where padded; the instances of each image come first.
        label_vectors: (C, D_l).
        edge_index_dict: the edges of each type.
        edge_attr_dict: attributes of the edge types that store them, (B or 1, N, K, D_e).
        y: (B, C) targets in {0, 1}, or None.
        difficult: (B, C) bool, labels that are present only in objects marked difficult (VOC), or None.
        row: (B,) int64 row of each image in its store, or None.
        score: (B, M), the detector's confidence in each instance, or None.
        detected_label: (B, M) int64, the detector's class of each instance, -1 for none; or None.
        confidence: (B, M, C), q_ic: the detector's confidence where instance i is detected as label c, or 0; or None.
        label_counts: (C,), training images with each label, or None.
        views: of each image, whose instances are in one graph.
    """

    x: Tensor
    box: Tensor
    mask: Tensor
    label_vectors: Tensor
    edge_index_dict: dict[EdgeType, DenseEdges] = field(default_factory=dict)
    edge_attr_dict: dict[EdgeType, Tensor] = field(default_factory=dict)
    y: Tensor | None = None
    difficult: Tensor | None = None
    row: Tensor | None = None
    score: Tensor | None = None
    detected_label: Tensor | None = None
    confidence: Tensor | None = None
    label_counts: Tensor | None = None
    views: int = 1

    @property
    def num_graphs(self) -> int:
        """B."""
        return int(self.x.shape[0])

    @property
    def num_labels(self) -> int:
        """C."""
        return int(self.label_vectors.shape[0])

    @property
    def x_dict(self) -> dict[str, Tensor]:
        """Node attributes: instances (B, M, D_o), labels (1, C, D_l)."""
        return {INSTANCE: self.x, LABEL: self.label_vectors[None]}

    def collect(self, key: str, allow_empty: bool = False) -> dict[Any, Any]:
        """An attribute by node or edge type, as :meth:`torch_geometric.data.HeteroData.collect`."""
        if key in ("x", "edge_index", "edge_attr"):
            found: dict[Any, Any] = getattr(self, f"{key}_dict")
        elif key == "count":
            found = {} if self.label_counts is None else {LABEL: self.label_counts[None]}
        else:
            value = getattr(self, key)
            found = {} if value is None else {MATCHES if key == "confidence" else INSTANCE: value}
        if not found and not allow_empty:
            raise KeyError(key)
        return found

    @property
    def match_mask(self) -> Tensor:
        """(B, M, C or 1) bool, the matching edges that exist."""
        mask: Tensor = getattr(self.edge_index_dict.get(MATCHES), "mask", self.mask)
        return mask if mask.dim() == 3 else mask[..., None]

    def pin_memory(self) -> AssignmentBatch:
        """The same batch in page-locked memory, for copies to a GPU that overlap with computation."""
        return self.map(Tensor.pin_memory)

    def split(self, size: int) -> list[AssignmentBatch]:
        """The same images in batches of up to ``size``."""
        B, of_labels = self.num_graphs, (self.label_vectors, self.label_counts)

        def sliced(value: Tensor, start: int) -> Tensor:
            shared = len(value) != B or any(value is tensor for tensor in of_labels)
            return value if shared else value[start : start + size]

        return [self.map(partial(sliced, start=start)) for start in range(0, B, size)] if size < B else [self]

    @classmethod
    def from_padded(
        cls,
        x: Tensor,
        box: Tensor,
        mask: Tensor,
        label_vectors: Tensor,
        *,
        num_neighbors: int = 5,
        label_neighbors: Tensor | None = None,
        edge_types: Sequence[str | EdgeType] = RELATIONS,
        candidates: Tensor | None = None,
        class_labels: Tensor | None = None,
        detected_label: Tensor | None = None,
        score: Tensor | None = None,
        views: int = 1,
        **others: Tensor | None,
    ) -> AssignmentBatch:
        """Connect padded instances and label vectors, as :class:`AssignmentGraph` does for one image.

        Args:
            x, box, mask: (B, M, D_o), (B, M, 4), (B, M); see the class.
            label_vectors: (C, D_l); they get the dtype of ``x``, as do edge attributes.
            label_neighbors: (C, K), the neighbors of each label; None for all other labels.
            num_neighbors, edge_types, candidates, class_labels: as for :class:`AssignmentGraph`.
            **others: other attributes of the class, except ``confidence``.

        Raises:
            ArgumentError: for an unknown edge type.
            ConfigError: for candidates or class labels without detected labels, or of other classes.
        """
        table, label_vectors = edge_table(edge_types), label_vectors.to(x.dtype)
        x, box = x.masked_fill(~mask[..., None], 0), box.masked_fill(~mask[..., None], 0)
        edges: dict[EdgeType, DenseEdges] = {}
        attrs: dict[EdgeType, Tensor] = {}
        if SPATIAL in table:
            # written such that B and M stay dynamic in torch.export
            B, M = x.shape[:2]
            center = (box[..., :2] + box[..., 2:]) / 2
            distance = (center[:, :, None] - center[:, None]).square().sum(dim=-1)
            excluded = ~mask[:, None] | torch.eye(M, dtype=torch.bool, device=x.device)
            distance, index = distance.masked_fill(excluded, float("inf")).sort(dim=2, stable=True)
            K = num_neighbors if num_neighbors < M else M - 1
            index, exists = index[..., :K], distance[..., :K].isfinite() & mask[..., None]
            sources = torch.gather(box, 1, index.reshape(B, M * K, 1).expand(-1, -1, 4)).view(B, M, K, 4)
            edges[SPATIAL] = NeighborLists(index, exists)
            attrs[SPATIAL] = torch.cat([sources, box[:, :, None].expand_as(sources)], dim=-1).to(x.dtype)
        if SEMANTIC in table:
            complete = _complete_labels(len(label_vectors), x.device)
            edges[SEMANTIC] = complete if label_neighbors is None else NeighborLists(label_neighbors[None])
        edges[MATCHES] = Bipartite(mask if candidates is None else candidate_edges(candidates, detected_label, mask))
        confidence = None
        if class_labels is not None:
            confidence = class_confidence(class_labels, detected_label, score)
            confidence = confidence.masked_fill(~mask[..., None], 0).to(x.dtype)
        others |= {"detected_label": detected_label, "score": score, "confidence": confidence}
        return cls(x, box, mask, label_vectors, edges, attrs, views=views, **others)  # type: ignore[arg-type]

    @classmethod
    def collate(cls, graphs: Sequence[HeteroData]) -> AssignmentBatch:
        """For ``DataLoader(collate_fn=AssignmentBatch.collate)``: the dense form of a list of graphs."""
        if not len(graphs):
            raise ConfigError("A batch needs at least one graph.")
        check_label_counts([len(graph[LABEL].x) for graph in graphs])  # before PyG fails to concatenate targets
        return cls.from_hetero_data(Batch.from_data_list(list(graphs)))

    @classmethod
    def from_hetero_data(cls, data: HeteroData) -> AssignmentBatch:
        """The dense form of one assignment graph or a PyG batch of them.

        Edge types between instances or between labels can be custom ones with attributes.

        Raises:
            ConfigError: if there is no dense form: images differ in their labels or label edges, a label edge connects
                two images, an edge occurs twice, or matching edges have attributes.
        """
        B = int(getattr(data, "num_graphs", 1))
        instances, x, W = data[INSTANCE], data[INSTANCE].x, data[LABEL].x
        check_label_counts(data[LABEL].ptr.diff().tolist() if "ptr" in data[LABEL] else [])
        _require(W.shape[0] % B == 0 and torch.equal(W, W[: W.shape[0] // B].repeat(B, 1)), "images differ in labels")
        C = W.shape[0] // B
        ptr = instances.ptr if "ptr" in instances else torch.tensor([0, x.shape[0]], device=x.device)
        counts = ptr.diff()
        mask = torch.arange(int(counts.max()), device=x.device) < counts[:, None]

        def padded(value: Tensor, padding: int = 0) -> Tensor:
            out = value.new_full((*mask.shape, *value.shape[1:]), padding)
            out[mask] = value
            return out

        edges: dict[EdgeType, DenseEdges] = {}
        attrs: dict[EdgeType, Tensor] = {}
        for edge_type in data.edge_types:
            store, ends = data[edge_type], (edge_type[0], edge_type[2])
            attr = store.edge_attr if "edge_attr" in store else None
            if ends == (INSTANCE, LABEL):
                _require(attr is None, f"{' '.join(edge_type)} edges carry attributes")
                edges[edge_type] = _bipartite(store.edge_index, ptr, C, mask)
            elif ends == (INSTANCE, INSTANCE):
                position = torch.arange(x.shape[0], device=x.device) - ptr[:-1].repeat_interleave(counts)
                edges[edge_type], attr = _neighbor_lists(store.edge_index, position, attr)
                edges[edge_type] = edges[edge_type].map(padded)
                attr = None if attr is None else padded(attr)
            elif ends == (LABEL, LABEL):
                edges[edge_type], attr = _label_lists(store.edge_index, B, C, attr)
            else:
                _require(False, f"{' '.join(edge_type)} connects other node types than instance and label")
            if attr is not None:
                attrs[edge_type] = attr
        others = {name: data[name] for name in ("y", "difficult", "row") if name in data}
        for name, padding in (("score", 0), ("detected_label", -1)):
            if name in instances:
                others[name] = padded(instances[name], padding)
        if "views" in data:
            others["views"] = int(torch.as_tensor(data.views).flatten()[0])
        if "count" in data[LABEL]:
            others["label_counts"] = data[LABEL].count[:C]
        if MATCHES in data.edge_types and "confidence" in data[MATCHES]:
            source, target = data[MATCHES].edge_index
            confidence = data[MATCHES].confidence.new_zeros(x.shape[0], C)
            confidence[source, target % C] = data[MATCHES].confidence
            others["confidence"] = padded(confidence)
        return cls(padded(x), padded(instances.box), mask, W[:C], edges, attrs, **others)


def drop_edges(batch: AssignmentBatch | HeteroData, edge_type: EdgeType) -> AssignmentBatch | HeteroData:
    """The same graphs without any edge of one type. The edge type itself stays, for models that need it."""
    if edge_type not in batch.edge_index_dict:
        return batch
    if isinstance(batch, AssignmentBatch):
        lists: Any = batch.edge_index_dict[edge_type]
        like = lists.index if lists.mask is None else lists.mask
        empty = replace(lists, mask=torch.zeros_like(like, dtype=torch.bool))
        return replace(batch, edge_index_dict={**batch.edge_index_dict, edge_type: empty})
    graph = copy.copy(batch)
    for name, value in batch[edge_type].items():
        graph[edge_type][name] = value[:, :0] if name == "edge_index" else value[:0]
    return graph


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ConfigError(
            f"These graphs have no dense form: {otherwise}. Batch them with torch_geometric.loader.DataLoader and pass "
            "the HeteroData itself."
        )


def _complete_labels(C: int, device: torch.device) -> NeighborLists:
    """Edges from all other labels to each label."""
    return NeighborLists(mask=~torch.eye(C, dtype=torch.bool, device=device)[None])


def _bipartite(edge_index: Tensor, ptr: Tensor, C: int, mask: Tensor) -> Bipartite:
    source, target = edge_index
    image = target // C
    inside = (source >= ptr[image]) & (source < ptr[image + 1])
    _require(bool(inside.all()), "an edge connects two images")
    exists = torch.zeros(*mask.shape, C, dtype=torch.bool, device=mask.device)
    exists[image, source - ptr[image], target % C] = True
    _require(int(exists.sum()) == source.numel(), "an edge occurs twice")
    return Bipartite(mask if source.numel() == int(mask.sum()) * C else exists)


def _neighbor_lists(edge_index: Tensor, position: Tensor, attr: Tensor | None) -> tuple[NeighborLists, Tensor | None]:
    """Lists (N, K) of the sources of each of N targets, by their ``position`` in the image, and padded attributes."""
    order = edge_index[1].argsort(stable=True)
    source, target = edge_index[:, order]

    def lists(values: Tensor) -> tuple[Tensor, Tensor]:
        return to_dense_batch(values, target, batch_size=position.shape[0])  # type: ignore[no-any-return]

    return NeighborLists(*lists(position[source])), None if attr is None else lists(attr[order])[0]


def _label_lists(edge_index: Tensor, B: int, C: int, attr: Tensor | None) -> tuple[NeighborLists, Tensor | None]:
    """Label edges, which are the same in each of B images."""
    source, target = edge_index
    _require(torch.equal(source // C, target // C), "an edge connects two images")
    order, E = (target * C + source % C).argsort(stable=True), edge_index.shape[1] // B
    edges, shift = edge_index[:, order], C * torch.arange(B, device=source.device).repeat_interleave(E)
    same = edges.shape[1] == B * E and torch.equal(edges, edges[:, :E].repeat(1, B) + shift)
    _require(same, "images differ in their label edges")
    edges = edges[:, :E]
    if attr is not None:
        images = attr[order].view(B, E, *attr.shape[1:])
        _require(torch.equal(images, images[:1].expand_as(images)), "images differ in their label edges")
        attr = images[0]
    if attr is None and torch.equal(edges, label_edge_index(C).to(edges.device)):
        return _complete_labels(C, edges.device), None
    lists, attr = _neighbor_lists(edges, torch.arange(C, device=edges.device), attr)
    return lists.map(lambda tensor: tensor[None]), None if attr is None else attr[None]
