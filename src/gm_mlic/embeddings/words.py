"""From label names to words, and the other spellings under which a word may be found."""

from __future__ import annotations

import re

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
