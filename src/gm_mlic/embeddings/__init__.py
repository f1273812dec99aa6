"""Label embeddings from GloVe text files, tables, or hashed words."""

from __future__ import annotations

from gm_mlic.embeddings.labels import LabelEmbedding, embed_classes, embed_labels
from gm_mlic.embeddings.words import ALIASES, labels_of, labels_of_classes, words_of

__all__ = [
    "ALIASES",
    "LabelEmbedding",
    "embed_classes",
    "embed_labels",
    "labels_of",
    "labels_of_classes",
    "words_of",
]
