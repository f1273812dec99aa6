"""Download, verify and safely unpack dataset archives.

A call that is interrupted at any point, even by ``kill -9``, is resumed by calling it again:

- Bytes are appended to ``downloads/NAME.part``. ``NAME`` exists only after its hash was verified. If the hash is wrong
  since the bytes of an earlier call are of another version of the file, the download restarts.
- Archives are unpacked to ``.NAME.unpacking`` inside the target folder, so that moving needs no copying. When all
  members are checked and written, this folder is renamed to ``.NAME.moving`` and its content is moved into place.
  Before ``.NAME.moving`` exists, no target file is touched; while it exists, the move must be completed.

A file lock in ``downloads`` serializes the processes that use one root.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
import ssl
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout
from rich.filesize import decimal

from gm_mlic._version import __version__
from gm_mlic.errors import DataError
from gm_mlic.io import Progress, first_line, unpacked_limit

log = logging.getLogger(__name__)

#: Subfolder of a dataset root that keeps the archives.
DOWNLOADS = "downloads"
#: Seconds without data after which a connection is considered broken.
TIMEOUT_S = 30.0
#: Seconds to wait before each retry; after the last one the download fails. The count restarts after ``GAIN`` new
#: bytes.
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
GAIN = 1 << 20
#: Largest number of members of an archive; MS-COCO's largest has 82,783 photos.
MAX_MEMBERS = 2_000_000

_CHUNK = 1 << 18
#: HTTP status codes that are worth a retry.
_PASSING = {408, 425, 429, 500, 502, 503, 504}
#: File system errors caused by invalid member names.
_BAD_NAME = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENOTEMPTY}


@dataclass(frozen=True)
class Archive:
    """One archive of a dataset.

    Attributes:
        url: address; the last part of its path is the file name.
        hash: ``md5:HEX`` or ``sha256:HEX`` of the archive, in lower case.
        size: expected size in bytes, used in messages and for progress if the server sends no size; not verified.
        holds: paths, relative to the root, that exist once it is unpacked. The last file of the archive is a better
            indicator than a folder, which exists from the first file on.
    """

    url: str
    hash: str
    size: int | None = None
    holds: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The archive's file name."""
        return PurePosixPath(unquote(urlsplit(self.url).path)).name


