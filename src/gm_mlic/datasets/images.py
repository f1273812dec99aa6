"""Image reader: any format that Pillow decodes, returned as RGB, 8 bit, upright."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gm_mlic.errors import DataError, UnreadableImage
from gm_mlic.io import first_line

log = logging.getLogger(__name__)

#: Larger images are refused before decoding: 100 million pixels need 300 MB as RGB, 1.2 GB as a float tensor.
MAX_PIXELS = 100_000_000

#: Suffixes of image files.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".heic", ".heif", ".ppm", ".pgm"}
)

#: EXIF orientation tag; values 5 to 8 swap width and height.
_ORIENTATION = 0x0112

#: Formats whose further images are frames or pages. Those of other formats are previews, depth maps or layers.
_ANIMATED = frozenset({"GIF", "PNG", "WEBP", "TIFF", "AVIF"})
#: The animated file that is in the log; only the first one is.
_logged: list[str] = []

#: Brands in the first bytes of HEIC and AVIF files.
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")


def read_image(path: str | Path) -> Image.Image:
    """Read one image file as RGB, 8 bit per channel, upright.

    The EXIF orientation is applied. Gray, palette, CMYK and other modes are converted; 16-bit gray is scaled to 8 bit
    (value / 257); transparent pixels are blended with white. The first frame of an animated file is read; a line of
    the log says so, once per process. The image is fully decoded and the file closed.

    Args:
        path: an image file in any format that Pillow reads. HEIC needs ``pip install 'gm-mlic[heif]'``.

    Raises:
        UnreadableImage: if the file is missing, empty, truncated, not an image, or has more than
            :data:`MAX_PIXELS` pixels. The message has the file and the reason.
    """
    with _opened(Path(path)) as image:
        _scale_transparent_color(image)
        image.load()
        result = _to_rgb(_upright(image))
        with contextlib.suppress(Exception):  # of the second frame
            if image.format in _ANIMATED and getattr(image, "is_animated", False) and not _logged:
                _logged.append(str(path))
                log.warning("%s has several frames: only the first one is read, as of all animated files", path)
        return result


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height after :func:`read_image`, from the file header only; raises UnreadableImage as it does."""
    with _opened(Path(path)) as image:
        width, height = image.size
        try:
            rotated = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        except Exception:
            rotated = False
        return (height, width) if rotated else (width, height)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image and read its header; any error, also in the ``with`` block, becomes UnreadableImage."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise UnreadableImage(f"Image {path} does not exist: restore the file or remove it from the list.") from error
    except (OSError, ValueError) as error:
        raise UnreadableImage(f"Image {path} cannot be opened ({first_line(error)}).") from error
    if path.is_dir():
        raise UnreadableImage(f"Image {path} is a folder: name an image file.")
    if size == 0:
        raise UnreadableImage(f"Image {path} is empty (0 bytes): copy or download it again.")
    has_reader = True
    try:
        if _is_heif(path):
            has_reader = _register_heif()
        with warnings.catch_warnings():
            # Pillow warns above 89 million pixels; MAX_PIXELS is checked below. Damaged metadata is no error if the
            # pixels are intact.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise UnreadableImage(
                        f"Image {path} has {width} x {height} pixels, over the limit of {MAX_PIXELS:,}: scale it down."
                    )
                yield image
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:  # Pillow refuses the largest images when opening
        raise UnreadableImage(f"Image {path} is over the limit of {MAX_PIXELS:,} pixels: scale it down.") from error
    except UnidentifiedImageError as error:
        problem = "is not an image, or damaged, or of an unknown format: convert it to JPEG or PNG."
        if not has_reader:
            problem = "is HEIC or AVIF: install its reader (pip install 'gm-mlic[heif]'), or convert it to JPEG or PNG."
        raise UnreadableImage(f"Image {path} {problem}") from error
    except Exception as error:  # on damaged files, Pillow's decoders raise errors of almost any class
        raise UnreadableImage(
            f"Image {path} cannot be decoded ({first_line(error)}): copy or download it again."
        ) from error


def _is_heif(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(12)
    return start[4:8] == b"ftyp" and start[8:] in _HEIF


@functools.cache
def _register_heif() -> bool:
    """Add the reader of HEIC to Pillow; whether it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def check_size(path: Path, size: tuple[int, int], annotated: tuple[int, int], where: str) -> None:
    """Raise :class:`DataError` if the (width, height) of an image differs from the annotated one."""
    if size != annotated:
        raise DataError(
            f"Image {path} is {size[0]} x {size[1]} pixels, but {where} has {annotated[0]} x {annotated[1]}: correct "
            "the annotation or replace the image."
        )


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """An RGB image, or its pixels (H, W, 3) uint8, as (3, H, W) float32 in [0, 1]."""
    if isinstance(image, Image.Image) and image.mode != "RGB":
        image = image.convert("RGB")
    array = np.array(image)  # a writable copy, as torch requires
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().to(torch.float32) / 255.0


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; with damaged metadata, return the image unchanged."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _scale_transparent_color(image: Image.Image) -> None:
    """Scale the transparent color of a PNG, which Pillow keeps as in the file, to the pixels that Pillow decodes."""
    color = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    if image.format != "PNG" or not tiles or not isinstance(color, (int, tuple)):
        return
    stored = tiles[0][3]
    if stored in ("L;2", "L;4") and isinstance(color, int):
        image.info["transparency"] = color * 255 // (3 if stored == "L;2" else 15)
    elif stored == "RGB;16B" and isinstance(color, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _wide_gray_to_rgb(image)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    # `convert` copies an RGB image, which also releases the file.
    return image.convert("RGB")


def _wide_gray_to_rgb(image: Image.Image) -> Image.Image:
    """Scale gray with more than 8 bits to RGB; Pillow's conversion clips at 255."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    # 16-bit files have mode I;16 or, from older PNG and TIFF readers, I with values up to 65,535. Mode F has no fixed
    # range; values that fit in 8 bits are used unscaled.
    if image.mode != "F" or values.max(initial=0.0) > 255.0:
        values = values / 257.0
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[np.asarray(image) == transparent] = 255.0
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
