"""From label names to words, and the other spellings under which a word may be found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

#: Other spellings, tried in this order and only if a word itself is missing. VOC's compounds come first (tvmonitor is
#: tv in the vectors that the literature distributes); the rest are compounds written together and synonyms by which
#: VOC, COCO and NUS-WIDE differ, so that a table of one also serves another.
ALIASES: dict[str, tuple[str, ...]] = {
    "tvmonitor": ("tv", "tv monitor", "television"),
    "pottedplant": ("potted plant", "plant"),
    "diningtable": ("dining table", "table"),
    "aeroplane": ("airplane", "plane"),
    "airplane": ("aeroplane", "plane"),
    "plane": ("airplane", "aeroplane"),
    "motorbike": ("motorcycle",),
    "motorcycle": ("motorbike",),
    "sofa": ("couch",),
    "couch": ("sofa",),
    "tv": ("television", "tvmonitor"),
    "donut": ("doughnut",),
    "doughnut": ("donut",),
    "drier": ("dryer",),
    "hairdrier": ("hair dryer", "hairdryer"),
    "cellphone": ("cell phone", "phone"),
    "wineglass": ("wine glass",),
    "firehydrant": ("fire hydrant",),
    "teddybear": ("teddy bear",),
    "hotdog": ("hot dog",),
    "trafficlight": ("traffic light",),
    "stopsign": ("stop sign",),
    "parkingmeter": ("parking meter",),
    "sportsball": ("sports ball",),
    "baseballbat": ("baseball bat",),
    "baseballglove": ("baseball glove",),
    "tennisracket": ("tennis racket",),
    "harbor": ("harbour",),
    "harbour": ("harbor",),
    "nighttime": ("night time", "night"),
    "cityscape": ("skyline",),
    "railroad": ("railway",),
    "skis": ("ski",),
    "racket": ("racquet",),
    "racquet": ("racket",),
    "grey": ("gray",),
    "gray": ("grey",),
}


def words_of(label: str) -> list[str]:
    """The lower-case words of a label name, split at anything but letters, digits and apostrophes.

    ``"Wine_Glass"`` and ``"wine glass"`` both give ``["wine", "glass"]``.
    """
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", label.lower())


def labels_of(classes: Sequence[str], labels: Sequence[str]) -> list[int]:
    """For each class of a detector the label that means the same, as its number; -1 where there is none.

    Names are compared as they stand, then without case and punctuation, then in the plural or singular, then by
    :data:`ALIASES`; each step only for labels and classes that no earlier one has joined. A class is one label at most.
    """
    found = [-1] * len(classes)
    for spellings in (_itself, _plain, _number, _aliases):
        free = [c for c in range(len(labels)) if c not in found]
        known = {spelling: c for c in reversed(free) for spelling in spellings(labels[c])}
        for k, name in enumerate(classes):
            if found[k] < 0:
                found[k] = next((known[spelling] for spelling in spellings(name) if spelling in known), -1)
    return found


def _itself(name: str) -> Iterable[str]:
    return [name]


def _plain(name: str) -> Iterable[str]:
    return [" ".join(words_of(name))]


def _number(name: str) -> Iterable[str]:
    (plain,) = _plain(name)
    return [plain, plain.removesuffix("s")]


def _aliases(name: str) -> Iterable[str]:
    compact = "".join(words_of(name))
    return [compact, *("".join(words_of(alias)) for alias in ALIASES.get(compact, ()))]
