"""Which torch device a process uses."""

from __future__ import annotations

import torch

from gm_mlic.distributed import rank_info
from gm_mlic.errors import ArgumentError


def resolve_device(accelerator: str) -> str:
    """The torch device that Lightning's name of an accelerator stands for here, in this process of several."""
    if not torch.cuda.is_available() or accelerator not in ("auto", "gpu", "cuda"):
        return "cpu"
    return f"cuda:{rank_info().local_rank % torch.cuda.device_count()}"


def require_device(accelerator: str) -> str:
    """:func:`resolve_device`, but a GPU that is asked for and absent is an error.

    Raises:
        ArgumentError: if a GPU is asked for, and there is none.
    """
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ArgumentError(
            "accelerator", f"is {accelerator!r}, but torch finds no GPU: auto takes one where there is one."
        )
    return resolve_device(accelerator)