def fetch(archives: Sequence[Archive], root: str | Path, mirror: str | None = None) -> None:
    """Download missing archives and unpack them under ``root``. Does nothing if all are unpacked.

    An archive in ``root`` or ``root/downloads`` is used after its hash was verified. Otherwise it is downloaded to
    ``root/downloads``. An earlier transfer is resumed if the server supports HTTP Range; a broken transfer is retried
    (see :data:`WAITS_S`). Archives are kept. Other processes that fetch to the same root wait.

    Args:
        archives: archives in download order.
        root: the dataset folder; created if missing.
        mirror: download from ``MIRROR/NAME`` instead of the official URLs; the expected hashes are the same.

    Raises:
        DataError: if an archive cannot be downloaded, has a wrong hash (a new download is then deleted, an existing
            file is not), cannot be unpacked safely, or lacks an expected file.
        OSError: if the disk is full or cannot be written. Downloaded bytes are kept.
    """
    root = Path(root)
    if mirror is not None:
        archives = [replace(archive, url=f"{mirror.rstrip('/')}/{archive.name}") for archive in archives]
    if all(_is_unpacked(archive, root) for archive in archives):
        return
    folder = root / DOWNLOADS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{folder} cannot be created, a file is in the way: choose another `root`.") from error
    lock = FileLock(folder / ".lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        log.warning("Waiting for another process that downloads to %s.", root)
        held = lock.acquire()
    with held:
        for archive in archives:
            _fetch(archive, root, folder)


def unpack(archive_file: str | Path, into: str | Path) -> None:
    """Unpack a tar (plain, gzip, bzip2 or xz) or zip file into a folder, completely or not at all.

    Existing files of the same names are replaced; other files are kept. An archive is refused, before any target file
    is touched, if it is damaged, has a member with an absolute path, ``..``, a link or a device, or exceeds the size
    limits. Concurrent calls with the same folder are not safe.

    Args:
        archive_file: zip if the name ends in ``.zip``, else tar.
        into: target folder; created if missing.

    Raises:
        DataError: if the archive is refused, this Python cannot unpack tar files safely, or an existing file or folder
            is in the way.
        OSError: if the disk is full or cannot be written.
    """
    archive_file, into = Path(archive_file), Path(into)
    if not archive_file.is_file():
        raise DataError(f"{archive_file}: no such file.")
    _finish_move(into, archive_file.name)
    staging = into / f".{archive_file.name}.unpacking"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        _unpack(archive_file, staging)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        is_disk_error = isinstance(error, OSError) and error.errno is not None and error.errno not in _BAD_NAME
        if is_disk_error or isinstance(error, DataError) or not isinstance(error, Exception):
            raise
        # on damaged archives, the readers raise errors of many classes
        raise DataError(f"{archive_file} cannot be unpacked ({first_line(error)}): download it again.") from error
    staging.rename(_moving(into, archive_file.name))
    _finish_move(into, archive_file.name)


# --- single archive ---


def _is_unpacked(archive: Archive, root: Path) -> bool:
    return not _moving(root, archive.name).exists() and all((root / path).exists() for path in archive.holds)


def _fetch(archive: Archive, root: Path, folder: Path) -> None:
    _finish_move(root, archive.name)
    if _is_unpacked(archive, root):
        return
    file = next((file for file in (root / archive.name, folder / archive.name) if file.is_file()), None)
    if file is None:
        file = _download(archive, folder)
    elif (digest := _digest(file, archive)) != archive.hash:
        raise DataError(
            f"{file} has the wrong hash {digest}, expected {archive.hash}: remove it and run the same command again to "
            "download it."
        )
    unpack(file, root)
    missing = [path for path in archive.holds if not (root / path).exists()]
    if missing:
        raise DataError(f"{file} was unpacked to {root}, but {missing[0]} is missing: it is the wrong archive.")
    log.info("Unpacked %s to %s; the archive (%s) is no longer needed.", file, root, decimal(file.stat().st_size))


def _digest(file: Path, archive: Archive) -> str:
    """Hash of the file, in the format of ``archive.hash``."""
    algorithm = archive.hash.partition(":")[0]
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as raw, Progress(f"Checking {file.name}", "bytes", file.stat().st_size, log=log) as bar:
        while chunk := raw.read(_CHUNK):
            digest.update(chunk)
            bar.advance(len(chunk))
    return f"{algorithm}:{digest.hexdigest()}"


# --- download ---


class _Broken(Exception):  # noqa: N818 - retried, not yet an error
    """A transfer failed and may succeed on retry."""


def _download(archive: Archive, folder: Path) -> Path:
    """Download to ``folder``, resuming a partial file; returns the verified file."""
    part = folder / f"{archive.name}.part"
    log.info("Downloading %s to %s.", archive.url, folder)
    while True:
        resumed = _size(part) > 0
        _transfer_with_retries(archive, part)
        digest, size = _digest(part, archive), part.stat().st_size
        if digest == archive.hash:
            return part.replace(folder / archive.name)
        part.unlink()
        if not resumed:
            expected = f", expected about {archive.size:,}" if archive.size else ""
            raise DataError(
                f"{archive.url} has the wrong hash {digest}, expected {archive.hash} ({size:,} bytes{expected}), and "
                f"was deleted: try again later, or download it manually to {folder}."
            )
        log.warning("%s: wrong hash after resuming; the remote file may have changed, restarting.", archive.name)


def _transfer_with_retries(archive: Archive, part: Path) -> None:
    furthest, waits = _size(part), iter(WAITS_S)
    while True:
        try:
            return _transfer(archive, part)
        except _Broken as broken:
            done = _size(part)
            if done >= furthest + GAIN:
                furthest, waits = done, iter(WAITS_S)
            wait = next(waits, None)
            if wait is None:
                raise DataError(
                    f"{archive.url} could not be downloaded ({broken}): {decimal(done)} are kept; run the same command "
                    f"again to resume, or download it manually to {part.parent}."
                ) from broken
            log.warning("%s: %s; retrying in %.0f s.", archive.name, broken, wait)
            time.sleep(wait)


def _transfer(archive: Archive, part: Path) -> None:
    """Append the missing bytes to ``part`` in one attempt."""
    done = _size(part)
    headers = {"User-Agent": f"gm-mlic/{__version__}"} | ({"Range": f"bytes={done}-"} if done else {})
    with _network(archive, part):
        try:
            response = urllib.request.urlopen(urllib.request.Request(archive.url, headers=headers), timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if done and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # no bytes are missing
            raise
    with response:
        if response.status == HTTPStatus.PARTIAL_CONTENT:
            log.info("%s: resuming at %s.", archive.name, decimal(done))
        else:
            if done:
                log.info("%s: the server does not resume this transfer; restarting.", archive.name)
            part.unlink(missing_ok=True)
            done = 0
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdigit() else None
        with part.open("ab") as file, Progress(archive.name, "bytes", total or archive.size, done, log) as bar:
            while True:
                with _network(archive, part):
                    chunk = response.read1(_CHUNK)
                if not chunk:
                    break
                file.write(chunk)
                bar.advance(len(chunk))
    if total is not None and bar.done < total:
        raise _Broken(f"the connection was closed after {bar.done:,} of {total:,} bytes")


@contextmanager
def _network(archive: Archive, part: Path) -> Iterator[None]:
    """Context manager that converts network errors: to _Broken if a retry may succeed, else to DataError."""
    try:
        yield
    except (OSError, HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            reason, final = f"HTTP {error.code} {error.reason}", error.code not in _PASSING
        else:
            cause = getattr(error, "reason", error)  # of URLError
            reason, final = first_line(cause), isinstance(cause, ssl.SSLCertVerificationError)
        if not final:
            raise _Broken(reason) from error
        raise DataError(
            f"{archive.url} could not be downloaded ({reason}): check the connection, or download it manually to "
            f"{part.parent}."
        ) from error


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


# --- unpacking ---


def _unpack(archive_file: Path, folder: Path) -> None:
    """Check and extract all members."""
    is_zip, limit, count, total = archive_file.suffix.lower() == ".zip", unpacked_limit(archive_file), 0, 0
    progress = Progress(f"Unpacking {archive_file.name}", "bytes", archive_file.stat().st_size, log=log)
    with archive_file.open("rb") as raw, progress as bar:
        for name, size, is_plain, extract in (_zip_members if is_zip else _tar_members)(raw):
            if count == MAX_MEMBERS or total + size > limit:
                raise DataError(
                    f"{archive_file} would unpack to more than {count:,} files and {decimal(total)}: it is refused as "
                    "a decompression bomb."
                )
            count, total = count + 1, total + size
            path = PureWindowsPath(name)  # handles both slashes and drive letters
            is_outside = bool(path.anchor) or ".." in path.parts or "\0" in name
            if is_outside or not is_plain:
                problem = "points outside the folder" if is_outside else "is a link or a device, not a file or a folder"
                raise DataError(
                    f"{archive_file} is not safe to unpack: its member {name!r} {problem}. Nothing was unpacked; "
                    "download the archive from its official source."
                )
            extract(path=folder)
            bar.advance(raw.tell() - bar.done)


#: Name of a member, its size in bytes, whether it is a file or folder, and the function that extracts it.
_Member = tuple[str, int, bool, Callable[..., Any]]


def _tar_members(raw: BinaryIO) -> Iterator[_Member]:
    if not hasattr(tarfile, "data_filter"):
        version = ".".join(map(str, sys.version_info[:3]))
        raise DataError(
            f"Python {version} cannot unpack {raw.name} safely: update to 3.10.12, 3.11.4, 3.12 or later, or unpack it "
            "manually."
        )
    with tarfile.open(fileobj=raw, mode="r:*") as tar:
        for member in tar:
            # filter="data" alone would make absolute names relative and allow internal links, which could escape the
            # folder in Python releases before June 2025
            is_plain = member.isreg() or member.isdir()
            yield member.name, member.size, is_plain, partial(tar.extract, member, filter="data")
        while tar.fileobj is not None and tar.fileobj.read(_CHUNK):
            pass  # the checksum of a compressed tar follows its last member


def _zip_members(raw: BinaryIO) -> Iterator[_Member]:
    with zipfile.ZipFile(raw) as archive:
        for member in archive.infolist():
            is_plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
            yield member.filename, member.file_size, is_plain, partial(archive.extract, member)


def _moving(into: Path, name: str) -> Path:
    return into / f".{name}.moving"


def _finish_move(into: Path, name: str) -> None:
    """Complete the move of ``.NAME.moving`` into place, if it exists."""
    if _moving(into, name).is_dir():
        _merge(_moving(into, name), into)


def _merge(source: Path, target: Path) -> None:
    """Move the content of a folder into another one, and remove it."""
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            _merge(entry, place)
        elif place.exists() and (entry.is_dir() or place.is_dir()):
            raise DataError(f"{place} is in the way: remove it and run the same command again to resume.")
        else:
            shutil.move(entry, place)  # a rename, unless a folder is a link to another disk
    source.rmdir()
