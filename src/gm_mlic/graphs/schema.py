"""Node and edge types of an assignment graph, and the table of edge types."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
    """Coordinates that are uniform in [0, 1] to mean 0 and variance 1."""
    return (box - 0.5) * math.sqrt(12)


def relative_boxes(edge_attr: Tensor) -> Tensor:
    r""":math:`[B_j, B_i]` of eq. 1 to :math:`[16 (B_j - B_i), \sqrt{12} (B_i - 1/2)]`, (..., 8) to (..., 8).

    The map is linear and invertible, so the Linear that follows can express the same functions as on eq. 1 itself. It
    makes the relative position the larger part of the input. Without it, spatial relations are not learned in
    reasonable time (``experiments/recipe``).
    """
    B_j, B_i = edge_attr.chunk(2, dim=-1)
    return torch.cat([16 * (B_j - B_i), standardize_boxes(B_i)], dim=-1)


@dataclass(frozen=True)
class EdgeSpec:
    r"""One row of the table of edge types: what the network computes on edges of this type.

    Args:
        attr_dim: length of the stored edge attribute; None (default) if the attribute is the
            concatenation of both ends, :math:`[x_j, x_i]` (eq. 2 and 3), which is then never stored.
        transform: function of the edge attribute before it is encoded; default: none.
        bidirectional: messages also flow from target to source (eq. 5), over the same ``edge_index``.
        fused: functions of both ends get the third argument :class:`~gm_mlic.nn.HadamardFusion`, if the network has
            ``fusion="product"``.
    """

    attr_dim: int | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    bidirectional: bool = False
    fused: bool = False


#: The edge types of the paper: instance spatial graph, label semantic graph, matching edges (eq. 1 to 3).
EDGE_TYPES: dict[EdgeType, EdgeSpec] = {
    SPATIAL: EdgeSpec(attr_dim=8, transform=relative_boxes),
    SEMANTIC: EdgeSpec(),
    MATCHES: EdgeSpec(bidirectional=True, fused=True),
}

#: Their names: the middle of each edge type.
RELATIONS = tuple(relation for _, relation, _ in EDGE_TYPES)


def edge_table(edge_types: Mapping[EdgeType, EdgeSpec] | Sequence[str]) -> dict[EdgeType, EdgeSpec]:
    """The rows of a table of edge types; names of relations select rows of :data:`EDGE_TYPES`.

    Raises:
        ArgumentError: for an unknown name.
    """
    if isinstance(edge_types, Mapping):
        return dict(edge_types)
    if isinstance(edge_types, str) or not set(edge_types) <= set(RELATIONS):
        raise ArgumentError("edge_types", f"must be names among {', '.join(RELATIONS)}; got {edge_types!r}.")
    return {edge_type: spec for edge_type, spec in EDGE_TYPES.items() if edge_type[1] in edge_types}
