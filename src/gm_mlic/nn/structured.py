r"""The structured execution: the same modules, for (nearly) complete relations, without gathers and scatters.

It computes what :class:`~gm_mlic.nn.GMMLIC` computes on ``edge_index``, rearranged by exact algebra:

1. a Linear on a concatenation is a sum of Linears, each applied where its argument lives and added by broadcast
   (:func:`concat_linear`);
2. the mean over neighbours commutes with a message's last Linear (:func:`mean_message`);
3. :math:`\sigma`'s last Linear composes with the slice of :math:`\psi`'s first that reads it (:func:`compose`);
4. what does not depend on the image is computed once for a batch in training, once for all of them in prediction
   (:func:`prepare`);
5. the linear map at the end of an edge state (LayerNorm's scale and shift; without LayerNorm, the MLP's last Linear)
   composes with the Linears that read it, and is never applied by itself (:class:`EdgeState`).

Shapes: instances (B, M, d), labels (B or 1, C, d), matching edges (B, M, C, d), instance edges (B, M, K, d), label
edges (B or 1, C, C or K, d), receiving label first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import LayerNorm
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.mlp import MLP, ConcatLinear

if TYPE_CHECKING:
    from gm_mlic.nn.conv import AssignmentConv, EdgeConv
    from gm_mlic.nn.gm_mlic import GMMLIC, Encoder


T = TypeVar("T")

#: How many edges, of images taken together, are computed again at a time where the model is to ``recompute``: enough to
#: keep a processor busy, and at the widths of the paper some 200 MB.
RECOMPUTED_EDGES = 2**13


def require(value: T | None) -> T:
    """``value``, which :meth:`GMMLIC.forward` has checked is there."""
    assert value is not None
    return value


class EdgeState(NamedTuple):
    """States of edges, ``x`` and the linear map that still goes over it, which is left to who reads them (rule 5).

    Attributes:
        x: (..., d).
        scale: (d,), LayerNorm's, or (d', d), an MLP's last Linear; None for no map.
        shift: (d,) or (d',), of the same.
    """

    x: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    def seen_by(self, weight: Tensor) -> tuple[Tensor, Tensor | float]:
        """The weight and the bias by which ``weight`` reads ``x``."""
        if self.scale is None or self.shift is None:
            return weight, 0.0
        return weight * self.scale if self.scale.dim() == 1 else weight @ self.scale, weight @ self.shift


def concat_linear(lin: ConcatLinear, *parts: Tensor | EdgeState) -> Tensor:
    """:math:`W [x_1, ..., x_n] + b` of parts that broadcast against each other (rule 1); the result is a new tensor."""
    weights, tensors = [], []
    bias: Tensor = lin.bias
    for k, part in enumerate(parts):
        state = part if isinstance(part, EdgeState) else EdgeState(part)
        weight, shift = state.seen_by(lin.part_weight(k))
        weights.append(weight)
        tensors.append(state.x)
        bias = bias + shift
    # Parts that broadcast come first, so that few sums are of full size; the last one in place, if there is a place.
    *smaller, largest = sorted(range(len(parts)), key=lambda k: len([n for n in tensors[k].shape if n != 1]))
    if not smaller:
        return linear(tensors[largest], weights[largest], bias)
    total = linear(tensors[smaller[0]], weights[smaller[0]], bias)
    for k in smaller[1:]:
        total = total + linear(tensors[k], weights[k])
    return add(linear(tensors[largest], weights[largest]), total)


def add(fresh: Tensor, other: Tensor) -> Tensor:
    """``fresh + other``, in the memory of ``fresh`` (which nobody else may read) where the sum fits in."""
    fits = all(a == b or b == 1 for a, b in zip(fresh.shape, other.shape, strict=True))
    if fits and fresh.dtype == other.dtype:
        return fresh.add_(other)
    return fresh + other


def mlp(f: MLP, *parts: Tensor | EdgeState) -> Tensor:
    """An MLP of parts that broadcast against each other."""
    return f.after_lin1(concat_linear(f.lin1, *parts))


def edge_state(f: MLP, total: Tensor) -> EdgeState:
    """What an MLP makes of ``total``, the sum of its first Linear, for edges: their number makes its end costly."""
    hidden = total.relu_()
    if not isinstance(f.norm, LayerNorm):
        return EdgeState(hidden, f.lin2.weight, f.lin2.bias)
    return EdgeState(Normalise.apply(f.lin2(hidden), f.norm.eps), f.norm.weight, f.norm.bias)  # type: ignore[no-untyped-call]


class Normalise(torch.autograd.Function):
    """LayerNorm without scale and shift, that keeps for the backward pass its result, which is there in any case."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        out, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(out, rstd)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out, rstd = ctx.saved_tensors
        # Of values that are normalised already mean and deviation are 0 and 1; the first deviation is a factor.
        of_out, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, out, out.shape[-1:], torch.zeros_like(rstd), torch.ones_like(rstd), None, None, [True, False, False]
        )
        return of_out.mul_(rstd), None


