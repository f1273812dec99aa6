"""Checkpoints on their way to the disk."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Has Lightning write a checkpoint beside its place, and move it there when the disk has it.

    Lightning's own goes by way of the folder for temporary files. Where that is on another disk, the move is a copy:
    a process killed, or a disk full, in the middle of it leaves half a checkpoint, and takes the one before along.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        part = target.with_name(target.name + ".part")
        target.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # torch's own writer says RuntimeError where the disk is full
        torch.save(checkpoint, content)
        try:
            with part.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error  # write() does not say where
