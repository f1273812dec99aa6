"""The output of a model, and pooling over instances (eq. 14)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from gm_mlic.errors import ArgumentError, ConfigError
from gm_mlic.graphs.batch import AssignmentBatch, check_label_counts
from gm_mlic.graphs.dense import TensorFields
from gm_mlic.graphs.schema import INSTANCE, LABEL, MATCHES
from gm_mlic.nn.scatter import scatter_logsumexp, scatter_max

Pooling = Literal["max", "logsumexp"]

_ISOLATED = "Label nodes {} have no matching edge: connect each to at least one instance."


@dataclass(frozen=True, eq=False, repr=False)
class ModelOutput(TensorFields):
    r"""The output of a model for a batch of B images with C labels and up to M instances.

    Attributes:
        logits: (B, C) label logits; their ``sigmoid`` is :math:`p_c` of eq. 14.
        argmax_instance: (B, C) int64, the instance with the largest match logit of each label. Instances are numbered
            per image from 0, the most confident first.
        label_states: (B, C, d) features of the labels after the last block; None from a model without label nodes.
        matches: (B, M, C) match logits, or one of each matching edge, (E,), with ``edges``.
        edges: (E,) image, instance and label of each matching edge, and (B + 1,) the first instance of each image.
        auxiliary: (B, C) logits of further classifiers, to which the training loss is applied as well; None for none.
        loss: scalar, the model's own term of the training loss, in training mode only; None for none. It is added to
            the loss of the logits, and replaces it if the model gives logits without gradient (``logits.detach()``).
            The logged losses are those of the logits.
    """

    logits: Tensor
    argmax_instance: Tensor
    label_states: Tensor | None = None
    matches: Tensor | None = None
    edges: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    auxiliary: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None

    @property
    def match_logits(self) -> Tensor:
        r"""(B, M, C) match logits :math:`s_{ic}` (eq. 13), -inf where there is no instance or no matching edge.

        Whole-image baselines return other values per location and label; see their docstrings.

        Raises:
            ConfigError: if the model gave none.
        """
        if self.matches is None:
            raise ConfigError("This output has no match logits: the model must give ModelOutput `matches`.")
        if self.edges is None:
            return self.matches
        image, instance, label, ptr = self.edges
        B, C = self.logits.shape
        empty = self.matches.new_full((B, int(ptr.diff().max()), C), float("-inf"))
        return empty.index_put((image, instance, label), self.matches)


def pool_instances(
    match_logits: Tensor, data: HeteroData | AssignmentBatch, label_states: Tensor | None = None, pooling: str = "max"
) -> ModelOutput:
    r"""Pooling over instances, on logits (eq. 14).

    The gradient of the maximum goes to one instance, the first one where several are equal. NaN counts as the largest
    value, so that NaN propagates.

    Args:
        match_logits: of each matching edge of ``data``: (E,) for a ``HeteroData``, (B, M, C) for an
            :class:`~gm_mlic.graphs.AssignmentBatch`.
        data: the graphs.
        label_states: (B * C, d) or (B or 1, C, d), passed on to the output.
        pooling: ``max`` (the paper), or ``logsumexp``, by which several weak matches add up: the logarithm of the mean
            over views of :math:`\sum_i e^{s_{ic}}`.

    Raises:
        ArgumentError: for match logits of another shape.
        ConfigError: if images differ in their number of labels, or a label has no matching edge.
    """
    dense = isinstance(data, AssignmentBatch)
    shape = (*data.mask.shape, data.label_vectors.shape[0]) if dense else data[MATCHES].edge_index.shape[1:]  # type: ignore[index,union-attr]
    if match_logits.shape != shape:
        raise ArgumentError("match_logits", f"must be {tuple(shape)}, got {tuple(match_logits.shape)}.")
    pool: Any = _pool_dense if dense else _pool_sparse
    return pool(match_logits, data, label_states, pooling)  # type: ignore[no-any-return]


def _pool_dense(match_logits: Tensor, batch: AssignmentBatch, label_states: Tensor | None, pooling: str) -> ModelOutput:
    mask = batch.match_mask
    if mask.shape[2] > 1 and not torch.compiler.is_compiling() and not bool(mask.any(dim=1).all()):
        raise ConfigError(_ISOLATED.format((~mask.any(dim=1)).flatten().nonzero().flatten().tolist()[:5]))
    match_logits = match_logits.masked_fill(~mask, float("-inf"))
    values = match_logits.detach()
    position = torch.arange(values.shape[1], device=values.device)[:, None]
    largest = (values == values.amax(dim=1, keepdim=True)) | values.isnan()
    argmax = torch.where(largest, position, values.shape[1]).amin(dim=1)
    logits = match_logits.gather(1, argmax[:, None]).squeeze(1)
    if pooling == "logsumexp":
        logits = match_logits.logsumexp(dim=1) - math.log(batch.views)
    if label_states is not None:
        label_states = label_states.expand(logits.shape[0], -1, -1)  # len() would fix B in torch.export
    return ModelOutput(logits, argmax, label_states, match_logits)


def _pool_sparse(match_logits: Tensor, data: HeteroData, label_states: Tensor | None, pooling: str) -> ModelOutput:
    source, target = data[MATCHES].edge_index
    labels, instances = data[LABEL], data[INSTANCE]
    B, N = int(getattr(data, "num_graphs", 1)), labels.x.shape[0]
    C = N // B
    if not torch.compiler.is_compiling():  # the checks depend on values, which would break a compiled graph
        # Inside torch.func.grad, torch 2.8 converts no tensor to a list.
        if "ptr" in labels and bool((labels.ptr.diff() != C).any()):
            check_label_counts(labels.ptr.diff().tolist())
        isolated = torch.bincount(target, minlength=N) == 0
        if bool(isolated.any()):
            raise ConfigError(_ISOLATED.format(isolated.nonzero().flatten().tolist()[:5]))
    logits, edge = scatter_max(match_logits, target, N)
    if pooling == "logsumexp":
        views = torch.as_tensor(data.stores[0].get("views", 1), device=target.device).flatten()[0]
        logits = scatter_logsumexp(match_logits, target, logits.detach()) - views.log()
    image = target // C
    # Of a single graph without ptr: [0, M].
    ptr = instances.ptr if "ptr" in instances else torch.arange(2, device=target.device) * instances.x.shape[0]
    instance = source - ptr[image]
    label_states = None if label_states is None else label_states.view(B, C, -1)
    edges = (image, instance, target - image * C, ptr)
    return ModelOutput(logits.view(B, C), instance[edge].view(B, C), label_states, match_logits, edges)
