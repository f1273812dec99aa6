r"""The building block of every function of the network: ``Linear, ReLU, Linear`` over a concatenation.

Every layer initializes its parameters in ``__init__``; ``reset_parameters`` initializes them again.

Initialization keeps the variance (He et al. before a ReLU, LeCun et al. elsewhere): a path through k blocks passes
about ten Linears, most of them without a norm. torch's default scales the signal by about 0.4 at each, and with
``fusion="product"`` messages may then never be learned (``experiments/recipe``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from gm_mlic.graphs.dense import EdgeTensor, apply_linear, call, expanded, is_cached, is_plain, shape_of


class _EmptyLinear(nn.Linear):
    def reset_parameters(self) -> None:
        pass


def make_linear(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Linear:
    """A Linear without initial values; ``in_channels=-1`` takes the size from the first input."""
    if in_channels == -1:
        return nn.LazyLinear(out_channels, bias)
    lin = _EmptyLinear(in_channels, out_channels, bias)  # skip_init of torch takes ten times longer
    lin.__class__ = nn.Linear  # type: ignore[assignment]
    return lin


def is_lazy(lin: nn.Module) -> bool:
    """Whether the input size of a Linear is not known yet."""
    return isinstance(lin, nn.LazyLinear) and lin.has_uninitialized_params()  # type: ignore[no-untyped-call]


def init_linear(lin: Any, weight: Tensor | None = None) -> None:
    """LeCun normal initialization, for a Linear that no ReLU follows, or the given weight; zeros for the bias.

    A module without a weight, such as a wrapper, initializes itself.
    """
    if not isinstance(getattr(lin, "weight", None), Tensor):
        getattr(lin, "reset_parameters", lambda: None)()
    elif not is_lazy(lin):
        nn.init.kaiming_normal_(lin.weight, nonlinearity="linear") if weight is None else lin.weight.data.copy_(weight)
        if lin.bias is not None:
            nn.init.zeros_(lin.bias)


class ConcatLinear(nn.Module):
    r"""A Linear over a concatenation, as a sum of Linears: :math:`W [x_1, \ldots, x_n] + b = \sum_k W_k x_k + b`.

    The parts may broadcast against each other: values shared by many edges are multiplied once.

    Args:
        in_channels: the size of each part; -1 to take it from the first input.
        out_channels: the size of the result.

    Shapes:
        - **input:** parts :math:`x_k` (..., in_channels[k]), tensors or :class:`~gm_mlic.graphs.EdgeTensor`
        - **output:** (..., out_channels)
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self._in_channels, self.out_channels = tuple(in_channels), out_channels
        self.lins = nn.ModuleList(make_linear(size, out_channels, bias=k == 0) for k, size in enumerate(in_channels))
        self.reset_parameters()

    @property
    def in_channels(self) -> tuple[int, ...]:
        """The size of each part; 0 or -1 where it is not known yet."""
        known = zip(self.lins, self._in_channels, strict=True)
        return tuple(int(getattr(lin, "in_features", size)) for lin, size in known)

    def reset_parameters(self) -> None:
        lins: Any = self.lins
        if any(is_lazy(lin) for lin in lins):
            return
        # One draw for all parts: the variance depends on the size of the whole concatenation.
        weight = next(self.parameters()).new_empty(self.out_channels, sum(self.in_channels))
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
        for lin, part in zip(lins, torch.split(weight, list(self.in_channels), dim=1), strict=True):
            init_linear(lin, part)

    def forward(self, *parts: Tensor | EdgeTensor) -> Tensor:
        return self.sum(*parts)[0]

    def sum(self, *parts: Tensor | EdgeTensor) -> tuple[Tensor, bool]:
        """The result, and whether it is a fresh tensor that may be modified in place."""
        lins = list(self.lins)
        if not all(map(is_plain, lins)):
            if any(map(is_lazy, lins)):
                for lin, part in zip(lins, parts, strict=True):
                    apply_linear(lin, part)
                self.reset_parameters()
                return self.sum(*parts)
            terms = [lin(part) for lin, part in zip(lins, expanded(*parts), strict=True)]
            return reduce(torch.add, terms), False
        # Compact parts first, so that few sums are of full size.
        pairs = zip(lins, parts, strict=True)
        (lin, part), *rest = sorted(pairs, key=lambda pair: len([n for n in shape_of(pair[1]) if n != 1]))
        total, fresh = apply_linear(lin, part), not is_cached(lin, part)
        for lin, part in rest:
            total = total + apply_linear(lin, part) if is_cached(lin, part) else _add_linear(total, lin, part, fresh)  # type: ignore[arg-type]
            fresh = True
        return total, fresh

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.in_channels)}, {self.out_channels})"


