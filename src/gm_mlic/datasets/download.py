"""Download, verify and safely unpack dataset archives.

A call that is interrupted at any point, even by ``kill -9``, is resumed by calling it again:

- Bytes are appended to ``downloads/NAME.part``. ``NAME.part.json`` records the version of the remote file, so that a
  transfer resumes only with bytes of the same version.
- ``NAME`` exists only after its hash was verified.
- Archives are unpacked to ``.NAME.unpacking`` inside the target folder, so that moving needs no copying. When all
  members are checked and written, this folder is renamed to ``.NAME.moving`` and its content is moved into place.
  Before ``.NAME.moving`` exists, no target file is touched; while it exists, the move must be completed.

A file lock in ``downloads`` serializes the processes that use one root.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import logging
import lzma
import re
import shutil
import ssl
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gm_mlic._version import __version__
from gm_mlic.errors import DataError

log = logging.getLogger(__name__)

#: Subfolder of a dataset root that keeps the archives.
DOWNLOADS = "downloads"
#: Seconds without data after which a connection is considered broken.
TIMEOUT_S = 30.0
#: Seconds to wait before each retry; after the last one the download fails. The count restarts after ``GAIN`` new
#: bytes.
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
GAIN = 1 << 20
#: Seconds between progress log lines without a terminal.
LOG_S = 10.0

#: Limits against decompression bombs: number of members; growth factor, applied above ``ALWAYS_FINE`` bytes. (MS-COCO's
#: largest archive has 82,783 photos; annotations compress to a tenth, photos not at all.)
MAX_MEMBERS = 2_000_000
MAX_GROWTH, ALWAYS_FINE = 200, 1 << 30

_CHUNK = 1 << 18
#: HTTP status codes that are worth a retry.
_PASSING = {408, 425, 429, 500, 502, 503, 504}
#: File system errors caused by invalid member names.
_BAD_NAME = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENOTEMPTY}


@dataclass(frozen=True)
class Archive:
    """One archive of a dataset and its target folder.

    Attributes:
        url: address; the last part of its path is the file name.
        hash: ``md5:HEX`` or ``sha256:HEX`` of the archive.
        size: expected size in bytes, used in messages and for progress if the server sends no size; not verified.
        into: folder, relative to the root, in which it is unpacked.
        holds: paths, relative to the root, that exist once it is unpacked. The last file of the archive is a better
            indicator than a folder, which exists from the first file on.
    """

    url: str
    hash: str
    size: int | None = None
    into: str = "."
    holds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", self.hash):
            raise ValueError(f"hash={self.hash!r}: expected md5: and 32, or sha256: and 64 lower-case hex digits")
        if not self.name or not self.holds:
            raise ValueError(f"{self.url}: url must end in a file name, and holds must not be empty")

    @property
    def name(self) -> str:
        """The archive's file name."""
        return PurePosixPath(unquote(urlsplit(self.url).path)).name


