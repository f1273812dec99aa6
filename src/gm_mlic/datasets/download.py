"""Fetch a dataset's archives from their official places, check them, and unpack them so that nothing leaves the target.

Everything may be interrupted at any point, by ``kill -9`` too, and is taken up by the same call again:

- bytes arrive in ``downloads/NAME.part``; beside it, ``NAME.part.json`` says of which version of the remote file they
  are, so that a transfer is continued only with more bytes of the same version;
- ``NAME`` is there only once its hash was found right;
- it is unpacked to the folder ``.NAME.unpacking``, inside the target so that moving needs no copying. Only when all of
  it was checked and written is that folder renamed to ``.NAME.moving``, and its content moved into place. While
  ``.NAME.moving`` exists, the move has to be finished; before it exists, nothing in place has been touched.

A file lock in ``downloads`` lets one process at a time work on a root.
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

#: The folder under a dataset's root where archives are kept.
DOWNLOADS = "downloads"
#: Seconds without a byte after which a connection counts as broken.
TIMEOUT_S = 30.0
#: Seconds to wait before each further attempt; after the last of them a download gives up. Attempts are counted anew
#: when one got this many bytes further than the download was when they were last counted anew.
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
GAIN = 1 << 20
#: Seconds between two log lines without a terminal.
LOG_S = 10.0

#: An archive with more members than this, or that grows by more than this factor to more than so many bytes, is taken
#: for a bomb. (MS-COCO's largest has 82,783 photos; annotations shrink to a tenth, photos not at all.)
MAX_MEMBERS = 2_000_000
MAX_GROWTH, ALWAYS_FINE = 200, 1 << 30

_CHUNK = 1 << 18
#: Answers of a server that may be others the next time.
_PASSING = {408, 425, 429, 500, 502, 503, 504}
#: What a file system answers to names that no archive of a dataset has.
_BAD_NAME = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENOTEMPTY}


@dataclass(frozen=True)
class Archive:
    """One archive of a dataset, and where its content belongs.

    Attributes:
        url: where it is; the last part of its path is the file's name.
        hash: ``md5:HEX`` or ``sha256:HEX`` of the archive.
        size: in bytes, for messages and for the progress of a server that does not tell; the hash alone decides.
        into: folder under the root in which it is unpacked.
        holds: paths under the root whose presence says that it is unpacked, by whomever. The last file of the archive
            says so better than a folder, which is there from the first file on.
    """

    url: str
    hash: str
    size: int | None = None
    into: str = "."
    holds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", self.hash):
            raise ValueError(f"hash={self.hash!r} is neither md5: and 32 nor sha256: and 64 lower-case hex digits")
        if not self.name or not self.holds:
            raise ValueError(f"{self.url}: the url must end in a file name, and holds must name a path")

    @property
    def name(self) -> str:
        """The archive's file name."""
        return PurePosixPath(unquote(urlsplit(self.url).path)).name