def _add_linear(total: Tensor, lin: nn.Linear, part: Tensor | EdgeTensor, fresh: bool) -> Tensor:
    """``total + lin(part)``, in place where ``total`` is fresh and the sum fits."""
    x, weight, bias = (part.x, *part.compose(lin)) if isinstance(part, EdgeTensor) else (part, lin.weight, lin.bias)
    if fresh and total.dim() != 3 and total.shape[:-1] == x.shape[:-1]:  # edges; a copy of nodes (B, N, d) is cheap
        if bias is not None:
            total.add_(bias)
        # The matrix product adds to the sum in place. Under autocast it has the dtype of the sum.
        rows = x.reshape(-1, x.shape[-1]).to(total.dtype)
        total.view(-1, total.shape[-1]).addmm_(rows, weight.t().to(total.dtype))
        return total
    term, small = linear(x, weight), total if bias is None else total + bias
    fits = all(a == b or b == 1 for a, b in zip(term.shape, small.shape, strict=True))
    return term.add_(small) if fits and term.dtype == small.dtype else term + small


class HadamardFusion(nn.Module):
    r"""The element-wise product of projections of both ends of an edge: :math:`(A x_j) \odot (B x_i)`.

    A third argument beside :math:`[x_j, x_i]` for functions on matching edges: an MLP over a concatenation learns an
    inner product slowly. Not in the paper; see ``fusion`` of :class:`~gm_mlic.nn.GMMLIC`.

    Args:
        in_channels: sizes of source and target; -1 to take them from the first input.
        out_channels: size of the product.

    Shapes:
        - **input:** :math:`x_j` (..., in_channels[0]), :math:`x_i` (..., in_channels[1])
        - **output:** (..., out_channels)
    """

    def __init__(self, in_channels: tuple[int, int], out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = tuple(in_channels), out_channels
        self.A = make_linear(in_channels[0], out_channels, bias=False)
        self.B = make_linear(in_channels[1], out_channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Keep the variance, as in ConcatMLP: a product of small values is learned too slowly.
        init_linear(self.A)
        init_linear(self.B)

    def forward(self, x_j: Tensor | EdgeTensor, x_i: Tensor | EdgeTensor) -> Any:
        if is_lazy(self.A) or is_lazy(self.B):
            apply_linear(self.A, x_j)
            apply_linear(self.B, x_i)
            self.reset_parameters()
        dense = isinstance(x_j, EdgeTensor)
        if not (is_plain(self.A) and is_plain(self.B)):
            x_j, x_i = expanded(x_j, x_i)
        product = apply_linear(self.A, x_j) * apply_linear(self.B, x_i)
        return EdgeTensor(product) if dense else product

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels})"


