"""The one building block of every function of the network: ``Linear, ReLU, Linear`` over a concatenation.

Everywhere in this package, what owns parameters draws them once, when it is made; ``reset_parameters`` draws anew.

He initialisation: a path through k blocks passes some ten Linears, most of them without a norm. torch's default shrinks
the signal to 0.4 at each, and with fusion ``product`` what neighbours say may never arrive (``experiments/recipe``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ConcatLinear(nn.Module):
    r"""A Linear over a concatenation, :math:`W [x_1, \ldots, x_n] + b`, that takes the parts.

    With :math:`W = [W_1, \ldots, W_n]` it equals :math:`\sum_k W_k x_k + b`. :meth:`forward` concatenates, as the
    paper writes it; :meth:`part` applies one :math:`W_k`, for executions that add the parts by broadcasting.

    Args:
        in_channels: the length of each part.
        out_channels: the length of the result.

    Shapes:
        - **input:** parts (..., in_channels[k]) with equal leading sizes
        - **output:** (..., out_channels)
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.in_channels = tuple(in_channels)
        self.out_channels = out_channels
        self.weight = nn.Parameter(torch.empty(out_channels, sum(self.in_channels)))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")  # a ReLU always follows
        nn.init.zeros_(self.bias)

    def forward(self, *parts: Tensor) -> Tensor:
        return nn.functional.linear(torch.cat(parts, dim=-1), self.weight, self.bias)

    def part_weight(self, k: int) -> Tensor:
        """:math:`W_k`, (out_channels, in_channels[k])."""
        start = sum(self.in_channels[:k])
        return self.weight[:, start : start + self.in_channels[k]]

    def part(self, k: int, x: Tensor) -> Tensor:
        """:math:`W_k x`, without the bias."""
        return nn.functional.linear(x, self.part_weight(k))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.in_channels)}, {self.out_channels})"


class OutLinear(nn.Linear):
    """A Linear that no ReLU follows."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class MLP(nn.Module):
    r"""``Linear, ReLU, Linear`` over a concatenation, then LayerNorm if asked for.

    Every function of the paper's equations (:math:`\rho, \phi, \sigma, \psi`, encoder, decoder) is one of these, with
    parameters of its own.

    Args:
        in_channels: the length of each part of the concatenation.
        hidden_channels: width between the two Linears.
        out_channels: length of the result.
        norm: LayerNorm on the result.

    Shapes:
        - **input:** parts (..., in_channels[k])
        - **output:** (..., out_channels)
    """

    def __init__(
        self, in_channels: Sequence[int], hidden_channels: int, out_channels: int, *, norm: bool = False
    ) -> None:
        super().__init__()
        self.lin1 = ConcatLinear(in_channels, hidden_channels)
        self.lin2 = OutLinear(hidden_channels, out_channels)
        self.norm = nn.LayerNorm(out_channels) if norm else nn.Identity()

    def reset_parameters(self) -> None:
        self.lin1.reset_parameters()
        self.lin2.reset_parameters()
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.reset_parameters()

    def forward(self, *parts: Tensor) -> Tensor:
        return self.after_lin1(self.lin1(*parts))

    def after_lin1(self, total: Tensor) -> Tensor:
        r"""The rest, for executions that form ``total`` :math:`= \sum_k W_k x_k + b` in their own way; it is lost."""
        out: Tensor = self.norm(self.lin2(total.relu_()))
        return out

    def __repr__(self) -> str:
        norm = ", norm" if isinstance(self.norm, nn.LayerNorm) else ""
        return (
            f"{type(self).__name__}({list(self.lin1.in_channels)}, {self.lin1.out_channels}, "
            f"{self.lin2.out_features}{norm})"
        )


class Decoder(MLP):
    """An MLP to logits, whose last Linear autocast leaves in the parameters' own type.

    Rounded to bfloat16, logits of different instances and images would tie, and ties decide winners and rankings.
    """

    def after_lin1(self, total: Tensor) -> Tensor:
        with torch.autocast(total.device.type, enabled=False):
            return super().after_lin1(total.to(self.lin2.weight.dtype))
