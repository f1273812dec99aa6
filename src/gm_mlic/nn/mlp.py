r"""The building block of every function of the network: ``Linear, ReLU, Linear`` over a concatenation.

Every layer initializes its parameters in ``__init__``; ``reset_parameters`` initializes them again.

He initialization: a path through k blocks passes about ten Linears, most of them without a norm. torch's default
initialization scales the signal by about 0.4 at each, and with ``fusion="product"`` messages may then never be learned
(``experiments/recipe``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, relu

from gm_mlic.graphs.dense import EdgeTensor, apply_linear, is_plain


def make_linear(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Linear:
    """A Linear without initial values; ``in_channels=-1`` takes the size from the first input."""
    if in_channels == -1:
        return nn.LazyLinear(out_channels, bias)
    lin = nn.Linear(in_channels, out_channels, bias, device="meta")
    return lin.to_empty(device=torch.get_default_device())


def is_lazy(lin: nn.Module) -> bool:
    """Whether the input size of a Linear is not known yet."""
    return isinstance(lin, nn.LazyLinear) and lin.has_uninitialized_params()  # type: ignore[no-untyped-call]


def draw_linear(lin: Any) -> None:
    """He initialization for a Linear that no ReLU follows; zeros for the bias."""
    if is_lazy(lin):
        return
    nn.init.kaiming_normal_(lin.weight, nonlinearity="linear")
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
        self.out_channels = out_channels
        self.lins = nn.ModuleList(make_linear(size, out_channels, bias=k == 0) for k, size in enumerate(in_channels))
        self.reset_parameters()

    @property
    def in_channels(self) -> tuple[int, ...]:
        """The size of each part; 0 where it is not known yet."""
        return tuple(int(lin.in_features) for lin in self.lins)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        lins: Any = self.lins
        if any(is_lazy(lin) for lin in lins):
            return
        # One draw for all parts: the variance depends on the size of the whole concatenation.
        weight = lins[0].weight.new_empty(self.out_channels, sum(self.in_channels))
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
        with torch.no_grad():
            for lin, part in zip(lins, torch.split(weight, list(self.in_channels), dim=1), strict=True):
                lin.weight.copy_(part)
        nn.init.zeros_(lins[0].bias)

    def forward(self, *parts: Tensor | EdgeTensor) -> Tensor:
        if any(is_lazy(lin) for lin in self.lins):
            for lin, part in zip(self.lins, parts, strict=True):
                apply_linear(lin, part)
            self.reset_parameters()
        # Compact parts first, so that few sums are of full size.
        first, *rest = sorted(range(len(parts)), key=lambda k: len([size for size in _shape(parts[k]) if size != 1]))
        total = apply_linear(self.lins[first], parts[first])
        writable = _owns_result(self.lins[first], parts[first])
        for k in rest:
            total = _add_linear(total, self.lins[k], parts[k], writable)
            writable = True
        return total

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.in_channels)}, {self.out_channels})"


def _shape(part: Tensor | EdgeTensor) -> torch.Size:
    return part.x.shape if isinstance(part, EdgeTensor) else part.shape


def _owns_result(lin: nn.Module, part: Tensor | EdgeTensor) -> bool:
    """Whether nothing else can hold a reference to the result of ``lin(part)``: no hook, other module or cache."""
    return is_plain(lin) and not (isinstance(part, EdgeTensor) and lin in part.outputs)


def _add_linear(total: Tensor, lin: Any, part: Tensor | EdgeTensor, writable: bool) -> Tensor:
    """``total + lin(part)``, in place where that is allowed and the sum fits."""
    if not _owns_result(lin, part):
        return total + apply_linear(lin, part)
    weight, bias = lin.weight, lin.bias
    if isinstance(part, EdgeTensor):
        weight, shift = part.read(weight)
        bias = shift if bias is None else bias if shift is None else bias + shift
    x: Tensor = part.x if isinstance(part, EdgeTensor) else part
    if writable and total.shape[:-1] == x.shape[:-1]:
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
        self.A = make_linear(in_channels[0], out_channels, bias=False)
        self.B = make_linear(in_channels[1], out_channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Keep the variance, as in ConcatMLP: a product of small values is learned too slowly.
        draw_linear(self.A)
        draw_linear(self.B)

    def forward(self, x_j: Tensor | EdgeTensor, x_i: Tensor | EdgeTensor) -> Any:
        if is_lazy(self.A) or is_lazy(self.B):
            apply_linear(self.A, x_j)
            apply_linear(self.B, x_i)
            self.reset_parameters()
        product = apply_linear(self.A, x_j) * apply_linear(self.B, x_i)
        return EdgeTensor(product) if isinstance(x_j, EdgeTensor) else product

    def __repr__(self) -> str:
        return f"{type(self).__name__}({(self.A.in_features, self.B.in_features)}, {self.A.out_features})"


class ConcatMLP(nn.Module):
    r"""``Linear, ReLU, Linear`` over a concatenation, optionally followed by LayerNorm.

    .. math::
        f(x_1, \ldots, x_n) = \mathrm{Norm}(W' \, \mathrm{ReLU}(W [x_1, \ldots, x_n] + b) + b')

    With ``product``, the function of both ends of an edge becomes :math:`f(x_j, x_i, A x_j \odot B x_i)`.

    Every function of the paper's equations (:math:`\rho_n, \phi_n, \rho_e, \phi_e`, encoder, decoder) is one of these,
    with its own parameters.

    If a part is an :class:`~gm_mlic.graphs.EdgeTensor`, so is the result: its last affine map (the scale and shift of
    the LayerNorm, or else :math:`W', b'`) is pending.

    Args:
        in_channels: the size of each part; -1 to take it from the first input.
        hidden_channels: the size between the two Linears.
        out_channels: the size of the result.
        product: add :class:`HadamardFusion` of the two parts as a third one (default: no).
        norm: LayerNorm on the result (default: no).

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
        self.product = HadamardFusion(tuple(in_channels), hidden_channels) if product else None  # type: ignore[arg-type]
        self.lin1 = ConcatLinear([*in_channels, *[hidden_channels] * product], hidden_channels)
        self.lin2: Any = make_linear(hidden_channels, out_channels)
        self.norm: Any = nn.LayerNorm(out_channels) if norm else nn.Identity()
        draw_linear(self.lin2)

    def reset_parameters(self) -> None:
        for module in (self.product, self.lin1, self.norm):
            if isinstance(module, (HadamardFusion, ConcatLinear, nn.LayerNorm)):
                module.reset_parameters()
        draw_linear(self.lin2)

    def forward(self, *parts: Tensor | EdgeTensor) -> Any:
        hidden = self.hidden(*parts)
        if not any(isinstance(part, EdgeTensor) for part in parts):
            return self.norm(self.lin2(hidden))
        if is_plain(self.norm, nn.Identity) and is_plain(self.lin2):
            return EdgeTensor(hidden, self.lin2.weight, self.lin2.bias)
        if is_plain(self.norm, nn.LayerNorm):
            x = Normalize.apply(self.lin2(hidden), self.norm.eps)  # type: ignore[no-untyped-call]
            return EdgeTensor(x, self.norm.weight, self.norm.bias)
        return EdgeTensor(self.norm(self.lin2(hidden)))

    def hidden(self, *parts: Tensor | EdgeTensor) -> Tensor:
        r""":math:`\mathrm{ReLU}(W [x_1, \ldots, x_n] + b)`."""
        total = self.lin1(*parts) if self.product is None else self.lin1(*parts, self.product(*parts))
        writable = is_plain(self.lin1, ConcatLinear) and all(is_plain(lin) for lin in self.lin1.lins)
        return relu(total, inplace=writable)

    def __repr__(self) -> str:
        norm = ", norm" if isinstance(self.norm, nn.LayerNorm) else ""
        return (
            f"{type(self).__name__}({list(self.lin1.in_channels)}, {self.lin1.out_channels}, "
            f"{self.lin2.out_features}{norm})"
        )


