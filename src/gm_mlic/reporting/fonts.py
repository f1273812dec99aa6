"""Fonts that have the letters of labels: matplotlib's own, and for other scripts one of this machine."""

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

#: What was said to be missing.
_warned: list[str] = []

#: It has the letters of all European languages; Pillow's own has those of English and no others.
OWN = Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")


def pillow_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The font that has the most letters of ``text``: Pillow takes one for the whole of it."""
    wanted = _letters([text])
    best = max((OWN, *_fonts_for(wanted)), key=lambda path: len(wanted & _letters_of(path)))
    return ImageFont.truetype(best, size)


def save_figure(figure: Figure, path: Path, **settings: Any) -> None:
    """``figure.savefig``, with fonts for all of its texts."""
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    families = [family for path in _fonts_for(_letters(text.get_text() for text in texts)) if (family := _family(path))]
    for text in texts if families else ():
        text.set_fontfamily(list(dict.fromkeys([*text.get_fontfamily(), *families])))
    finder = logging.getLogger("matplotlib.font_manager")
    level = finder.level
    finder.setLevel(logging.ERROR)  # a font may be there in one weight only
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # said in our words
            figure.savefig(path, **settings)
    finally:
        finder.setLevel(level)


def _letters(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(letter for text in texts for letter in text if letter.isprintable() and not letter.isspace())


@functools.lru_cache(maxsize=1024)
def _fonts_for(wanted: frozenset[str]) -> tuple[Path, ...]:
    """Fonts of this machine for those letters that our own lacks, as few as do; what no font has is logged, once."""
    missing = wanted - _letters_of(OWN)
    chosen: list[Path] = []
    while missing:
        best = max(_installed(), key=lambda path: len(missing & _letters_of(path)), default=OWN)
        found = missing & _letters_of(best)
        if not found:
            _say_what_is_missing("".join(sorted(missing)))
            break
        chosen.append(best)
        missing -= found
    return tuple(chosen)


def _say_what_is_missing(letters: str) -> None:
    if _warned:  # once is enough: each photo may have other labels
        return
    _warned.append(letters)
    log.warning(
        "No font of this machine has the letters %s: pictures show boxes instead. For Chinese, Japanese and Korean, "
        "install fonts-noto-cjk (Debian, Ubuntu), google-noto-sans-cjk-fonts (Fedora) or another font that has them.",
        letters[:10] + ("..." if len(letters) > 10 else ""),
    )


@functools.cache
def _installed() -> tuple[Path, ...]:
    """The font files of this machine, those for running text first; looked for anew, for matplotlib's list is old."""
    paths = map(Path, font_manager.findSystemFonts())
    unusual = ("bold", "black", "heavy", "light", "thin", "italic", "oblique", "mono", "serif")
    return tuple(sorted(paths, key=lambda path: (sum(word in path.name.lower() for word in unusual), path.name)))


@functools.cache
def _letters_of(path: Path) -> frozenset[str]:
    """The letters that a font draws; none if it cannot be scaled, or has a box for each."""
    try:
        font = FT2Font(str(path))
    except (RuntimeError, OSError, ValueError):
        return frozenset()
    if not font.scalable or "lastresort" in font.family_name.lower().replace(" ", ""):
        return frozenset()
    return frozenset(map(chr, font.get_charmap()))


@functools.cache
def _family(path: Path) -> str | None:
    """The name by which matplotlib finds a font file from now on."""
    try:
        font_manager.fontManager.addfont(path)
    except (RuntimeError, OSError, ValueError):
        return None
    return FT2Font(str(path)).family_name
