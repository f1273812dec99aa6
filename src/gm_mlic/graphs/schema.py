"""Node and edge types of an assignment graph, and the table of edge types."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from gm_mlic.errors import ArgumentError

NodeType: TypeAlias = str
EdgeType: TypeAlias = tuple[str, str, str]

INSTANCE = "instance"
LABEL = "label"
SPATIAL: EdgeType = (INSTANCE, "spatial", INSTANCE)
SEMANTIC: EdgeType = (LABEL, "semantic", LABEL)
MATCHES: EdgeType = (INSTANCE, "matches", LABEL)


def standardize_boxes(box: Tensor) -> Tensor:
    """Map uniform coordinates in [0, 1] to zero mean and unit variance."""
    return (box - 0.5) * math.sqrt(12)


def relative_boxes(edge_attr: Tensor) -> Tensor:
    r"""Map :math:`[B_j, B_i]` of eq. 1 to :math:`[16 (B_j - B_i), \sqrt{12} (B_i - 1/2)]`, (..., 8) to (..., 8).

    The map is linear and invertible, so the Linear that follows can express the same functions as on eq. 1 itself. The
    factor 16 makes the relative position the larger part of the input: a difference of 1/16 of the image becomes 1.
    Without the map, spatial relations are not learned in reasonable time (``experiments/recipe``).
    """
    B_j, B_i = edge_attr.chunk(2, dim=-1)
    return torch.cat([16 * (B_j - B_i), standardize_boxes(B_i)], dim=-1)


@dataclass(frozen=True)
class EdgeSpec:
    r"""One row of the table of edge types: what the network computes on edges of this type.

    Args:
        attr_dim: length of the stored edge attribute; None (default) if the attribute is the
            concatenation of both ends, :math:`[x_j, x_i]` (eq. 2 and 3), which is stored only with
            ``AssignmentGraph(edge_attr=True)``, and otherwise computed.
        transform: function of the edge attribute before it is encoded; default: none.
        bidirectional: messages also flow from target to source (eq. 5), over the same ``edge_index``.
        product: MLPs on source and target node features get the third argument :class:`~gm_mlic.nn.HadamardFusion`, if
            the network has ``fusion="product"``.
    """

    attr_dim: int | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    bidirectional: bool = False
    product: bool = False


#: The edge types of the paper: instance spatial graph, label semantic graph, matching edges (eq. 1 to 3).
EDGE_TYPES: dict[EdgeType, EdgeSpec] = {
    SPATIAL: EdgeSpec(attr_dim=8, transform=relative_boxes),
    SEMANTIC: EdgeSpec(),
    MATCHES: EdgeSpec(bidirectional=True, product=True),
}

#: Their names: the middle of each edge type.
RELATIONS = tuple(relation for _, relation, _ in EDGE_TYPES)


def edge_table(edge_types: Mapping[EdgeType, EdgeSpec] | Sequence[str | EdgeType]) -> dict[EdgeType, EdgeSpec]:
    """The rows of a table of edge types; relations or edge types select rows of :data:`EDGE_TYPES`.

    Raises:
        ArgumentError: for an unknown one.
    """
    if isinstance(edge_types, Mapping):
        return dict(edge_types)
    known = (*RELATIONS, *EDGE_TYPES)
    if not isinstance(edge_types, Collection) or isinstance(edge_types, str) or any(t not in known for t in edge_types):
        raise ArgumentError("edge_types", f"must be names among {', '.join(RELATIONS)}; got {edge_types!r}.")
    return {t: spec for t, spec in EDGE_TYPES.items() if t in edge_types or t[1] in edge_types}