def mean_message(rho: MLP, edges: EdgeState, senders: Tensor, to: str, mask: Tensor | None = None) -> Tensor:
    """The mean over senders of the messages ``rho([edges, senders])``, its last Linear after the mean (rule 2).

    Args:
        rho: the message function.
        edges, senders: edge states and senders' states, broadcasting against each other.
        to: ``rows`` if senders stand along the third axis, ``columns`` if along the second.
        mask: which messages there are: (., N, S) for ``rows``, (., S) or (., S, N) for ``columns``; None for all.

    Returns:
        The means (., N, d); zero where there is no message.
    """
    hidden = concat_linear(rho.lin1, edges, senders).relu_()
    if mask is None:
        return rho.lin2(hidden.mean(dim=2 if to == "rows" else 1))  # type: ignore[no-any-return]
    # Sums as products with the mask: a masked copy of all hidden states would cost as much as computing them.
    weight, count = mask.to(hidden.dtype), mask.sum(dim=-1, keepdim=True)
    if to == "rows":
        total = (weight[:, :, None] @ hidden).squeeze(2)
    elif mask.dim() == 3:
        total, count = (weight[..., None] * hidden).sum(dim=1), mask.sum(dim=1)[..., None]
    else:
        total = (weight[:, None] @ hidden.flatten(2)).view(hidden.shape[0], *hidden.shape[2:])
        count = count[..., None]
    # A node without neighbours receives nothing, not even the bias.
    return rho.lin2(total / count.clamp(min=1)) * (count > 0)  # type: ignore[no-any-return]


class Composed(NamedTuple):
    """The one Linear that stands for sigma's last and the part of psi's first that reads it (rule 3)."""

    weight: Tensor
    bias: Tensor


def compose(conv: EdgeConv | None) -> Composed | None:
    """Rule 3 for one edge convolution; None for none."""
    if conv is None:
        return None
    read = conv.psi.lin1.part_weight(1)
    return Composed(read @ conv.sigma.lin2.weight, read @ conv.sigma.lin2.bias + conv.psi.lin1.bias)


def read_edges(conv: EdgeConv, edges: EdgeState) -> Tensor:
    """What psi's first Linear makes of the edge states, without its bias."""
    weight, shift = edges.seen_by(conv.psi.lin1.part_weight(0))
    return linear(edges.x, weight, shift if isinstance(shift, Tensor) else None)


def edge_update(
    conv: EdgeConv, composed: Composed, edges: EdgeState | Tensor, source: Tensor, target: Tensor
) -> EdgeState:
    """Edge convolution of edge states, or of what psi has read of them already."""
    parts = [source, target]
    if conv.product is not None:
        parts.append(conv.product.A(source) * conv.product.B(target))
    hidden = concat_linear(conv.sigma.lin1, *parts).relu_()
    if isinstance(edges, Tensor):
        return edge_state(conv.psi, add(linear(hidden, *composed), edges))
    weight, shift = edges.seen_by(conv.psi.lin1.part_weight(0))
    total = linear(hidden, composed.weight, composed.bias + shift)
    # The second product is added where the first one stands, by the matrix product itself.
    total.flatten(0, 2).addmm_(edges.x.flatten(0, 2).to(total.dtype), weight.t().to(total.dtype))
    return edge_state(conv.psi, total)


