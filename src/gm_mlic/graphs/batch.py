"""A batch of assignment graphs as dense tensors: what the structured execution reads.

A tensor (B, M, C, d) holds the matching edges without any ``edge_index``; fewer instances, or fewer edges, are a mask.
Nothing of eq. 2 and 3 is ever written out, for it only repeats node attributes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from gm_mlic.errors import ConfigError
from gm_mlic.graphs.candidates import candidate_matches
from gm_mlic.graphs.schema import INSTANCE, LABEL, MATCHES, NEAR, RELATES


@dataclass(frozen=True, eq=False)
class AssignmentBatch:
    """B assignment graphs over the same C labels.

    Attributes:
        x: (B, M, D_o) instance features, zero where there is none.
        box: (B, M, 4), (x1, y1, x2, y2) divided by image width and height.
        mask: (B, M) bool, which instances there are; each image's stand first.
        label_vectors: (C, D_l).
        near: (B, M, K) int64, neighbours j of each instance i; None without an instance graph.
        near_mask: (B, M, K) bool, which of them there are.
        near_attr: (B, M, K, 8), [B_j, B_i] of eq. 1.
        label_graph: whether labels hear each other.
        relates: (C, K_l) int64, neighbours of each label; None for all other labels.
        y: (B, C) int64 targets in {0, 1}, or None.
        difficult: (B, C) bool, which labels are difficult (VOC), or None.
        row: (B,) int64 row of each image in its store, or None.
        score: (B, M), the detector's confidence in each instance, or None.
        detected_label: (B, M) int64, which of its own classes the detector gave each instance, -1 for none; or None.
        matches: (B, M, C) bool, which matching edges there are, one at least for each label; None for those of every
            instance with every label.
    """

    x: Tensor
    box: Tensor
    mask: Tensor
    label_vectors: Tensor
    near: Tensor | None = None
    near_mask: Tensor | None = None
    near_attr: Tensor | None = None
    label_graph: bool = True
    relates: Tensor | None = None
    y: Tensor | None = None
    difficult: Tensor | None = None
    row: Tensor | None = None
    score: Tensor | None = None
    detected_label: Tensor | None = None
    matches: Tensor | None = None

    @property
    def num_graphs(self) -> int:
        """B."""
        return int(self.x.shape[0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> AssignmentBatch:
        """The same batch on another device."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AssignmentBatch:
        """The same batch in page-locked memory, for copies to a GPU that overlap with work."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> AssignmentBatch:
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        changed: dict[str, Any] = {name: change(value) for name, value in tensors.items()}
        return replace(self, **changed)

    def split(self, size: int) -> list[AssignmentBatch]:
        """The same images in batches of up to ``size``."""
        shared = ("label_vectors", "relates")
        tensors = {
            f.name: torch.split(value, size)
            for f in fields(self)
            if f.name not in shared and isinstance(value := getattr(self, f.name), Tensor)
        }
        parts: list[dict[str, Any]] = [
            dict(zip(tensors, values, strict=True)) for values in zip(*tensors.values(), strict=True)
        ]
        return [replace(self, **part) for part in parts]

    @classmethod
    def build(
        cls,
        x: Tensor,
        box: Tensor,
        mask: Tensor,
        label_vectors: Tensor,
        *,
        neighbours: int | None = 5,
        label_graph: bool = True,
        relates: Tensor | None = None,
        y: Tensor | None = None,
        difficult: Tensor | None = None,
        row: Tensor | None = None,
        score: Tensor | None = None,
        detected_label: Tensor | None = None,
        candidates: Tensor | None = None,
    ) -> AssignmentBatch:
        """Join padded instances and label vectors, as :class:`AssignmentGraph` does for one image.

        Args:
            x, box, mask: (B, M, D_o), (B, M, 4), (B, M); see the class.
            label_vectors: (C, D_l).
            neighbours: of each instance, by distance of box centres; None leaves the instance graph out.
            label_graph, relates, y, difficult, row, score, detected_label: see the class.
            candidates: (D, C) bool, the labels that an instance of each detected class may be; None for all.

        Raises:
            ConfigError: for candidates without detected labels, or of other classes.
        """
        x, box = x.masked_fill(~mask[..., None], 0), box.masked_fill(~mask[..., None], 0)
        near = near_mask = near_attr = None
        if neighbours is not None:
            # written so that torch.export can leave B and M open
            B, M = x.shape[:2]
            centres = (box[..., :2] + box[..., 2:]) / 2
            distance = (centres[:, :, None] - centres[:, None]).square().sum(dim=-1)
            nobody = ~mask[:, None] | torch.eye(M, dtype=torch.bool, device=x.device)
            distance, near = distance.masked_fill(nobody, float("inf")).sort(dim=2, stable=True)
            K = neighbours if neighbours < M else M - 1
            near, near_mask = near[..., :K], distance[..., :K].isfinite() & mask[..., None]
            sources = torch.gather(box, 1, near.reshape(B, M * K, 1).expand(-1, -1, 4)).view(B, M, K, 4)
            near_attr = torch.cat([sources, box[:, :, None].expand_as(sources)], dim=-1)
        matches = None
        if candidates is not None:
            if detected_label is None:
                raise ConfigError("Candidates need the detected label of each instance.")
            matches = candidate_matches(candidates, detected_label, mask)
        return cls(
            x, box, mask, label_vectors, near, near_mask, near_attr, label_graph, relates, y, difficult, row,
            score, detected_label, matches,
        )  # fmt: skip

    @classmethod
    def from_data(cls, data: HeteroData) -> AssignmentBatch | None:
        """The dense form of a ``HeteroData`` (or PyG batch of them), or None where it has none.

        There is none where the matching edges are not sorted by instance and label, or are fewer than a tenth of all
        pairs (a tensor of them would be mostly empty), where images differ in their labels, where the label graph is
        neither complete nor of equal degree, or where the graph carries edge
        attributes for eq. 2 and 3 of its own.
        """
        if "edge_attr" in data[MATCHES] or ("edge_attr" in data[RELATES] if RELATES in data.edge_types else False):
            return None
        B = int(getattr(data, "num_graphs", 1))
        x, W = data[INSTANCE].x, data[LABEL].x
        if W.shape[0] % B:
            return None
        C = W.shape[0] // B
        ptr = data[INSTANCE].ptr if "ptr" in data[INSTANCE] else torch.tensor([0, x.shape[0]], device=x.device)
        counts = ptr.diff()
        W = W.view(B, C, -1)
        if B > 1 and not torch.equal(W, W[:1].expand_as(W)):
            return None
        M = int(counts.max())
        mask = torch.arange(M, device=x.device) < counts[:, None]
        matches: Tensor | None = None
        if not _complete_matches(data[MATCHES].edge_index, x.shape[0], C, counts):
            matches = _some_matches(data[MATCHES].edge_index, ptr, C, mask)
            if matches is None:
                return None

        def dense(value: Tensor, absent: int = 0) -> Tensor:
            padded = value.new_full((B, M, *value.shape[1:]), absent)
            padded[mask] = value
            return padded

        score = dense(data[INSTANCE].score) if "score" in data[INSTANCE] else None
        detected_label = dense(data[INSTANCE].detected_label, -1) if "detected_label" in data[INSTANCE] else None
        near = near_mask = near_attr = relates = None
        if NEAR in data.edge_types:
            source, target = data[NEAR].edge_index
            image = torch.repeat_interleave(torch.arange(B, device=x.device), counts)
            slot, K = _slots(target, x.shape[0])
            near = source.new_zeros(B, M, K)
            near_mask = torch.zeros(B, M, K, dtype=torch.bool, device=x.device)
            near_attr = x.new_zeros(B, M, K, data[NEAR].edge_attr.shape[1])
            where = (image[target], target - ptr[image[target]], slot)
            near[where] = source - ptr[image[source]]
            near_mask[where] = True
            near_attr[where] = data[NEAR].edge_attr
        if RELATES in data.edge_types:
            source, target = data[RELATES].edge_index
            if not _complete_relations(source, target, B, C):
                relates = _equal_lists(source, target, B, C)
                if relates is None:
                    return None
        y = data.y if "y" in data else None
        difficult = data.difficult if "difficult" in data else None
        row = data.row if "row" in data else None
        label_graph = RELATES in data.edge_types
        return cls(
            dense(x), dense(data[INSTANCE].box), mask, W[0], near, near_mask, near_attr, label_graph, relates, y,
            difficult, row, score, detected_label, matches,
        )  # fmt: skip


def without_near(batch: AssignmentBatch | HeteroData) -> AssignmentBatch | HeteroData:
    """The same graphs without a single edge of the instance graph; the edge type stays, for models that read it."""
    if isinstance(batch, AssignmentBatch):
        return batch if batch.near_mask is None else replace(batch, near_mask=torch.zeros_like(batch.near_mask))
    if NEAR not in batch.edge_types:
        return batch
    graph = copy.copy(batch)
    graph[NEAR].edge_index, graph[NEAR].edge_attr = batch[NEAR].edge_index[:, :0], batch[NEAR].edge_attr[:0]
    return graph


def _complete_matches(matches: Tensor, num_instances: int, C: int, counts: Tensor) -> bool:
    """Whether the matching edges are every instance with every label of its image, sorted by instance."""
    if matches.shape[1] != num_instances * C:
        return False
    image = torch.repeat_interleave(torch.arange(len(counts), device=matches.device), counts)
    source = torch.arange(num_instances, device=matches.device).repeat_interleave(C)
    target = (image * C)[:, None] + torch.arange(C, device=matches.device)
    return torch.equal(matches[0], source) and torch.equal(matches[1], target.reshape(-1))


def _some_matches(matches: Tensor, ptr: Tensor, C: int, mask: Tensor) -> Tensor | None:
    """Which instance is joined to which label (B, M, C); None for few, unsorted, or between two images."""
    if matches.shape[1] * 10 < mask.numel() * C:
        return None
    source, target = matches
    image = target // C
    slot = source - ptr[image]
    place = source * C + target % C
    inside = bool(((slot >= 0) & (source < ptr[image + 1])).all())
    if not inside or not bool((place.diff() > 0).all()):
        return None
    there = torch.zeros(*mask.shape, C, dtype=torch.bool, device=matches.device)
    there[image, slot, target % C] = True
    return there


def _complete_relations(source: Tensor, target: Tensor, B: int, C: int) -> bool:
    """Whether the label edges are every ordered pair of different labels of each image, in any order."""
    if source.numel() != B * C * (C - 1):
        return False
    if not torch.equal(source // C, target // C) or bool((source == target).any()):
        return False
    return bool((torch.bincount(target * C + source % C, minlength=B * C * C) <= 1).all())


def _slots(target: Tensor, num_nodes: int) -> tuple[Tensor, int]:
    """The rank of each edge among the edges of its target, and the largest number of edges of a target."""
    degree = torch.bincount(target, minlength=num_nodes)
    order = target.argsort(stable=True)
    start = degree.cumsum(0) - degree
    slot = torch.empty_like(target)
    slot[order] = torch.arange(target.numel(), device=target.device) - start[target[order]]
    return slot, int(degree.max()) if target.numel() else 0


def _equal_lists(source: Tensor, target: Tensor, B: int, C: int) -> Tensor | None:
    """Neighbour lists (C, K) if every label of every image has the same K, else None."""
    degree = torch.bincount(target, minlength=B * C)
    K = int(degree[0])
    if K == 0 or not bool((degree == K).all()) or not torch.equal(source // C, target // C):
        return None
    order = target.argsort(stable=True)
    lists = torch.remainder(source[order], C).view(B, C, K)
    return lists[0] if torch.equal(lists, lists[:1].expand_as(lists)) else None
