"""Atomic writes and hashes of files, kept results, texts of messages, progress, and the limit of unpacked sizes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from logging import Logger, getLogger
from pathlib import Path
from typing import Any, TypeVar

log = getLogger(__name__)

#: Limit against decompression bombs: growth factor, applied above ``ALWAYS_FINE`` bytes.
MAX_GROWTH, ALWAYS_FINE = 200, 1 << 30
#: Seconds between progress log lines without a terminal.
LOG_S = 10.0

Item = TypeVar("Item")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Context manager that yields a temporary path, whose file replaces ``path`` at the end.

    ``PATH.part`` is in the same folder, which is created if missing, and is synced to disk before it replaces ``path``.
    If the block raises, it is removed. A killed process leaves it, and the next write overwrites it. Processes that
    write the same file need a lock. An OSError names ``path``.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(part)):
            error.filename = str(path)  # errors of write() lack it
        raise


def write_file(path: str | Path, content: str | bytes | memoryview) -> None:
    """Write a file with :func:`atomic_write`; text as UTF-8."""
    with atomic_write(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256(file: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def kept(file: Path, state: Any, compute: Callable[[], Any], what: str) -> Any:
    """Result of a slow step ``what``, which is kept in ``file`` until ``state`` changes; both as in JSON.

    In a read-only folder it is computed each time.
    """
    with contextlib.suppress(OSError, ValueError, TypeError):
        stored, result = json.loads(file.read_bytes())
        if stored == state:
            return result
    log.info("%s.", what)
    result = compute()
    with contextlib.suppress(OSError):
        file.write_text(json.dumps([state, result]))
    return result


def first_line(error: BaseException) -> str:
    """First line of an error's message, at most 500 characters; the error's type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:500].rstrip(".:") if lines else type(error).__name__


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names, separated by commas, and ``...`` if there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def unpacked_limit(archive: str | Path) -> int:
    """Bytes to which an archive may unpack; one that is larger is a decompression bomb."""
    return max(ALWAYS_FINE, MAX_GROWTH * Path(archive).stat().st_size)


class Progress:
    """Progress of a slow step: a bar on a terminal, else a log line every 10 s and at the end.

    Args:
        what: the step.
        unit: what is counted; ``bytes`` are shown in kB, MB or GB.
        total: number of units; None if unknown.
        done: number of units that are complete at the start.
        log: logger of the lines without a terminal; None logs nothing.
        show: whether to show anything.
    """

    def __init__(
        self, what: str, unit: str, total: int | None, done: int = 0, log: Logger | None = None, show: bool = True
    ) -> None:
        from rich import console, filesize, progress

        screen = console.Console(stderr=True)
        is_bar = show and screen.is_terminal
        columns = ("{task.description}", progress.BarColumn(), "{task.fields[state]}")
        self._bar = progress.Progress(*columns, console=screen, transient=True, disable=not is_bar)
        self._task = self._bar.add_task(what, total=total, completed=done, state="")
        self._amount: Callable[[float], str] = lambda n: str(round(n, 1))
        if unit == "bytes":
            self._amount, unit = lambda n: filesize.decimal(int(n)), ""
        self._what, self._unit, self._log = what, f" {unit}".rstrip(), log if show and not is_bar else None
        self.total, self.done, self._resumed = total, done, done
        self._began = self._logged = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def track(self, items: Iterable[Item]) -> Iterator[Item]:
        """Iterate and count."""
        with self:
            for item in items:
                yield item
                self.advance(1)

    def advance(self, count: int, note: str = "") -> None:
        """Add completed units; ``note`` ends the line."""
        self.done += count
        now = time.monotonic()
        speed = (self.done - self._resumed) / max(now - self._began, 1e-9)
        of = "" if self.total is None else f" of {self._amount(self.total)}"
        left = "" if self.total is None or speed <= 0 else f", {max(self.total - self.done, 0) / speed:.0f} s left"
        state = f"{self._amount(self.done)}{of}{self._unit}, {self._amount(speed)}{self._unit}/s{left}"
        state += note and f", {note}"
        self._bar.update(self._task, completed=self.done, state=state)
        if self._log is not None and (now - self._logged > LOG_S or self.done == self.total):
            self._log.info("%s: %s", self._what, state)
            self._logged = now