def neighbours(nodes: Tensor, lists: Tensor) -> Tensor:
    """States of listed neighbours: nodes (B, N, d), lists (B or 1, N, K) -> (B, N, K, d)."""
    B, _, d = nodes.shape
    _, N, K = lists.shape
    flat = lists.expand(B, N, K).reshape(B, N * K, 1).expand(-1, -1, d)
    return torch.gather(nodes, 1, flat).view(B, N, K, d)


class Prepared(NamedTuple):
    """What the weights and the labels decide, whatever the image (rule 4).

    Attributes:
        v_l: (1, C, d), encoded labels.
        w_e_m: (1, 1, C, d), what the first Linear of the matching edges' encoder makes of the labels; None without.
        w_product: (1, 1, C, d), what the product's B makes of them; None without.
        heard: (1, C, d), what labels hear from each other in the first block; None without a label graph.
        read: (1, C, C or K, d), what psi makes of the encoded label edges there; None if they are not updated.
        composed: for each block, rule 3 for its edges_o, edges_l and edges_m.
    """

    v_l: Tensor
    w_e_m: Tensor | None
    w_product: Tensor | None
    heard: Tensor | None
    read: Tensor | None
    composed: tuple[tuple[Composed | None, ...], ...]


def prepare(model: GMMLIC, label_vectors: Tensor, relates: Tensor | None = None) -> Prepared:
    """Rule 4.

    Args:
        model: its weights.
        label_vectors: (C, D_l).
        relates: (C, K), the labels that each label hears; None for all others.
    """
    encoder, W = model.encoder, label_vectors[None]
    first: AssignmentConv = model.blocks[0]  # type: ignore[assignment]
    v_l = encoder.v_l(W)
    w_e_m = w_product = heard = read = None
    if encoder.e_m is not None:
        w_e_m = (encoder.e_m.lin1.part(1, W) + encoder.e_m.lin1.bias)[:, None]
    if encoder.product is not None:
        w_product = encoder.product.B(W)[:, None]
    if encoder.e_l is not None:
        e_l = edge_state(encoder.e_l, concat_linear(encoder.e_l.lin1, label_senders(W, relates), W[:, :, None]))
        rho_ll = require(first.nodes.rho_ll).rho
        heard = mean_message(rho_ll, e_l, label_senders(v_l, relates), "rows", other_labels(v_l, relates))
        if first.edges_l is not None:
            read = read_edges(first.edges_l, e_l)
    composed = tuple(
        tuple(compose(conv) for conv in (block.edges_o, block.edges_l, block.edges_m))  # type: ignore[arg-type]
        for block in model.blocks
    )
    return Prepared(v_l, w_e_m, w_product, heard, read, composed)


def label_senders(v_l: Tensor, relates: Tensor | None) -> Tensor:
    """States of the labels that each label hears: (., 1, C, d) for all of them, (., C, K, d) for listed ones."""
    return v_l[:, None] if relates is None else neighbours(v_l, relates[None])


def other_labels(v_l: Tensor, relates: Tensor | None) -> Tensor | None:
    """The mask (1, C, C) that keeps a label from hearing itself; None where neighbours are listed."""
    if relates is not None:
        return None
    C = v_l.shape[1]
    return ~torch.eye(C, dtype=torch.bool, device=v_l.device)[None]


class AssignmentStates(NamedTuple):
    """As :class:`~gm_mlic.nn.conv.States`, with :class:`EdgeState` for edges."""

    v_o: Tensor
    v_l: Tensor
    e_o: EdgeState | None
    e_l: EdgeState | None
    e_m: EdgeState | None


def encode(encoder: Encoder, batch: AssignmentBatch, labels: Prepared) -> AssignmentStates:
    """The encoder, but for the label edges: what the first block reads of them is in ``labels``."""
    f = batch.x
    e_o: EdgeState | None = None
    e_m: EdgeState | None = None
    if encoder.e_o is not None:
        e_o = edge_state(encoder.e_o, encoder.e_o.lin1(encoder.relative(require(batch.near_attr))))
    if encoder.e_m is not None:
        lin1 = encoder.e_m.lin1
        total = lin1.part(0, f)[:, :, None] + require(labels.w_e_m)
        if encoder.product is not None:
            total = add(total, lin1.part(2, encoder.product.A(f)[:, :, None] * require(labels.w_product)))
        e_m = edge_state(encoder.e_m, total)
    return AssignmentStates(encoder.v_o(f), labels.v_l, e_o, None, e_m)


