r"""The graph network block of GM-MLIC: node convolution (eq. 5 to 8), then edge convolution (eq. 9 to 12).

The layers take ``x_dict``, ``edge_index_dict`` and ``edge_attr_dict``, as PyG's heterogeneous layers do, with any node
and edge types. An entry of ``edge_index_dict`` is an ``edge_index`` (2, E) with node features (N, d)
and edge features (E, d), or :class:`~gm_mlic.graphs.DenseEdges` with node features (B, N, d). The two differ in how the
ends of an edge are read and how messages are averaged. The formulas and the parameters are the same.

Indices follow PyG: an edge leads from source j to target i.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch_geometric.nn import MeanAggregation, MessagePassing
from torch_geometric.nn.inits import reset
from torch_geometric.nn.module_dict import ModuleDict

from gm_mlic.errors import ArgumentError, ConfigError
from gm_mlic.graphs.dense import DenseEdges, EdgeTensor, call, edge_ends, expanded, is_plain
from gm_mlic.graphs.schema import EdgeSpec, EdgeType, NodeType
from gm_mlic.nn.mlp import ConcatMLP

NodeValues: TypeAlias = Mapping[NodeType, Tensor]
EdgeValues: TypeAlias = Mapping[EdgeType, Any]


def pair(channels: int | tuple[int, int]) -> tuple[int, int]:
    """Sizes of source and target nodes."""
    return (channels, channels) if isinstance(channels, int) else channels


def by_type(name: str, channels: Any, types: Iterable[Any]) -> dict[Any, int]:
    """A size for each node or edge type, from a dictionary or one size for all.

    Raises:
        ArgumentError: for anything else, or if a size is missing.
    """
    if isinstance(channels, int):
        return dict.fromkeys(types, channels)
    if not isinstance(channels, Mapping):
        raise ArgumentError(name, f"must be an int or a dict from type to size, got {channels!r}.")
    missing = [t for t in types if t not in channels]
    if missing:
        raise ArgumentError(name, f"has no size for {', '.join(map(str, missing))}.")
    return dict(channels)


def node_types(edge_types: Iterable[EdgeType]) -> list[NodeType]:
    """The node types at the ends of edge types, in order of appearance."""
    return list(dict.fromkeys(end for source, _, target in edge_types for end in (source, target)))


_STEPS = ("propagate", "message", "aggregate", "edge_update")
_HOOKS = [f"_{step}_{hooks}" for step in _STEPS for hooks in ("forward_hooks", "forward_pre_hooks")]


def _dense_parts(layer: Any, kind: type[nn.Module], *parts: Any) -> tuple[Any, ...]:
    """The arguments of a layer's formula on dense edges, where PyG's hooks and aggregations do not apply."""
    own, cls = layer.__dict__, type(layer)
    other = [name for name in ("propagate", "edge_updater", "aggregate", "update") if name in own]
    other += [name for name in ("aggregate", "update") if getattr(cls, name) is not getattr(kind, name)]
    other += [name for name in _HOOKS if own[name]]
    aggr = layer.aggr_module
    if aggr is not None and (type(aggr) is not MeanAggregation or aggr._forward_hooks or aggr._forward_pre_hooks):
        other.append("aggr_module")
    if other:
        raise ConfigError(f"{cls.__name__} has its own {other[0]}, which needs edge_index: pass a HeteroData.")
    plain = is_plain(layer, kind) and "message" not in own and "edge_update" not in own
    return parts if plain else expanded(*parts)


class MessageMLP(MessagePassing):
    r"""The mean of messages from neighbors, as in eq. 5 and 7 of the `GM-MLIC paper
    <https://www.ijcai.org/proceedings/2021/163>`_:

    .. math::
        \hat{v}_i = \frac{1}{|\mathcal{N}(i)|} \sum_{j \in \mathcal{N}(i)} \rho_n([e_{ij}, v_j])

    It is zero for a node without neighbors.

    Args:
        in_channels: size of node features; a tuple for source and target of a bipartite graph; -1 to take the size
            from the first input.
        edge_dim: size of edge features, or -1.
        out_channels: size of the result.
        reverse: messages flow from target to source of ``edge_index``, as over the matching edges in eq. 5
            (default: ``False``).
        **kwargs: arguments of :class:`torch_geometric.nn.MessagePassing`, except ``aggr`` and ``flow``.

    Shapes:
        - **input:** node features (N, in_channels) or a pair of them, ``edge_index`` (2, E), edge features
          (E, edge_dim)
        - **output:** (N_i, out_channels), for the receiving nodes
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        edge_dim: int,
        out_channels: int,
        *,
        reverse: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(aggr="mean", flow="target_to_source" if reverse else "source_to_target", **kwargs)
        self.in_channels, self.edge_dim, self.out_channels, self.reverse = in_channels, edge_dim, out_channels, reverse
        self.rho_n = ConcatMLP([edge_dim, pair(in_channels)[reverse]], out_channels, out_channels)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.rho_n.reset_parameters()

    def forward(self, x: Tensor | tuple[Tensor, Tensor], edge_index: Tensor | DenseEdges, edge_attr: Any) -> Tensor:
        x = (x, x) if isinstance(x, Tensor) else x
        if isinstance(edge_index, DenseEdges):
            if isinstance(edge_attr, EdgeTensor) and self in edge_attr.outputs:
                return edge_attr.outputs[self]
            parts = _dense_parts(self, MessageMLP, edge_index.ends(*x)[self.reverse], edge_attr)
            return edge_index.mean(self.message(*parts), to_source=self.reverse)
        # Sizes are in the order of edge_index, (source, target), in both directions.
        size = (x[0].shape[0], x[1].shape[0])
        return self.propagate(edge_index, x=x[self.reverse], edge_attr=edge_attr, size=size)  # type: ignore[no-any-return]

    def message(self, x_j: Tensor, edge_attr: Tensor) -> Tensor:
        return call(ConcatMLP, self.rho_n, edge_attr, x_j)  # type: ignore[no-any-return]  # dense: EdgeTensor in and out

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.edge_dim}, {self.out_channels})"


