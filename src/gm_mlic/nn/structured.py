r"""The structured execution: the same modules, for complete relations, without gathers, concatenations or scatters.

It computes what :class:`~gm_mlic.nn.GMMLIC` computes on ``edge_index``, rearranged by exact algebra:

1. a Linear on a concatenation is a sum of Linears, each applied where its argument lives and added by broadcast
   (:func:`concat_linear`);
2. the mean over neighbours commutes with a message's last Linear (:func:`mean_message`);
3. :math:`\sigma`'s last Linear composes with the slice of :math:`\psi`'s first that reads it (:func:`edge_update`);
4. what does not depend on the image (labels and label edges of the encoder, the first block's :math:`\rho_{ll}`) has
   a leading size of 1 and is computed once for the batch.

Shapes: instances (B, M, d), labels (B or 1, C, d), matching edges (B, M, C, d), instance edges (B, M, K, d), label
edges (B or 1, C, C or K, d), receiving label first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.conv import States
from gm_mlic.nn.mlp import MLP, ConcatLinear

if TYPE_CHECKING:
    from gm_mlic.nn.conv import AssignmentConv, EdgeConv
    from gm_mlic.nn.gm_mlic import GMMLIC, Encoder


def require(value: Tensor | None) -> Tensor:
    """``value``, which :meth:`GMMLIC.forward` has checked is there."""
    assert value is not None
    return value


def concat_linear(lin: ConcatLinear, *parts: Tensor) -> Tensor:
    """:math:`W [x_1, ..., x_n] + b` of parts that broadcast against each other (rule 1)."""
    # Smallest parts first: the one sum of full size is formed last.
    order = sorted(range(len(parts)), key=lambda k: parts[k].numel())
    total = linear(parts[order[0]], lin.part_weight(order[0]), lin.bias)
    for k in order[1:]:
        total = total + lin.part(k, parts[k])
    return total


def mlp(f: MLP, *parts: Tensor) -> Tensor:
    """An MLP of parts that broadcast against each other."""
    return f.after_lin1(concat_linear(f.lin1, *parts))


def mean_message(rho: MLP, edges: Tensor, senders: Tensor, dim: int, mask: Tensor | None = None) -> Tensor:
    """The mean along ``dim`` of the messages ``rho([edges, senders])``, its last Linear after the mean (rule 2).

    Args:
        rho: the message function.
        edges, senders: edge states and senders' states, broadcasting against each other.
        dim: the axis of the senders.
        mask: which messages there are, broadcasting against the hidden states; None for all.

    Returns:
        The means; zero where there is no message.
    """
    hidden = concat_linear(rho.lin1, edges, senders).relu()
    if mask is None:
        return rho.lin2(hidden.mean(dim=dim))  # type: ignore[no-any-return]
    weight = mask.to(hidden.dtype)
    count = weight.sum(dim=dim)
    mean = (hidden * weight).sum(dim=dim) / count.clamp(min=1)
    # A node without neighbours receives nothing, not even the bias.
    return rho.lin2(mean) * (count > 0)  # type: ignore[no-any-return]


def edge_update(conv: EdgeConv, edges: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Edge convolution with the two Linears between sigma and psi composed into one (rule 3)."""
    parts = [source, target]
    if conv.product is not None:
        parts.append(conv.product.A(source) * conv.product.B(target))
    hidden = concat_linear(conv.sigma.lin1, *parts).relu()
    read = conv.psi.lin1.part_weight(1)
    composed = read @ conv.sigma.lin2.weight
    bias = read @ conv.sigma.lin2.bias + conv.psi.lin1.bias
    return conv.psi.after_lin1(conv.psi.lin1.part(0, edges) + linear(hidden, composed, bias))


def neighbours(nodes: Tensor, lists: Tensor) -> Tensor:
    """States of listed neighbours: nodes (B, N, d), lists (B or 1, N, K) -> (B, N, K, d)."""
    B, _, d = nodes.shape
    _, N, K = lists.shape
    flat = lists.expand(B, N, K).reshape(B, N * K, 1).expand(-1, -1, d)
    return torch.gather(nodes, 1, flat).view(B, N, K, d)


