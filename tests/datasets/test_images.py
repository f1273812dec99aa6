from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

from gm_mlic.datasets import images
from gm_mlic.datasets.images import read_image, to_tensor
from gm_mlic.errors import UnreadableImage


def gradient(height: int = 24, width: int = 32) -> np.ndarray:
    """Smooth image with four different corners, to detect rotations and swapped channels."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * y / (height - 1), 255 * x / (width - 1), 128 + 0 * x], axis=-1).astype(np.uint8)


def assert_rgb(image: Image.Image, expected: np.ndarray, tolerance: int = 0) -> None:
    assert image.mode == "RGB"
    array = np.asarray(image).astype(int)
    assert array.shape == expected.shape
    assert np.abs(array - expected.astype(int)).max() <= tolerance


@pytest.mark.parametrize(("suffix", "tolerance"), [("png", 0), ("bmp", 0), ("tiff", 0), ("jpg", 12)])
def test_rgb_formats_are_read_unchanged(tmp_path: Path, suffix: str, tolerance: int) -> None:
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(gradient()).save(path, **({"quality": 95} if suffix == "jpg" else {}))
    assert_rgb(read_image(path), gradient(), tolerance)
    assert_rgb(read_image(str(path)), gradient(), tolerance)


@pytest.mark.parametrize(("orientation", "undo"), [
    (1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (4, lambda a: a[::-1]),
    (5, lambda a: a.transpose(1, 0, 2)), (6, lambda a: np.rot90(a, 1)),
    (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)), (8, lambda a: np.rot90(a, -1)),
])  # fmt: skip
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, undo) -> None:
    """Rotated images with an orientation tag (EXIF 2.3, 0x0112) are read upright."""
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(undo(gradient()))
    Image.fromarray(stored).save(path, quality=95, exif=exif)
    assert_rgb(read_image(path), gradient(), 14)


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "exif.jpg"
    Image.fromarray(gradient()).save(path, quality=95, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert_rgb(read_image(path), gradient(), 12)


def test_gray_has_equal_channels(tmp_path: Path) -> None:
    gray = gradient()[..., 0]
    for suffix, tolerance in (("png", 0), ("jpg", 8)):
        path = tmp_path / f"gray.{suffix}"
        Image.fromarray(gray).save(path)
        assert_rgb(read_image(path), np.repeat(gray[..., None], 3, -1), tolerance)


def test_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    bits = gradient()[..., 0] > 100
    Image.fromarray(bits).save(tmp_path / "bits.png")
    assert_rgb(read_image(tmp_path / "bits.png"), np.repeat(bits[..., None] * 255, 3, -1))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = (gradient()[..., 1].astype(np.uint16)) * 257  # 0 .. 65,535, exactly 0 .. 255 after division by 257
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    assert_rgb(read_image(tmp_path / f"deep.{suffix}"), np.repeat(gradient()[..., 1:2], 3, -1))


def test_dark_sixteen_bit_gray_stays_dark(tmp_path: Path) -> None:
    """Scaling depends on the format, not on the image's maximum: 200 of 65,535 is nearly black."""
    Image.fromarray(np.full((5, 6), 200, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert_rgb(read_image(tmp_path / "dark.png"), np.full((5, 6, 3), 1))


def test_transparency_is_blended_with_white(tmp_path: Path) -> None:
    color, alpha = gradient(), np.zeros((24, 32), np.uint8)
    alpha[:, 16:], alpha[0, 0] = 255, 128
    Image.fromarray(np.dstack([color, alpha])).save(tmp_path / "rgba.png")
    share = alpha[..., None] / 255
    assert_rgb(read_image(tmp_path / "rgba.png"), color * share + 255 * (1 - share), 1)
    Image.fromarray(np.dstack([color[..., 0], alpha])).save(tmp_path / "la.png")
    assert_rgb(read_image(tmp_path / "la.png"), color[..., [0, 0, 0]] * share + 255 * (1 - share), 1)


def test_palette_with_transparent_entry(tmp_path: Path) -> None:
    image = Image.fromarray(np.repeat([[0, 1, 2]], 4, axis=0).astype(np.uint8), mode=None)
    paletted = Image.new("P", image.size)
    paletted.putdata(list(image.tobytes()))
    paletted.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    expected = np.repeat([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], 4, axis=0)
    paletted.save(tmp_path / "plain.png")
    assert_rgb(read_image(tmp_path / "plain.png"), expected)
    paletted.save(tmp_path / "hole.png", transparency=1)
    expected[:, 1] = 255
    assert_rgb(read_image(tmp_path / "hole.png"), expected)
    paletted.save(tmp_path / "hole.gif", transparency=1)
    assert_rgb(read_image(tmp_path / "hole.gif"), expected)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of each PNG color type


def write_png(path: Path, pixels: np.ndarray, depth: int, color: int, **extra: bytes) -> None:
    """A PNG of integer samples (H, W, channels), written from the specification, apart from Pillow."""
    height, width, _ = pixels.shape
    bits = (pixels.reshape(height, -1)[..., None] >> np.arange(depth)[::-1]) & 1  # most significant bit first
    lines = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    parts = [chunk(name.encode(), extra[name]) for name in ("PLTE", "tRNS") if name in extra]
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(parts) + data + chunk(b"IEND", b""))


def blended(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colors (H, W, 3) in [0, 1] over white, as 8 bit."""
    return np.rint(255 * (color * alpha[..., None] + 1 - alpha[..., None]))


@pytest.mark.parametrize(
    ("depth", "color"),
    [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2), (8, 4), (16, 4), (8, 6), (16, 6)],
)
def test_png_of_every_depth(tmp_path: Path, depth: int, color: int) -> None:
    top = 2**depth - 1
    samples = np.random.default_rng(depth).integers(0, top + 1, (9, 7, CHANNELS[color]))
    write_png(tmp_path / "x.png", samples, depth, color)
    values = samples / top
    alpha = values[..., -1] if color in (4, 6) else np.ones((9, 7))
    rgb = np.repeat(values[..., :1], 3, axis=-1) if color in (0, 4) else values[..., :3]
    assert_rgb(read_image(tmp_path / "x.png"), blended(rgb, alpha), 2)  # rounding of 16 bit


@pytest.mark.parametrize(("depth", "color"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_png_with_one_transparent_color(tmp_path: Path, depth: int, color: int) -> None:
    """Chunk tRNS of gray and color images; its value has the depth of the image."""
    samples = np.random.default_rng(1).integers(0, 2**depth, (4, 5, CHANNELS[color]))
    hole = samples[2, 3]
    write_png(tmp_path / "x.png", samples, depth, color, tRNS=struct.pack(f">{len(hole)}H", *hole))
    values = samples / (2**depth - 1)
    alpha = 1.0 - (samples == hole).all(axis=-1)
    assert_rgb(read_image(tmp_path / "x.png"), blended(np.broadcast_to(values, (4, 5, 3)), alpha), 1)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palette_png_with_alpha(tmp_path: Path, depth: int) -> None:
    """Chunk tRNS of a palette: the alpha of the first entries; the others are opaque."""
    rng = np.random.default_rng(depth)
    palette = rng.integers(0, 256, (2**depth, 3))
    opacity = np.full(2**depth, 255)
    opacity[: 2 ** (depth - 1)] = rng.integers(0, 256, 2 ** (depth - 1))
    samples = rng.integers(0, 2**depth, (6, 5, 1))
    extra = {
        "PLTE": palette.astype(np.uint8).tobytes(),
        "tRNS": opacity[: 2 ** (depth - 1)].astype(np.uint8).tobytes(),
    }
    write_png(tmp_path / "x.png", samples, depth, 3, **extra)
    index = samples[..., 0]
    assert_rgb(read_image(tmp_path / "x.png"), blended(palette[index] / 255, opacity[index] / 255), 1)


FRAMES = [np.full((6, 8, 3), color, dtype=np.uint8) for color in ((255, 0, 0), (0, 0, 255))]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_first_frame_of_animated_files(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_logged", [])
    first, second = (Image.fromarray(frame) for frame in FRAMES)
    options = {"lossless": True} if suffix == "webp" else {}
    for name in ("a", "b"):
        first.save(tmp_path / f"{name}.{suffix}", save_all=True, append_images=[second], **options)
        assert_rgb(read_image(tmp_path / f"{name}.{suffix}"), FRAMES[0])
    first.save(tmp_path / f"single.{suffix}", **options)
    read_image(tmp_path / f"single.{suffix}")
    (line,) = caplog.messages  # once
    assert (
        line == f"{tmp_path / f'a.{suffix}'} has several frames: only the first one is read, as of all animated files"
    )


def test_heic_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_register_heif", lambda: False)
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    assert "install its reader (pip install 'gm-mlic[heif]'), or convert it" in refused(tmp_path / "x.heic")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_heic(tmp_path: Path, orientation: int) -> None:
    """HEIC rotates by its own tag (irot), which the EXIF orientation must not repeat."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    upright = np.zeros((32, 64, 3), dtype=np.uint8)
    upright[:, :32] = (255, 0, 0)
    undo = {1: lambda a: a, 3: lambda a: a[::-1, ::-1], 6: lambda a: np.rot90(a, 1), 8: lambda a: np.rot90(a, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    stored.info["exif"] = exif.tobytes()
    stored.save(tmp_path / "x.heic", quality=95)
    assert b"irot" in (tmp_path / "x.heic").read_bytes() or orientation == 1
    assert_rgb(read_image(tmp_path / "x.heic"), upright, 20)
    assert images.image_size(tmp_path / "x.heic") == (64, 32)
    (tmp_path / "x.heic").write_bytes((tmp_path / "x.heic").read_bytes()[:300])
    refused(tmp_path / "x.heic")


def test_avif(tmp_path: Path) -> None:
    if not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    Image.fromarray(gradient()).save(tmp_path / "x.avif", quality=100)
    assert_rgb(read_image(tmp_path / "x.avif"), gradient(), 12)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=95)  # no cyan: red
    assert_rgb(read_image(tmp_path / "ink.jpg"), np.full((6, 8, 3), (255, 0, 0)), 6)


def test_to_tensor(tmp_path: Path) -> None:
    tensor = to_tensor(Image.fromarray(gradient()))
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 24, 32)
    assert tensor.is_contiguous()
    assert torch.equal(tensor, torch.from_numpy(gradient().astype(np.float32).transpose(2, 0, 1) / 255))
    assert tensor.min() == 0
    assert tensor.max() == 1


def refused(path: Path) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_image(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_errors_name_file_and_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not exist" in refused(tmp_path / "none.jpg")
    assert "folder" in refused(tmp_path)
    (tmp_path / "empty.jpg").touch()
    assert "0 bytes" in refused(tmp_path / "empty.jpg")
    (tmp_path / "text.jpg").write_text("<html>404</html>")
    assert "not an image" in refused(tmp_path / "text.jpg")
    Image.fromarray(gradient()).save(tmp_path / "big.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 32 - 1)
    assert "32 x 24" in refused(tmp_path / "big.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 32)
    read_image(tmp_path / "big.png")


@pytest.mark.parametrize("side", [11_000, 13_000, 60_000])  # under, at and over Pillow's own limits
def test_large_images_are_refused_before_decoding(tmp_path: Path, side: int) -> None:
    """PNG with a valid header of side x side pixels and almost no data."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert "over the limit of 100,000,000" in refused(tmp_path / "bomb.png")


def encoded(kind: str) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {
        "jpeg": {"format": "JPEG", "exif": exif},
        "progressive": {"format": "JPEG", "progressive": True},
        "png": {"format": "PNG"},
        "gif": {"format": "GIF"},
        "webp": {"format": "WEBP"},
        "tiff": {"format": "TIFF", "compression": "tiff_lzw"},
        "bmp": {"format": "BMP"},
    }[kind]
    image.save(stream, **options)
    return stream.getvalue()


ENCODED = {kind: encoded(kind) for kind in ("jpeg", "progressive", "png", "gif", "webp", "tiff", "bmp")}


def read_or_refused(path: Path) -> Image.Image | None:
    """Read an image, or None if it is refused; other errors fail the test."""
    try:
        image = read_image(path)
    except UnreadableImage as error:
        image, message = None, str(error)
    if image is None:
        assert str(path) in message
        assert "\n" not in message
    else:
        assert image.mode == "RGB"
    return image


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(ENCODED)), share=st.floats(0, 1, exclude_max=True))
def test_truncated_file_is_read_or_refused(tmp_path: Path, kind: str, share: float) -> None:
    whole = ENCODED[kind]
    path = tmp_path / "cut.img"
    path.write_bytes(whole[: int(share * len(whole))])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    image = read_or_refused(path)
    assert image is None or sorted(image.size) == [40, 50]


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_half_of_a_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "half.img"
    path.write_bytes(ENCODED[kind][: len(ENCODED[kind]) // 2])
    assert "decoded" in refused(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(ENCODED)), data=st.data())
def test_flipped_bytes_are_read_or_refused(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    damaged = bytearray(ENCODED[kind])
    # Mutate headers, whose fields decoders trust.
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, min(len(damaged), 200) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.img"
    path.write_bytes(bytes(damaged))
    read_or_refused(path)


@pytest.mark.shared
def test_real_photos_are_read(shared_data: Path) -> None:
    photos = sorted((shared_data / "coco-mini" / "val2014").glob("*.jpg"))
    assert len(photos) == 82
    assert all(read_image(photo).mode == "RGB" for photo in photos)