def fetch(archives: Sequence[Archive], root: str | Path, mirror: str | None = None) -> None:
    """Have every archive unpacked under ``root``; download those that are not there. Does nothing if all are unpacked.

    An archive that is already in ``root`` or ``root/downloads`` is used, once its hash was found right. Else it is
    downloaded to ``root/downloads``, going on where an earlier transfer ended if the server offers that (HTTP Range)
    and still has the same file; a transfer that breaks is tried again (see :data:`WAITS_S`). Archives are kept.
    Other processes that fetch to the same root wait.

    Args:
        archives: in the order in which they are to be fetched.
        root: the dataset's folder; made if need be.
        mirror: take the archives from ``MIRROR/NAME`` instead of their own places; their hashes stay.

    Raises:
        DataError: if an archive cannot be downloaded, has another hash (a downloaded one is then deleted, one that
            was there is not), cannot be unpacked safely, or does not hold what it should.
        OSError: if the disk is full or cannot be written. What was downloaded so far stays.
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
        raise DataError(f"{folder} cannot be made, a file is in the way: choose another `root`.") from error
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("Waiting for another process that is fetching to %s.", root)
        lock.acquire()
    try:
        for archive in archives:
            _fetch(archive, root, folder)
    except KeyboardInterrupt:
        log.warning("Stopped. The same command continues the download to %s where it stopped.", folder)
        raise
    finally:
        lock.release()


def unpack(archive_file: str | Path, into: str | Path) -> None:
    """Unpack a tar (plain, gzip, bzip2 or xz) or zip file into a folder, all of it or nothing.

    Files of the same names are replaced, other files in the folder stay. Refused, before anything is in place, are
    archives that are damaged or have a member that a dataset needs not and an attack does: an absolute path, ``..``,
    a link of any kind (wherever it leads), a device; and those that unpack to an absurd size or number of files. One
    process at a time may unpack into a folder.

    Args:
        archive_file: zip if the name ends in ``.zip``, else tar.
        into: the folder; made if need be.

    Raises:
        DataError: if the archive is refused, this Python cannot unpack tar files safely, or something in the folder
            is in the way.
        OSError: if the disk is full or cannot be written.
    """
    archive_file, into = Path(archive_file), Path(into)
    if not archive_file.is_file():
        raise DataError(f"{archive_file}: there is no such file.")
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
            raise  # the disk's fault, not the archive's
        # RuntimeError: an encrypted zip; NotImplementedError: a compression that zipfile does not know
        damage = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError)
        if isinstance(error, (*damage, ValueError, RuntimeError)):
            why = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
            raise DataError(f"{archive_file} cannot be unpacked ({why}): fetch it again.") from error
        raise
    staging.rename(_moving(into, archive_file.name))
    _finish_move(into, archive_file.name)


# --- one archive ---


def _is_unpacked(archive: Archive, root: Path) -> bool:
    return not _moving(root / archive.into, archive.name).exists() and all((root / p).exists() for p in archive.holds)


def _fetch(archive: Archive, root: Path, folder: Path) -> None:
    into = root / archive.into
    _finish_move(into, archive.name)
    if _is_unpacked(archive, root):
        return
    for file in (root / archive.name, folder / archive.name):
        if file.is_file():
            found = _digest(file, archive)
            if found != archive.hash:
                raise DataError(
                    f"{file} is not the right file: its hash is {found}, expected {archive.hash}. Remove it, and the "
                    "same command downloads the right one."
                )
            break
    else:
        file = _download(archive, folder)
    unpack(file, into)
    missing = [path for path in archive.holds if not (root / path).exists()]
    if missing:
        raise DataError(f"{file} was unpacked in {into}, but {missing[0]} is still missing: it is another archive.")
    log.info("Unpacked %s in %s; the archive (%s) is no longer needed.", file, into, decimal(file.stat().st_size))


def _digest(file: Path, archive: Archive) -> str:
    """The file's hash, written as ``archive.hash`` is."""
    algorithm = archive.hash.partition(":")[0]
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as raw, _Meter(f"Checking {file.name}") as meter:
        meter.start(0, file.stat().st_size)
        while chunk := raw.read(_CHUNK):
            digest.update(chunk)
            meter.advance(len(chunk))
    return f"{algorithm}:{digest.hexdigest()}"


# --- download ---


class _Broken(Exception):  # noqa: N818 - a transfer that ended early, not yet an error
    """A transfer ended early, and the next attempt may do better."""


@dataclass(frozen=True)
class _Version:
    """The version of a remote file that the bytes in a ``.part`` are of."""

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
        except (OSError, ValueError, TypeError):  # absent, or cut short when a process was killed
            return None

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @property
    def validator(self) -> str | None:
        """What ``If-Range`` may hold: a weak ETag does not promise equal bytes."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    def is_other(self, version: _Version) -> bool:
        """Whether anything that both know differs."""
        pairs = ((self.etag, version.etag), (self.modified, version.modified), (self.size, version.size))
        return any(a is not None and b is not None and a != b for a, b in pairs)


def _download(archive: Archive, folder: Path) -> Path:
    """Download to ``folder``, continuing what is there; returns the file, of the right hash."""
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
                        f"{archive.url} could not be downloaded ({broken}): {decimal(_size(part))} are kept, and the "
                        f"same command continues. Or fetch it by other means and put it in {folder}."
                    ) from broken
                log.warning("%s: %s; trying again in %.0f s.", archive.name, broken, WAITS_S[failures])
                time.sleep(WAITS_S[failures])
                failures += 1
    found = _digest(part, archive)
    if found != archive.hash:
        size = f"{part.stat().st_size:,} bytes" + (f", expected about {archive.size:,}" if archive.size else "")
        part.unlink()
        note.unlink(missing_ok=True)
        raise DataError(
            f"{archive.url} is not the right file: its hash is {found}, expected {archive.hash} ({size}). It was "
            f"deleted. Try again later, or fetch it by other means and put it in {folder}."
        )
    file = part.with_name(archive.name)
    part.replace(file)
    note.unlink(missing_ok=True)  # after the rename: a part without its note would be started over
    return file


def _transfer(archive: Archive, part: Path, note: Path, meter: _Meter) -> None:
    """One attempt to get all bytes that ``part`` lacks."""
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
        if error.size == done:  # nothing is missing; the server had not told the size
            return
        part.unlink(missing_ok=True)
        raise _Broken("the server's file has become shorter") from error
    with response:
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdigit() else None
        if response.status == http.client.PARTIAL_CONTENT:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            start, whole = (int(span[1]), span[2]) if span else (None, "*")
            total = int(whole) if whole != "*" else None if total is None else done + total
            # not every server that knows Range minds If-Range
            if start != done or version is None or version.is_other(_Version.of(archive.url, response.headers, total)):
                part.unlink(missing_ok=True)
                raise _Broken("the server's file has changed")
            log.info("%s: continuing at %s.", archive.name, decimal(done))
        else:
            if done:
                log.info("%s: the server does not continue this transfer; starting over.", archive.name)
            done = 0
            part.unlink(missing_ok=True)  # before the note: never bytes of one version with the note of another
            _Version.of(archive.url, response.headers, total).write(note)
        meter.start(done, total if total is not None else archive.size)
        with part.open("ab") as file:
            while chunk := _read(response):
                file.write(chunk)
                done += len(chunk)
                meter.advance(len(chunk))
    if total is not None and done < total:
        raise _Broken(f"the connection was closed after {done:,} of {total:,} bytes")


class _NoSuchRange(Exception):  # noqa: N818 - an answer, not an error
    """HTTP 416, with the size of the server's file if it was told."""

    def __init__(self, size: int | None) -> None:
        self.size = size


