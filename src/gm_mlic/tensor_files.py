"""Files of tensors and arrays that may come from anywhere: checked before they are read, never unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: An archive that grows by more than this factor, to more than this many bytes, is taken for a decompression bomb.
MAX_GROWTH, ALWAYS_FINE = 200, 1 << 30


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """What ``torch.save`` wrote, read with ``weights_only=True`` and every checksum compared.

    torch itself writes a checksum for each tensor and reads without looking at them.

    Raises:
        ValueError: if a checksum differs, or the file is a compressed archive (torch writes none).
        RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError: whatever torch raises on other files.
    """
    if zipfile.is_zipfile(path):
        check_archive(path, stored=True)
    return torch.load(path, map_location=device, weights_only=True)


def load_arrays(path: str | Path) -> np.lib.npyio.NpzFile:
    """An ``.npz``, opened without pickles; numpy compares checksums as it reads.

    Raises:
        ValueError: if it would unpack to an absurd size, or is no ``.npz``.
        OSError, EOFError, zipfile.BadZipFile: whatever numpy raises on other files.
    """
    if zipfile.is_zipfile(path):
        check_archive(path)
    content = np.load(path, allow_pickle=False)
    if not isinstance(content, np.lib.npyio.NpzFile):
        raise ValueError("it holds a single array; save named ones with numpy.savez")
    return content


def check_archive(path: str | Path, *, stored: bool = False) -> None:
    """Raise ValueError if a zip archive is a decompression bomb; with ``stored``, if it is compressed or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if stored and any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise ValueError("it is compressed, which files of torch.save never are")
            size = sum(info.file_size for info in infos)
            if size > max(ALWAYS_FINE, MAX_GROWTH * Path(path).stat().st_size):
                raise ValueError(f"it would unpack to {size / 1e9:.1f} GB")
            damaged = archive.testzip() if stored else None
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(f"it is damaged ({error})") from error
    if damaged is not None:
        raise ValueError(f"it is damaged (the checksum of {damaged} is wrong)")
