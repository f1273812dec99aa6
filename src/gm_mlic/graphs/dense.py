r"""Edges of a batch of graphs as dense tensors, and values on them in factored form.

Layers accept these classes in place of an ``edge_index`` (2, E). They implement the two primitives that
differ between sparse and dense graphs: the values at both ends of each edge (:meth:`DenseEdges.ends`), and the mean of
messages (:meth:`DenseEdges.mean`). Nothing is gathered or scattered, and exact algebra reduces the computation:

1. a Linear over a concatenation is a sum of Linears. Each is applied to the N node features rather than to N x C edge
   features, and the results are added by broadcasting (:class:`EdgeTensor` holds the ends compactly);
2. an affine map at the end of an edge value (an MLP's last Linear; the scale and shift of a LayerNorm) is not applied
   to the edges. It is composed with the next Linear (:meth:`EdgeTensor.compose`), or it is applied after the mean, with
   which it commutes;
3. values that do not depend on the image have batch size 1, and are computed once for a batch.

Only plain layers of this package get these values. :func:`call` gives a module with hooks, a subclass or another module
tensors of full size, and such a layer returns tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._pytree import tree_map, tree_map_only

T = TypeVar("T", bound="TensorFields")
#: Results of :meth:`EdgeTensor.compose`, by its operands, while the weights do not change.
Compositions: TypeAlias = dict[tuple[nn.Module, Tensor], tuple[Tensor, Tensor | None]]
_compositions: ContextVar[Compositions | None] = ContextVar("compositions", default=None)


@contextmanager
def reused(compositions: Compositions) -> Iterator[None]:
    """Context manager to take compositions from a dictionary, and to add those that are not in it."""
    token = _compositions.set(compositions)
    try:
        yield
    finally:
        _compositions.reset(token)


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a call of ``module`` is equal to ``kind.forward``: no subclass, wrapper, hook or replaced ``forward``.

    Only then can the call be replaced by an equal computation.
    """
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


class EdgeTensor:
    r"""Values on the edges of a dense graph: :math:`A x + s`, with a broadcastable x, and A and s not yet applied.

    It is not a Tensor: torch functions need :meth:`tensor`.

    Args:
        x: (B, N, K, d), where each of the first three sizes may be 1.
        weight: A, (d', d), or (d,) if A is diagonal; None for the identity.
        bias: s, (d',); None for zero.
    """

    def __init__(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        self.x, self.weight, self.bias = x, weight, bias
        #: Precomputed results of modules for these values.
        self.outputs: dict[nn.Module, Tensor] = {}

    def finish(self, x: Tensor) -> Tensor:
        """:math:`A x + s` of values (..., d)."""
        if self.weight is not None and self.weight.dim() == 2:
            return linear(x, self.weight, self.bias)
        x = x if self.weight is None else x * self.weight
        return x if self.bias is None else x + self.bias

    def tensor(self) -> Tensor:
        """The values, with sizes of 1 where they are equal along an axis."""
        return self.finish(self.x)

    def compose(self, lin: Any) -> tuple[Tensor, Tensor | None]:
        r"""The weight and bias of ``lin`` as a function of x: :math:`W (A x + s) + b = (W A) x + (W s + b)`."""
        # Gradients need the operation itself, and compiled code cannot read a context variable.
        fixed = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else _compositions.get()
        if fixed is None or self.weight is None:
            return self._compose(lin)
        if (lin, self.weight) not in fixed:
            fixed[lin, self.weight] = self._compose(lin)
        return fixed[lin, self.weight]

    def _compose(self, lin: Any) -> tuple[Tensor, Tensor | None]:
        weight, bias = lin.weight, lin.bias
        if self.bias is not None:
            shift = weight @ self.bias
            bias = shift if bias is None else bias + shift
        if self.weight is not None:
            weight = weight * self.weight if self.weight.dim() == 1 else weight @ self.weight
        return weight, bias

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.x.shape)}{'' if self.weight is None else ', affine'})"


