"""Files of tensors and arrays that may come from anywhere: checked before they are read, never unpickled."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Iterator
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
        ValueError: if it is no such file, or damaged: a checksum differs, it is compressed (torch's are not), or holds
            more than tensors, texts, numbers and collections of them. The message is a line.
        OSError: if it cannot be opened.
    """
    with _opened(path):
        if zipfile.is_zipfile(path):
            _check_archive(path, stored=True)
        return torch.load(path, map_location=device, weights_only=True)


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz``, without pickles; numpy compares checksums as it reads.

    Raises:
        ValueError: if it is no such file, is damaged, or would unpack to an absurd size. The message is a line.
        OSError: if it cannot be opened.
    """
    with _opened(path):
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no archive of named arrays, as numpy.savez writes them")
        _check_archive(path)
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}


def map_array(path: str | Path) -> np.memmap[Any, Any]:
    """An ``.npy`` in place, read-only.

    Raises:
        ValueError: if it is none, or shorter than it says. The message is a line.
        OSError: if it cannot be opened.
    """
    with _opened(path):
        array: np.memmap[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return array


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[None]:
    """Makes one error of the many that parsers raise on what they do not expect (numpy's tokenizer, zipfile, torch)."""
    with Path(path).open("rb"):
        pass
    try:
        yield
    except pickle.UnpicklingError as error:  # torch advises at length to read it unsafely
        raise ValueError("it is no file of torch.save, or holds more than tensors and plain values") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(reason[:200]) from error


def _check_archive(path: str | Path, *, stored: bool = False) -> None:
    """Raise ValueError if a zip archive is a decompression bomb; with ``stored``, if it is compressed or damaged."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if stored and any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise ValueError("it is compressed, which files of torch.save never are")
        size = sum(info.file_size for info in infos)
        if size > max(ALWAYS_FINE, MAX_GROWTH * Path(path).stat().st_size):
            raise ValueError(f"it would unpack to {size / 1e9:.1f} GB")
        damaged = archive.testzip() if stored else None
    if damaged is not None:
        raise ValueError(f"it is damaged (the checksum of {damaged} is wrong)")
