"""Why a label was given: what each single edge of the assignment graph contributes to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, HeteroData

from gm_mlic.errors import ArgumentError, ConfigError
from gm_mlic.graphs import LABEL, MATCHES, NEAR, RELATES
from gm_mlic.nn import GMMLIC
from gm_mlic.zoo.predictor import Photo, Prediction, Predictor

#: Edges of graphs that go through the network together, at most.
_EDGES_AT_A_TIME = 50_000


@dataclass(frozen=True)
class Influence:
    r"""What one edge of the graph contributes to one label's logit.

    Attributes:
        kind: ``instance_to_instance`` (from a neighbouring instance to the winning instance), ``label_to_label`` (from
            another label to this label), ``instance_to_label`` (from another instance to this label),
            ``label_to_instance`` (from another label to the winning instance).
        neighbour: the number of the instance, or the name of the label, at the edge's source.
        change: :math:`s_c - s_c^{without}`: the label's logit, less that of the same graph without this edge. Above 0
            it speaks for the label. (Neighbours are averaged, so without one the others weigh more.)
    """

    kind: str
    neighbour: int | str
    change: float


@dataclass(frozen=True)
class Explanation:
    """One label of one photo.

    Attributes:
        prediction: everything predicted of the photo, with the match logits of all instances and labels.
        label: which label this is about.
        instance: the instance that won it.
        logit: its logit.
        influences: every edge into the winning instance and into the label, the largest change first.
    """

    prediction: Prediction
    label: str
    instance: int
    logit: float
    influences: tuple[Influence, ...]


def explain(predictor: Predictor, photo: Photo, label: str | None = None) -> Explanation:
    """Take away each edge into the winning instance and into the label, one at a time, and predict again.

    Exact: a forward pass for each of the up to K + (C - 1) + (M - 1) + (C - 1) edges, by message passing. Influences do
    not add up: the network is not linear in its edges. The only edge of another label is not taken away.

    Args:
        predictor: with a GM-MLIC model.
        photo: a file or an open image.
        label: one of the predictor's; default: the most probable.

    Raises:
        ConfigError: if the model has no graph, or no such label.
        UnreadableImage: if the photo cannot be read.
    """
    model = _explicit(predictor)
    (prediction,) = predictor([photo])
    names = prediction.labels
    if label is not None and label not in names:
        raise ArgumentError(
            "label", f"is {label!r}: the model knows {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}."
        )
    c = names.index(label) if label is not None else int(prediction.probabilities.argmax())
    data = predictor.assignment_graph(photo)
    with torch.no_grad():
        whole = model(data)
    winner, logit = int(whole.winners[0, c]), float(whole.logits[0, c])
    without = _without_each(data, winner, c, names)
    influences = []
    size = max(1, _EDGES_AT_A_TIME // sum(data[t].edge_index.shape[1] for t in data.edge_types))
    while chunk := list(islice(without, size)):
        with torch.no_grad():
            logits = model(Batch.from_data_list([graph for _, _, graph in chunk])).logits[:, c].tolist()
        influences += [
            Influence(kind, neighbour, logit - other) for (kind, neighbour, _), other in zip(chunk, logits, strict=True)
        ]
    influences.sort(key=lambda influence: -abs(influence.change))
    return Explanation(prediction, names[c], winner, logit, tuple(influences))


class ExplainedModel(nn.Module):
    """A GM-MLIC model with the signature that :class:`torch_geometric.explain.Explainer` expects of heterogeneous ones.

    Node masks apply to ``x_dict``; edge masks to all messages along an edge type, in both directions of the matching
    edges.

    Args:
        model: the model.
        data: the graph that is explained; its edge attributes and boxes are used as they are.
    """

    def __init__(self, model: GMMLIC, data: HeteroData) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.model.execution = "explicit"
        self._data = data
        by_type: dict[tuple[str, str, str], list[nn.Module]] = {NEAR: [], RELATES: [], MATCHES: []}
        for block in self.model.blocks:
            nodes: Any = block.nodes
            for edge_type, message in (
                (NEAR, nodes.rho_oo),
                (RELATES, nodes.rho_ll),
                (MATCHES, nodes.rho_ol),
                (MATCHES, nodes.rho_lo),
            ):
                if message is not None:
                    by_type[edge_type].append(message)
        # where PyG looks for the layers of an edge type
        self.messages = nn.ModuleDict({"__".join(kind): nn.ModuleList(found) for kind, found in by_type.items()})

    def forward(self, x_dict: dict[str, Tensor], edge_index_dict: dict[Any, Tensor]) -> Tensor:
        """Label logits (1, C)."""
        data = copy.copy(self._data)
        for kind, x in x_dict.items():
            data[kind].x = x
        for edge_type, edge_index in edge_index_dict.items():
            data[edge_type].edge_index = edge_index
        logits: Tensor = self.model(data).logits
        return logits


def _explicit(predictor: Predictor) -> GMMLIC:
    """A copy of the predictor's model that passes messages over ``edge_index``."""
    if not isinstance(predictor.model, GMMLIC):
        raise ConfigError(f"{type(predictor.model).__name__} has no assignment graph whose edges could be explained.")
    model = copy.copy(predictor.model)
    model.execution = "explicit"
    return model


def _without_each(
    data: HeteroData, winner: int, c: int, names: tuple[str, ...]
) -> Iterator[tuple[str, int | str, HeteroData]]:
    """Of each edge into the winning instance or label c: its kind, its source, and the graph without it."""
    for edge_type in data.edge_types:
        source, target = data[edge_type].edge_index.cpu()
        if edge_type == NEAR:
            edges = [
                ("instance_to_instance", e, int(source[e])) for e in (target == winner).nonzero().flatten().tolist()
            ]
        elif edge_type == RELATES:
            into = (target == c).nonzero().flatten().tolist()
            edges = [("label_to_label", e, names[source[e]]) for e in into]
        else:
            others = ((target == c) & (source != winner)).nonzero().flatten().tolist()
            edges = [("instance_to_label", e, int(source[e])) for e in others]
            others = ((source == winner) & (target != c)).nonzero().flatten().tolist()
            # a label whose only edge this is would have none left
            degree = torch.bincount(target)
            edges += [("label_to_instance", e, names[target[e]]) for e in others if degree[target[e]] > 1]
        for kind, edge, neighbour in edges:
            graph = copy.copy(data)
            kept = torch.arange(len(source), device=data[LABEL].x.device) != edge
            graph[edge_type].edge_index = data[edge_type].edge_index[:, kept]
            if "edge_attr" in data[edge_type]:
                graph[edge_type].edge_attr = data[edge_type].edge_attr[kept]
            yield kind, neighbour, graph