class NodeConv(nn.Module):
    r"""The node convolution of the `GM-MLIC paper <https://www.ijcai.org/proceedings/2021/163>`_ (eq. 5 to 8), with one
    mean for each edge type that leads to a node:

    .. math::
        \hat{v}^o_i &= \operatorname{mean}_{j \in \mathcal{N}_o(i)} \rho_n^{oo}([e^o_{ij}, v^o_j]), \quad
        \tilde{v}^o_i = \operatorname{mean}_{j \in \mathcal{N}_l(i)} \rho_n^{lo}([e^m_{ij}, v^l_j]), \quad
        v^o_i \leftarrow \phi_n^o([v^o_i, \hat{v}^o_i, \tilde{v}^o_i]) \\
        \hat{v}^l_i &= \operatorname{mean}_{j \in \mathcal{N}_l(i)} \rho_n^{ll}([e^l_{ij}, v^l_j]), \quad
        \tilde{v}^l_i = \operatorname{mean}_{j \in \mathcal{N}_o(i)} \rho_n^{ol}([e^m_{ji}, v^o_j]), \quad
        v^l_i \leftarrow \phi_n^l([v^l_i, \hat{v}^l_i, \tilde{v}^l_i])

    ``message[edge_type][node_type]`` is the :class:`MessageMLP` along ``edge_type`` to nodes of ``node_type``, with the
    function ``rho_n``; ``phi_n[node_type]`` is the function of the update.

    Args:
        in_channels: size of node features; -1 to take it from the first input; a dictionary for sizes by node type. Its
            types are updated, also those without edges.
        out_channels: size of the new node features.
        edge_types: dict from edge type to :class:`~gm_mlic.graphs.EdgeSpec`.
        edge_dim: size of edge features; -1, or a dictionary by edge type. Default: ``in_channels``, if it is one size.
        norm: LayerNorm on the new features (default: ``False``).

    Shapes:
        - **input:** ``x_dict`` (N, in_channels) by node type, ``edge_index_dict`` (2, E) and ``edge_attr_dict``
          (E, edge_dim) by edge type
        - **output:** ``x_dict`` (N, out_channels)

    Raises:
        ArgumentError: if ``in_channels`` or ``edge_dim`` has no size for a type.
    """

    def __init__(
        self,
        in_channels: int | Mapping[NodeType, int],
        out_channels: int,
        edge_types: Mapping[EdgeType, EdgeSpec],
        edge_dim: int | Mapping[EdgeType, int] | None = None,
        *,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        size = by_type("in_channels", in_channels, node_types(edge_types))
        dims = by_type("edge_dim", in_channels if edge_dim is None else edge_dim, edge_types)
        self.message = ModuleDict({edge_type: ModuleDict() for edge_type in edge_types})
        parts = {node_type: [size[node_type]] for node_type in size}
        for node_type in size:
            for t, spec in edge_types.items():
                for reverse in (False, True)[: 1 + spec.bidirectional]:
                    if node_type == t[0 if reverse else 2]:
                        ends = (size[t[0]], size[t[2]])
                        self.message[t][node_type] = MessageMLP(ends, dims[t], out_channels, reverse=reverse)
                        parts[node_type].append(out_channels)
        self.phi_n = ModuleDict({t: ConcatMLP(parts[t], out_channels, out_channels, norm=norm) for t in size})

    def reset_parameters(self) -> None:
        reset(self.message)
        reset(self.phi_n)

    def forward(
        self, x_dict: NodeValues, edge_index_dict: EdgeValues, edge_attr_dict: EdgeValues
    ) -> dict[NodeType, Tensor]:
        parts = {node_type: [x_dict[node_type]] for node_type, _ in self.phi_n.items()}
        for edge_type, by_receiver in self.message.items():
            ends, edge_index = (x_dict[edge_type[0]], x_dict[edge_type[2]]), edge_index_dict[edge_type]
            for node_type, message in by_receiver.items():
                parts[node_type].append(call(MessageMLP, message, ends, edge_index, edge_attr_dict[edge_type]))
        return {node_type: phi_n(*parts[node_type]) for node_type, phi_n in self.phi_n.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels})"


