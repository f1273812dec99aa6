"""The graph convolutions of GM-MLIC on an assignment graph: messages, node convolution, edge convolution.

``v_o, v_l, e_o, e_l, e_m`` are the paper's states of instances, labels and the three edge types; ``near, relates,
matches`` are their ``edge_index`` (2, E), source first. For a matching edge the source is the
instance and the target the label; one ``edge_index`` serves both directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from gm_mlic.nn.mlp import MLP


@dataclass(frozen=True)
class Relations:
    """Which edge types a network has; the paper's Table 4 removes one at a time.

    Args:
        label_graph: label-label edges (w/o Gl when False).
        instance_graph: instance-instance edges (w/o Go when False).
        matching_edges: states on the instance-label edges, and messages across them (w/o ILM edges when False).
    """

    label_graph: bool = True
    instance_graph: bool = True
    matching_edges: bool = True


class States(NamedTuple):
    """The states of an assignment graph; None for an edge type that the network does not have, or nobody reads."""

    v_o: Tensor
    v_l: Tensor
    e_o: Tensor | None
    e_l: Tensor | None
    e_m: Tensor | None


class Edges(NamedTuple):
    """The ``edge_index`` of each edge type; None for one that the network does not have."""

    near: Tensor | None
    relates: Tensor | None
    matches: Tensor


class MeanMessage(MessagePassing):
    r"""The mean of messages from neighbours (either half of eq. 5 or 7): :math:`\frac{1}{|N(i)|} \sum_{j \in N(i)}
    \rho([e_{ij}, v_j])`.

    A node without neighbours gets zeros.

    Args:
        edge_channels: length of an edge state.
        node_channels: length of a source node's state.
        out_channels: length of the result.
        reverse: let messages run from target to source of ``edge_index`` (labels to instances along matching edges).

    Shapes:
        - **input:** states of the sending nodes (N_j, node_channels), ``edge_index`` (2, E), edge states
          (E, edge_channels), number of receiving nodes N_i
        - **output:** (N_i, out_channels)
    """

    def __init__(self, edge_channels: int, node_channels: int, out_channels: int, *, reverse: bool = False) -> None:
        super().__init__(aggr="mean", flow="target_to_source" if reverse else "source_to_target")
        self.rho = MLP([edge_channels, node_channels], out_channels, out_channels)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.rho.reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, num_receivers: int) -> Tensor:
        # Sizes stand in the order of edge_index, (source, target), whichever way messages flow.
        size = (x.shape[0], num_receivers) if self.flow == "source_to_target" else (num_receivers, x.shape[0])
        out: Tensor = self.propagate(edge_index, x=x, edge_attr=edge_attr, size=size)
        return out

    def message(self, x_j: Tensor, edge_attr: Tensor) -> Tensor:
        out: Tensor = self.rho(edge_attr, x_j)
        return out

    def __repr__(self) -> str:
        edge, node = self.rho.lin1.in_channels
        return f"{type(self).__name__}({edge}, {node}, {self.rho.lin2.out_features})"


class NodeConv(nn.Module):
    r"""Node convolution with two aggregators for each kind of node (eq. 5 to 8).

    .. math::
        a_i &= \operatorname{mean}_{j \in N_o(i)} \rho_{oo}([e^o_{ij}, v^o_j]), \quad
        b_i = \operatorname{mean}_{j \in N_l(i)} \rho_{ol}([e^m_{ij}, v^l_j]), \quad
        v^o_i \leftarrow \phi_o([v^o_i, a_i, b_i]) \\
        a_i &= \operatorname{mean}_{j \in N_l(i)} \rho_{ll}([e^l_{ij}, v^l_j]), \quad
        b_i = \operatorname{mean}_{j \in N_o(i)} \rho_{lo}([e^m_{ji}, v^o_j]), \quad
        v^l_i \leftarrow \phi_l([v^l_i, a_i, b_i])

    An edge type that ``relations`` leaves out takes its argument of :math:`\phi` with it.

    Args:
        in_channels: length of all states that come in.
        out_channels: length of the new node states.
        relations: which edge types there are.
        norm: LayerNorm on the new states.
    """

    def __init__(
        self, in_channels: int, out_channels: int, relations: Relations | None = None, *, norm: bool = False
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.relations = relations = relations or Relations()

        def message(present: bool, *, reverse: bool = False) -> MeanMessage | None:
            return MeanMessage(in_channels, in_channels, out_channels, reverse=reverse) if present else None

        self.rho_oo = message(relations.instance_graph)
        self.rho_ol = message(relations.matching_edges, reverse=True)
        self.rho_ll = message(relations.label_graph)
        self.rho_lo = message(relations.matching_edges)
        messages_o = [out_channels] * (relations.instance_graph + relations.matching_edges)
        messages_l = [out_channels] * (relations.label_graph + relations.matching_edges)
        self.phi_o = MLP([in_channels, *messages_o], out_channels, out_channels, norm=norm)
        self.phi_l = MLP([in_channels, *messages_l], out_channels, out_channels, norm=norm)

    def reset_parameters(self) -> None:
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]

    def forward(self, states: States, edges: Edges) -> tuple[Tensor, Tensor]:
        """New states of instances (N_o, out_channels) and labels (N_l, out_channels)."""
        v_o, v_l, e_o, e_l, e_m = states
        near, relates, matches = edges
        N_o, N_l = v_o.shape[0], v_l.shape[0]
        to_o = [v_o]
        to_l = [v_l]
        if self.rho_oo is not None:
            to_o.append(self.rho_oo(v_o, near, e_o, N_o))
        if self.rho_ol is not None:
            to_o.append(self.rho_ol(v_l, matches, e_m, N_o))
        if self.rho_ll is not None:
            to_l.append(self.rho_ll(v_l, relates, e_l, N_l))
        if self.rho_lo is not None:
            to_l.append(self.rho_lo(v_o, matches, e_m, N_l))
        return self.phi_o(*to_o), self.phi_l(*to_l)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels})"


class Product(nn.Module):
    r"""The element-wise product :math:`(A v_i) \odot (B v_j)` of projections of both ends of an edge.

    A third argument beside :math:`[v_i, v_j]` for functions on matching edges: a multilayer perceptron over a
    concatenation learns an inner product slowly. Not in the paper; see ``fusion`` of :class:`~gm_mlic.nn.GMMLIC`.

    Args:
        in_channels: lengths of both states.
        out_channels: length of the product.
    """

    def __init__(self, in_channels: tuple[int, int], out_channels: int) -> None:
        super().__init__()
        self.A = nn.Linear(in_channels[0], out_channels, bias=False)
        self.B = nn.Linear(in_channels[1], out_channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for lin in (self.A, self.B):  # keep the variance, as in MLP: a faint product is not found in time
            nn.init.kaiming_normal_(lin.weight, nonlinearity="linear")

    def forward(self, v_i: Tensor, v_j: Tensor) -> Tensor:
        out: Tensor = self.A(v_i) * self.B(v_j)
        return out

    def __repr__(self) -> str:
        return f"{type(self).__name__}({(self.A.in_features, self.B.in_features)}, {self.A.out_features})"


class EdgeConv(MessagePassing):
    r"""Edge convolution of one edge type (eq. 9 to 12): :math:`e_{ij} \leftarrow \psi([e_{ij},
    \sigma([v_{source}, v_{target}])])`.

    Args:
        edge_channels: length of the edge states that come in.
        node_channels: length of the node states, after the node convolution.
        out_channels: length of the new edge states.
        product: give :math:`\sigma` the third argument :class:`Product` (fusion ``product``).
        norm: LayerNorm on the new states.

    Shapes:
        - **input:** source and target states (N_s, node_channels), (N_t, node_channels), ``edge_index`` (2, E), edge
          states (E, edge_channels)
        - **output:** (E, out_channels)
    """

    def __init__(
        self, edge_channels: int, node_channels: int, out_channels: int, *, product: bool = False, norm: bool = False
    ) -> None:
        super().__init__(aggr=None)
        parts = [node_channels] * 2 + [out_channels] * product
        self.product = Product((node_channels, node_channels), out_channels) if product else None
        self.sigma = MLP(parts, out_channels, out_channels)
        self.psi = MLP([edge_channels, out_channels], out_channels, out_channels, norm=norm)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for module in (self.product, self.sigma, self.psi):
            if module is not None:
                module.reset_parameters()

    def forward(self, x: tuple[Tensor, Tensor], edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        size = (x[0].shape[0], x[1].shape[0])
        out: Tensor = self.edge_updater(edge_index, x=x, edge_attr=edge_attr, size=size)
        return out

    def edge_update(self, x_i: Tensor, x_j: Tensor, edge_attr: Tensor) -> Tensor:
        # PyG: j is the source, i the target.
        ends = [x_j, x_i] if self.product is None else [x_j, x_i, self.product(x_j, x_i)]
        out: Tensor = self.psi(edge_attr, self.sigma(*ends))
        return out

    def __repr__(self) -> str:
        edge, out = self.psi.lin1.in_channels
        return f"{type(self).__name__}({edge}, {self.sigma.lin1.in_channels[0]}, {out})"


class AssignmentConv(nn.Module):
    """One graph network block: a node convolution, then an edge convolution of each edge type on its new nodes.

    Args:
        in_channels: length of all states that come in.
        out_channels: length of all new states.
        relations: which edge types there are.
        product: fusion ``product`` on the matching edges.
        norm: LayerNorm on updated node and edge states.
        last: in the last block only the matching edges are read, so the other two are not updated.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        relations: Relations | None = None,
        *,
        product: bool = False,
        norm: bool = False,
        last: bool = False,
    ) -> None:
        super().__init__()
        relations = relations or Relations()
        self.in_channels, self.out_channels = in_channels, out_channels

        def edges(present: bool, *, product: bool = False) -> EdgeConv | None:
            return EdgeConv(in_channels, out_channels, out_channels, product=product, norm=norm) if present else None

        self.nodes = NodeConv(in_channels, out_channels, relations, norm=norm)
        self.edges_o = edges(relations.instance_graph and not last)
        self.edges_l = edges(relations.label_graph and not last)
        self.edges_m = edges(relations.matching_edges, product=product)

    def reset_parameters(self) -> None:
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]

    def forward(self, states: States, edges: Edges) -> States:
        """New states of all nodes and edges."""
        _, _, e_o, e_l, e_m = states
        near, relates, matches = edges
        v_o, v_l = self.nodes(states, edges)
        e_o = None if self.edges_o is None else self.edges_o((v_o, v_o), near, e_o)
        e_l = None if self.edges_l is None else self.edges_l((v_l, v_l), relates, e_l)
        e_m = None if self.edges_m is None else self.edges_m((v_o, v_l), matches, e_m)
        return States(v_o, v_l, e_o, e_l, e_m)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels})"