def shape_of(part: Tensor | EdgeTensor) -> torch.Size:
    """The compact shape of values on edges, without the affine map."""
    return part.x.shape if isinstance(part, EdgeTensor) else part.shape


def expanded(*parts: Any) -> tuple[Any, ...]:
    """Values on the same edges as tensors of full size; among or within other arguments, each EdgeTensor for itself."""
    if all(isinstance(part, (Tensor, EdgeTensor)) for part in parts):
        sizes: Any = torch.broadcast_shapes(*(shape_of(part)[:-1] for part in parts))  # type: ignore[no-untyped-call]
        tensors = (part.tensor() if isinstance(part, EdgeTensor) else part for part in parts)
        return tuple(tensor.expand(*sizes, -1).contiguous() for tensor in tensors)
    return tree_map_only(EdgeTensor, lambda values: expanded(values)[0], parts)  # type: ignore[no-any-return]


def call(kind: type[nn.Module], module: nn.Module, *arguments: Any) -> Any:
    """``module(*arguments)``; of :func:`expanded` arguments, unless it is a plain module of the class ``kind``."""
    return module(*(arguments if is_plain(module, kind) else expanded(*arguments)))


def is_cached(module: nn.Module, x: Tensor | EdgeTensor) -> bool:
    """Whether the result of ``module`` for these values is precomputed."""
    return isinstance(x, EdgeTensor) and module in x.outputs


def apply_linear(lin: Any, x: Tensor | EdgeTensor) -> Tensor:
    """``lin(x)``; for an :class:`EdgeTensor`, the affine map is composed and the compact shape is kept."""
    if not isinstance(x, EdgeTensor):
        return lin(x)  # type: ignore[no-any-return]
    if lin in x.outputs:
        return x.outputs[lin]
    if x.weight is None or not is_plain(lin):
        return lin(x.tensor())  # type: ignore[no-any-return]
    return linear(x.x, *x.compose(lin))


