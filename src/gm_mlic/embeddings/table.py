"""Tables of label vectors in ``.npz`` and ``.pt`` files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gm_mlic.embeddings.words import compact
from gm_mlic.errors import DataError
from gm_mlic.io import first_line
from gm_mlic.safe_load import load_arrays, load_tensors

#: Errors of damaged or unexpected files.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)


def read_table(path: str | Path) -> tuple[dict[str, np.ndarray], int]:
    """Read a table of named vectors.

    ``.npz``: arrays ``labels`` (C names) and ``vectors`` (C, D). ``.pt`` (loaded with ``weights_only=True``): a dict
    with ``labels`` and ``vectors``, or a dict from name to vector.

    Returns:
        Vectors (D,) float32 by the :func:`compact <gm_mlic.embeddings.words.compact>` form of their names, and D.

    Raises:
        DataError: if the file is missing, malformed, or contains NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"The table of label vectors {path} does not exist: check `path`.")
    try:
        names, vectors = _names_and_vectors(path)
    except _UNREADABLE as error:
        raise DataError(
            f"The table of label vectors {path} cannot be read ({first_line(error)}): expected labels (C,) and "
            "vectors (C, D)."
        ) from error
    if vectors.ndim != 2 or len(names) != len(vectors) or vectors.size == 0:
        raise DataError(f"{path} has {len(names)} labels but vectors of shape {vectors.shape}: expected (C, D).")
    table: dict[str, np.ndarray] = {}
    for name, vector in zip(names, vectors, strict=True):
        if not np.isfinite(vector).all():
            raise DataError(f"{path}: the vector of {name!r} contains NaN or infinity: replace it.")
        key = compact(name)
        if key in table and not np.array_equal(table[key], vector):
            raise DataError(f"{path}: {name!r} occurs twice with different vectors: keep one of them.")
        table[key] = vector
    return table, vectors.shape[1]


def _names_and_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    content: Any = load_arrays(path) if path.suffix == ".npz" else load_tensors(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"it contains a {type(content).__name__}, not a dict")
    if path.suffix == ".npz" or set(content) >= {"labels", "vectors"}:
        names, vectors = [str(name) for name in content["labels"]], content["vectors"]
    else:
        names, vectors = [str(name) for name in content], [torch.as_tensor(v) for v in content.values()]
        vectors = torch.stack(vectors) if vectors else torch.empty(0, 0)
    return names, torch.as_tensor(vectors).detach().to(torch.float32).numpy()