def encode(encoder: Encoder, batch: AssignmentBatch) -> States:
    """The encoder; labels and label edges once for the batch (rule 4)."""
    x, W = batch.x, batch.label_vectors[None]
    e_o = e_l = e_m = None
    if encoder.e_o is not None:
        e_o = encoder.e_o(encoder.relative(require(batch.near_attr)))
    if encoder.e_l is not None:
        e_l = mlp(encoder.e_l, label_senders(W, batch), W[:, :, None])
    if encoder.e_m is not None:
        f, w = x[:, :, None], W[:, None]
        parts = [f, w] if encoder.product is None else [f, w, encoder.product.A(f) * encoder.product.B(w)]
        e_m = mlp(encoder.e_m, *parts)
    return States(encoder.v_o(x), encoder.v_l(W), e_o, e_l, e_m)


def label_senders(v_l: Tensor, batch: AssignmentBatch) -> Tensor:
    """States of the labels that each label hears: (., 1, C, d) for all of them, (., C, K, d) for listed ones."""
    return v_l[:, None] if batch.relates is None else neighbours(v_l, batch.relates[None])


def block(conv: AssignmentConv, states: States, batch: AssignmentBatch) -> States:
    """One graph network block, line by line as :meth:`AssignmentConv.forward`."""
    v_o, v_l, e_o, e_l, e_m = states
    nodes = conv.nodes
    to_o, to_l = [v_o], [v_l]
    if nodes.rho_oo is not None:
        senders, present = neighbours(v_o, require(batch.near)), require(batch.near_mask)[..., None]
        to_o.append(mean_message(nodes.rho_oo.rho, require(e_o), senders, 2, present))
    if nodes.rho_ol is not None:
        to_o.append(mean_message(nodes.rho_ol.rho, require(e_m), v_l[:, None], 2))
    if nodes.rho_ll is not None:
        senders, others = label_senders(v_l, batch), other_labels(v_l, batch)
        to_l.append(mean_message(nodes.rho_ll.rho, require(e_l), senders, 2, others))
    if nodes.rho_lo is not None:
        to_l.append(mean_message(nodes.rho_lo.rho, require(e_m), v_o[:, :, None], 1, batch.mask[:, :, None, None]))
    v_o, v_l = mlp(nodes.phi_o, *to_o), mlp(nodes.phi_l, *to_l)

    new_o = new_l = new_m = None
    if conv.edges_o is not None:
        new_o = edge_update(conv.edges_o, require(e_o), neighbours(v_o, require(batch.near)), v_o[:, :, None])
    if conv.edges_l is not None:
        new_l = edge_update(conv.edges_l, require(e_l), label_senders(v_l, batch), v_l[:, :, None])
    if conv.edges_m is not None:
        new_m = edge_update(conv.edges_m, require(e_m), v_o[:, :, None], v_l[:, None])
    return States(v_o, v_l, new_o, new_l, new_m)


def other_labels(v_l: Tensor, batch: AssignmentBatch) -> Tensor | None:
    """The mask (1, C, C, 1) that keeps a label from hearing itself; None where neighbours are listed."""
    if batch.relates is not None:
        return None
    C = v_l.shape[1]
    return ~torch.eye(C, dtype=torch.bool, device=v_l.device)[None, :, :, None]


def match_matrix(model: GMMLIC, batch: AssignmentBatch) -> Tensor:
    """Match logits (B, M, C) of a model by the structured execution; rows of absent instances mean nothing."""
    states = encode(model.encoder, batch)
    for conv in model.blocks:
        states = block(conv, states, batch)  # type: ignore[arg-type]
    v_o, v_l, _, _, e_m = states
    ends = (e_m,) if e_m is not None else (v_o[:, :, None], v_l[:, None])
    return mlp(model.decoder, *ends).squeeze(-1)