def _open(archive: Archive, part: Path, request: urllib.request.Request) -> http.client.HTTPResponse:
    by_hand = f"Check the connection, or fetch it by other means and put it in {part.parent}."
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        return response
    except urllib.error.HTTPError as error:
        with error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and request.has_header("Range"):
                size = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
                raise _NoSuchRange(int(size[1]) if size else None) from error
            answer = f"the server answers {error.code} {error.reason}"
        if error.code in _PASSING:
            raise _Broken(answer) from error
        raise DataError(f"{archive.url} could not be downloaded ({answer}). {by_hand}") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DataError(f"{archive.url} could not be downloaded ({error.reason}). {by_hand}") from error
        raise _Broken(str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:  # while the answer's head was read
        raise _Broken(str(error) or type(error).__name__) from error


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"the connection broke: {str(error) or type(error).__name__}") from error


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


# --- unpacking ---


def _checked(name: str, archive_file: Path) -> PurePosixPath:
    """The member's name as a relative path without ``..``, on every system."""
    path = PureWindowsPath(name)  # which takes both kinds of slashes for separators, and knows drives
    if path.anchor or ".." in path.parts or "\0" in name:
        raise DataError(
            f"{archive_file} is not safe to unpack: its member {name!r} leads out of the folder. Nothing was unpacked; "
            "get the archive from its official place."
        )
    return PurePosixPath(*path.parts)


def _refuse(name: str, archive_file: Path) -> DataError:
    return DataError(
        f"{archive_file} is not safe to unpack: its member {name!r} is a link or a device, not a file or a folder. "
        "Nothing was unpacked; get the archive from its official place."
    )


class _Growth:
    """Counts what an archive unpacks to, and refuses it when that is absurd: before the member in question is."""

    def __init__(self, archive_file: Path) -> None:
        self.archive_file, self.members, self.bytes = archive_file, 0, 0
        self.limit = max(ALWAYS_FINE, MAX_GROWTH * archive_file.stat().st_size)

    def add(self, size: int) -> None:
        self.members += 1
        self.bytes += size
        if self.members > MAX_MEMBERS or self.bytes > self.limit:
            raise DataError(
                f"{self.archive_file} would unpack to more than {self.members - 1:,} files and "
                f"{decimal(self.bytes - size)}, which no dataset does: it is refused."
            )


def _unpack_tar(raw: BinaryIO, archive_file: Path, folder: Path, meter: _Meter) -> None:
    if not hasattr(tarfile, "data_filter"):
        version = ".".join(map(str, sys.version_info[:3]))
        raise DataError(
            f"Python {version} cannot unpack {archive_file} safely: update to 3.10.12, 3.11.4, 3.12 or later, or "
            "unpack it by hand."
        )
    size = _Growth(archive_file)
    with tarfile.open(fileobj=raw, mode="r:*") as tar:
        for member in tar:
            size.add(member.size)
            # Stricter than filter="data", which makes absolute names relative and lets inner links pass, a way out of
            # the folder in Pythons before June 2025.
            _checked(member.name, archive_file)
            if not (member.isreg() or member.isdir()):
                raise _refuse(member.name, archive_file)
            tar.extract(member, folder, filter="data")
            meter.at(raw.tell())
        while tar.fileobj is not None and tar.fileobj.read(_CHUNK):
            pass  # the check sum of a compressed tar is behind its last member


def _unpack_zip(raw: BinaryIO, archive_file: Path, folder: Path, meter: _Meter) -> None:
    size = _Growth(archive_file)
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
    """Move what is in ``.NAME.moving`` into place, if it is there."""
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
            raise DataError(f"{place} is in the way: remove it, then run the same command again: it continues.")
        else:
            shutil.move(entry, place)  # a rename, unless the user linked a folder to another disk


class _Meter:
    """Bytes done, of how many, bytes/s and time left: as a bar on a terminal, else as a log line every 10 s."""

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
        """Begin, or begin again, with ``done`` bytes that cost no time."""
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