class Normalize(torch.autograd.Function):
    """LayerNorm without scale and shift. It saves its result, which is kept in memory anyway, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        out, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(out, rstd)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out, rstd = ctx.saved_tensors
        # The result has mean 0 and deviation 1 already; the deviation of the input is a factor.
        grad_out, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, out, out.shape[-1:], torch.zeros_like(rstd), torch.ones_like(rstd), None, None, [True, False, False]
        )
        return grad_out.mul_(rstd), None


class Decoder(ConcatMLP):
    r"""The decoder of eq. 13, a :class:`ConcatMLP` to logits.

    Autocast does not apply to its last Linear. Rounded to bfloat16, logits of different instances and images would be
    equal, and equal logits decide the argmax and the ranking.

    Args:
        in_channels: the size of each part of the input: one edge state, or two node states.
        hidden_channels: the size between the two Linears.
        out_channels: logits per input (default: 1).

    Shapes:
        - **input:** parts :math:`x_k` (..., in_channels[k])
        - **output:** (..., out_channels)
    """

    def __init__(self, in_channels: Sequence[int], hidden_channels: int, out_channels: int = 1) -> None:
        super().__init__(in_channels, hidden_channels, out_channels)

    def forward(self, *parts: Tensor | EdgeTensor) -> Tensor:
        hidden = self.hidden(*parts)
        with torch.autocast(hidden.device.type, enabled=False):
            weight = getattr(self.lin2, "weight", None)
            hidden = hidden.to(weight.dtype) if isinstance(weight, Tensor) else hidden
            return self.norm(self.lin2(hidden))  # type: ignore[no-any-return]