def fetch(archives: Sequence[Archive], root: str | Path, mirror: str | None = None) -> None:
    """Download missing archives and unpack them under ``root``. Does nothing if all are unpacked.

    An archive in ``root`` or ``root/downloads`` is used after its hash was verified. Otherwise it is downloaded to
    ``root/downloads``. An earlier transfer is resumed if the server supports HTTP Range and the file has not changed;
    a broken transfer is retried (see :data:`WAITS_S`). Archives are kept. Other processes that fetch to the same root
    wait.

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
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("Waiting for another process that downloads to %s.", root)
        lock.acquire()
    try:
        for archive in archives:
            _fetch(archive, root, folder)
    except KeyboardInterrupt:
        log.warning("Interrupted. Run the same command again to resume the download to %s.", folder)
        raise
    finally:
        lock.release()


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
    into.mkdir(parents=True, exist_ok=True)
    _finish_move(into, archive_file.name)
    staging = into / f".{archive_file.name}.unpacking"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    try:
        with archive_file.open("rb") as raw, _Meter(f"Unpacking {archive_file.name}") as meter:
            meter.start(0, archive_file.stat().st_size)
            if archive_file.suffix.lower() == ".zip":
                _unpack_zip(raw, archive_file, staging, meter)
            else:
                _unpack_tar(raw, archive_file, staging, meter)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None and error.errno not in _BAD_NAME:
            raise  # a disk error, not a damaged archive
        # RuntimeError: encrypted zip; NotImplementedError: unsupported compression
        damage = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError)
        if isinstance(error, (*damage, ValueError, RuntimeError)):
            why = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
            raise DataError(f"{archive_file} cannot be unpacked ({why}): download it again.") from error
        raise
    staging.rename(_moving(into, archive_file.name))
    _finish_move(into, archive_file.name)


# --- single archive ---


def _is_unpacked(archive: Archive, root: Path) -> bool:
    return not _moving(root / archive.into, archive.name).exists() and all((root / p).exists() for p in archive.holds)


def _fetch(archive: Archive, root: Path, folder: Path) -> None:
    into = root / archive.into
    _finish_move(into, archive.name)
    if _is_unpacked(archive, root):
        return
    for file in (root / archive.name, folder / archive.name):
        if file.is_file():
            digest = _digest(file, archive)
            if digest != archive.hash:
                raise DataError(
                    f"{file} has the wrong hash {digest}, expected {archive.hash}: remove it and run the same command "
                    "again to download it."
                )
            break
    else:
        file = _download(archive, folder)
    unpack(file, into)
    missing = [path for path in archive.holds if not (root / path).exists()]
    if missing:
        raise DataError(f"{file} was unpacked to {into}, but {missing[0]} is missing: it is the wrong archive.")
    log.info("Unpacked %s to %s; the archive (%s) is no longer needed.", file, into, decimal(file.stat().st_size))


def _digest(file: Path, archive: Archive) -> str:
    """Hash of the file, in the format of ``archive.hash``."""
    algorithm = archive.hash.partition(":")[0]
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as raw, _Meter(f"Checking {file.name}") as meter:
        meter.start(0, file.stat().st_size)
        while chunk := raw.read(_CHUNK):
            digest.update(chunk)
            meter.advance(len(chunk))
    return f"{algorithm}:{digest.hexdigest()}"


# --- download ---


class _Broken(Exception):  # noqa: N818 - retried, not yet an error
    """A transfer failed and may succeed on retry."""


@dataclass(frozen=True)
class _Version:
    """Version of the remote file that a ``.part`` file belongs to."""

    url: str
    etag: str | None
    modified: str | None
    size: int | None

    @classmethod
    def of(cls, url: str, headers: Any, size: int | None) -> _Version:
        return cls(url, headers.get("ETag"), headers.get("Last-Modified"), size)

    @classmethod
    def read(cls, file: Path) -> _Version | None:
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # missing, or truncated when a process was killed
            return None

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @property
    def validator(self) -> str | None:
        """Value for ``If-Range``; weak ETags do not guarantee equal bytes."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    def differs_from(self, version: _Version) -> bool:
        """Whether any field that both versions have differs."""
        pairs = ((self.etag, version.etag), (self.modified, version.modified), (self.size, version.size))
        return any(a is not None and b is not None and a != b for a, b in pairs)


def _download(archive: Archive, folder: Path) -> Path:
    """Download to ``folder``, resuming a partial file; returns the verified file."""
    part = folder / f"{archive.name}.part"
    note = folder / f"{archive.name}.part.json"
    furthest = _size(part)
    failures = 0
    log.info("Downloading %s to %s.", archive.url, folder)
    with _Meter(archive.name) as meter:
        while True:
            try:
                _transfer(archive, part, note, meter)
                break
            except _Broken as broken:
                if _size(part) >= furthest + GAIN:
                    furthest, failures = _size(part), 0
                if failures == len(WAITS_S):
                    raise DataError(
                        f"{archive.url} could not be downloaded ({broken}): {decimal(_size(part))} are kept; run the "
                        f"same command again to resume, or download it manually to {folder}."
                    ) from broken
                log.warning("%s: %s; retrying in %.0f s.", archive.name, broken, WAITS_S[failures])
                time.sleep(WAITS_S[failures])
                failures += 1
    digest = _digest(part, archive)
    if digest != archive.hash:
        size = f"{part.stat().st_size:,} bytes" + (f", expected about {archive.size:,}" if archive.size else "")
        part.unlink()
        note.unlink(missing_ok=True)
        raise DataError(
            f"{archive.url} has the wrong hash {digest}, expected {archive.hash} ({size}), and was deleted: try again "
            f"later, or download it manually to {folder}."
        )
    file = part.with_name(archive.name)
    part.replace(file)
    note.unlink(missing_ok=True)  # after the rename: a part without its note restarts from zero
    return file


