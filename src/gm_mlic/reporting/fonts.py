"""Fonts for label names: DejaVu Sans, and installed fonts for scripts that it lacks."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import font_manager, get_data_path
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import ImageFont

log = logging.getLogger(__name__)

_NO_FONT = (
    "No installed font has the letters %s: pictures show boxes instead. For Chinese, Japanese and Korean, install "
    "fonts-noto-cjk (Debian, Ubuntu), google-noto-sans-cjk-fonts (Fedora) or another font with these letters."
)
#: Missing letters that were logged.
_warned: list[str] = []

#: Font of matplotlib. It covers all European languages; Pillow's font covers English only.
OWN = Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")


def pillow_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Font with the most letters of ``text``; Pillow uses one font per text."""
    letters = _letters([text])
    best = max((OWN, *_fonts_for(letters)), key=lambda path: len(letters & _letters_of(path)))
    return ImageFont.truetype(best, size)


def save_figure(figure: Figure, path: Path, **settings: Any) -> None:
    """Save a figure with fonts for all of its texts; the folder is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    families = [family for path in _fonts_for(_letters(text.get_text() for text in texts)) if (family := _family(path))]
    for text in texts if families else ():
        text.set_fontfamily(list(dict.fromkeys([*text.get_fontfamily(), *families])))
    finder = logging.getLogger("matplotlib.font_manager")
    level = finder.level
    finder.setLevel(logging.ERROR)  # a font may be installed in one weight only
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # logged by _fonts_for
            figure.savefig(path, **settings)
    finally:
        finder.setLevel(level)


def _letters(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(letter for text in texts for letter in text if letter.isprintable() and not letter.isspace())


@functools.lru_cache(maxsize=1024)
def _fonts_for(letters: frozenset[str]) -> tuple[Path, ...]:
    """Installed fonts, chosen greedily, for the letters that :data:`OWN` lacks; letters without a font are logged."""
    missing = letters - _letters_of(OWN)
    chosen: list[Path] = []
    while missing:
        best = max(_installed(), key=lambda path: len(missing & _letters_of(path)), default=OWN)
        found = missing & _letters_of(best)
        if not found:
            if not _warned:  # once per process: each photo may have other labels
                _warned.extend(sorted(missing))
                log.warning(_NO_FONT, "".join(_warned[:10]) + ("..." if len(_warned) > 10 else ""))
            break
        chosen.append(best)
        missing -= found
    return tuple(chosen)


@functools.cache
def _installed() -> tuple[Path, ...]:
    """Installed font files, regular faces first; searched again, since matplotlib's cached list may be outdated."""
    paths = map(Path, font_manager.findSystemFonts())
    unusual = ("bold", "black", "heavy", "light", "thin", "italic", "oblique", "mono", "serif")
    return tuple(sorted(paths, key=lambda path: (sum(word in path.name.lower() for word in unusual), path.name)))


@functools.cache
def _letters_of(path: Path) -> frozenset[str]:
    """Letters of a font; empty if it is not scalable or a last-resort font, which draws boxes."""
    try:
        font = FT2Font(str(path))
    except (RuntimeError, OSError, ValueError):
        return frozenset()
    if not font.scalable or "lastresort" in font.family_name.lower().replace(" ", ""):
        return frozenset()
    return frozenset(map(chr, font.get_charmap()))


@functools.cache
def _family(path: Path) -> str | None:
    """Register a font file with matplotlib; returns its family name."""
    try:
        font_manager.fontManager.addfont(path)
    except (RuntimeError, OSError, ValueError):
        return None
    return FT2Font(str(path)).family_name
