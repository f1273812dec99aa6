"""Atomic checkpoint writing."""

from __future__ import annotations

import io
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from gm_mlic.io import write_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes to a temporary file in the same folder and renames it after ``fsync``.

    Lightning's default writes to the system's temporary folder. If that is on another disk, the move is a copy, and a
    kill or a full disk in the middle of it leaves a truncated checkpoint in place of the previous one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()  # writing directly, torch.save raises RuntimeError if the disk is full
        torch.save(checkpoint, content)
        write_file(path, content.getbuffer())
