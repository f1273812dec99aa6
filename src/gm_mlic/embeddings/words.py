"""Words of label names, and their alternative spellings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

#: Smallest cosine similarity of a class and a label of different names. With GloVe, couch and sofa have 0.63, airplane
#: and aeroplane 0.49 (an alternative spelling), couch and bed 0.47.
_SIMILAR = 0.5

_SYNONYMS = (
    ("motorbike", "motorcycle"), ("sofa", "couch"), ("donut", "doughnut"), ("harbor", "harbour"), ("racket", "racquet"),
    ("grey", "gray"),
)  # fmt: skip
_COMPOUNDS = (
    "wine glass", "fire hydrant", "teddy bear", "hot dog", "traffic light", "stop sign", "parking meter", "sports ball",
    "baseball bat", "baseball glove", "tennis racket",
)  # fmt: skip
#: Alternative spellings, tried in order and only for missing words. They are VOC's compounds (tvmonitor is tv in
#: published vectors), and compounds and synonyms that differ between VOC, COCO and NUS-WIDE, so that one table can be
#: used for all of them.
ALIASES: dict[str, tuple[str, ...]] = {
    **{a: (b,) for pair in _SYNONYMS for a, b in (pair, pair[::-1])},
    **{name.replace(" ", ""): (name,) for name in _COMPOUNDS},
    "tvmonitor": ("tv", "tv monitor", "television"),
    "tv": ("television", "tvmonitor"),
    "pottedplant": ("potted plant", "plant"),
    "diningtable": ("dining table", "table"),
    "aeroplane": ("airplane", "plane"),
    "airplane": ("aeroplane", "plane"),
    "plane": ("airplane", "aeroplane"),
    "drier": ("dryer",),
    "hairdrier": ("hair dryer", "hairdryer"),
    "cellphone": ("cell phone", "phone"),
    "nighttime": ("night time", "night"),
    "cityscape": ("skyline",),
    "railroad": ("railway",),
    "skis": ("ski",),
}


def words_of(label: str) -> list[str]:
    """Lower-case words of a label name, split at all characters except letters, digits and apostrophes.

    ``"Wine_Glass"`` and ``"wine glass"`` give ``["wine", "glass"]``.
    """
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", label.lower())


def compact(name: str) -> str:
    """Words of a name without spaces, so that ``potted plant`` equals ``pottedplant``."""
    return "".join(words_of(name))


#: Spellings of a name that are compared, in this order: exact, without case and punctuation, in singular and plural,
#: and alternatives.
_SPELLINGS: tuple[Callable[[str], list[str]], ...] = (
    lambda name: [name],
    lambda name: [" ".join(words_of(name))],
    lambda name: [" ".join(words_of(name)), " ".join(words_of(name)).removesuffix("s")],
    lambda name: [compact(name), *map(compact, ALIASES.get(compact(name), ()))],
)


def labels_of(classes: Sequence[str], labels: Sequence[str]) -> list[int]:
    """Label index of each detector class; -1 for classes without an equivalent label.

    Names are compared exactly, then without case and punctuation, then in singular and plural, then by :data:`ALIASES`;
    each step considers only labels and classes that are not matched yet. Several classes can match one label.
    """
    label_of = [-1] * len(classes)
    for spellings in _SPELLINGS:
        free = [c for c in range(len(labels)) if c not in label_of]
        known = {spelling: c for c in reversed(free) for spelling in spellings(labels[c])}
        for k, name in enumerate(classes):
            if label_of[k] < 0:
                label_of[k] = next((known[spelling] for spelling in spellings(name) if spelling in known), -1)
    return label_of


def labels_of_classes(
    classes: Sequence[str],
    labels: Sequence[str],
    class_vectors: np.ndarray | None = None,
    label_vectors: np.ndarray | None = None,
) -> list[list[int]]:
    """Labels with the same meaning as each detector class; a class can have several.

    1. Classes and labels are matched by name (:func:`labels_of`).
    2. Each label without a class is compared by name with all classes, including those with a label. For example,
       ``diningtable`` and ``table`` both match the class ``dining table``.
    3. The remaining labels and classes are matched by word vectors: label and class must be nearest to each other, with
       a cosine similarity of at least 0.5.

    Args:
        classes: D names.
        labels: C names.
        class_vectors, label_vectors: (D, n) and (C, n), zeros for unknown words; None to compare names only.

    Returns:
        D lists of label indices.
    """
    found = [[c] if c >= 0 else [] for c in labels_of(classes, labels)]
    for c in _unnamed(found, labels):
        for k, match in enumerate(labels_of(classes, [labels[c]])):
            found[k] += [c] if match == 0 else []
    rest, free = _unnamed(found, labels), [k for k, named in enumerate(found) if not named]
    if class_vectors is None or label_vectors is None or not rest or not free:
        return found
    left, right = (v / np.linalg.norm(v, axis=1, keepdims=True).clip(1e-12) for v in (class_vectors, label_vectors))
    similarity = left[free] @ right.T
    for c in rest:
        k = int(similarity[:, c].argmax())
        if similarity[k, c] >= _SIMILAR and int(similarity[k].argmax()) == c:
            found[free[k]].append(c)
    return found


def _unnamed(found: list[list[int]], labels: Sequence[str]) -> list[int]:
    named = {c for of_class in found for c in of_class}
    return [c for c in range(len(labels)) if c not in named]
