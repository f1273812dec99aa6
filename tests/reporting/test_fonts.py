"""Fonts for letters that DejaVu Sans lacks, tested with generated fonts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from gm_mlic.reporting import fonts
from gm_mlic.reporting.annotated_images import annotated


def make_font(path: Path, family: str, letters: str) -> Path:
    """Font with a triangle for each of these letters and empty glyphs for others."""
    names = [".notdef", *(f"letter{n}" for n in range(len(letters)))]
    pen, empty = TTGlyphPen(None), TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((1000, 0))
    pen.lineTo((500, 1000))
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    builder.setupGlyf({".notdef": empty.glyph(), **dict.fromkeys(names[1:], pen.glyph())})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """List of installed font files, with a damaged one."""
    (tmp_path / "a damaged font.ttf").write_bytes(b"\x00\x01\x00\x00")
    files = [str(tmp_path / "a damaged font.ttf")]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(files))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    monkeypatch.setattr(fonts, "_warned", [])
    cached = (fonts._fonts_for, fonts._installed, fonts._letters_of, fonts._family)
    for function in cached:
        function.cache_clear()
    yield files
    for function in cached:
        function.cache_clear()


def photo(name: str) -> bytes:
    return annotated(Image.new("RGB", (640, 640)), [(name, 0.9, (100, 100, 600, 600))]).tobytes()


def figure(tmp_path: Path, *names: str) -> bytes:
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), names)
    axes.set_title(names[-1], fontweight="bold")
    fonts.save_figure(figure, tmp_path / "x.png")
    return (tmp_path / "x.png").read_bytes()


def test_installed_fonts_with_the_letters_are_used(
    tmp_path: Path, machine: list[str], caplog: pytest.LogCaptureFixture
):
    boxes = photo("猫"), figure(tmp_path, "cat", "猫", "고양이")
    assert "No installed font" in caplog.text
    caplog.clear()
    fonts._installed.cache_clear()
    fonts._fonts_for.cache_clear()
    machine.append(str(make_font(tmp_path / "one.ttf", "One", "猫 0123456789.")))
    machine.append(str(make_font(tmp_path / "two.ttf", "Two", "고양이")))
    drawn = photo("猫"), figure(tmp_path, "cat", "猫", "고양이")
    assert drawn[0] != boxes[0]
    assert drawn[1] != boxes[1]
    assert caplog.text == ""


def test_dejavu_is_used_if_it_has_the_letters(tmp_path: Path, machine: list[str]):
    machine.append(str(make_font(tmp_path / "one.ttf", "One", "猫 0123456789.éж")))
    assert fonts.pillow_font("éж Ω – 0.93", 20).getname()[0] == "DejaVu Sans"
    assert fonts.pillow_font("猫 0.93", 20).getname()[0] == "One"
    assert fonts.pillow_font("", 20).getname()[0] == "DejaVu Sans"


def test_missing_fonts_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        for name in ("猫", "犬", "電車"):
            photo(name)
            figure(tmp_path, name, "cat\n猫")
    (record,) = caplog.records
    assert "letters 猫: pictures show boxes" in record.getMessage()
    assert "fonts-noto-cjk" in record.getMessage()


def test_last_resort_fonts_are_ignored(tmp_path: Path, machine: list[str]):
    machine.append(str(make_font(tmp_path / "all.ttf", "Last Resort", "猫")))
    assert fonts.pillow_font("猫", 20).getname()[0] == "DejaVu Sans"