class ConcatMLP(nn.Module):
    r"""``Linear, ReLU, Linear`` over a concatenation, optionally followed by LayerNorm.

    .. math::
        f(x_1, \ldots, x_n) = \mathrm{Norm}(W' \, \mathrm{ReLU}(W [x_1, \ldots, x_n] + b) + b')

    With ``product``, the function of both ends of an edge becomes :math:`f(x_j, x_i, A x_j \odot B x_i)`.

    Every function of the paper's equations (:math:`\rho_n, \phi_n, \rho_e, \phi_e`, encoder, decoder) is one of these,
    with its own parameters.

    If a part is an :class:`~gm_mlic.graphs.EdgeTensor`, so is the result: its last affine map (the scale and shift of
    the LayerNorm, or else :math:`W', b'`) is not yet applied.

    Args:
        in_channels: the size of each part; -1 to take it from the first input.
        hidden_channels: the size between the two Linears.
        out_channels: the size of the result.
        product: add :class:`HadamardFusion` of the two parts as a third one (default: ``False``).
        norm: LayerNorm on the result (default: ``False``).

    Shapes:
        - **input:** parts :math:`x_k` (..., in_channels[k])
        - **output:** (..., out_channels)
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        hidden_channels: int,
        out_channels: int,
        *,
        product: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = (*in_channels, *[hidden_channels] * product), out_channels
        self.hidden_channels = hidden_channels
        self.product = HadamardFusion(tuple(in_channels), hidden_channels) if product else None  # type: ignore[arg-type]
        self.lin1 = ConcatLinear(self.in_channels, hidden_channels)
        self.lin2: Any = make_linear(hidden_channels, out_channels)
        self.norm: Any = nn.LayerNorm(out_channels) if norm else nn.Identity()
        init_linear(self.lin2)

    def reset_parameters(self) -> None:
        for module in (self.product, self.lin1, self.norm):
            if isinstance(module, (HadamardFusion, ConcatLinear, nn.LayerNorm)):
                module.reset_parameters()
        init_linear(self.lin2)

    def forward(self, *parts: Tensor | EdgeTensor) -> Any:
        hidden = self.hidden(*parts)
        if not any(isinstance(part, EdgeTensor) for part in parts):
            return self.norm(self.lin2(hidden))
        if is_plain(self.norm, nn.Identity) and is_plain(self.lin2):
            return EdgeTensor(hidden, self.lin2.weight, self.lin2.bias)
        if is_plain(self.norm, nn.LayerNorm):
            # A Function takes longer to call, and only gradients need it.
            normalize = Normalize.apply if torch.is_grad_enabled() else Normalize.forward
            return EdgeTensor(normalize(self.lin2(hidden), self.norm.eps)[0], self.norm.weight, self.norm.bias)
        return EdgeTensor(self.norm(self.lin2(hidden)))

    def hidden(self, *parts: Tensor | EdgeTensor) -> Tensor:
        r""":math:`\mathrm{ReLU}(W [x_1, \ldots, x_n] + b)`."""
        if self.product is not None:
            parts = (*parts, call(HadamardFusion, self.product, *parts))
        if not is_plain(self.lin1, ConcatLinear):
            return relu(self.lin1(*expanded(*parts)))
        total, fresh = self.lin1.sum(*parts)
        return total.relu_() if fresh else relu(total)

    def __repr__(self) -> str:
        norm = ", norm" if isinstance(self.norm, nn.LayerNorm) else ""
        sizes = list(getattr(self.lin1, "in_channels", self.in_channels))
        return f"{type(self).__name__}({sizes}, {self.hidden_channels}, {self.out_channels}{norm})"


class Normalize(torch.autograd.Function):
    """LayerNorm without scale and shift. It saves its results, of which one is kept in memory anyway; the other, the
    inverse deviation r, is a result so that gradients can be differentiated.
    """

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, _, r = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        return out, r

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_r: Tensor | None) -> tuple[Tensor, None]:
        out, r = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else grad
        # Compiled code has no second derivatives, and passes zeros for grad_r.
        if torch.compiler.is_compiling() or (grad_r is None and not torch.is_grad_enabled()):
            # The result has mean 0 and deviation 1 already; the deviation of the input is a factor.
            mean, one = torch.zeros_like(r), torch.ones_like(r)
            fast: Any = torch.ops.aten.native_layer_norm_backward
            grad_x = fast(grad, out, out.shape[-1:], mean, one, None, None, [True, False, False])[0]
            return grad_x.mul_(r), None
        grad_x = r * (grad - grad.mean(-1, keepdim=True) - out * (grad * out).mean(-1, keepdim=True))
        return grad_x if grad_r is None else grad_x - grad_r * r.square() * out / out.shape[-1], None


class Decoder(ConcatMLP):
    r"""The decoder of eq. 13, a :class:`ConcatMLP` to logits.

    Autocast does not apply to its last Linear. Rounded to bfloat16, logits of different instances and images would be
    equal, and equal logits decide the argmax and the ranking.

    Args:
        in_channels: the size of each part of the input: one edge state, or two node states.
        hidden_channels: the size between the two Linears.
        out_channels: logits per input (default: 1).
        zero: initialize the weight of the last Linear with zeros (default: ``False``).

    Shapes:
        - **input:** parts :math:`x_k` (..., in_channels[k])
        - **output:** (..., out_channels)
    """

    def __init__(
        self, in_channels: Sequence[int], hidden_channels: int, out_channels: int = 1, *, zero: bool = False
    ) -> None:
        super().__init__(in_channels, hidden_channels, out_channels)
        self.zero = zero
        self._start_at_zero()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        if self.zero:
            nn.init.zeros_(self.lin2.weight)

    def forward(self, *parts: Tensor | EdgeTensor) -> Tensor:
        hidden = self.hidden(*parts)
        with torch.autocast(hidden.device.type, enabled=False):
            weight = getattr(self.lin2, "weight", None)
            hidden = hidden.to(weight.dtype) if isinstance(weight, Tensor) else hidden
            return self.norm(self.lin2(hidden))  # type: ignore[no-any-return]
