"""Image reader: any format that Pillow decodes, returned as RGB, 8 bit, upright."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gm_mlic.errors import UnreadableImage
from gm_mlic.io import first_line

#: Larger images are refused before decoding: 100 million pixels need 300 MB as RGB, 1.2 GB as a float tensor.
MAX_PIXELS = 100_000_000

#: EXIF orientation tag; values 5 to 8 swap width and height.
_ORIENTATION = 0x0112

#: Exceptions of Pillow's decoders on damaged files (they differ by format).
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    AttributeError,
    AssertionError,
    ZeroDivisionError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
)


def read_image(path: str | Path) -> Image.Image:
    """Read one image file as RGB, 8 bit per channel, upright.

    The EXIF orientation is applied. Gray, palette, CMYK and other modes are converted; 16-bit gray is scaled to 8 bit
    (value / 257); transparent pixels are blended with white. The image is fully decoded and the file closed.

    Args:
        path: an image file in any format that Pillow reads.

    Raises:
        UnreadableImage: if the file is missing, empty, truncated, not an image, or has more than
            :data:`MAX_PIXELS` pixels. The message has the file and the reason.
    """
    with _opened(Path(path)) as image:
        image.load()
        return _to_rgb(_upright(image))


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height after :func:`read_image`, from the file header only.

    Raises:
        UnreadableImage: as :func:`read_image`, if the header shows it.
    """
    with _opened(Path(path)) as image:
        width, height = image.size
        try:
            rotated = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        except _DECODING_ERRORS:
            rotated = False
        return (height, width) if rotated else (width, height)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image and read its header; any error, also in the ``with`` block, becomes UnreadableImage."""
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise UnreadableImage(
                f"Image {path} does not exist: restore the file or remove it from the list."
            ) from error
        raise UnreadableImage(f"Image {path} cannot be opened ({first_line(error)}).") from error
    if path.is_dir():
        raise UnreadableImage(f"Image {path} is a folder: name an image file.")
    if size == 0:
        raise UnreadableImage(f"Image {path} is empty (0 bytes): copy or download it again.")
    try:
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
        raise UnreadableImage(
            f"Image {path} is not an image, or damaged, or of an unknown format: convert it to JPEG or PNG."
        ) from error
    except _DECODING_ERRORS as error:
        raise UnreadableImage(
            f"Image {path} cannot be decoded ({first_line(error)}): copy or download it again."
        ) from error


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) float32 in [0, 1]."""
    array = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # a writable copy, as torch requires
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().to(torch.float32) / 255.0


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; with damaged metadata, return the image unchanged."""
    try:
        return ImageOps.exif_transpose(image)
    except _DECODING_ERRORS:
        return image


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
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
