from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import gm_mlic.io
from gm_mlic.cli.errors import explain
from gm_mlic.datasets import download
from gm_mlic.datasets.download import Archive, fetch, unpack
from gm_mlic.errors import DataError

#: Content of the test archive; random bytes, which do not compress.
CONTENT = {
    "VOCdevkit/VOC2007/ImageSets/Main/cat_train.txt": b"000001  1\n",
    "VOCdevkit/VOC2007/JPEGImages/000001.jpg": np.random.default_rng(0).bytes(300_000),
    "VOCdevkit/VOC2007/JPEGImages/000002.jpg": np.random.default_rng(1).bytes(100_000),
}
LAST = "VOCdevkit/VOC2007/JPEGImages/000002.jpg"


def tar_bytes(content: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def zip_bytes(content: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return out.getvalue()


TAR = tar_bytes(CONTENT)


def tree(root: Path) -> dict[str, bytes]:
    """Content of every file under the root except downloads, including hidden files and links."""
    files = {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_symlink() or not p.is_dir()}
    return {name: p.read_bytes() for name, p in files.items() if not name.startswith("downloads/")}


@dataclass
class Server:
    """Configurable HTTP server."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    tells_size: bool = True
    chunked: bool = False
    #: Number of body bytes after which the connection breaks, per request; later requests succeed.
    breaks: list[int] = field(default_factory=list)
    #: Error status, per request; later requests succeed.
    statuses: list[int] = field(default_factory=list)
    #: Number of body bytes after which a response pauses until ``go`` is set.
    pause_after: int | None = None
    go: threading.Event = field(default_factory=threading.Event)
    #: Requests and responses: (Range header, status, bytes of body), recorded before sending.
    served: list[tuple[str | None, int, int]] = field(default_factory=list)
    port: int = 0

    @property
    def bytes_served(self) -> int:
        return sum(count for _, _, count in self.served)

    def archive(self, name: str, data: bytes, **changes: Any) -> Archive:
        """Serve a file and return its archive."""
        self.files[f"/pub/{name}"] = data
        return self.describe(name, data, **changes)

    def describe(self, name: str, data: bytes, **changes: Any) -> Archive:
        described = {
            "url": f"http://127.0.0.1:{self.port}/pub/{name}",
            "hash": f"md5:{hashlib.md5(data).hexdigest()}",
            "size": len(data),
            "holds": (LAST,),
        }
        return Archive(**(described | changes))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, state: Server, *args: Any) -> None:
        self.state = state
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        state, wanted = self.state, self.headers.get("Range")
        data = state.files.get(self.path)
        status = state.statuses.pop(0) if state.statuses else 200 if data is not None else 404
        if status != 200 or data is None:
            state.served.append((wanted, status, 0))
            self.send_response(status)
            self.send_header("Connection", "close")
            self.end_headers()
            return
        start = 0
        if wanted and state.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(data) else 416
        body = data[start:] if status != 416 else b""
        stop = state.breaks.pop(0) if state.breaks else len(body)
        state.served.append((wanted, status, len(body[:stop])))
        self.send_response(status)
        self.send_header("Connection", "close")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if status == 416:
            self.send_header("Content-Range", f"bytes */{len(data)}")
        if state.tells_size and not state.chunked:
            self.send_header("Content-Length", str(len(body)))
        if state.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may be killed
            for piece in self.pieces(body[:stop]):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if state.chunked else piece)
            if state.chunked and stop == len(body):
                self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def pieces(self, body: bytes) -> Iterator[bytes]:
        pause = self.state.pause_after
        if pause is None:
            yield body
        else:
            yield body[:pause]
            self.wfile.flush()
            self.state.go.wait(60)
            yield body[pause:]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "WAITS_S", (0.0, 0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, state))
    state.port = http.server_port
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield state
    state.go.set()
    http.shutdown()
    http.server_close()
    thread.join()


def has_no_traces(root: Path) -> bool:
    """Whether no partial files are left."""
    return not [p for p in root.rglob("*") if p.suffix in (".part", ".json", ".unpacking", ".moving")]


class TestFetch:
    @pytest.mark.parametrize(
        ("name", "data"),
        [
            ("a.tar", TAR),
            ("a.tar.gz", tar_bytes(CONTENT, "w:gz")),
            ("a.tgz", tar_bytes(CONTENT, "w:gz")),
            ("a.tar.bz2", tar_bytes(CONTENT, "w:bz2")),
            ("a.tar.xz", tar_bytes(CONTENT, "w:xz")),
            ("a.zip", zip_bytes(CONTENT)),
        ],
    )
    @pytest.mark.parametrize("algorithm", ["md5", "sha256"])
    def test_downloads_verifies_and_unpacks(
        self, server: Server, tmp_path: Path, name: str, data: bytes, algorithm: str
    ) -> None:
        archive = server.archive(name, data, hash=f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}")
        fetch([archive], tmp_path / "new" / "root")
        assert tree(tmp_path / "new" / "root") == CONTENT
        assert server.served == [(None, 200, len(data))]
        assert has_no_traces(tmp_path)

    def test_second_call_sends_no_request(self, server: Server, tmp_path: Path) -> None:
        archive = server.archive("a.tar", TAR)
        fetch([archive], tmp_path)
        server.served.clear()
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        fetch([archive], tmp_path)
        assert server.served == []
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before

    def test_manually_unpacked_dataset_is_unchanged(self, server: Server, tmp_path: Path) -> None:
        for name, data in CONTENT.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        fetch([server.archive("a.tar", TAR)], tmp_path)
        assert server.served == []
        assert not (tmp_path / "downloads").exists()

    def test_archives_with_common_folders(self, server: Server, tmp_path: Path) -> None:
        # as VOC trainval and test
        other = {
            "VOCdevkit/VOC2007/JPEGImages/000003.jpg": b"three",
            "VOCdevkit/VOC2007/ImageSets/Main/cat_test.txt": b"000003 -1\n",
        }
        test = server.archive("test.tar", tar_bytes(other), holds=("VOCdevkit/VOC2007/JPEGImages/000003.jpg",))
        fetch([server.archive("a.tar", TAR), test], tmp_path)
        assert tree(tmp_path) == CONTENT | other

    def test_deleted_files_are_restored_without_download(self, server: Server, tmp_path: Path) -> None:
        archive = server.archive("a.tar", TAR)
        fetch([archive], tmp_path)
        (tmp_path / LAST).unlink()
        server.served.clear()
        fetch([archive], tmp_path)
        assert tree(tmp_path) == CONTENT
        assert server.served == []

    @pytest.mark.parametrize("folder", [".", "downloads"])
    def test_manually_downloaded_archive_is_used(self, server: Server, tmp_path: Path, folder: str) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.tar").write_bytes(TAR)
        fetch([server.describe("a.tar", TAR)], tmp_path)
        assert server.served == []
        assert (tmp_path / LAST).read_bytes() == CONTENT[LAST]

    def test_wrong_manual_archive_is_refused_and_kept(self, server: Server, tmp_path: Path) -> None:
        wrong = b"half a download"
        (tmp_path / "a.tar").write_bytes(wrong)
        archive = server.archive("a.tar", TAR)
        with pytest.raises(DataError, match=r"a\.tar has the wrong hash") as raised:
            fetch([archive], tmp_path)
        assert archive.hash in str(raised.value)
        assert hashlib.md5(wrong).hexdigest() in str(raised.value)
        assert (tmp_path / "a.tar").read_bytes() == wrong
        assert server.served == []

    def test_wrong_download_is_refused_and_deleted(self, server: Server, tmp_path: Path) -> None:
        page = b"<html>please log in</html>"
        server.files["/pub/a.tar"] = page
        archive = server.describe("a.tar", TAR)
        with pytest.raises(DataError, match="expected about") as raised:
            fetch([archive], tmp_path)
        assert archive.hash in str(raised.value)
        assert f"md5:{hashlib.md5(page).hexdigest()}" in str(raised.value)
        assert "\n" not in str(raised.value)
        assert [p.name for p in (tmp_path / "downloads").iterdir()] == [".lock"]
        assert tree(tmp_path) == {}
        server.files["/pub/a.tar"] = TAR
        fetch([archive], tmp_path)
        assert tree(tmp_path) == CONTENT

    def test_archive_without_expected_file(self, server: Server, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"VOC2012 is missing: it is the wrong archive"):
            fetch([server.archive("a.tar", TAR, holds=("VOCdevkit/VOC2012",))], tmp_path)

    def test_root_is_a_file(self, server: Server, tmp_path: Path) -> None:
        (tmp_path / "root").write_text("")
        with pytest.raises(DataError, match="a file is in the way"):
            fetch([server.archive("a.tar", TAR)], tmp_path / "root")


class TestBrokenTransfers:
    def test_resumes_without_repeating_bytes(self, server: Server, tmp_path: Path) -> None:
        server.breaks = [100_000, 150_000]
        fetch([server.archive("a.tar", TAR)], tmp_path)
        assert tree(tmp_path) == CONTENT
        assert [request[:2] for request in server.served] == [
            (None, 200),
            ("bytes=100000-", 206),
            ("bytes=250000-", 206),
        ]
        assert server.bytes_served == len(TAR)

    def test_mirror_continues_the_official_download(self, server: Server, tmp_path: Path) -> None:
        archive = server.archive("a.tar", TAR)
        server.breaks = [100_000, 0, 0, 0]
        with pytest.raises(DataError, match="to resume"):
            fetch([archive], tmp_path)
        server.files = {"/mirror/a.tar": TAR}
        fetch([archive], tmp_path, mirror=f"http://127.0.0.1:{server.port}/mirror/")
        assert tree(tmp_path) == CONTENT
        assert server.bytes_served == len(TAR)

    def test_fails_after_retries_then_resumes(self, server: Server, tmp_path: Path) -> None:
        archive = server.archive("a.tar", TAR)
        server.breaks = [100_000, 0, 0, 0]  # the first attempt and three more
        with pytest.raises(DataError, match=r"100\.0 kB are kept; run the same command again to resume"):
            fetch([archive], tmp_path)
        assert len(server.served) == 4
        assert (tmp_path / "downloads" / "a.tar.part").read_bytes() == TAR[:100_000]
        fetch([archive], tmp_path)
        assert tree(tmp_path) == CONTENT
        assert server.bytes_served == len(TAR)

    def test_progress_resets_the_retry_count(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(download, "GAIN", 10_000)
        server.breaks = [10_000] * 10
        fetch([server.archive("a.tar", TAR)], tmp_path)
        assert tree(tmp_path) == CONTENT
        assert server.bytes_served == len(TAR)

    def test_small_progress_does_not_reset_the_retry_count(self, server: Server, tmp_path: Path) -> None:
        server.breaks = [1000] * 100
        with pytest.raises(DataError, match=r"closed after 4,000 of .* 4\.0 kB are kept"):
            fetch([server.archive("a.tar", TAR)], tmp_path)

    def test_server_without_ranges_restarts(self, server: Server, tmp_path: Path) -> None:
        server.ranges = False
        server.breaks = [100_000]
        fetch([server.archive("a.tar", TAR)], tmp_path)
        assert tree(tmp_path) == CONTENT
        assert [(status, count) for _, status, count in server.served] == [(200, 100_000), (200, len(TAR))]

    def test_server_without_ranges_fails_after_retries(self, server: Server, tmp_path: Path) -> None:
        server.ranges = False
        server.breaks = [100_000] * 100
        with pytest.raises(DataError, match="closed after 100,000 of"):
            fetch([server.archive("a.tar", TAR)], tmp_path)
        assert len(server.served) == 1 + 3

    def test_remote_file_changes(self, server: Server, tmp_path: Path) -> None:
        server.archive("a.tar", tar_bytes(CONTENT | {"more.txt": b"x" * 20_000})[::-1])
        server.breaks = [100_000, 0, 0, 0]
        archive = server.describe("a.tar", TAR)
        with pytest.raises(DataError, match="to resume"):
            fetch([archive], tmp_path)
        server.files["/pub/a.tar"] = TAR
        fetch([archive], tmp_path)
        assert tree(tmp_path) == CONTENT
        # the hash shows that the bytes are of two versions
        assert [status for _, status, _ in server.served[4:]] == [206, 200]

    def test_part_longer_than_remote_file(self, server: Server, tmp_path: Path) -> None:
        archive = server.archive("a.tar", TAR + b"\0" * 10_240)
        server.breaks = [len(TAR) + 5000, 0, 0, 0]
        with pytest.raises(DataError, match="to resume"):
            fetch([archive], tmp_path)
        fetch([server.archive("a.tar", TAR)], tmp_path)
        assert tree(tmp_path) == CONTENT
        assert [status for _, status, _ in server.served[-2:]] == [416, 200]

    def test_complete_part(self, server: Server, tmp_path: Path) -> None:
        # killed between the last byte and the rename
        archive = server.archive("a.tar", TAR)
        folder = tmp_path / "downloads"
        folder.mkdir()
        (folder / "a.tar.part").write_bytes(TAR)
        fetch([archive], tmp_path)
        assert tree(tmp_path) == CONTENT
        assert server.served == [(f"bytes={len(TAR)}-", 416, 0)]

    def test_wrong_part_is_replaced(self, server: Server, tmp_path: Path) -> None:
        folder = tmp_path / "downloads"
        folder.mkdir()
        (folder / "a.tar.part").write_bytes(b"?" * 1000)
        fetch([server.archive("a.tar", TAR)], tmp_path)
        assert server.served == [("bytes=1000-", 206, len(TAR) - 1000), (None, 200, len(TAR))]
        assert tree(tmp_path) == CONTENT

    def test_server_without_content_length(self, server: Server, tmp_path: Path) -> None:
        server.tells_size = False
        fetch([server.archive("a.tar", TAR)], tmp_path)
        assert tree(tmp_path) == CONTENT

    def test_chunked_download_resumes(self, server: Server, tmp_path: Path) -> None:
        server.chunked = True
        server.breaks = [100_000]
        fetch([server.archive("a.tar", TAR)], tmp_path)
        assert tree(tmp_path) == CONTENT
        assert server.bytes_served == len(TAR)

    def test_temporary_server_errors_are_retried(self, server: Server, tmp_path: Path) -> None:
        server.statuses = [503, 500, 429]
        fetch([server.archive("a.tar", TAR)], tmp_path)
        assert tree(tmp_path) == CONTENT
        assert [status for _, status, _ in server.served] == [503, 500, 429, 200]

    def test_persistent_server_error(self, server: Server, tmp_path: Path) -> None:
        server.statuses = [500] * 100
        with pytest.raises(DataError, match="HTTP 500"):
            fetch([server.archive("a.tar", TAR)], tmp_path)
        assert len(server.served) == 1 + 3

    @pytest.mark.parametrize("status", [401, 403, 404, 410])
    def test_client_errors_are_not_retried(self, server: Server, tmp_path: Path, status: int) -> None:
        server.statuses = [status]
        with pytest.raises(DataError, match=rf"HTTP {status} .* download it manually to .*downloads") as raised:
            fetch([server.archive("a.tar", TAR)], tmp_path)
        assert "\n" not in str(raised.value)
        assert len(server.served) == 1

    def test_connection_refused(self, server: Server, tmp_path: Path) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}/a.tar"
            with pytest.raises(DataError, match=r"a\.tar could not be downloaded \(.*refused"):
                fetch([server.describe("a.tar", TAR, url=url)], tmp_path)

    def test_server_timeout(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
        monkeypatch.setattr(download, "WAITS_S", (0.0,))
        server.pause_after = 1000
        with pytest.raises(DataError, match=r"timed out"):
            fetch([server.archive("a.tar", TAR)], tmp_path)
        server.go.set()
        server.pause_after = None
        fetch([server.archive("a.tar", TAR)], tmp_path)
        assert tree(tmp_path) == CONTENT

    def test_retry_delays_increase(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        waited: list[float] = []
        monkeypatch.setattr(download, "WAITS_S", (1.0, 2.0, 4.0))
        monkeypatch.setattr(download, "GAIN", 50_000)
        monkeypatch.setattr(download.time, "sleep", waited.append)
        server.breaks = [0, 50_000, 0, 0]
        fetch([server.archive("a.tar", TAR)], tmp_path)
        assert waited == [1.0, 1.0, 2.0, 4.0]

    def test_progress_without_a_terminal(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(gm_mlic.io, "LOG_S", -1.0)
        server.breaks = [100_000]
        with caplog.at_level(logging.INFO):
            fetch([server.archive("a.tar", TAR)], tmp_path)
        lines = [r.getMessage() for r in caplog.records if re.match(r"a\.tar: .* of .*/s, \d+ s left$", r.getMessage())]
        assert lines[-1].startswith(f"a.tar: {len(TAR) / 1000:.1f} kB of {len(TAR) / 1000:.1f} kB, ")
        assert any("a.tar: resuming at 100.0 kB" in r.getMessage() for r in caplog.records)


class TestFullDisk:
    def check(self, server: Server, tmp_path: Path, match: str) -> None:
        with pytest.raises(OSError) as raised:
            fetch([server.archive("a.tar", TAR)], tmp_path)
        assert raised.value.errno == errno.ENOSPC
        line, code = explain(raised.value, "train", [])
        assert (match in line, code) == (True, 2)

    def test_while_downloading(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # the disk takes 150,000 bytes
        opened = Path.open

        def open_full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = opened(path, mode, *args, **kwargs)
            if path.suffix != ".part" or "a" not in mode:
                return file

            class Full:
                def __enter__(self) -> Full:
                    return self

                def __exit__(self, *error: object) -> None:
                    file.close()

                def write(self, data: bytes) -> None:
                    room = 150_000 - file.tell()
                    file.write(data[:room])
                    if len(data) > room:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            return Full()

        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", open_full)
            self.check(server, tmp_path, "the disk is full")
        assert len(server.served) == 1, "a full disk is not retried"
        server.served.clear()
        fetch([server.describe("a.tar", TAR)], tmp_path)
        assert tree(tmp_path) == CONTENT
        assert server.served == [("bytes=150000-", 206, len(TAR) - 150_000)]

    def test_while_unpacking(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        copy = tarfile.copyfileobj

        def full(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
            if target.name.endswith("000002.jpg"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            copy(source, target, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(tarfile, "copyfileobj", full)
            self.check(server, tmp_path, "the disk is full")
        assert tree(tmp_path) == {}, "partial files were removed"
        fetch([server.describe("a.tar", TAR)], tmp_path)
        assert tree(tmp_path) == CONTENT
        assert len(server.served) == 1


# --- unpacking ---


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    return member


def plain(name: str, data: bytes = b"evil") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    return member, data


EVIL_NAMES = [
    "/tmp/gm_mlic_evil.txt",
    "../evil.txt",
    "a/../../evil.txt",
    "a/b/../../../evil.txt",
    "./../evil.txt",
    "..",
    "a/..",
    "..\\evil.txt",
    "a\\..\\..\\evil.txt",
    "C:\\evil.txt",
    "C:evil.txt",
    "\\evil.txt",
    "//host/share/evil.txt",
]
EVIL_MEMBERS = {
    "symlink out, absolute": [link("a", "/etc/passwd")],
    "symlink out, relative": [link("a/b", "../../evil")],
    "symlink inside": [plain("x"), link("a", "x")],
    "symlinked folder, then a file through it": [link("d", ".."), plain("d/evil.txt")],
    "hard link out": [link("a", "../evil.txt", tarfile.LNKTYPE)],
    "hard link out, absolute": [link("a", "/etc/passwd", tarfile.LNKTYPE)],
    "hard link inside": [plain("x"), link("a", "x", tarfile.LNKTYPE)],
    "character device": [special("a", tarfile.CHRTYPE)],
    "block device": [special("a", tarfile.BLKTYPE)],
    "pipe": [special("a", tarfile.FIFOTYPE)],
}


def write_tar(file: Path, members: list[Any]) -> None:
    with tarfile.open(file, "w") as tar:
        for member in members:
            info, data = member if isinstance(member, tuple) else (member, b"")
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Target folder with a file, and a parent folder with a file that must not be overwritten."""
    (tmp_path / "evil.txt").write_text("mine")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine.txt").write_text("mine")
    return tmp_path / "target"


def check_refused(file: Path, target: Path, match: str) -> None:
    before = tree(target.parent)
    with pytest.raises(DataError, match=match) as raised:
        unpack(file, target)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert tree(target.parent) == before
    assert sorted(p.name for p in target.iterdir()) == ["mine.txt"]


class TestUnpack:
    @pytest.mark.parametrize("name", EVIL_NAMES)
    def test_tar_names(self, place: Path, name: str) -> None:
        write_tar(place.parent / "evil.tar", [plain("good.txt"), plain(name)])
        check_refused(place.parent / "evil.tar", place, "not safe .* points outside the folder")

    @pytest.mark.parametrize("name", EVIL_NAMES)
    def test_zip_names(self, place: Path, name: str) -> None:
        with zipfile.ZipFile(place.parent / "evil.zip", "w") as archive:
            archive.writestr("good.txt", b"good")
            archive.writestr(name, b"evil")
        check_refused(place.parent / "evil.zip", place, "not safe .* points outside the folder")

    @pytest.mark.parametrize("what", EVIL_MEMBERS)
    def test_tar_members(self, place: Path, what: str) -> None:
        write_tar(place.parent / "evil.tar", [plain("good.txt"), *EVIL_MEMBERS[what]])
        check_refused(place.parent / "evil.tar", place, "not safe .* is a link or a device")

    @pytest.mark.parametrize("kind", [0o120000, 0o020000, 0o060000, 0o010000, 0o140000])
    def test_zip_members(self, place: Path, kind: int) -> None:
        with zipfile.ZipFile(place.parent / "evil.zip", "w") as archive:
            archive.writestr("good.txt", b"good")
            member = zipfile.ZipInfo("a")
            member.create_system, member.external_attr = 3, (kind | 0o777) << 16
            archive.writestr(member, "/etc/passwd")
        check_refused(place.parent / "evil.zip", place, "not safe .* is a link or a device")

    @pytest.mark.parametrize("suffix", ["tar.gz", "zip"])
    def test_bombs(self, place: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Zeros compress by a factor of 1000; the archive is refused before all are written."""
        monkeypatch.setattr(gm_mlic.io, "ALWAYS_FINE", 1 << 20)
        file = place.parent / f"bomb.{suffix}"
        block, count = bytes(1 << 22), 8
        if suffix == "zip":
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for n in range(count):
                    archive.writestr(f"{n}.jpg", block)
        else:
            with tarfile.open(file, "w:gz") as tar:
                for n in range(count):
                    member = tarfile.TarInfo(f"{n}.jpg")
                    member.size = len(block)
                    tar.addfile(member, io.BytesIO(block))
        assert file.stat().st_size < 100_000
        check_refused(file, place, "would unpack to more than .* decompression bomb")

    @pytest.mark.parametrize("suffix", ["tar", "zip"])
    def test_too_many_files(self, place: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
        file = place.parent / f"many.{suffix}"
        file.write_bytes(TAR if suffix == "tar" else zip_bytes(CONTENT))
        monkeypatch.setattr(download, "MAX_MEMBERS", len(CONTENT) - 1)
        check_refused(file, place, f"would unpack to more than {len(CONTENT) - 1} files")
        monkeypatch.setattr(download, "MAX_MEMBERS", 2 * len(CONTENT))  # folders are counted too
        unpack(file, place)

    @pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
    def test_truncated_archive(self, place: Path, suffix: str) -> None:
        data = {"tar": TAR, "tar.gz": tar_bytes(CONTENT, "w:gz"), "zip": zip_bytes(CONTENT)}[suffix]
        file = place.parent / f"a.{suffix}"
        file.write_bytes(data[:200_000])
        check_refused(file, place, "cannot be unpacked")

    @pytest.mark.parametrize("suffix", ["tar.gz", "zip"])
    def test_flipped_bits(self, place: Path, suffix: str) -> None:
        data = bytearray(tar_bytes(CONTENT, "w:gz") if suffix == "tar.gz" else zip_bytes(CONTENT))
        data[150_000] ^= 0xFF
        file = place.parent / f"a.{suffix}"
        file.write_bytes(data)
        check_refused(file, place, "cannot be unpacked")

    @pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
    @pytest.mark.parametrize("data", [b"", b"<html>not found</html>"])
    def test_not_an_archive(self, place: Path, suffix: str, data: bytes) -> None:
        file = place.parent / f"a.{suffix}"
        file.write_bytes(data)
        check_refused(file, place, "cannot be unpacked")

    @pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("x" * 300, "y")])
    @pytest.mark.parametrize("suffix", ["tar", "zip"])
    def test_invalid_member_names(self, place: Path, suffix: str, names: tuple[str, str]) -> None:
        file = place.parent / f"a.{suffix}"
        content = dict.fromkeys(names, b"data")
        file.write_bytes(tar_bytes(content) if suffix == "tar" else zip_bytes(content))
        check_refused(file, place, "cannot be unpacked")

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such file"):
            unpack(tmp_path / "a.tar", tmp_path / "target")

    def test_python_without_the_data_filter(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (place.parent / "a.tar").write_bytes(TAR)
        monkeypatch.delattr(tarfile, "data_filter")
        check_refused(place.parent / "a.tar", place, r"Python 3\..* cannot unpack .* safely: update")

    @pytest.mark.parametrize("suffix", ["tar", "zip"])
    def test_replaces_files_of_the_same_name_only(self, place: Path, suffix: str) -> None:
        content = {"a/b.txt": b"new", "a/d/": b"", "c.txt": b"new"}
        if suffix == "zip":
            data = zip_bytes(content)
        else:
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w") as tar:
                tar.addfile(special("./a", tarfile.DIRTYPE))
                tar.addfile(special("./a/d", tarfile.DIRTYPE))
                for name in ("./a/b.txt", "c.txt"):
                    info, new = plain(name, b"new")
                    tar.addfile(info, io.BytesIO(new))
            data = out.getvalue()
        (place / "a").mkdir()
        (place / "a" / "b.txt").write_text("old")
        (place / "a" / "mine.txt").write_text("mine")
        file = place.parent / f"x.{suffix}"
        file.write_bytes(data)
        unpack(file, place)
        assert tree(place) == {"a/b.txt": b"new", "a/mine.txt": b"mine", "c.txt": b"new", "mine.txt": b"mine"}
        assert (place / "a" / "d").is_dir()
        assert has_no_traces(place)

    def test_file_modes_are_not_restored(self, place: Path) -> None:
        member, data = plain("run.sh")
        member.mode, member.uid = 0o6777, 0
        folder = special("shut", tarfile.DIRTYPE)
        folder.mode = 0
        write_tar(place.parent / "a.tar", [folder, (member, data), plain("shut/x.txt")])
        unpack(place.parent / "a.tar", place)
        assert not (place / "run.sh").stat().st_mode & 0o6022
        assert (place / "shut" / "x.txt").read_bytes() == b"evil"

    def test_target_folders_may_be_links(self, place: Path) -> None:
        # images on a larger disk
        disk = place.parent / "disk"
        disk.mkdir()
        (place / "VOCdevkit").symlink_to(disk)
        (place.parent / "a.tar").write_bytes(TAR)
        unpack(place.parent / "a.tar", place)
        assert tree(disk) == {name.removeprefix("VOCdevkit/"): data for name, data in CONTENT.items()}
        assert (place / "VOCdevkit").is_symlink()

    @pytest.mark.parametrize("blocked", ["VOCdevkit", LAST])
    def test_existing_file_blocks_folder(self, place: Path, blocked: str) -> None:
        (place.parent / "a.tar").write_bytes(TAR)
        obstacle = place / blocked
        if blocked == LAST:
            obstacle.mkdir(parents=True)
        else:
            obstacle.write_text("a file")
        with pytest.raises(DataError, match=re.escape(f"{obstacle} is in the way")):
            unpack(place.parent / "a.tar", place)
        obstacle.rmdir() if blocked == LAST else obstacle.unlink()
        unpack(place.parent / "a.tar", place)
        assert tree(place) == CONTENT | {"mine.txt": b"mine"}
        assert has_no_traces(place)

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(st.sampled_from(["..", ".", "", "a", "b", "C:", "c.txt", "~", "...", "\\"]), min_size=1, max_size=6),
        st.sampled_from(["/", "\\"]),
        st.sampled_from(["tar", "zip"]),
    )
    @example(["", "..", "a"], "/", "tar")
    def test_nothing_is_written_outside_the_target(self, parts: list[str], slash: str, suffix: str) -> None:
        assume(suffix == "tar" or slash.join(parts))  # zipfile cannot write a name without a letter
        content = {slash.join(parts): b"data"}
        with tempfile.TemporaryDirectory() as folder:
            outer = Path(folder) / "outer"
            target = outer / "middle" / "target"
            target.mkdir(parents=True)
            file = Path(folder) / f"x.{suffix}"
            file.write_bytes(tar_bytes(content) if suffix == "tar" else zip_bytes(content))
            try:
                unpack(file, target)
            except DataError:
                assert not any(target.iterdir())
            assert [p for p in outer.rglob("*") if target not in (p, *p.parents)] == [target.parent]
            assert sorted(p.name for p in Path(folder).iterdir()) == ["outer", file.name]


# --- processes ---


class Child:
    """Process that calls fetch."""

    def __init__(self, archive: Archive, root: Path, before: str = "") -> None:
        code = f"""
            import os, shutil, signal, sys, types
            from pathlib import Path
            import gm_mlic
            # skip the package's imports (torch), which take seconds
            package = sys.modules["gm_mlic.datasets"] = types.ModuleType("gm_mlic.datasets")
            package.__path__ = [str(Path(gm_mlic.__path__[0], "datasets"))]
            from gm_mlic.datasets import download
            {before}
            print("ready", flush=True)
            sys.stdin.readline()
            download.fetch([download.{archive!r}], Path({str(root)!r}))
            """
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"},
        )

    def start(self) -> Child:
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        assert self.process.stdout.readline() == "ready\n"
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self

    def end(self) -> tuple[int, str]:
        """Exit code and error output."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestProcesses:
    def test_killed_while_downloading(self, server: Server, tmp_path: Path) -> None:
        archive = server.archive("a.tar", TAR)
        server.pause_after = 200_000
        child = Child(archive, tmp_path).start()
        part = tmp_path / "downloads" / "a.tar.part"
        # the last bytes may be buffered in the process
        wait_until(lambda: part.is_file() and part.stat().st_size > 100_000)
        child.process.kill()
        assert child.end()[0] == -signal.SIGKILL
        server.pause_after = None
        server.go.set()
        server.served.clear()
        kept = part.stat().st_size
        fetch([archive], tmp_path)
        assert tree(tmp_path) == CONTENT
        assert server.served == [(f"bytes={kept}-", 206, len(TAR) - kept)]
        assert has_no_traces(tmp_path)

    @pytest.mark.parametrize(
        ("before", "left"),
        [
            # between two members, before any file is in place
            (
                "extract = download.tarfile.TarFile.extract\n"
                "            download.tarfile.TarFile.extract = lambda *arguments, **settings: "
                "(extract(*arguments, **settings), os.kill(os.getpid(), signal.SIGKILL))",
                ".a.tar.unpacking",
            ),
            # between two moves, with some files in place
            (
                "rest, move = [1, 2], shutil.move\n"
                "            download.shutil.move = lambda a, b: "
                "(move(a, b) if rest.pop() else 0) if rest else os.kill(os.getpid(), signal.SIGKILL)",
                ".a.tar.moving",
            ),
        ],
        ids=["unpacking", "moving"],
    )
    def test_killed_while_unpacking(self, server: Server, tmp_path: Path, before: str, left: str) -> None:
        # existing folders, so that files are moved individually; the ``holds`` file is moved before others
        for folder in ("ImageSets/Main", "JPEGImages"):
            (tmp_path / "VOCdevkit/VOC2007" / folder).mkdir(parents=True)
        archive = server.archive("a.tar", TAR, holds=("VOCdevkit/VOC2007/ImageSets/Main/cat_train.txt",))
        child = Child(archive, tmp_path, before).start()
        code, errors = child.end()
        assert code == -signal.SIGKILL, errors
        assert (tmp_path / left).is_dir()
        assert (tmp_path / archive.holds[0]).exists() == (left == ".a.tar.moving")
        assert not (tmp_path / LAST).exists()
        if left == ".a.tar.moving":  # complete, needs no archive
            (tmp_path / "downloads" / "a.tar").unlink()
        fetch([archive], tmp_path)
        assert tree(tmp_path) == CONTENT
        assert has_no_traces(tmp_path)
        assert len(server.served) == 1

    def test_concurrent_calls(self, server: Server, tmp_path: Path) -> None:
        archive = server.archive("a.tar", TAR)
        server.pause_after = 200_000
        first, second = Child(archive, tmp_path), Child(archive, tmp_path)
        first.start()
        wait_until(lambda: (tmp_path / "downloads" / "a.tar.part").is_file())
        second.start()
        assert second.process.stderr is not None
        assert "Waiting for another process" in second.process.stderr.readline()
        server.go.set()
        for child in (first, second):
            code, errors = child.end()
            assert code == 0, errors
        assert tree(tmp_path) == CONTENT
        assert server.served == [(None, 200, len(TAR))]
        assert has_no_traces(tmp_path)

    def test_waits_for_a_process_that_is_killed(self, server: Server, tmp_path: Path) -> None:
        archive = server.archive("a.tar", TAR)
        server.pause_after = 200_000
        first, second = Child(archive, tmp_path), Child(archive, tmp_path)
        first.start()
        part = tmp_path / "downloads" / "a.tar.part"
        wait_until(lambda: part.is_file() and part.stat().st_size > 100_000)
        second.start()
        assert second.process.stderr is not None
        assert "Waiting for another process" in second.process.stderr.readline()
        server.pause_after = None
        first.process.kill()
        assert first.end()[0] == -signal.SIGKILL
        code, errors = second.end()
        assert code == 0, errors
        assert tree(tmp_path) == CONTENT
        assert [request[1] for request in server.served] == [200, 206]
        assert has_no_traces(tmp_path)
