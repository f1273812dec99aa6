"""File names in annotations as paths of photos. A name never leads out of the dataset's root."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from gm_mlic.errors import DataError

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


class PhotoFolder:
    """The photos below a folder. Each folder is listed once.

    Args:
        root: the dataset's root.
        below: folder of the file names, relative to root; empty: root.
    """

    def __init__(self, root: Path, below: str = "") -> None:
        self.root, self.below = root, PurePosixPath(below)
        self._listed: dict[str, tuple[dict[str, str], set[str]]] = {}

    def locate(self, name: str, where: str) -> str | None:
        r"""Path of a photo relative to ``root``, with ``/``.

        The name is relative to the folder, or absolute and inside it. ``\`` separates folders. Composed and decomposed
        characters (NFC, NFD) are equal, as on macOS. If no such file exists, the spellings of annotation tools are
        tried: URL-encoding, Label Studio's upload prefix, and the folder ``images`` that exports add. If none exists
        either, the name is returned as it is, for the caller to report.

        Args:
            name: file name in an annotation.
            where: start of error messages.

        Returns:
            The path as spelled on disk; None if it could be outside the folder.

        Raises:
            DataError: if it is a symbolic link, or below one, that leads out of ``root``.
        """
        exact = self._relative(name)
        found = None if exact is None else self.find(self.below / exact, where)
        for spelling in self._spellings(name) if found is None else ():
            if (other := inside(spelling)) is not None and (found := self.find(self.below / other, where)) is not None:
                break
        if found is not None:
            return str(found)
        return None if exact is None else str(self.below / exact)

    def find(self, path: PurePosixPath, where: str) -> PurePosixPath | None:
        """A path relative to ``root`` as spelled on disk; None if it does not exist.

        Raises:
            DataError: if it leads out of ``root`` through a symbolic link.
        """
        found = ""
        for part in path.parts:
            names, links = self._names(found)
            name = names.get(part) or names.get(unicodedata.normalize("NFC", part))
            if name is None:
                return None
            found = f"{found}/{name}" if found else name
            if name in links:
                self._check_link(found, where)
        return PurePosixPath(found)

    def files(self, folder: PurePosixPath, where: str) -> Iterator[PurePosixPath]:
        """All files below a folder, sorted; paths are relative to ``root``. Hidden files are left out."""
        names, links = self._names("" if folder == PurePosixPath() else str(folder))
        for name in sorted({*names.values()}):
            path = folder / name
            if name.startswith("."):
                continue
            if name in links:
                self._check_link(str(path), where)
            if (self.root / path).is_dir():
                if name not in links:  # a link to a parent folder would never end
                    yield from self.files(path, where)
            else:
                yield path

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
                if folder == "images" and rest and self.find(self.below / folder, name) is None:
                    yield rest

    def _check_link(self, path: str, where: str) -> None:
        if not (self.root / path).resolve().is_relative_to(self.root.resolve()):
            raise DataError(
                f"{where} names {path!r}, a link to a place outside {self.root}: copy the photos into this folder, or "
                "set `root` to theirs."
            )

    def _names(self, folder: str) -> tuple[dict[str, str], set[str]]:
        """Names in a folder by exact and by composed spelling, and those of them that are links."""
        if folder not in self._listed:
            names: dict[str, str] = {}
            links: set[str] = set()
            try:
                with os.scandir(self.root / folder) as entries:
                    for entry in entries:
                        names[entry.name] = entry.name
                        if entry.is_symlink():
                            links.add(entry.name)
            except (OSError, ValueError):
                pass
            for name in sorted(names):
                names.setdefault(unicodedata.normalize("NFC", name), name)
            self._listed[folder] = names, links
        return self._listed[folder]
