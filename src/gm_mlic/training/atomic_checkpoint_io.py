"""Atomic checkpoint writing."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes to a temporary file in the same folder and renames it after ``fsync``.

    Lightning's default writes to the system's temporary folder. If that is on another disk, the move is a copy, and a
    kill or a full disk in the middle of it leaves a truncated checkpoint in place of the previous one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        part = target.with_name(target.name + ".part")
        target.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # writing directly, torch.save raises RuntimeError if the disk is full
        torch.save(checkpoint, content)
        try:
            with part.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error  # errors of write() lack the path
