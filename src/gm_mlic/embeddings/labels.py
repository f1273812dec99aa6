"""Label vectors W (C, D) of the label graph (eq. 2): from word vectors, from a table, or hashed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gm_mlic.embeddings.glove import read_words
from gm_mlic.embeddings.hashed import hashed_vectors
from gm_mlic.embeddings.table import read_table, table_key
from gm_mlic.embeddings.words import ALIASES, words_of
from gm_mlic.errors import ArgumentError, DataError

_SOURCES = ("hashed", "glove")
_POLICIES = ("error", "skip_words", "zeros", "hashed")


@dataclass(frozen=True)
class LabelEmbedding:
    """One vector for each label, and where it came from.

    Attributes:
        labels: the C names.
        vectors: (C, D) float32, finite.
        source: where the vectors came from.
        found: for each label the entries of the source that made its vector (their mean); empty if it was out of
            vocabulary and the policy filled it.
    """

    labels: tuple[str, ...]
    vectors: Tensor
    source: str
    found: dict[str, tuple[str, ...]]

    @property
    def out_of_vocabulary(self) -> tuple[str, ...]:
        """The labels that the source does not know at all, or not with all their words (then filled by the policy)."""
        return tuple(label for label in self.labels if not self.found[label])


def embed_labels(
    labels: Sequence[str],
    name: Literal["hashed", "glove"] = "hashed",
    path: str | Path | None = None,
    dim: int = 300,
    oov: Literal["error", "skip_words", "zeros", "hashed"] = "error",
    seed: int = 0,
) -> LabelEmbedding:
    """The vectors of ``labels``, in their order.

    ``hashed`` needs no file (:func:`~gm_mlic.embeddings.hashed.hashed_vectors`). ``glove`` reads ``path``: a ``.npz``
    or ``.pt`` table by label name (:func:`~gm_mlic.embeddings.table.read_table`), any other suffix as GloVe text
    (:func:`~gm_mlic.embeddings.glove.read_words`). Tables are looked up by the whole name first, never by position.
    Else a label is the mean of its words' vectors. Other spellings (:data:`~gm_mlic.embeddings.words.ALIASES`) are
    tried only where a name or word is missing. Vectors are not normalised.

    Args:
        labels: C different names.
        name: ``hashed`` or ``glove``.
        path: the file of ``glove``.
        dim: D of hashed vectors; files bring their own.
        oov: what happens to labels with a word that is not in the file. ``error``: stop and name all of them;
            ``skip_words``: the mean of the words that are there (a label with none still stops); ``zeros``: a zero
            vector; ``hashed``: a hashed vector, scaled to the median norm of the labels that were found.
        seed: of hashed vectors.

    Raises:
        ConfigError: for an unknown ``name`` or ``oov``, a missing ``path`` or a ``dim`` below 1.
        DataError: for a missing or malformed file, NaN, or labels out of vocabulary.
    """
    labels = tuple(labels)
    if name not in _SOURCES:
        raise ArgumentError("name", f"is {name!r}: choose one of {', '.join(_SOURCES)}.")
    if oov not in _POLICIES:
        raise ArgumentError("oov", f"is {oov!r}: choose one of {', '.join(_POLICIES)}.")
    if not labels or len(set(labels)) != len(labels):
        raise DataError("Label vectors need at least one label, and no label twice.")
    if name == "hashed":
        if isinstance(dim, bool) or dim < 1:
            raise ArgumentError("dim", f"is {dim}: at least 1 is needed.")
        vectors = hashed_vectors(labels, dim, seed)
        found = {label: tuple(words_of(label)) or (label,) for label in labels}
        return LabelEmbedding(labels, torch.from_numpy(vectors), f"hashed (dim {dim}, seed {seed})", found)
    if path is None:
        raise ArgumentError("path", "is needed: `name='glove'` reads a GloVe text file, or a .npz or .pt table.")
    path = Path(path)
    if path.suffix in (".npz", ".pt"):
        entries, dim = read_table(path)
        pieces = {label: _from_table(label, entries) for label in labels}
    else:
        entries, dim = read_words(path, _wanted(labels))
        pieces = {label: [_word(word, entries, str) for word in words_of(label)] for label in labels}
    return _assemble(labels, pieces, entries, dim, oov, seed, path)


#: For each word of a label the entries that stand for it; None for a word that is missing under every spelling.
_Pieces = list["tuple[str, ...] | None"]


def _wanted(labels: Sequence[str]) -> set[str]:
    """All words that may be needed, those of other spellings included."""
    words = {word for label in labels for word in words_of(label)}
    return words | {part for word in words for alias in ALIASES.get(word, ()) for part in words_of(alias)}


def _word(word: str, entries: dict[str, np.ndarray], key: Callable[[str], str]) -> tuple[str, ...] | None:
    if key(word) in entries:
        return (key(word),)
    for alias in ALIASES.get(word, ()):
        parts = tuple(key(part) for part in words_of(alias))
        if all(part in entries for part in parts):
            return parts
    return None


def _from_table(label: str, entries: dict[str, np.ndarray]) -> _Pieces:
    for name in (label, *ALIASES.get(table_key(label), ())):
        if table_key(name) in entries:
            return [(table_key(name),)]
    return [_word(word, entries, table_key) for word in words_of(label)]


def _assemble(
    labels: tuple[str, ...],
    pieces: dict[str, _Pieces],
    entries: dict[str, np.ndarray],
    dim: int,
    oov: str,
    seed: int,
    path: Path,
) -> LabelEmbedding:
    found: dict[str, tuple[str, ...]] = {}
    for label in labels:
        in_source = [piece for piece in pieces[label] if piece is not None]
        complete = bool(in_source) and (len(in_source) == len(pieces[label]) or oov == "skip_words")
        found[label] = tuple(entry for piece in in_source for entry in piece) if complete else ()
    unknown = [label for label in labels if not found[label]]
    if unknown and oov in ("error", "skip_words"):
        raise DataError(_out_of_vocabulary(unknown, pieces, oov, path))
    vectors = np.zeros((len(labels), dim), dtype=np.float32)
    for row, label in enumerate(labels):
        if found[label]:
            vectors[row] = np.mean([entries[entry] for entry in found[label]], axis=0)
    if unknown and oov == "hashed":
        filled = hashed_vectors(unknown, dim, seed)
        norms = np.linalg.norm(vectors, axis=1)[[bool(found[label]) for label in labels]]
        if norms.size:
            filled *= np.median(norms) / np.linalg.norm(filled, axis=1, keepdims=True)
        vectors[[labels.index(label) for label in unknown]] = filled
    return LabelEmbedding(labels, torch.from_numpy(vectors), f"{path.name} (dim {dim})", found)


def _out_of_vocabulary(unknown: list[str], pieces: dict[str, _Pieces], oov: str, path: Path) -> str:
    listed = []
    for label in unknown:
        missing = [word for word, piece in zip(words_of(label), pieces[label], strict=False) if piece is None]
        listed.append(repr(label) if len(words_of(label)) < 2 else f"{label!r} (no {', '.join(missing)})")
    policies = "zeros or hashed" if oov == "skip_words" else "skip_words, zeros or hashed"
    return (
        f"{len(unknown)} labels are not in {path}: {', '.join(listed)}. "
        f"Use a file that has them, or choose another `oov`: {policies}."
    )
