"""Torch device selection, and settings that depend on the device."""

from __future__ import annotations

import torch

from gm_mlic.distributed import rank_info
from gm_mlic.errors import ArgumentError


def resolve_device(device: str) -> str:
    """Torch device of this process for ``auto``, ``cpu``, ``cuda`` or a Lightning accelerator name."""
    if not torch.cuda.is_available() or device not in ("auto", "gpu", "cuda"):
        return "cpu"
    return f"cuda:{rank_info().local_rank % torch.cuda.device_count()}"


def resolve_num_workers(num_workers: int | None, device: str) -> int:
    """Number of worker processes of a data loader; None: 0 if the torch device ``device`` is the CPU, 2 if it is a GPU.

    On a CPU, workers would compete with the computation for its cores.
    """
    if num_workers is None:
        return 0 if device == "cpu" else 2
    return num_workers


def require_device(device: str) -> str:
    """Resolve a device as :func:`resolve_device`, but fail if ``cuda`` is unavailable.

    Raises:
        ArgumentError: if ``device`` is ``cuda`` and there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device", "is cuda, but torch finds no GPU: use cpu or auto.")
    return resolve_device(device)
