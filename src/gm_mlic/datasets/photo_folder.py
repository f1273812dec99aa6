"""File names in annotations as paths of photos. A name never leads out of the dataset's root."""

from __future__ import annotations

import itertools
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

#: Where Label Studio serves photos, and the prefix of an uploaded file.
_SERVED = re.compile(r"^.*(?:/data/upload/(?:\d+/)?|/data/local-files/\?d=)", re.DOTALL)
_UPLOAD = re.compile(r"(^|/)[0-9a-f]{8}-(?=[^/]+$)")


def inside(name: str) -> PurePosixPath | None:
    r"""A relative file name as a path with ``/``; None if it could lead out of a folder on any operating system.

    ``\`` separates folders. Absolute names, ``..``, drive letters and network paths are refused.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    unsafe = not path.parts or path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name
    return None if unsafe else path


def file_size(path: Path) -> int | None:
    """Size of a file in bytes; None if there is none of this name."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


class PhotoFolder:
    """The photos below a folder. Each folder is listed once. Symbolic links are followed.

    Args:
        root: the dataset's root.
        below: folder of the file names, relative to root; empty: root.
    """

    def __init__(self, root: Path, below: str = "") -> None:
        self.root, self.below = root, PurePosixPath(below.replace("\\", "/"))
        self._listed: dict[str, dict[str, str]] = {}

    def locate(self, name: str) -> str | None:
        r"""Path of a photo relative to ``root``, with ``/``.

        The name is relative to the folder, or absolute and inside it. ``\`` separates folders. Composed and decomposed
        characters (NFC, NFD) are equal, as on macOS. If no such file exists, the spellings of annotation tools are
        tried: URL-encoding, Label Studio's upload prefix, and the folder ``images`` that exports add. If none exists
        either, the name is returned as it is, for the caller to report; None if it could be outside the folder.
        """
        exact = self._relative(name)
        for path in itertools.chain([exact], map(inside, self._spellings(name))):
            if path is not None and (found := self.find(self.below / path)) is not None:
                return str(found)
        return None if exact is None else str(self.below / exact)

    def find(self, path: PurePosixPath) -> PurePosixPath | None:
        """A path relative to ``root`` as spelled on disk; None if it does not exist."""
        found = ""
        for part in path.parts:
            names = self._names(found)
            name = names.get(part) or names.get(unicodedata.normalize("NFC", part))
            if name is None:
                return None
            found = f"{found}/{name}" if found else name
        return PurePosixPath(found)

    def files(self, folder: PurePosixPath, parents: tuple[Path, ...] = ()) -> Iterator[PurePosixPath]:
        """All files below a folder, sorted; paths are relative to ``root``. Hidden files are left out."""
        here = (self.root / folder).resolve()
        if here in parents:  # a link to a parent folder would never end
            return
        names = self._names("" if folder == PurePosixPath() else str(folder))
        for name in sorted({*names.values()}):
            if name.startswith("."):
                continue
            if (self.root / folder / name).is_dir():
                yield from self.files(folder / name, (*parents, here))
            else:
                yield folder / name

    def _relative(self, name: str) -> PurePosixPath | None:
        if os.path.isabs(name):  # noqa: PTH117 - faster, for each row of a table
            base = self.root / self.below
            for start in (base.absolute(), base.resolve()):
                if Path(name).is_relative_to(start):
                    return inside(Path(name).relative_to(start).as_posix())
        return inside(name)

    def _spellings(self, name: str) -> Iterator[str]:
        for text in dict.fromkeys((name, unquote(name))):
            served = _SERVED.sub("", text.replace("\\", "/"))
            for plain in dict.fromkeys((served, _UPLOAD.sub(r"\1", served))):
                yield plain
                folder, _, rest = plain.partition("/")
                if folder == "images" and rest and self.find(self.below / folder) is None:
                    yield rest

    def _names(self, folder: str) -> dict[str, str]:
        """Names in a folder by exact and by composed spelling."""
        if folder not in self._listed:
            try:
                names = {name: name for name in sorted(os.listdir(self.root / folder))}  # noqa: PTH208 - names only
            except (OSError, ValueError):
                names = {}
            for name in list(names):
                names.setdefault(unicodedata.normalize("NFC", name), name)
            self._listed[folder] = names
        return self._listed[folder]
