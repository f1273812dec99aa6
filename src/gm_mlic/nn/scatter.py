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
    """Whether reductions go through torch-scatter, which ``torch.compile`` cannot look into."""
    return PREFER_TORCH_SCATTER and torch_scatter is not None and not torch.compiler.is_compiling()


def group_max(src: Tensor, index: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    r"""The maximum of each group and where it stands: :math:`\max_{e: \mathrm{index}_e = g} \mathrm{src}_e`.

    The gradient goes to one winner, the first one where several are equal (torch's ``amax`` would share it out). NaN
    wins over everything, so that a diverged network shows.

    Args:
        src: (E,) values.
        index: (E,) group of each value, in any order.
        num_groups: G; every group must have at least one value.

    Returns:
        The maxima (G,), and the positions of the winners in ``src`` (G,) int64.
    """
    values = src.detach()
    nan = values.isnan()
    best = values.new_full((num_groups,), float("-inf"))
    if has_torch_scatter():
        # Without `out` it would turn the maximum of -inf alone into 0; NaN it steps over, so it is added afterwards.
        best = torch_scatter.scatter_max(values, index, out=best)[0]
        best = best.index_add(0, index, torch.where(nan, values, 0))
    else:
        best = best.scatter_reduce(0, index, values, "amax")
    # torch-scatter's own argmax depends on thread order where values are equal; the first winner does not.
    position = torch.arange(src.numel(), device=src.device)
    position = torch.where((values == best[index]) | nan, position, src.numel())
    winner = position.new_full((num_groups,), src.numel())
    winner.scatter_reduce_(0, index, position, "amin", include_self=True)
    return src[winner], winner
