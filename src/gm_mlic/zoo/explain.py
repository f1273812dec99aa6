"""The contribution of each edge of the assignment graph to a label."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, HeteroData

from gm_mlic.errors import ArgumentError, ConfigError
from gm_mlic.graphs import INSTANCE, LABEL, MATCHES, EdgeSpec
from gm_mlic.graphs.schema import EdgeType
from gm_mlic.io import few
from gm_mlic.nn import GMMLIC
from gm_mlic.zoo.predictor import Photo, Prediction, Predictor

#: Largest number of edges in a batch of graphs.
_BATCH_EDGES = 50_000


@dataclass(frozen=True)
class Influence:
    r"""The contribution of one edge of the graph to one label's logit.

    Attributes:
        edge_type: type of the edge.
        source: type of the sending node, ``instance`` or ``label``.
        target: type of the receiving node: ``instance`` for the argmax instance, ``label`` for the explained label.
        neighbor: index of the sending instance, or name of the sending label.
        change: :math:`s_c - s_c^{without}`, the label's logit minus its logit in the graph without this edge; positive
            if the edge supports the label. Messages are averaged, so removing one gives the others more weight.
    """

    edge_type: tuple[str, str, str]
    source: str
    target: str
    neighbor: int | str
    change: float


@dataclass(frozen=True)
class Explanation:
    """Explanation of one label of one photo.

    Attributes:
        prediction: the prediction for the photo, with the match logits of all instances and labels.
        label: the explained label.
        instance: index of the argmax instance.
        logit: the label's logit.
        match_logit: match logit of the argmax instance and the label.
        prior: the detector's part of the match logit; None for a model without prior.
        influences: all edges to the argmax instance and to the label, largest absolute change first.
    """

    prediction: Prediction
    label: str
    instance: int
    logit: float
    match_logit: float
    prior: float | None
    influences: tuple[Influence, ...]


def explain(predictor: Predictor, photo: Photo, label: str | None = None) -> Explanation:
    """Influence of each edge: remove the edges to the argmax instance and to the label one at a time.

    Edges of bidirectional types count in both directions. Each edge takes one forward pass; with the edge types of the
    paper and K neighbors, there are up to K + (C - 1) + (M - 1) + (C - 1). Influences do not add up, since the network
    is not linear in its edges. The last matching edge of a label is kept.

    Args:
        predictor: a predictor with a GM-MLIC model.
        photo: a file or an open image.
        label: a label of the predictor; default: the most probable one.

    Raises:
        ConfigError: if the model has no graph, or the label is unknown.
        UnreadableImage: if the photo cannot be read.
    """
    model = predictor.model
    if not isinstance(model, GMMLIC):
        raise ConfigError(f"{type(model).__name__} has no assignment graph to explain: use a GM-MLIC model.")
    (prediction,) = predictor([photo])
    names = prediction.labels
    if label is not None and label not in names:
        raise ArgumentError("label", f"is {label!r}: the labels are {few(names, 10)}.")
    c = names.index(label) if label is not None else int(prediction.probabilities.argmax())
    data = predictor.assignment_graph(photo)
    with torch.no_grad():
        output, priors = model(data), model.head.prior_logits(data)
    instance, logit = int(output.argmax_instance[0, c]), float(output.logits[0, c])
    removals = _removals(data, model.edge_types, {INSTANCE: instance, LABEL: c}, names)
    influences = []
    size = max(1, _BATCH_EDGES // sum(data[t].edge_index.shape[1] for t in data.edge_types))
    while batch := list(islice(removals, size)):
        with torch.no_grad():
            logits = model(Batch.from_data_list([graph for _, graph in batch])).logits[:, c].tolist()
        influences += [Influence(*edge, logit - other) for (edge, _), other in zip(batch, logits, strict=True)]
    influences.sort(key=lambda influence: -abs(influence.change))
    edge = (data[MATCHES].edge_index == torch.tensor([[instance], [c]], device=data[LABEL].x.device)).all(dim=0)
    prior = None if priors is None else float(priors[edge])
    match_logit = float(output.match_logits[0, instance, c])
    return Explanation(prediction, names[c], instance, logit, match_logit, prior, tuple(influences))


class ExplainedModel(nn.Module):
    """Adapter of a model for :class:`torch_geometric.explain.Explainer` on heterogeneous graphs.

    Node masks apply to ``x_dict``. Edge masks apply to all messages along an edge type; for bidirectional types, such
    as matching edges, in both directions.

    Args:
        model: the model; it is copied.
        data: the graph to explain; its edge attributes and boxes are used unchanged.
    """

    def __init__(self, model: GMMLIC, data: HeteroData) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self._data = data

    def forward(self, x_dict: Mapping[str, Tensor], edge_index_dict: Mapping[Any, Tensor]) -> Tensor:
        """Label logits (1, C)."""
        data = copy.copy(self._data)
        for node_type, x in x_dict.items():
            data[node_type].x = x
        for edge_type, edge_index in edge_index_dict.items():
            data[edge_type].edge_index = edge_index
        logits: Tensor = self.model(data).logits
        return logits


def _removals(
    data: HeteroData, edge_types: Mapping[EdgeType, EdgeSpec], explained: Mapping[str, int], names: tuple[str, ...]
) -> Iterator[tuple[tuple[Any, str, str, int | str], HeteroData]]:
    """Edge type, source type, target type and sender of each message to the ``explained`` nodes; graph without it."""
    for edge_type in data.edge_types:
        edge_index = data[edge_type].edge_index.cpu()
        degree = torch.bincount(edge_index[1])
        bidirectional = edge_type in edge_types and edge_types[edge_type].bidirectional
        for sender, receiver in ((0, 1), (1, 0)) if bidirectional else ((0, 1),):
            source, target = edge_type[::2][sender], edge_type[::2][receiver]
            edges = edge_index[receiver] == explained[target]
            if edge_type == MATCHES:  # not the scored edge itself; and each label needs a match logit
                edges &= (edge_index[sender] != explained[source]) & (degree[edge_index[1]] > 1)
            for e in edges.nonzero().flatten().tolist():
                node = int(edge_index[sender, e])
                neighbor = names[node] if source == LABEL else node
                yield (edge_type, source, target, neighbor), _without(data, edge_type, e)


def _without(data: HeteroData, edge_type: Any, edge: int) -> HeteroData:
    """Copy of a graph without one edge."""
    graph = copy.copy(data)
    kept = torch.arange(data[edge_type].edge_index.shape[1], device=data[LABEL].x.device) != edge
    for name, value in data[edge_type].items():
        graph[edge_type][name] = value[:, kept] if name == "edge_index" else value[kept]
    return graph
