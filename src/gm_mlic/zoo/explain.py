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
from gm_mlic.graphs import INSTANCE, LABEL, MATCHES
from gm_mlic.nn import GMMLIC
from gm_mlic.zoo.predictor import Photo, Prediction, Predictor

#: Largest number of edges in a batch of graphs.
_BATCH_EDGES = 50_000


@dataclass(frozen=True)
class Influence:
    r"""The contribution of one edge of the graph to one label's logit.

    Attributes:
        edge_type: of the edge.
        source: type of the node that sends the message, ``instance`` or ``label``.
        target: type of the node that receives it: ``instance`` for the argmax instance, ``label`` for the explained
            label.
        neighbor: index of the sending instance, or name of the sending label.
        change: :math:`s_c - s_c^{without}`, the label's logit minus that of the same graph without this edge. Above 0,
            the edge supports the label. (Messages are averaged, so without one the others weigh more.)
    """

    edge_type: tuple[str, str, str]
    source: str
    target: str
    neighbor: int | str
    change: float


@dataclass(frozen=True)
class Explanation:
    """One label of one photo.

    Attributes:
        prediction: all predictions for the photo, with the match logits of all instances and labels.
        label: the explained label.
        instance: the argmax instance.
        logit: its logit.
        influences: every edge to the argmax instance and to the label, the largest change first.
    """

    prediction: Prediction
    label: str
    instance: int
    logit: float
    influences: tuple[Influence, ...]


def explain(predictor: Predictor, photo: Photo, label: str | None = None) -> Explanation:
    """Remove each edge to the argmax instance and to the label, one at a time, and predict again.

    Exact, with a forward pass for each of the up to K + (C - 1) + (M - 1) + (C - 1) edges. Influences do not add up,
    since the network is not linear in its edges. The last edge of another label is not removed.

    Args:
        predictor: with a GM-MLIC model.
        photo: a file or an open image.
        label: one of the predictor's; default: the most probable.

    Raises:
        ConfigError: if the model has no graph, or no such label.
        UnreadableImage: if the photo cannot be read.
    """
    model = predictor.model
    if not isinstance(model, GMMLIC):
        raise ConfigError(f"{type(model).__name__} has no assignment graph whose edges could be explained.")
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
    instance, logit = int(whole.argmax_instance[0, c]), float(whole.logits[0, c])
    removals = _removals(data, {INSTANCE: instance, LABEL: c}, names)
    influences = []
    size = max(1, _BATCH_EDGES // sum(data[t].edge_index.shape[1] for t in data.edge_types))
    while some := list(islice(removals, size)):
        with torch.no_grad():
            logits = model(Batch.from_data_list([graph for _, graph in some])).logits[:, c].tolist()
        influences += [Influence(*edge, logit - other) for (edge, _), other in zip(some, logits, strict=True)]
    influences.sort(key=lambda influence: -abs(influence.change))
    return Explanation(prediction, names[c], instance, logit, tuple(influences))


class ExplainedModel(nn.Module):
    """A model with the signature that :class:`torch_geometric.explain.Explainer` expects of heterogeneous ones.

    Node masks apply to ``x_dict``; edge masks to all messages along an edge type, in both directions of the matching
    edges.

    Args:
        model: the model, which is copied.
        data: the explained graph; its edge attributes and boxes are used unchanged.
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
    data: HeteroData, explained: Mapping[str, int], names: tuple[str, ...]
) -> Iterator[tuple[tuple[Any, str, str, int | str], HeteroData]]:
    """Each edge that carries a message to one of the ``explained`` nodes, and the graph without it.

    Yields:
        (edge type, type of the sender, type of the receiver, sender) and the graph.
    """
    for edge_type in data.edge_types:
        edge_index = data[edge_type].edge_index.cpu()
        degree = torch.bincount(edge_index[1])
        for sender, receiver in ((0, 1), (1, 0)) if edge_type == MATCHES else ((0, 1),):
            source, target = edge_type[::2][sender], edge_type[::2][receiver]
            edges = edge_index[receiver] == explained[target]
            if edge_type == MATCHES:  # the scored edge itself carries no evidence of its own
                edges &= edge_index[sender] != explained[source]
            for e in edges.nonzero().flatten().tolist():
                if edge_type == MATCHES and degree[edge_index[1, e]] == 1:
                    continue  # each label needs a match logit
                node = int(edge_index[sender, e])
                neighbor = names[node] if source == LABEL else node
                yield (edge_type, source, target, neighbor), _without(data, edge_type, e)


def _without(data: HeteroData, edge_type: Any, edge: int) -> HeteroData:
    graph = copy.copy(data)
    kept = torch.arange(data[edge_type].edge_index.shape[1], device=data[LABEL].x.device) != edge
    graph[edge_type].edge_index = data[edge_type].edge_index[:, kept]
    if "edge_attr" in data[edge_type]:
        graph[edge_type].edge_attr = data[edge_type].edge_attr[kept]
    return graph
