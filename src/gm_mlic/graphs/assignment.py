"""From detected instances and label vectors to the assignment graph GA, a ``HeteroData`` (eq. 1 to 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import HeteroData
from torch_geometric.data.datapipes import functional_transform
from torch_geometric.transforms import BaseTransform

from gm_mlic.errors import ConfigError
from gm_mlic.graphs.candidates import candidate_matches
from gm_mlic.graphs.schema import INSTANCE, LABEL, MATCHES, NEAR, RELATES


def nearest_neighbours(boxes: Tensor, neighbours: int) -> Tensor:
    """Edges of the instance graph: from each of an instance's nearest neighbours to it.

    Distance is that of box centres; the instance itself is left out, equal distances go to the lower number.

    Args:
        boxes: (M, 4) as (x1, y1, x2, y2).
        neighbours: how many for each instance; fewer where M is smaller.

    Returns:
        ``edge_index`` (2, M * min(neighbours, M - 1)), sorted by receiving instance, nearest first.
    """
    M = boxes.shape[0]
    K = min(neighbours, M - 1)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    difference = centres[:, None] - centres[None]
    distance = difference.square().sum(dim=-1)
    distance.fill_diagonal_(float("inf"))
    source = distance.argsort(dim=1, stable=True)[:, :K].reshape(-1)
    target = torch.arange(M, device=boxes.device).repeat_interleave(K)
    return torch.stack([source, target])


def label_relations(label_vectors: Tensor, label_neighbours: int | None) -> Tensor:
    """Edges of the label graph: every ordered pair of different labels, or only from each label's nearest ones.

    Args:
        label_vectors: (C, D_l).
        label_neighbours: None for all pairs (the paper); else how many neighbours, by cosine similarity.

    Returns:
        ``edge_index`` (2, E), sorted by receiving label.
    """
    C = label_vectors.shape[0]
    if label_neighbours is None or label_neighbours >= C - 1:
        target, source = torch.cartesian_prod(torch.arange(C), torch.arange(C)).reshape(C * C, 2).t()
        different = source != target
        return torch.stack([source[different], target[different]])
    unit = torch.nn.functional.normalize(label_vectors.double(), dim=1)
    similarity = unit @ unit.t()
    similarity.fill_diagonal_(float("-inf"))
    source = similarity.argsort(dim=1, descending=True, stable=True)[:, :label_neighbours].reshape(-1)
    return torch.stack([source, torch.arange(C).repeat_interleave(label_neighbours)])


@functional_transform("assignment_graph")
class AssignmentGraph(BaseTransform):
    r"""Joins detected instances and label vectors into the assignment graph (functional name: ``assignment_graph``).

    Takes a ``HeteroData`` whose ``instance`` store holds ``x`` (M, D_o) and ``box`` (M, 4) and adds

    - ``label.x`` (C, D_l): :math:`v^l_i = w_i`;
    - ``instance near instance``: from each of the nearest neighbours j to i,
      :math:`e^o_{ij} = [B_j, B_i]`, source box first (eq. 1);
    - ``label relates label``: between every ordered pair of different labels, :math:`e^l_{ij} = [w_j, w_i]` (eq. 2);
    - ``instance matches label``: every pair, :math:`e^m_{ij} = [v^o_i, v^l_j]` (eq. 3). This one store serves both
      directions.

    Args:
        label_vectors: (C, D_l), the word vector of each label.
        m: keep the m first (most confident) instances; None keeps all.
        neighbours: of each instance, by distance of box centres (default: 5, where the paper is silent).
        label_neighbours: None joins all labels (the paper); a number keeps each label's nearest by cosine.
        instance_graph: False leaves out the instance-instance edges (ablation w/o Go).
        label_graph: False leaves out the label-label edges (ablation w/o Gl).
        candidates: (D, C) bool, the labels that an instance of each of the detector's classes may be (see
            :func:`label_candidates`): only these are joined to it. None joins every pair (the paper).
        edge_attr: also write the attributes of eq. 2 and 3 (default: no). They only repeat node attributes, the model
            forms them by itself where they are absent, and only graphs without them can take the structured execution.

    Raises:
        ConfigError: for label vectors of a wrong shape or with NaN or infinite values, for a number below 1, and, when
            called, for an image without instances or with NaN or infinite features or boxes.
    """

    def __init__(
        self,
        label_vectors: Tensor,
        m: int | None = None,
        neighbours: int = 5,
        label_neighbours: int | None = None,
        *,
        instance_graph: bool = True,
        label_graph: bool = True,
        candidates: Tensor | None = None,
        edge_attr: bool = False,
    ) -> None:
        if not isinstance(label_vectors, Tensor) or label_vectors.ndim != 2 or label_vectors.shape[0] == 0:
            raise ConfigError(f"label_vectors must be (C, D_l) with C >= 1, got {label_vectors!r:.60}.")
        if not bool(torch.isfinite(label_vectors).all()):
            bad = (~torch.isfinite(label_vectors).all(dim=1)).nonzero().flatten().tolist()
            raise ConfigError(f"The vectors of labels {bad[:10]} hold NaN or infinite values: mend the embedding file.")
        for name, value, optional in (
            ("m", m, True),
            ("neighbours", neighbours, False),
            ("label_neighbours", label_neighbours, True),
        ):
            if not (optional and value is None) and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"graph.{name} must be a whole number of 1 or more, got {value!r}.")
        if candidates is not None and (
            candidates.dtype != torch.bool or candidates.shape[1:] != label_vectors.shape[:1]
        ):
            raise ConfigError(
                f"graph.candidates must be a bool table of classes and {label_vectors.shape[0]} labels, got "
                f"{candidates.dtype} {tuple(candidates.shape)}."
            )
        self.label_vectors = label_vectors
        self.candidates = candidates
        self.m = m
        self.neighbours = neighbours
        self.label_neighbours = label_neighbours
        self.instance_graph = instance_graph
        self.label_graph = label_graph
        self.edge_attr = edge_attr
        self._relates = label_relations(label_vectors, label_neighbours)

    @property
    def label_lists(self) -> Tensor | None:
        """Each label's neighbours (C, K), or None where that is all others."""
        C = self.label_vectors.shape[0]
        complete = self.label_neighbours is None or self.label_neighbours >= C - 1
        return None if complete else self._relates[0].view(C, -1)

    def forward(self, data: HeteroData) -> HeteroData:
        instances, W = data[INSTANCE], self.label_vectors
        for name in ("x", "box"):
            if name not in instances:
                raise ConfigError(f"AssignmentGraph needs data['{INSTANCE}'].{name}.")
            if not bool(torch.isfinite(instances[name]).all()):
                raise ConfigError(f"data['{INSTANCE}'].{name} holds NaN or infinite values.")
        if self.m is not None:
            for name, value in list(instances.items()):
                if isinstance(value, Tensor) and value.ndim > 0:
                    instances[name] = value[: self.m]
        x, box = instances.x, instances.box
        M, C = x.shape[0], W.shape[0]
        if M == 0:
            raise ConfigError("An image without instances: give it one, the whole image (see InstanceExtractor).")

        data[LABEL].x = W
        if self.instance_graph:
            near = nearest_neighbours(box, self.neighbours)
            data[NEAR].edge_index = near
            data[NEAR].edge_attr = torch.cat([box[near[0]], box[near[1]]], dim=1)
        if self.label_graph:
            data[RELATES].edge_index = self._relates
            if self.edge_attr:
                data[RELATES].edge_attr = torch.cat([W[self._relates[0]], W[self._relates[1]]], dim=1)
        matches = torch.stack(
            [torch.arange(M, device=x.device).repeat_interleave(C), torch.arange(C, device=x.device).repeat(M)]
        )
        if self.candidates is not None:
            if "detected_label" not in instances:
                raise ConfigError(f"Candidates need data['{INSTANCE}'].detected_label.")
            everyone = torch.ones(1, M, dtype=torch.bool, device=x.device)
            there = candidate_matches(self.candidates, instances.detected_label[None], everyone)
            matches = matches[:, there.flatten()]
        data[MATCHES].edge_index = matches
        if self.edge_attr:
            data[MATCHES].edge_attr = torch.cat([x[matches[0]], W[matches[1]]], dim=1)
        return data

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(C={self.label_vectors.shape[0]}, m={self.m}, neighbours={self.neighbours}, "
            f"label_neighbours={self.label_neighbours})"
        )