def _transfer(archive: Archive, part: Path, note: Path, meter: _Meter) -> None:
    """Download the remaining bytes of ``part`` in one attempt."""
    version = _Version.read(note)
    done = _size(part) if version and version.url == archive.url else 0
    if version and done and done == version.size:
        return
    headers = {"User-Agent": f"gm-mlic/{__version__}"}
    if version and done:
        headers["Range"] = f"bytes={done}-"
        if version.validator:
            headers["If-Range"] = version.validator
    try:
        response = _open(archive, part, urllib.request.Request(archive.url, headers=headers))
    except _NoSuchRange as error:
        if error.size == done:  # complete; the server had not sent the size
            return
        part.unlink(missing_ok=True)
        raise _Broken("the remote file is shorter than before") from error
    with response:
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdigit() else None
        if response.status == http.client.PARTIAL_CONTENT:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            start, whole = (int(span[1]), span[2]) if span else (None, "*")
            total = int(whole) if whole != "*" else None if total is None else done + total
            # some servers support Range but ignore If-Range
            remote = _Version.of(archive.url, response.headers, total)
            if start != done or version is None or version.differs_from(remote):
                part.unlink(missing_ok=True)
                raise _Broken("the remote file has changed")
            log.info("%s: resuming at %s.", archive.name, decimal(done))
        else:
            if done:
                log.info("%s: the server does not resume this transfer; restarting.", archive.name)
            done = 0
            part.unlink(missing_ok=True)  # before the note: bytes and note must be of the same version
            _Version.of(archive.url, response.headers, total).write(note)
        meter.start(done, total if total is not None else archive.size)
        with part.open("ab") as file:
            while chunk := _read(response):
                file.write(chunk)
                done += len(chunk)
                meter.advance(len(chunk))
    if total is not None and done < total:
        raise _Broken(f"the connection was closed after {done:,} of {total:,} bytes")


class _NoSuchRange(Exception):  # noqa: N818 - a response, not an error
    """HTTP 416, with the size of the remote file if sent."""

    def __init__(self, size: int | None) -> None:
        self.size = size


def _open(archive: Archive, part: Path, request: urllib.request.Request) -> http.client.HTTPResponse:
    remedy = f"check the connection, or download it manually to {part.parent}."
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        return response
    except urllib.error.HTTPError as error:
        with error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and request.has_header("Range"):
                size = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
                raise _NoSuchRange(int(size[1]) if size else None) from error
            answer = f"HTTP {error.code} {error.reason}"
        if error.code in _PASSING:
            raise _Broken(answer) from error
        raise DataError(f"{archive.url} could not be downloaded ({answer}): {remedy}") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DataError(f"{archive.url} could not be downloaded ({error.reason}): {remedy}") from error
        raise _Broken(str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:  # while the response headers were read
        raise _Broken(str(error) or type(error).__name__) from error


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"the connection failed: {str(error) or type(error).__name__}") from error


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


# --- unpacking ---


def _checked(name: str, archive_file: Path) -> PurePosixPath:
    """Member name as a relative path without ``..``, on every system."""
    path = PureWindowsPath(name)  # handles both slashes and drive letters
    if path.anchor or ".." in path.parts or "\0" in name:
        raise DataError(
            f"{archive_file} is not safe to unpack: its member {name!r} points outside the folder. Nothing was "
            "unpacked; download the archive from its official source."
        )
    return PurePosixPath(*path.parts)