class TensorFields:
    """Base of dataclasses of tensors: conversion as in torch, and a short ``repr``."""

    def map(self: T, function: Callable[[Tensor], Tensor]) -> T:
        """The same values, with ``function`` applied to each tensor."""

        def mapped(value: Any) -> Any:
            nested = isinstance(value, TensorFields)
            return value.map(function) if nested else function(value) if isinstance(value, Tensor) else value

        return replace(self, **{name: tree_map(mapped, value) for name, value in vars(self).items()})  # type: ignore[type-var]

    def to(self: T, *args: Any, **kwargs: Any) -> T:
        """With the arguments of :meth:`torch.nn.Module.to`: a dtype applies to floating-point tensors only."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
        return self.map(lambda value: value.to(device, dtype if value.is_floating_point() else None, non_blocking))

    def cpu(self: T) -> T:
        return self.to("cpu")

    def cuda(self: T, device: int | str | torch.device = "cuda", *, non_blocking: bool = False) -> T:
        return self.to(device, non_blocking=non_blocking)

    def __repr__(self) -> str:
        shapes = tree_map_only(Tensor, lambda tensor: list(tensor.shape), vars(self))
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in shapes.items() if v is not None)})"


class DenseEdges(TensorFields):
    """Edges of one type in each graph of a batch of B: :class:`NeighborLists` or :class:`Bipartite`."""

    def ends(self, x_source: Tensor, x_target: Tensor) -> tuple[EdgeTensor, EdgeTensor]:
        """Values at the source and at the target of each edge, from (B or 1, N, d) of both node types."""
        raise NotImplementedError

    def mean(self, values: EdgeTensor | Tensor, *, to_source: bool = False) -> Tensor:
        """The mean of values over the edges of each target, or of each source, (B or 1, N, d).

        It is zero for a node without edges.
        """
        raise NotImplementedError


def edge_ends(edge_index: Tensor | DenseEdges, x_source: Tensor, x_target: Tensor) -> tuple[Any, Any]:
    """Values at the source and at the target of each edge: :meth:`DenseEdges.ends`, or (E, d) of ``edge_index``."""
    if isinstance(edge_index, DenseEdges):
        return edge_index.ends(x_source, x_target)
    return x_source[edge_index[0]], x_target[edge_index[1]]


def edge_dot(edge_index: Tensor | DenseEdges, x_source: Tensor, x_target: Tensor) -> Tensor:
    """The inner product of both ends of each edge: (E,) of ``edge_index``, (B, N_source, N_target) if bipartite."""
    if isinstance(edge_index, DenseEdges):
        return x_source @ x_target.transpose(1, 2)
    return (x_source[edge_index[0]] * x_target[edge_index[1]]).sum(dim=-1)


def _finished(values: EdgeTensor | Tensor, mean: Tensor, count: Tensor | None) -> Tensor:
    """Apply the affine map after the mean; zero, without the bias, for a node without edges."""
    mean = values.finish(mean) if isinstance(values, EdgeTensor) else mean
    return mean if count is None else mean * (count > 0)


@dataclass(frozen=True, eq=False, repr=False)
class NeighborLists(DenseEdges):
    """K sources for each target. Values on the edges are (B, N_target, K, d).

    Args:
        index: (B or 1, N_target, K) int64, the sources of each target; None: all nodes in order, K = N_source.
        mask: (B or 1, N_target, K) bool, the existing edges; None: all.
    """

    index: Tensor | None = None
    mask: Tensor | None = None

    def ends(self, x_source: Tensor, x_target: Tensor) -> tuple[EdgeTensor, EdgeTensor]:
        if self.index is None:
            return EdgeTensor(x_source[:, None]), EdgeTensor(x_target[:, :, None])
        B, _, d = x_source.shape
        _, N, K = self.index.shape
        flat = self.index.expand(B, N, K).reshape(B, N * K, 1).expand(-1, -1, d)
        return EdgeTensor(torch.gather(x_source, 1, flat).view(B, N, K, d)), EdgeTensor(x_target[:, :, None])

    def mean(self, values: EdgeTensor | Tensor, *, to_source: bool = False) -> Tensor:
        if to_source:
            raise NotImplementedError("Neighbor lists aggregate at targets only.")
        x = values.x if isinstance(values, EdgeTensor) else values
        if self.mask is None:
            return _finished(values, x.mean(dim=2), None)
        # Sums as products with the mask: a masked copy of all messages would cost as much as computing them.
        count = self.mask.sum(dim=-1, keepdim=True)
        total = (self.mask.to(x.dtype)[:, :, None] @ x).squeeze(2)
        return _finished(values, total / count.clamp(min=1), count)


@dataclass(frozen=True, eq=False, repr=False)
class Bipartite(DenseEdges):
    """An edge from every source to every target, except masked ones. Values are (B, N_source, N_target, d).

    Args:
        mask: (B, N_source) bool, the existing sources, or (B, N_source, N_target), the existing edges.
    """

    mask: Tensor

    def ends(self, x_source: Tensor, x_target: Tensor) -> tuple[EdgeTensor, EdgeTensor]:
        return EdgeTensor(x_source[:, :, None]), EdgeTensor(x_target[:, None])

    def mean(self, values: EdgeTensor | Tensor, *, to_source: bool = False) -> Tensor:
        x = values.x if isinstance(values, EdgeTensor) else values
        if to_source and self.mask.dim() == 2:
            return _finished(values, x.mean(dim=2), None)
        count = self.mask.sum(dim=2 if to_source else 1)[..., None]
        weight = self.mask.to(x.dtype)
        if to_source:
            total = (weight[:, :, None] @ x).squeeze(2)
        elif self.mask.dim() == 3:
            total = (weight[..., None] * x).sum(dim=1)
        else:
            total, count = (weight[:, None] @ x.flatten(2)).view(x.shape[0], *x.shape[2:]), count[..., None]
        return _finished(values, total / count.clamp(min=1), count)
