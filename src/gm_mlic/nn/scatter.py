"""Reductions over ragged groups: torch-scatter where it is installed, native torch otherwise, with equal results.

This is the only module that uses torch-scatter.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import torch_scatter
except ImportError:
    torch_scatter = None


def scatter_max(src: Tensor, index: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    r"""The maximum of each group and its position: :math:`\max_{e: \mathrm{index}_e = g} \mathrm{src}_e`.

    The gradient goes to one position, the first one where several values are equal (torch's ``amax`` would distribute
    it). NaN counts as the largest value, so that NaN propagates.

    Args:
        src: (E,) values.
        index: (E,) group of each value, in any order.
        num_groups: G; every group must have at least one value.

    Returns:
        The maxima (G,), and their positions in ``src`` (G,) int64.
    """
    values = src.detach()
    nan = values.isnan()
    largest = values.new_full((num_groups,), float("-inf"))
    if torch_scatter is not None and not torch.compiler.is_compiling():  # it cannot be compiled
        # Without `out` a maximum of -inf would become 0. NaN is ignored, so it is added afterwards.
        largest = torch_scatter.scatter_max(values, index, out=largest)[0]
        largest = largest.index_add(0, index, torch.where(nan, values, 0))
    else:
        largest = largest.scatter_reduce(0, index, values, "amax")
    # torch-scatter's own argmax depends on thread order where values are equal; the first position does not.
    position = torch.arange(src.numel(), device=src.device)
    position = torch.where((values == largest[index]) | nan, position, src.numel())
    argmax = position.new_full((num_groups,), src.numel())
    argmax.scatter_reduce_(0, index, position, "amin", include_self=True)
    return src[argmax], argmax


def scatter_logsumexp(src: Tensor, index: Tensor, largest: Tensor) -> Tensor:
    r"""The logarithm of the sum of exponentials of each group: :math:`\log \sum_{e: \mathrm{index}_e = g} e^{src_e}`.

    Args:
        src: (E,) values.
        index: (E,) group of each value, in any order.
        largest: (G,) the maximum of each group, without gradient.

    Returns:
        (G,).
    """
    terms = (src - largest[index]).exp()
    return largest + terms.new_zeros(largest.shape).index_add(0, index, terms).log()
