"""Reductions over ragged groups: torch-scatter where it is installed, native torch otherwise, with equal results.

This is the only module that knows of torch-scatter. ``PREFER_TORCH_SCATTER = False`` forces the native path.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import torch_scatter
except ImportError:
    torch_scatter = None

#: Use torch-scatter if it can be imported.
PREFER_TORCH_SCATTER = True


def has_torch_scatter() -> bool:
    """Whether reductions go through torch-scatter."""
    return PREFER_TORCH_SCATTER and torch_scatter is not None


def group_max(src: Tensor, index: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    r"""The maximum of each group and where it stands: :math:`\max_{e: \mathrm{index}_e = g} \mathrm{src}_e`.

    The gradient goes to one winner, the first one where several are equal (torch's ``amax`` would share it out).

    Args:
        src: (E,) values.
        index: (E,) group of each value, in any order.
        num_groups: G; every group must have at least one value.

    Returns:
        The maxima (G,), and the positions of the winners in ``src`` (G,) int64.
    """
    values = src.detach()
    if has_torch_scatter():
        best = torch_scatter.scatter_max(values, index, dim_size=num_groups)[0]
    else:
        best = values.new_full((num_groups,), float("-inf"))
        best.scatter_reduce_(0, index, values, "amax", include_self=True)
    # torch-scatter's own argmax depends on thread order where values are equal; the first winner does not.
    position = torch.arange(src.numel(), device=src.device)
    position = torch.where(values == best[index], position, src.numel())
    winner = position.new_full((num_groups,), src.numel())
    winner.scatter_reduce_(0, index, position, "amin", include_self=True)
    return src[winner], winner


def group_mean(src: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """The mean of each group, zero for an empty one: src (E, D), index (E,) -> (num_groups, D)."""
    if has_torch_scatter():
        out: Tensor = torch_scatter.scatter_mean(src, index, dim=0, dim_size=num_groups)
        return out
    total = src.new_zeros(num_groups, src.shape[1]).index_add_(0, index, src)
    count = src.new_zeros(num_groups).index_add_(0, index, src.new_ones(index.numel()))
    return total / count.clamp(min=1).unsqueeze(1)
