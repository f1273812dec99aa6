"""Label embeddings W (C, D) of the label graph (eq. 2) from word vectors, a table, or hashed words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gm_mlic.embeddings.glove import read_words
from gm_mlic.embeddings.table import read_table
from gm_mlic.embeddings.words import ALIASES, compact, words_of
from gm_mlic.errors import ConfigError, DataError, check_choice, check_positive
from gm_mlic.registry import EMBEDDINGS, register_embedding
from gm_mlic.schema import Positive, Seed


@dataclass(frozen=True)
class LabelEmbedding:
    """Label vectors and their origin.

    Attributes:
        labels: the C names.
        vectors: (C, D) float32, finite.
        source: description of the source.
        entries: by label, the source entries whose mean is its vector; empty if it is out of vocabulary and was filled
            by the policy.
    """

    labels: tuple[str, ...]
    vectors: Tensor
    source: str
    entries: dict[str, tuple[str, ...]]

    @property
    def out_of_vocabulary(self) -> tuple[str, ...]:
        """Labels with missing words, filled by the policy."""
        return tuple(label for label in self.labels if not self.entries[label])


def embed_labels(
    labels: Sequence[str], name: str = "hashed", path: str | Path | None = None, **settings: Any
) -> LabelEmbedding:
    """Compute the vectors of ``labels``.

    Args:
        labels: C unique names.
        name: ``hashed`` (:func:`hashed`), ``glove`` (:func:`glove`), or the registered name of another one.
        path: its setting ``path``, if it has one.
        **settings: its other settings.

    Raises:
        ConfigError: if the name or a setting is unknown or invalid.
        DataError: if a file is missing, malformed or contains NaN, or labels are out of vocabulary.
    """
    labels = tuple(labels)
    if not labels or len(set(labels)) != len(labels):
        raise DataError("labels must be unique and not empty.")
    if path is not None:
        settings["path"] = path
    found = EMBEDDINGS.build(name, labels=labels, **settings)
    if not isinstance(found, LabelEmbedding):
        raise ConfigError(f"The embedding {name} returned a {type(found).__name__}, expected a LabelEmbedding.")
    shape = tuple(found.vectors.shape)
    if tuple(found.labels) != labels or len(shape) != 2 or shape[0] != len(labels) or not shape[1]:
        raise ConfigError(
            f"The embedding {name} returned vectors of shape {shape} for {len(found.labels)} labels, expected "
            f"({len(labels)}, D) for the given labels in the same order: correct it."
        )
    return found


@register_embedding("hashed")
def hashed(labels: Sequence[str], dim: Positive = 300, seed: Seed = 0) -> LabelEmbedding:
    r"""Random vectors seeded by a hash of each word: no download, no semantics.

    The values of a word's vector are independent and standard normal, drawn from the SHA-256 of seed and word. A label
    of n words is :math:`\frac{1}{\sqrt{n}} \sum_w v_w`, so that its norm, about :math:`\sqrt{D}`, does not depend on n.
    The vectors are the same on every machine.

    Args:
        labels: C unique names.
        dim: length of the vectors.
        seed: seed of the vectors.
    """
    check_positive(dim=dim)
    words = {label: tuple(words_of(label)) or (label,) for label in labels}  # without letters or digits: unchanged
    drawn = [np.stack([_word_vector(word, dim, seed) for word in words[label]]) for label in labels]
    vectors = np.stack([of_label.sum(axis=0) / np.sqrt(len(of_label)) for of_label in drawn]).astype(np.float32)
    return LabelEmbedding(tuple(labels), torch.from_numpy(vectors), f"hashed (dim {dim}, seed {seed})", words)


def _word_vector(word: str, dim: int, seed: int) -> np.ndarray:
    """Box-Muller on the integers of the digests, rounded to five decimals for platform independence."""
    pairs = (dim + 1) // 2
    blocks = -(-pairs * 2 // 8)  # a digest holds eight 32-bit integers
    digests = b"".join(hashlib.sha256(f"{seed}:{block}:{word}".encode()).digest() for block in range(blocks))
    uniform = (np.frombuffer(digests, dtype="<u4")[: pairs * 2].astype(np.float64) + 0.5) / 2.0**32
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * np.pi * uniform[pairs:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:dim]
    return np.round(normal, 5)


@register_embedding("glove")
def glove(
    labels: Sequence[str],
    path: str | Path,
    oov: Literal["error", "skip_words", "zeros", "hashed"] = "error",
    seed: Seed = 0,
) -> LabelEmbedding:
    """GloVe vectors, from a text file or a table.

    A table (``.npz`` or ``.pt``, :func:`~gm_mlic.embeddings.table.read_table`) is searched for the full name first,
    never by position. Otherwise a label is the mean of its words' vectors. Alternative spellings
    (:data:`~gm_mlic.embeddings.words.ALIASES`) are used only for missing names or words. Vectors are not normalized.

    Args:
        labels: C unique names.
        path: GloVe text file (any size), or a table (.npz or .pt) with ``labels`` and ``vectors``.
        oov: labels with an out-of-vocabulary word: error (stop and list them), zeros, hashed (a hashed vector, scaled
            to the median norm of the known labels), or skip_words (mean of the known words; an error if none is known).
        seed: seed of hashed vectors.
    """
    check_choice("oov", oov, ("error", "skip_words", "zeros", "hashed"))
    labels, path = tuple(labels), Path(path)
    if path.suffix in (".npz", ".pt"):
        entries, dim = read_table(path)
        pieces = {label: _from_table(label, entries) for label in labels}
    else:
        words = {word for label in labels for word in words_of(label)}
        parts = {part for word in words for alias in ALIASES.get(word, ()) for part in words_of(alias)}
        entries, dim = read_words(path, words | parts)
        pieces = {label: [_word(word, entries) for word in words_of(label)] for label in labels}
    used: dict[str, tuple[str, ...]] = {}
    for label in labels:
        known = [piece for piece in pieces[label] if piece is not None]
        complete = bool(known) and (len(known) == len(pieces[label]) or oov == "skip_words")
        used[label] = tuple(entry for piece in known for entry in piece) if complete else ()
    unknown = [label for label in labels if not used[label]]
    if unknown and oov in ("error", "skip_words"):
        raise DataError(_out_of_vocabulary(unknown, pieces, oov, path))
    vectors = np.zeros((len(labels), dim), dtype=np.float32)
    for row, label in enumerate(labels):
        if used[label]:
            vectors[row] = np.mean([entries[entry] for entry in used[label]], axis=0)
    if unknown and oov == "hashed":
        filled = hashed(unknown, dim, seed).vectors.numpy()
        norms = np.linalg.norm(vectors, axis=1)[[bool(used[label]) for label in labels]]
        if norms.size:
            filled *= np.median(norms) / np.linalg.norm(filled, axis=1, keepdims=True)
        vectors[[labels.index(label) for label in unknown]] = filled
    return LabelEmbedding(labels, torch.from_numpy(vectors), f"{path.name} (dim {dim})", used)


def embed_classes(classes: Sequence[str], **settings: Any) -> Tensor:
    """Vectors (D, n) of detector classes, whose names may repeat; zeros for classes out of vocabulary.

    Args:
        classes: D >= 1 names.
        **settings: arguments of :func:`embed_labels`.
    """
    if "oov" in EMBEDDINGS.arguments(settings.get("name", "hashed")):
        settings["oov"] = "zeros"
    found = embed_labels(tuple(dict.fromkeys(classes)), **settings)
    position = {name: row for row, name in enumerate(found.labels)}
    return found.vectors[[position[name] for name in classes]]


#: Source entries of each word of a label; None for words that are missing under every spelling.
_Pieces = list["tuple[str, ...] | None"]


def _word(word: str, entries: dict[str, np.ndarray]) -> tuple[str, ...] | None:
    spellings = ([word], *map(words_of, ALIASES.get(word, ())))
    return next((tuple(parts) for parts in spellings if all(part in entries for part in parts)), None)


def _from_table(label: str, entries: dict[str, np.ndarray]) -> _Pieces:
    for name in (label, *ALIASES.get(compact(label), ())):
        if compact(name) in entries:
            return [(compact(name),)]
    return [_word(word, entries) for word in words_of(label)]


def _out_of_vocabulary(unknown: list[str], pieces: dict[str, _Pieces], oov: str, path: Path) -> str:
    listed = []
    for label in unknown:
        missing = [word for word, piece in zip(words_of(label), pieces[label], strict=False) if piece is None]
        listed.append(repr(label) if len(words_of(label)) < 2 else f"{label!r} (no {', '.join(missing)})")
    policies = "zeros or hashed" if oov == "skip_words" else "skip_words, zeros or hashed"
    return (
        f"{len(unknown)} labels are not in {path}: {', '.join(listed)}. "
        f"Use a file that contains them, or set `oov` to {policies}."
    )
