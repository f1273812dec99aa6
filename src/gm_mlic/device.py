"""Which torch device a process uses."""

from __future__ import annotations

import torch

from gm_mlic.distributed import rank_info
from gm_mlic.errors import ArgumentError


def resolve_device(device: str) -> str:
    """The torch device that ``auto``, ``cpu``, ``cuda`` or a name of Lightning's accelerators means in this process."""
    if not torch.cuda.is_available() or device not in ("auto", "gpu", "cuda"):
        return "cpu"
    return f"cuda:{rank_info().local_rank % torch.cuda.device_count()}"


def require_device(device: str) -> str:
    """:func:`resolve_device`, but a GPU that is asked for and absent is an error.

    Raises:
        ArgumentError: if there is no GPU and ``device`` is ``cuda``.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device", "is cuda, but torch finds no GPU: auto uses one where there is one.")
    return resolve_device(device)