def block(
    conv: AssignmentConv, number: int, states: AssignmentStates, batch: AssignmentBatch, labels: Prepared
) -> AssignmentStates:
    """One graph network block, line by line as :meth:`AssignmentConv.forward`."""
    v_o, v_l, e_o, e_l, e_m = states
    nodes = conv.nodes
    to_o, to_l = [v_o], [v_l]
    if nodes.rho_oo is not None:
        senders = neighbours(v_o, require(batch.near))
        to_o.append(mean_message(nodes.rho_oo.rho, require(e_o), senders, "rows", batch.near_mask))
    if nodes.rho_ol is not None:
        to_o.append(mean_message(nodes.rho_ol.rho, require(e_m), v_l[:, None], "rows", batch.matches))
    if nodes.rho_ll is not None and number == 0:
        to_l.append(require(labels.heard))
    elif nodes.rho_ll is not None:
        senders, others = label_senders(v_l, batch.relates), other_labels(v_l, batch.relates)
        to_l.append(mean_message(nodes.rho_ll.rho, require(e_l), senders, "rows", others))
    if nodes.rho_lo is not None:
        hears = batch.mask if batch.matches is None else batch.matches
        to_l.append(mean_message(nodes.rho_lo.rho, require(e_m), v_o[:, :, None], "columns", hears))
    v_o, v_l = mlp(nodes.phi_o, *to_o), mlp(nodes.phi_l, *to_l)

    new_o: EdgeState | None = None
    new_l: EdgeState | None = None
    new_m: EdgeState | None = None
    composed_o, composed_l, composed_m = labels.composed[number]
    if conv.edges_o is not None:
        ends = neighbours(v_o, require(batch.near)), v_o[:, :, None]
        new_o = edge_update(conv.edges_o, require(composed_o), require(e_o), *ends)
    if conv.edges_l is not None:
        ends = label_senders(v_l, batch.relates), v_l[:, :, None]
        read = require(labels.read) if number == 0 else require(e_l)
        new_l = edge_update(conv.edges_l, require(composed_l), read, *ends)
    if conv.edges_m is not None:
        ends = v_o[:, :, None], v_l[:, None]
        new_m = edge_update(conv.edges_m, require(composed_m), require(e_m), *ends)
    return AssignmentStates(v_o, v_l, new_o, new_l, new_m)


def match_matrix(model: GMMLIC, batch: AssignmentBatch, labels: Prepared | None = None) -> tuple[Tensor, Tensor]:
    """Match logits (B, M, C), in which rows of absent instances mean nothing, and the labels' last states (B, C, d)."""
    if labels is None:
        labels = prepare(model, batch.label_vectors, batch.relates)
    if not (model.recompute and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return network(model, batch, labels)  # torch 2.15 cannot compile it recomputed: its partitioner loses a node
    # Images meet only in the loss: of those that have been through, nothing is kept but their few inputs.
    C = labels.v_l.shape[1]
    size = max(1, RECOMPUTED_EDGES // (batch.mask.shape[1] * C + C**2))
    results = [
        checkpoint(network, model, part, labels, use_reentrant=False, preserve_rng_state=False)
        for part in batch.split(size)
    ]
    matrices, v_l = zip(*results, strict=True)
    return torch.cat(matrices), torch.cat(v_l)


def network(model: GMMLIC, batch: AssignmentBatch, labels: Prepared) -> tuple[Tensor, Tensor]:
    """Encoder, blocks and decoder."""
    states = encode(model.encoder, batch, labels)
    for number, conv in enumerate(model.blocks):
        states = block(conv, number, states, batch, labels)  # type: ignore[arg-type]
    v_o, v_l, _, _, e_m = states
    ends: tuple[Tensor | EdgeState, ...] = (e_m,) if e_m is not None else (v_o[:, :, None], v_l[:, None])
    # Without matching edges the labels' states are the same for all images.
    return mlp(model.decoder, *ends).squeeze(-1), v_l.expand(batch.x.shape[0], -1, -1)
