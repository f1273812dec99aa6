"""Hashed label vectors: pseudo-random vectors of the labels' words, reproducible on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from gm_mlic.embeddings.words import words_of


def hashed_vectors(labels: Sequence[str], dim: int = 300, seed: int = 0) -> np.ndarray:
    r"""Compute vectors of independent standard normal values from label names.

    A word's vector is drawn from the SHA-256 of seed and word (Box-Muller on the digest's integers, rounded to five
    decimals for platform independence). A label of n words is :math:`\frac{1}{\sqrt{n}} \sum_w v_w`, so that its norm
    does not depend on n.

    Args:
        labels: C names.
        dim: D, length of the vectors.
        seed: random seed.

    Returns:
        (C, dim) float32; norms are about :math:`\sqrt{D}`.
    """
    # Labels without letters or digits are hashed unchanged.
    rows = [[_word_vector(word, dim, seed) for word in words_of(label) or [label]] for label in labels]
    return np.stack([np.sum(words, axis=0) / np.sqrt(len(words)) for words in rows]).astype(np.float32)


def _word_vector(word: str, dim: int, seed: int) -> np.ndarray:
    pairs = (dim + 1) // 2
    blocks = -(-pairs * 2 // 8)  # a digest holds eight 32-bit integers
    digests = b"".join(hashlib.sha256(f"{seed}:{block}:{word}".encode()).digest() for block in range(blocks))
    uniform = (np.frombuffer(digests, dtype="<u4")[: pairs * 2].astype(np.float64) + 0.5) / 2.0**32
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * np.pi * uniform[pairs:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:dim]
    return np.round(normal, 5)