class EdgeUpdate(MessagePassing):
    r"""The edge convolution of one edge type of the `GM-MLIC paper <https://www.ijcai.org/proceedings/2021/163>`_
    (eq. 9 to 12), from source j to target i:

    .. math::
        e_{ij} \leftarrow \phi_e([e_{ij}, \rho_e([v_j, v_i])])

    Args:
        in_channels, edge_dim, kwargs: as for :class:`MessageMLP`.
        out_channels: size of the new edge features.
        product: give :math:`\rho_e` the third argument :class:`HadamardFusion` (default: ``False``).
        norm: LayerNorm on the new features (default: ``False``).

    Shapes:
        - **input:** as for :class:`MessageMLP`
        - **output:** (E, out_channels)
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        edge_dim: int,
        out_channels: int,
        *,
        product: bool = False,
        norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(aggr=None, flow="source_to_target", **kwargs)
        self.in_channels, self.edge_dim, self.out_channels = in_channels, edge_dim, out_channels
        self.rho_e = ConcatMLP(pair(in_channels), out_channels, out_channels, product=product)
        self.phi_e = ConcatMLP([edge_dim, out_channels], out_channels, out_channels, norm=norm)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.rho_e.reset_parameters()
        self.phi_e.reset_parameters()

    def forward(self, x: Tensor | tuple[Tensor, Tensor], edge_index: Tensor | DenseEdges, edge_attr: Any) -> Any:
        x = (x, x) if isinstance(x, Tensor) else x
        if isinstance(edge_index, DenseEdges):
            x_j, x_i = edge_ends(edge_index, *x)
            return self.edge_update(*_dense_parts(self, EdgeUpdate, x_i, x_j, edge_attr))
        return self.edge_updater(edge_index, x=x, edge_attr=edge_attr, size=(x[0].shape[0], x[1].shape[0]))

    def edge_update(self, x_i: Tensor, x_j: Tensor, edge_attr: Tensor) -> Tensor:
        return call(ConcatMLP, self.phi_e, edge_attr, call(ConcatMLP, self.rho_e, x_j, x_i))  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.edge_dim}, {self.out_channels})"


class GraphNetworkBlock(nn.Module):
    r"""One block of the `GM-MLIC paper <https://www.ijcai.org/proceedings/2021/163>`_: :class:`NodeConv` (eq. 5 to 8),
    then :class:`EdgeUpdate` of each edge type on the new nodes (eq. 9 to 12):

    .. math::
        v_i \leftarrow \phi_n([v_i, \hat{v}_i, \tilde{v}_i]), \qquad
        e_{ij} \leftarrow \phi_e([e_{ij}, \rho_e([v_j, v_i])])

    Args:
        in_channels, edge_types, edge_dim: as for :class:`NodeConv`, with the same errors.
        out_channels: size of all new features.
        product: fusion ``product`` for the edge types with ``product`` (default: ``False``).
        norm: LayerNorm on new node and edge features (default: ``False``).
        updated: the edge types whose features are updated (default: all). After the last block, only those that the
            decoder uses are needed.

    Shapes:
        - **input:** as for :class:`NodeConv`
        - **output:** ``x_dict`` (N, out_channels) and ``edge_attr_dict`` (E, out_channels)
    """

    def __init__(
        self,
        in_channels: int | Mapping[NodeType, int],
        out_channels: int,
        edge_types: Mapping[EdgeType, EdgeSpec],
        edge_dim: int | Mapping[EdgeType, int] | None = None,
        *,
        product: bool = False,
        norm: bool = False,
        updated: Collection[EdgeType] | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        dims = by_type("edge_dim", in_channels if edge_dim is None else edge_dim, edge_types)
        self.node_conv = NodeConv(in_channels, out_channels, edge_types, dims, norm=norm)
        self.edge_conv = ModuleDict()
        for t, spec in edge_types.items():
            if updated is None or t in updated:
                fusion = product and spec.product
                self.edge_conv[t] = EdgeUpdate(out_channels, dims[t], out_channels, product=fusion, norm=norm)

    def reset_parameters(self) -> None:
        reset(self.node_conv)
        reset(self.edge_conv)

    def forward(
        self, x_dict: NodeValues, edge_index_dict: EdgeValues, edge_attr_dict: EdgeValues
    ) -> tuple[dict[NodeType, Tensor], dict[EdgeType, Any]]:
        v = call(NodeConv, self.node_conv, x_dict, edge_index_dict, edge_attr_dict)
        e = {
            t: call(EdgeUpdate, edge_conv, (v[t[0]], v[t[2]]), edge_index_dict[t], edge_attr_dict[t])
            for t, edge_conv in self.edge_conv.items()
        }
        return v, e if is_plain(self, GraphNetworkBlock) else expanded(e)[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels})"
