"""Streaming reader for the text format of GloVe and word2vec."""

from __future__ import annotations

import gzip
from collections.abc import Collection
from pathlib import Path

import numpy as np

from gm_mlic.errors import DataError


def read_words(path: str | Path, words: Collection[str]) -> tuple[dict[str, np.ndarray], int]:
    """Read the vectors of ``words`` from a text file with one ``word v1 v2 ... vD`` per line.

    The file is streamed (``.gz`` is decompressed); only requested rows are parsed. The dimension is inferred; a
    word2vec header line (``count dimension``) is skipped. Words may contain spaces (as in glove.840B), so numbers are
    counted from the right. The lower-case row of a word is preferred, else its first row in another case.

    Args:
        path: the text file.
        words: words in lower case.

    Returns:
        Vectors (D,) float32 by word, and D.

    Raises:
        DataError: if the file is missing or empty, or a line is malformed or contains NaN or infinity.
    """
    path = Path(path)
    exact: dict[str, np.ndarray] = {}
    other_case: dict[str, np.ndarray] = {}
    dim = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                line = raw.rstrip()
                if not line or (number == 1 and _is_header(line)):
                    continue
                dim = dim or _trailing_numbers(line)
                if not dim or line.count(b" ") < dim:
                    raise DataError(_malformed(path, number, f"expected a word and {dim or 'its'} numbers"))
                written = line[: line.index(b" ")].decode("utf-8", "replace")
                word = written.lower()
                if word not in words or word in exact:
                    continue
                name, *fields = line.rsplit(b" ", dim)
                if b" " in name:  # a word with spaces that starts with a requested one, or too many numbers
                    if _trailing_numbers(name) == name.count(b" "):
                        raise DataError(_malformed(path, number, f"more than {dim} numbers for {written!r}"))
                    continue
                try:
                    with np.errstate(over="ignore"):  # infinity is refused below
                        vector = np.array([float(field) for field in fields]).astype(np.float32)
                except ValueError as error:
                    raise DataError(
                        _malformed(path, number, f"{written!r} has a value that is not a number")
                    ) from error
                if not np.isfinite(vector).all():
                    raise DataError(f"{path}, line {number}: the vector of {written!r} contains NaN or infinity.")
                if written == word:
                    exact[word] = vector
                else:
                    other_case.setdefault(word, vector)
    except FileNotFoundError as error:
        raise DataError(f"The word vectors {path} do not exist: check `path`.") from error
    except (OSError, EOFError) as error:
        raise DataError(f"The word vectors {path} cannot be read ({error}): check the file.") from error
    if not dim:
        raise DataError(f"The word vectors {path} are empty: download them again.")
    return other_case | exact, dim


def _malformed(path: Path, number: int, what: str) -> str:
    return f"{path}, line {number} is malformed: {what}."


def _is_header(line: bytes) -> bool:
    fields = line.split()
    return len(fields) == 2 and all(field.isdigit() for field in fields)


def _trailing_numbers(line: bytes) -> int:
    """Number of trailing numeric fields, without the first field."""
    count = 0
    for field in reversed(line.split(b" ")[1:]):
        try:
            float(field)
        except ValueError:
            break
        count += 1
    return count