def _refuse(name: str, archive_file: Path) -> DataError:
    return DataError(
        f"{archive_file} is not safe to unpack: its member {name!r} is a link or a device, not a file or a folder. "
        "Nothing was unpacked; download the archive from its official source."
    )


class _SizeLimit:
    """Counter of unpacked files and bytes that refuses decompression bombs before the member is written."""

    def __init__(self, archive_file: Path) -> None:
        self.archive_file, self.members, self.bytes = archive_file, 0, 0
        self.limit = max(ALWAYS_FINE, MAX_GROWTH * archive_file.stat().st_size)

    def add(self, size: int) -> None:
        self.members += 1
        self.bytes += size
        if self.members > MAX_MEMBERS or self.bytes > self.limit:
            raise DataError(
                f"{self.archive_file} would unpack to more than {self.members - 1:,} files and "
                f"{decimal(self.bytes - size)}: it is refused as a decompression bomb."
            )


def _unpack_tar(raw: BinaryIO, archive_file: Path, folder: Path, meter: _Meter) -> None:
    if not hasattr(tarfile, "data_filter"):
        version = ".".join(map(str, sys.version_info[:3]))
        raise DataError(
            f"Python {version} cannot unpack {archive_file} safely: update to 3.10.12, 3.11.4, 3.12 or later, or "
            "unpack it manually."
        )
    size = _SizeLimit(archive_file)
    with tarfile.open(fileobj=raw, mode="r:*") as tar:
        for member in tar:
            size.add(member.size)
            # Stricter than filter="data", which makes absolute names relative and allows internal links; these could
            # escape the folder in Python releases before June 2025.
            _checked(member.name, archive_file)
            if not (member.isreg() or member.isdir()):
                raise _refuse(member.name, archive_file)
            tar.extract(member, folder, filter="data")
            meter.at(raw.tell())
        while tar.fileobj is not None and tar.fileobj.read(_CHUNK):
            pass  # the checksum of a compressed tar follows its last member


def _unpack_zip(raw: BinaryIO, archive_file: Path, folder: Path, meter: _Meter) -> None:
    size = _SizeLimit(archive_file)
    with zipfile.ZipFile(raw) as archive:
        for member in archive.infolist():
            size.add(member.file_size)
            target = folder / _checked(member.filename, archive_file)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refuse(member.filename, archive_file)
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, _CHUNK)
            meter.at(raw.tell())


def _moving(into: Path, name: str) -> Path:
    return into / f".{name}.moving"


def _finish_move(into: Path, name: str) -> None:
    """Complete the move of ``.NAME.moving`` into place, if it exists."""
    moving = _moving(into, name)
    if moving.is_dir():
        _merge(moving, into)
        moving.rmdir()


def _merge(source: Path, target: Path) -> None:
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            _merge(entry, place)
            entry.rmdir()
        elif place.exists() and (entry.is_dir() or place.is_dir()):
            raise DataError(f"{place} is in the way: remove it and run the same command again to resume.")
        else:
            shutil.move(entry, place)  # a rename, unless a folder is a link to another disk


class _Meter:
    """Progress in bytes, with speed and remaining time: a bar on a terminal, else a log line every 10 s."""

    def __init__(self, what: str) -> None:
        self.what = what
        console = Console(stderr=True)
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task(what, total=None)
        self.start(0, None)

    def __enter__(self) -> _Meter:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, done: int, total: int | None) -> None:
        """Start or restart with ``done`` bytes already complete."""
        self.done = self.resumed = done
        self.total = total
        self.began = self.logged = time.monotonic()
        if self.bar is not None:
            self.bar.reset(self.task, total=total, completed=done)

    def at(self, done: int) -> None:
        self.advance(done - self.done)

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        elif now - self.logged > LOG_S:
            speed = max(self.done - self.resumed, 1) / (now - self.began)
            of, left = "", ""
            if self.total is not None:
                of, left = f" of {decimal(self.total)}", f", {max(self.total - self.done, 0) / speed:.0f} s left"
            log.info("%s: %s%s, %s/s%s", self.what, decimal(self.done), of, decimal(int(speed)), left)
            self.logged = now
