"""Detection in several views of a photo, merged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gm_mlic.detection.protocol import InstanceExtractor, Instances, LookupExtractor, detect
from gm_mlic.errors import ArgumentError

#: Views of a photo: left, top, width and height as fractions of its size, and whether it is mirrored.
VIEWS = (
    (0.0, 0.0, 1.0, 1.0, False),
    (0.0, 0.0, 1.0, 1.0, True),
    (0.0, 0.0, 0.75, 0.75, False),
    (0.25, 0.25, 0.75, 0.75, False),
    (0.25, 0.0, 0.75, 0.75, True),
    (0.0, 0.25, 0.75, 0.75, True),
)


class MultiViewExtractor:
    """The instances of an extractor in several views of each photo, as one list.

    The views are the photo, its mirror image, and its four corners, of three quarters of its width and height, two of
    them mirrored. The m most confident instances of all views are kept. Boxes are in the photo's coordinates. An object
    that is found in several views has several instances, whose match logits add up with ``pooling="logsumexp"``.

    Args:
        extractor: finds instances in each view.
        views: number of views, 2 to 6.

    Raises:
        ArgumentError: for another number of views, or an extractor that looks instances up.
    """

    def __init__(self, extractor: InstanceExtractor, views: int) -> None:
        if not 2 <= views <= len(VIEWS):
            raise ArgumentError("views", f"must be 2 to {len(VIEWS)}, got {views}.")
        if isinstance(extractor, LookupExtractor):
            raise ArgumentError(
                "views", f"is {views}: instances of other views of a photo cannot be looked up in files. Set it to 1."
            )
        self.extractor, self.views = extractor, views
        self.name = f"{extractor.name}-{views}_views"
        self.labels, self.feature_dim = tuple(extractor.labels), extractor.feature_dim

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the extractor's fingerprint and the views."""
        return hashlib.sha256(f"{self.extractor.fingerprint} {VIEWS[: self.views]}".encode()).hexdigest()

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], m: int) -> list[Instances]:
        """Detect instances; see :class:`InstanceExtractor`."""
        if not len(images):
            return []
        found: list[list[Instances]] = [[] for _ in images]
        for view in VIEWS[: self.views]:
            crops, places = zip(*(_crop(image, *view) for image in images), strict=True)
            for of_image, instances, place in zip(found, detect(self.extractor, crops, m), places, strict=True):
                of_image.append(_placed(instances, place, mirrored=view[4]))
        return [_merged(of_image, m) for of_image in found]


def _crop(
    image: Tensor, left: float, top: float, width: float, height: float, mirrored: bool
) -> tuple[Tensor, tuple[float, float, float, float]]:
    """A view, and its place: left, top, width and height as fractions of the image, after rounding to pixels."""
    H, W = image.shape[-2:]
    w, h = max(1, round(width * W)), max(1, round(height * H))
    x, y = min(round(left * W), W - w), min(round(top * H), H - h)
    view = image[..., y : y + h, x : x + w]
    return view.flip(-1) if mirrored else view, (x / W, y / H, w / W, h / H)


def _placed(instances: Instances, place: tuple[float, float, float, float], *, mirrored: bool) -> Instances:
    """Instances of a view in the coordinates of the photo."""
    x1, y1, x2, y2 = instances.boxes.unbind(1)
    if mirrored:
        x1, x2 = 1 - x2, 1 - x1
    left, top, width, height = place
    boxes = torch.stack([left + width * x1, top + height * y1, left + width * x2, top + height * y2], dim=1)
    return replace(instances, boxes=boxes.clamp(0, 1))


def _merged(found: list[Instances], m: int) -> Instances:
    """The ``m`` most confident instances of all views; an empty view's placeholder only where all are empty."""
    detected = [part for part in found if bool(((part.detected_labels >= 0) | (part.scores > 0)).any())] or found[:1]
    merged = Instances(**{name: torch.cat([getattr(part, name) for part in detected]) for name in vars(found[0])})
    return merged.at(merged.scores.argsort(descending=True, stable=True)[:m])
