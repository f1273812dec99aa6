"""Safe loading of tensor and array files from untrusted sources, without unpickling."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gm_mlic.io import first_line, unpacked_limit


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Load a file of ``torch.save`` with ``weights_only=True``, after verifying its checksums.

    torch writes a checksum per tensor but does not verify them.

    Raises:
        ValueError: if it is not such a file, a checksum is wrong, it is compressed, or it contains other objects than
            tensors, strings, numbers and collections. The message is one line.
        OSError: if it cannot be opened.
    """
    with _opened(path):
        if zipfile.is_zipfile(path):
            _check_archive(path, stored=True)
        return torch.load(path, map_location=device, weights_only=True)


def load_arrays(path: str | Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Load the arrays of an ``.npz`` file without pickles; numpy verifies checksums.

    Args:
        path: the file.
        names: arrays to load, if the file has them; default: all.

    Raises:
        ValueError: if it is not such a file, is damaged, or is a decompression bomb. The message is one line.
        OSError: if it cannot be opened.
    """
    with _opened(path):
        if not zipfile.is_zipfile(path):
            raise ValueError("not an .npz archive; numpy.savez writes one")
        _check_archive(path)
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files if names is None or name in names}


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[None]:
    """Context manager that converts parser errors (numpy, zipfile, torch) to ValueError."""
    with Path(path).open("rb"):
        pass
    try:
        yield
    except pickle.UnpicklingError as error:  # torch's message recommends unsafe loading
        raise ValueError("not a torch.save file, or it contains more than tensors and plain values") from error
    except Exception as error:
        raise ValueError(first_line(error)) from error


def _check_archive(path: str | Path, *, stored: bool = False) -> None:
    """Raise ValueError if a zip archive is a decompression bomb; with ``stored``, if it is compressed or damaged."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if stored and any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise ValueError("compressed, unlike files of torch.save")
        size = sum(info.file_size for info in infos)
        if size > unpacked_limit(path):
            raise ValueError(f"would unpack to {size / 1e9:.1f} GB")
        damaged = archive.testzip() if stored else None
    if damaged is not None:
        raise ValueError(f"damaged, wrong checksum of {damaged}")
