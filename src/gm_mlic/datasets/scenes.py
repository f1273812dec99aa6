"""Synthetic dataset `scenes`: multi-label images that require context and geometry, with a known upper bound of mAP.

Sampling is counter-based (Philox, one stream per seed, split and purpose; scene i reads row i), so a scene depends
neither on the size of its split nor on the process that draws it. Pixels are computed in integer arithmetic, so the
images are identical on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Interval
from numpy.typing import NDArray
from PIL import Image

from gm_mlic.datasets.base import BoxAnnotations, MultiLabelDataset
from gm_mlic.datasets.splits import Split
from gm_mlic.errors import ArgumentError, check_positive
from gm_mlic.registry import register_dataset
from gm_mlic.schema import Probability, Seed, checked

Array = NDArray[Any]

#: Part of the fingerprint: increment it when the same parameters give other pixels or scenes.
RELEASE = 1

#: Per theme t: two labels with unique looks, then the first label of pair t, then the second label of pair t - 1.
_THEME_LABELS = (
    ("mug", "cheese", "lemon", "doughnut"),  # kitchen
    ("kite", "dumbbell", "cricket bat", "tennis ball"),  # sport
    ("clover", "flower pot", "marigold", "fence post"),  # garden
    ("sailboat", "crate", "life ring", "starfish"),  # harbor
)
#: Per spatial family: the anchor, the twin beside it, the twin above or below it.
_FAMILIES = (("house", "gate", "hatch"), ("moon", "comet", "satellite"))
LABELS = tuple(label for group in _THEME_LABELS + _FAMILIES for label in group)

STRAY = 0.2  # fraction of singles drawn from all themes
SINGLES = (2, 5)  # minimum and maximum number of singles per scene
KIT = 0.5  # fraction of scenes with an anchor and its twin
LONE_ANCHOR = 0.15  # fraction of scenes with an anchor without a twin

# Lengths in pixels of a 160-pixel image; scaled with image_size.
_SIZE, _SMALL = (18, 34), (10, 13)
_DISPLACEMENT = 60  # d: distance of the centers of anchor and twin, which lie in a square of width 2 d
_JITTER = 4
_OCCLUDED = (45, 60)  # percent of a glyph's area

SIZES = {"train": 2000, "val": 500, "test": 1000}
_MOST = 10_000_000
_Size = Annotated[int, Interval(ge=1, le=_MOST)]
_KIT_SLOTS, _SINGLE_SLOTS, _LONE_SLOT, _SLOTS = (0, 1), slice(2, 7), 7, 8
_PLAIN, _IS_SMALL, _IS_OCCLUDED = 0, 1, 2
_CANDIDATES = 48  # positions tried per object before the scene is redrawn
_BLOCK = 4096  # scenes drawn at once, to bound memory


# --- Looks: shapes on the square -1000..1000 (x right, y down); each touches all four sides ---


def _polygon(*points: tuple[int, int]) -> Callable[[Array, Array], Array]:
    def contains(x: Array, y: Array) -> Array:
        inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)  # odd number of edge crossings
        for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
            if y1 > y2:
                x1, y1, x2, y2 = x2, y2, x1, y1
            inside ^= (y1 <= y) & (y < y2) & ((x - x1) * (y2 - y1) < (y - y1) * (x2 - x1))
        return inside

    return contains


def _ball(x: Array, y: Array, cx: int = 0, cy: int = 0, r: int = 1000) -> Array:
    return np.asarray((x - cx) ** 2 + (y - cy) ** 2 <= r * r)


def _clover(x: Array, y: Array) -> Array:
    return _ball(abs(x), abs(y), 480, 480, 520) | (abs(x) + abs(y) < 500)


def _crescent(x: Array, y: Array) -> Array:
    x = x * 805 // 1000 - 195
    return _ball(x, y) & ~_ball(x, y, 500, 0, 800)


_triangle = _polygon((0, -1000), (1000, 1000), (-1000, 1000))
_star = _polygon(
    *((0, -1000), (236, -345), (1000, -236), (382, 171), (618, 1000)),
    *((0, 560), (-618, 1000), (-382, 171), (-1000, -236), (-236, -345)),
)
_pot = _polygon(
    (-1000, -1000), (1000, -1000), (1000, -550), (800, -550), (550, 1000), (-550, 1000), (-800, -550), (-1000, -550)
)
_boat = _polygon(
    (0, -1000), (760, 330), (180, 330), (180, 480), (1000, 480), (620, 1000), (-620, 1000), (-1000, 480), (0, 480)
)
_house = _polygon(
    *((0, -1000), (1000, -50), (760, -50), (760, 1000), (230, 1000), (230, 300)),
    *((-230, 300), (-230, 1000), (-760, 1000), (-760, -50), (-1000, -50)),
)
_arrow = _polygon((0, -1000), (1000, 0), (450, 0), (450, 1000), (-450, 1000), (-450, 0), (-1000, 0))
_hexagon = _polygon((-500, -1000), (500, -1000), (1000, 0), (500, 1000), (-500, 1000), (-1000, 0))


@dataclass(frozen=True)
class _Look:
    """Appearance of a glyph: name, shape, color, and width and height in percent of its size."""

    name: str
    shape: Callable[[Array, Array], Array]
    color: tuple[int, int, int]
    width: int = 100
    height: int = 100


_LOOK_OF_LABEL = {
    "mug": _Look(
        "blue mug",
        lambda x, y: (x <= 350) | (_ball(x, y, 350, 0, 650) & ~_ball(x, y, 350, 0, 330)),
        (60, 105, 215),
        100,
        92,
    ),
    "cheese": _Look("golden wedge", lambda x, y: _triangle(x, y) & ~_ball(x, y, 150, 450, 260), (245, 190, 60)),
    "kite": _Look("magenta diamond", lambda x, y: abs(x) + abs(y) <= 1000, (215, 50, 165), 84),
    "dumbbell": _Look("slate dumbbell", lambda x, y: (abs(x) >= 520) | (abs(y) <= 300), (60, 66, 78), 100, 62),
    "clover": _Look("green clover", _clover, (45, 165, 60)),
    "flower pot": _Look("rust pot", _pot, (190, 92, 62), 92),
    "sailboat": _Look("white sailboat", _boat, (244, 244, 240)),
    "crate": _Look(
        "tan crate", lambda x, y: (abs(x) <= 1000) & ~((abs(abs(y) - 380) < 170) & (abs(x) < 680)), (205, 165, 110)
    ),
    "house": _Look("dark red house", _house, (150, 32, 44)),
    "moon": _Look("pale crescent", _crescent, (250, 240, 185), 80),
    # Looks of the first label of a pair, which both labels can have.
    "lemon": _Look("yellow disc", _ball, (240, 222, 40)),
    "cricket bat": _Look("brown bar", lambda x, y: (abs(x) <= 1000) & (abs(y) <= 1000), (122, 74, 36), 38),
    "marigold": _Look("orange star", _star, (250, 128, 28)),
    "life ring": _Look("red ring", lambda x, y: _ball(x, y) & ~_ball(x, y, r=480), (232, 62, 62)),
    "gate": _Look("purple arch", lambda x, y: ~((abs(x) < 480) & (y > -380)), (122, 68, 190), 88),
    "comet": _Look("teal plus", lambda x, y: (abs(x) <= 340) | (abs(y) <= 340), (22, 165, 165)),
    # Looks of the second label of a pair, if they do not share one.
    "tennis ball": _Look("lime split disc", lambda x, y: _ball(x, y) & (abs(y) > 170), (178, 232, 50)),
    "fence post": _Look("sky-blue arrow", _arrow, (110, 190, 245), 80),
    "starfish": _Look("pink saltire", lambda x, y: (abs(x - y) <= 480) | (abs(x + y) <= 480), (250, 150, 190)),
    "doughnut": _Look("chocolate frame", lambda x, y: np.maximum(abs(x), abs(y)) >= 520, (84, 48, 38)),
    "hatch": _Look("olive hexagon", _hexagon, (122, 128, 40)),
    "satellite": _Look("navy hourglass", lambda x, y: abs(x) <= 180 + abs(y) * 82 // 100, (34, 42, 112), 84),
}
_LOOKS = tuple(_LOOK_OF_LABEL.values())


@lru_cache(maxsize=4096)
def _stencil(look: int, width: int, height: int) -> tuple[Array, Array]:
    """Pixel coverage of a glyph with and without its outline: two (height, width) int32 arrays in 0..16."""
    # 4 x 4 samples per pixel at odd multiples of half a sample: integers, for identical results on every machine.
    x = (2 * np.arange(4 * width) + 1 - 4 * width) * 1000 // (4 * width)
    y = (2 * np.arange(4 * height) + 1 - 4 * height) * 1000 // (4 * height)
    shape = np.broadcast_to(_LOOKS[look].shape(x[None, :], y[:, None]), (4 * height, 4 * width))
    outline = 2 + max(width, height) // 12
    padded = np.pad(shape, outline)
    inner = shape.copy()
    for dy, dx in ((0, outline), (0, -outline), (outline, 0), (-outline, 0)):
        inner &= np.roll(padded, (dy, dx), (0, 1))[outline:-outline, outline:-outline]
    covered, fill = (m.reshape(height, 4, width, 4).sum(axis=(1, 3), dtype=np.int32) for m in (shape, inner))
    return covered, fill


@lru_cache(maxsize=16)
def _ramps(size: int, knots: int) -> tuple[Array, Array, Array]:
    """Linear interpolation from ``knots`` values to ``size`` pixels: both knots of each pixel, and the weight of the
    second one in 64ths.
    """
    position = (2 * np.arange(size) + 1) * (knots - 1) * 32 // size
    left = position // 64
    return left, np.minimum(left + 1, knots - 1), (position % 64).astype(np.int32)


def _smooth(knots: Array, size: int) -> Array:
    """Interpolate (..., k, k) integers to (..., size, size) int32."""
    # Not a matrix product: BLAS threads would compete with torch's for this small operation.
    left, right, part = _ramps(size, knots.shape[-1])
    knots = knots.astype(np.int32)
    wide = knots[..., left] * (64 - part) + knots[..., right] * part
    part = part[:, None]
    return np.asarray((wide[..., left, :] * (64 - part) + wide[..., right, :] * part) >> 12)


# --- Layout: objects and their positions ---


@dataclass(frozen=True)
class _Layout:
    """Layout of N scenes with up to 8 objects: slots 0 and 1 kit (anchor, twin), 2 to 6 singles, 7 lone anchor.

    ``label`` (N, 8) int8, -1 for empty slots; ``origin`` and ``extent`` (N, 8, 2) int16 as (x, y) and (width, height);
    ``kind`` (N, 8): plain, small or occluded; ``style`` (N, 8, 6) uint8: random bytes for color and patch.
    """

    label: Array
    origin: Array
    extent: Array
    kind: Array
    style: Array


def _pick(u: Array, low: int, high: int) -> Array:
    """Map uniform numbers in [0, 1) to uniform integers in low..high (inclusive)."""
    return np.asarray(low + (u * (high - low + 1)).astype(np.int64))


def _streams(seed: int, split: str, purpose: int, *more: int) -> np.random.Generator:
    entropy = (seed, tuple(SIZES).index(split), purpose, *more)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def _objects(u: Array) -> tuple[Array, Array]:
    """Labels (n, 8), and relation of the kit (n,) (1 beside, 2 above or below) from random numbers (n, 16)."""
    n = len(u)
    theme = _pick(u[:, 0], 0, 3)
    label = np.full((n, _SLOTS), -1, dtype=np.int8)
    stray, which = u[:, 1:6] < STRAY, u[:, 6:11]
    singles = np.where(stray, _pick(which, 0, 15), 4 * theme[:, None] + _pick(which, 0, 3))
    count = _pick(u[:, 11], *SINGLES)
    label[:, _SINGLE_SLOTS] = np.where(np.arange(5) < count[:, None], singles, -1)
    kit, family, relation = u[:, 12] < KIT, _pick(u[:, 13], 0, 1), _pick(u[:, 14], 1, 2)
    label[:, 0] = np.where(kit, 16 + 3 * family, -1)
    label[:, 1] = np.where(kit, 16 + 3 * family + relation, -1)
    # A lone anchor is never of the kit's family; without a kit, `family` is uniform.
    label[:, _LONE_SLOT] = np.where(u[:, 15] < LONE_ANCHOR, 16 + 3 * (1 - family), -1)
    return label, relation


def _kit_centers(u: Array, relation: Array, d: int) -> Array:
    """Centers (n, 2, 2) of anchor and twin in the square [0, 2 d), from random numbers (n, 4).

    Along the displacement, one of them (random) is at t and the other at t + d, with t uniform in [0, d). Across it,
    they share a uniform coordinate, plus a jitter reflected at the borders. Each position alone is therefore uniform in
    the square for both relations; only the pair determines the relation.
    """
    t, swap = _pick(u[:, 0], 0, d - 1), u[:, 1] < 0.5
    along = np.stack([np.where(swap, t + d, t), np.where(swap, t, t + d)], axis=1)
    across = _pick(u[:, 2], 0, 2 * d - 1)
    jitter = max(1, _JITTER * d // _DISPLACEMENT)
    moved = across + _pick(u[:, 3], -jitter, jitter)
    moved = np.where(moved < 0, -1 - moved, np.where(moved >= 2 * d, 4 * d - 1 - moved, moved))
    across = np.stack([across, moved], axis=1)
    beside = (relation == 1)[:, None]
    return np.stack([np.where(beside, along, across), np.where(beside, across, along)], axis=-1)


def _place(origin: Array, extent: Array, wanted: Array, dice: Array, size: int) -> Array:
    """Place singles and lone anchors without overlap; returns (n,) bool, True if all fit.

    ``origin`` (n, 8, 2) has the kits, and the others are written to it. ``wanted`` (n, 8) is True for slots with an
    object; ``dice`` (n, 6, candidates, 2) are random numbers in [0, 1).
    """
    rows, fits = np.arange(len(origin)), np.ones(len(origin), dtype=bool)
    taken = wanted & (np.arange(_SLOTS) < 2)
    for k, slot in enumerate(range(2, _SLOTS)):
        room = size - 2 - extent[:, slot]  # margin of one pixel
        tried = 1 + (dice[:, k] * (room[:, None, :] + 1)).astype(np.int64)  # (n, candidates, 2)
        clear = np.ones(tried.shape[:2], dtype=bool)
        for other in range(slot):
            apart = (tried >= (origin[:, other] + extent[:, other] + 2)[:, None]) | (
                tried + extent[:, None, slot] + 2 <= origin[:, None, other]
            )
            clear &= apart.any(axis=-1) | ~taken[:, None, other]
        first = clear.argmax(axis=1)
        origin[:, slot] = tried[rows, first]
        fits &= clear[rows, first] | ~wanted[:, slot]
        taken[:, slot] = wanted[:, slot]
    return fits


def _lay_out(split: str, size: int, seed: int, hard_fraction: float, image_size: int, look_of: Array) -> _Layout:
    objects, sizes, styles, positions = (_streams(seed, split, purpose) for purpose in range(4))
    d = _DISPLACEMENT * image_size // 160
    margin = (image_size - 2 * d) // 2
    shares = np.array([(look.width, look.height) for look in _LOOKS])
    blocks = []
    for start in range(0, size, _BLOCK):
        n = min(_BLOCK, size - start)
        u, v = objects.random((n, 16)), sizes.random((n, 4 + 2 * _SLOTS))
        style = styles.integers(0, 256, (n, _SLOTS, 6), dtype=np.uint8)
        dice = positions.random((n, _SLOTS - 2, _CANDIDATES, 2), dtype=np.float32)
        label, relation = _objects(u)
        rolled, length = v[:, 4 : 4 + _SLOTS], v[:, 4 + _SLOTS :]
        kind = np.where(rolled < hard_fraction / 2, _IS_SMALL, np.where(rolled < hard_fraction, _IS_OCCLUDED, _PLAIN))
        length = np.where(kind == _IS_SMALL, _pick(length, *_SMALL), _pick(length, *_SIZE)) * image_size // 160
        extent = np.maximum(2, length[..., None] * shares[look_of[label]] // 100)
        origin = np.zeros_like(extent)
        origin[:, _KIT_SLOTS] = margin + _kit_centers(v[:, :4], relation, d) - extent[:, _KIT_SLOTS] // 2
        fits = _place(origin, extent, label >= 0, dice, image_size)
        for row in np.flatnonzero(~fits):  # rare: keep the kit, redraw the others until they fit
            rng = _streams(seed, split, 4, start + int(row))
            one = slice(row, row + 1)
            while not fits[row]:
                again = rng.random((1, *dice.shape[1:]), dtype=np.float32)
                fits[one] = _place(origin[one], extent[one], label[one] >= 0, again, image_size)
        blocks.append((label, origin.astype(np.int16), extent.astype(np.int16), kind.astype(np.int8), style))
    return _Layout(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


# --- Upper bound ---


def _theme_label_posteriors(label: Array, look_of: Array) -> Array:
    """Posteriors (n, 16) of theme labels given the looks of the singles ``label`` (n, s)."""
    q = np.kron(np.eye(4), np.full(4, (1 - STRAY) / 4)) + STRAY / 16  # (4, 16): P(a single has label a | theme)
    same = look_of[:16, None] == look_of[None, :16]
    q_look = q @ same  # (4, 16): q_t of the look of label a
    share = q / q_look  # P(label a | theme, the look of a)
    theme = np.full((len(label), 4), 0.25)
    absent = np.ones((len(label), 4, 16))
    for slot in label.T:
        has_object = slot >= 0
        theme *= np.where(has_object[:, None], q_look.T[slot], 1.0)
        has_look = has_object[:, None] & same[slot]  # labels with this object's look
        absent *= np.where(has_look[:, None], 1.0 - share, 1.0)
    theme /= theme.sum(axis=1, keepdims=True)
    # Rounded, so that equal posteriors tie and certain ones are 0 and 1 on every machine.
    return np.asarray(np.einsum("nt,nta->na", theme, 1.0 - absent).round(12))


@register_dataset("scenes")
class Scenes(MultiLabelDataset):
    r"""Synthetic scenes whose labels depend on context and relative position; no download.

    A scene has a theme t (of 4, uniform) and 2 to 5 single objects. Each has one of the theme's 4 labels with
    probability 0.8, else one of all 16 theme labels, so :math:`q_t(a) = 0.8\,[a \in t]/4 + 0.2/16`. Half of the scenes
    also have a kit: an anchor and one of its two twins. 15 % have an anchor without a twin. Three parameters control
    the difficulty:

    * *context pairs*: two labels of different themes share one look (lemon and tennis ball: yellow disc). Only the
      other objects distinguish them;
    * *spatial pairs*: the two twins of an anchor share one look. One is beside its anchor, the other above or below it;
      the position of the twin alone is uninformative;
    * *hard objects*: small (10 to 13 pixels instead of 18 to 34), or 45 to 60 % covered by a gray patch.

    Statistics with the default parameters:

    ===== ====== ====== ================ =============== ========
    split images labels labels per image r_c             best mAP
    ===== ====== ====== ================ =============== ========
    train 2000   22     3.91             0.125 to 0.325  97.2
    val   500    22     3.88             0.112 to 0.338  97.1
    test  1000   22     3.91             0.113 to 0.334  97.3
    ===== ====== ====== ================ =============== ========

    Args:
        split: ``train``, ``val`` or ``test``: independent random streams.
        size: number of scenes; default: that of ``sizes``. Scene i is the same for every size.
        seed: seed of the scenes.
        context_pairs: number of context pairs (of 4) that share their look.
        spatial_pairs: number of families (of 2) whose twins share their look.
        hard_fraction: fraction of objects that are small or occluded (half each), in [0, 1].
        image_size: width and height in pixels, 96 to 640; objects scale with it.
        sizes: number of scenes of each split.

    Raises:
        ConfigError: if an argument is out of range.
    """

    name = "scenes"
    #: Its number of images is the setting ``sizes`` of all splits.
    no_settings = ("size",)
    detector = "scenes_tiny"

    @checked
    def __init__(
        self,
        split: Split = "train",
        size: _Size | None = None,
        seed: Seed = 0,
        context_pairs: Annotated[int, Interval(ge=0, le=4)] = 4,
        spatial_pairs: Annotated[int, Interval(ge=0, le=2)] = 2,
        hard_fraction: Probability = 0.3,
        image_size: Annotated[int, Interval(ge=96, le=640)] = 160,
        *,
        sizes: Mapping[str, _Size] = SIZES,
    ) -> None:
        size = sizes[split] if size is None else size
        check_positive(size=size)  # `checked` does not check the values of `sizes`
        if size > _MOST:
            raise ArgumentError("size", f"must be 1 to {_MOST}, got {size}.")
        self.split, self.seed = split, int(seed)
        self.context_pairs, self.spatial_pairs = int(context_pairs), int(spatial_pairs)
        self.hard_fraction, self.image_size = float(hard_fraction), int(image_size)
        self.labels = LABELS
        self.ids = tuple(f"{split}-{i:05d}" for i in range(size))
        names = {label: label for label in LABELS}  # of the label whose look each label has
        for p in range(self.context_pairs):
            names[LABELS[4 * ((p + 1) % 4) + 3]] = LABELS[4 * p + 2]
        for _, beside, above in _FAMILIES[: self.spatial_pairs]:
            names[above] = beside
        self._look_of = np.array([list(_LOOK_OF_LABEL).index(names[label]) for label in LABELS])
        self._layout = _lay_out(split, int(size), self.seed, self.hard_fraction, self.image_size, self._look_of)
        self.targets = np.zeros((size, len(LABELS)), dtype=np.int8)
        row, slot = np.nonzero(self._layout.label >= 0)
        self.targets[row, self._layout.label[row, slot]] = 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the base class's fingerprint and all parameters that affect the images."""
        settings = [RELEASE, self.seed, self.context_pairs, self.spatial_pairs, self.hard_fraction, self.image_size]
        return hashlib.sha256(json.dumps([super().fingerprint, *settings]).encode()).hexdigest()

    # --- Images ---

    def image(self, i: int) -> Image.Image:
        """Draw the image of row ``i``: RGB, ``image_size`` square, deterministic."""
        i = range(len(self))[i]
        size, scene = self.image_size, self._layout
        rng = _streams(self.seed, self.split, 5, i)
        # Background: one tone, smooth color gradients, finer gray texture; pixel noise is added last.
        tone = rng.integers(105, 176)
        canvas = (
            _smooth(tone + rng.integers(-26, 27, (3, 4, 4)), size) + _smooth(rng.integers(0, 29, (21, 21)), size) - 14
        )
        for slot in np.flatnonzero(scene.label[i] >= 0):
            (x, y), (w, h) = scene.origin[i, slot].tolist(), scene.extent[i, slot].tolist()
            look, style = int(self._look_of[scene.label[i, slot]]), scene.style[i, slot].astype(np.int32)
            covered, fill = _stencil(look, w, h)
            color = (np.array(_LOOKS[look].color) + style[:3] % 37 - 18)[:, None, None]
            patch = canvas[:, y : y + h, x : x + w]
            # Outline: the same color at 45 % brightness.
            patch[:] = (patch * (16 - covered) + color * fill + color * 45 // 100 * (covered - fill)) // 16
            if scene.kind[i, slot] == _IS_OCCLUDED:
                _occlude(canvas, (x, y, w, h), covered, style)
        canvas += rng.integers(0, 27, canvas.shape, dtype=np.uint8)
        canvas -= 13
        return Image.fromarray(np.ascontiguousarray(canvas.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)))

    def boxes(self, i: int) -> BoxAnnotations:
        """Boxes of all objects of row ``i``, in full extent even if occluded."""
        slots = np.flatnonzero(self._layout.label[i] >= 0)
        origin, extent = self._layout.origin[i, slots], self._layout.extent[i, slots]
        boxes = np.concatenate([origin, origin + extent], axis=1).astype(np.float32)
        return BoxAnnotations(torch.from_numpy(boxes), torch.from_numpy(self._layout.label[i, slots].astype(np.int64)))

    # --- Upper bound ---

    @cached_property
    def limit_scores(self) -> NDArray[np.float64]:
        r"""Exact label posteriors given every object's look and box: (N, 22) float64.

        With :math:`q_t(L) = \sum_{a: look(a) = L} q_t(a)`,

        .. math::
            P(t \mid looks) \propto \prod_i q_t(L_i), \qquad
            P(a \mid looks) = \sum_t P(t \mid looks) \Bigl(1 - \prod_{i: L_i = look(a)}
            \bigl(1 - q_t(a) / q_t(L_i)\bigr)\Bigr)

        for theme labels. Posteriors of anchors and twins are 0 or 1, since look and geometry determine them.
        """
        theme_labels = _theme_label_posteriors(self._layout.label[:, _SINGLE_SLOTS], self._look_of)
        return np.concatenate([theme_labels, self.targets[:, 16:]], axis=1)

    def best_map(self) -> float:
        """Upper bound of mAP in percent: the mAP of :attr:`limit_scores`.

        AP is the mean precision at the ranks of a label's positives; ties keep the row order, and labels without
        positives are not counted. Ranking by the exact posterior maximizes its expectation; on a finite split, a method
        can exceed it slightly at random.
        """
        order = np.argsort(-self.limit_scores, axis=0, kind="stable")
        hits = np.take_along_axis(self.targets == 1, order, axis=0)
        precision = np.cumsum(hits, axis=0) / np.arange(1, len(hits) + 1)[:, None]
        positives = hits.sum(axis=0)
        occurs = positives > 0
        return float(100 * ((precision * hits).sum(axis=0)[occurs] / positives[occurs]).mean())


def _occlude(canvas: Array, box: tuple[int, int, int, int], covered: Array, style: Array) -> None:
    """Cover a fraction of a glyph's area with a gray patch from one side."""
    x, y, w, h = box
    share = _OCCLUDED[0] + int(style[3]) % (_OCCLUDED[1] - _OCCLUDED[0] + 1)
    gray, across, from_end = 70 + int(style[4]) % 31, bool(style[5] & 1), bool(style[5] & 2)
    area = covered.sum(axis=0 if across else 1)
    hidden = np.cumsum(area[::-1] if from_end else area) * 100 // area.sum()
    # Tiny glyphs allow few cuts: prefer fractions within the bounds, then the closest to the target.
    depth = 1 + int((1000 * abs(hidden - hidden.clip(*_OCCLUDED)) + abs(hidden - share)).argmin())
    length = w if across else h
    start = length - depth if from_end else 0
    if across:
        canvas[:, y - 1 : y + h + 1, x + start : x + start + depth] = gray
    else:
        canvas[:, y + start : y + start + depth, x - 1 : x + w + 1] = gray
