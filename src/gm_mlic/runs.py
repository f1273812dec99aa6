"""Run folders: outputs of training as plain files.

::

    RUN/config.yaml           resolved settings
    RUN/state.json            running, finished, failed or interrupted; process; error
    RUN/metrics.csv           one row per epoch
    RUN/metrics.json          test result; exists once the run is finished
    RUN/checkpoints/          best.ckpt and last.ckpt
    RUN/test.npz              scores and targets of the test split
    RUN/examples/             some test photos with their predictions (examples.json)
    RUN/diverged.json         images of the batch with a non-finite loss, if any
    RUN/label_states.npz      label states after the last block

Commands that list, compare or report runs read only these files.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from filelock import FileLock, Timeout

from gm_mlic.errors import GMMLICError
from gm_mlic.io import first_line, write_file

log = logging.getLogger(__name__)

#: Settings, by section, that affect paths and speed but not results; they are not part of a run's identity.
NOT_PART_OF_A_RUN: Mapping[str, frozenset[str]] = {
    "": frozenset({"hydra", "run_dir", "overwrite", "out", "num_workers", "logger", "sweep", "plugins"}),
    "dataset": frozenset({"download", "mirror"}),
    "instances": frozenset({"root", "num_workers", "overwrite", "shard"}),
    "trainer": frozenset({"num_workers", "checkpoint_every_n_minutes"}),
}

CONFIG, STATE, EPOCHS, RESULT = "config.yaml", "state.json", "metrics.csv", "metrics.json"
SCORES, EXAMPLES, LABEL_STATES = "test.npz", "examples", "label_states.npz"
DIVERGED = "diverged.json"
#: Files that a run deletes before it starts again.
WRITTEN = (
    RESULT, EPOCHS, "checkpoints/best.ckpt", "checkpoints/last.ckpt", SCORES, f"{EXAMPLES}/examples.json", LABEL_STATES,
    DIVERGED,
)  # fmt: skip
_LOCK = ".lock"

#: Lock timeout; other processes hold the lock briefly to check whether the run is alive.
_PATIENCE_S = 2.0


class RunFolderError(GMMLICError):
    """Folder that is not a run, is damaged, or is in use by another process."""


@dataclass(frozen=True)
class Run:
    """Content of a run folder.

    Attributes:
        path: the folder.
        config: nested settings.
        state: ``finished``, ``running``, ``failed``, ``interrupted``, ``stopped`` (the process ended without recording
            a state) or ``damaged`` (files cannot be read).
        error: one-line error of a failed or damaged run.
        epochs: rows of ``metrics.csv``.
        result: ``metrics.json`` of a finished run.
    """

    path: Path
    config: Mapping[str, Any]
    state: str
    error: str | None
    epochs: tuple[Mapping[str, float], ...]
    result: Mapping[str, Any] | None

    def setting(self, key: str, default: Any = None) -> Any:
        """Value of a dotted key such as ``graph.m``."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value


def read_run(path: str | Path) -> Run:
    """Read one run folder.

    Raises:
        RunFolderError: if it is not a run folder, or a file is damaged.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise RunFolderError(f"{path} is not a run folder (it has no {CONFIG}).")
    config = _parsed(path / CONFIG, yaml.safe_load)
    state = _parsed(path / STATE, json.loads) if (path / STATE).is_file() else {}
    result = _parsed(path / RESULT, json.loads) if (path / RESULT).is_file() else None
    if result is not None and not isinstance(result.get("test"), dict):
        raise _damaged(path / RESULT)
    known = str(state.get("state", "stopped"))
    if result is not None:
        known = "finished"
    elif known == "running" and not _is_locked(path):
        known = "stopped"
    return Run(path, config, known, state.get("error"), read_epochs(path), result)


def _parsed(path: Path, parse: Any) -> dict[str, Any]:
    try:
        content = parse(path.read_text())
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise _damaged(path) from error
    if not isinstance(content, dict):
        raise _damaged(path)
    return content


def _damaged(path: Path) -> RunFolderError:
    return RunFolderError(f"{path} is damaged: delete {path.parent} and run its command again.")


def read_epochs(path: Path) -> tuple[dict[str, float], ...]:
    """Rows of the ``metrics.csv`` of a run folder; empty if it has none. Raises RunFolderError if it is damaged."""
    file = path / EPOCHS
    if not file.is_file():
        return ()
    try:
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (ValueError, csv.Error) as error:
        raise _damaged(file) from error
    epochs: list[dict[str, float]] = []
    for row in rows:
        epochs.append({})
        for name, text in row.items():
            with contextlib.suppress(TypeError, ValueError):
                epochs[-1][name] = float(text)
    return tuple(epochs)


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Find runs in folders. Each folder is a run, a multirun, or contains runs at any depth.

    Damaged runs are included, with the state ``damaged``.

    Raises:
        RunFolderError: if a path does not exist or contains no runs.
    """
    runs: dict[Path, Run] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise RunFolderError(f"{path} is not a folder.")
        folders = {file.parent.resolve() for file in path.rglob(CONFIG) if file.parent.name != ".hydra"}
        folders |= {Path(job["run_dir"]).resolve() for job in read_jobs(path)}
        if not folders:
            raise RunFolderError(f"{path} contains no runs: create one with gm-mlic train.")
        for folder in sorted(folders):
            if os.path.isfile(folder / CONFIG):  # noqa: PTH113 - no error for invalid names
                shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
                try:
                    runs[folder] = read_run(shown)
                except RunFolderError as error:
                    runs[folder] = Run(shown, {}, "damaged", str(error), (), None)
    return list(runs.values())


def varying(runs: Sequence[Run]) -> list[str]:
    """Dotted settings that affect results and differ between runs; the seed is last."""
    flat = [flat_settings(run.config) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    differ = [key for key in keys if len({json.dumps(s.get(key), default=str) for s in flat}) > 1]
    return sorted(differ, key=lambda key: key == "seed")


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that affect the result of a run."""
    kept = {key: value for key, value in config.items() if key not in NOT_PART_OF_A_RUN[""]}
    for key, left_out in NOT_PART_OF_A_RUN.items():
        if isinstance(kept.get(key), Mapping):
            kept[key] = {name: value for name, value in kept[key].items() if name not in left_out}
    return kept


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and values of the settings that affect the result of a run."""
    return dict(_leaves(decisive(config)))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Writing


class RunState:
    """Context manager that locks a run folder and writes ``state.json``.

    Args:
        path: run folder; created if missing.
        command: name of the running command.
        sweep: folder of the multirun, if any.
        silent: do nothing; for DDP ranks other than 0.

    Raises:
        RunFolderError: on entering, if another process holds the lock.
    """

    def __init__(self, path: Path, command: str, sweep: str | None = None, *, silent: bool = False) -> None:
        self.path, self.command, self.silent = path, command, silent
        self._lock = FileLock(path / _LOCK)
        self._begun = False
        self._content: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": now(),
            "command": command,
            "sweep": sweep,
            "error": None,
        }

    def __enter__(self) -> RunState:
        self.path.mkdir(parents=True, exist_ok=True)
        if self.silent:
            return self
        try:
            self._lock.acquire(timeout=_PATIENCE_S)
        except Timeout:
            state = json.loads((self.path / STATE).read_text()) if (self.path / STATE).is_file() else {}
            who = f"process {state.get('pid', '?')} on {state.get('host', '?')}"
            raise RunFolderError(f"{self.path} is in use by {who}: wait for it, or choose another run_dir.") from None
        return self

    def begin(self) -> None:
        """Set the state to ``running``. The final state is written on exit."""
        if not self.silent:
            self._begun = True
            self._write("running")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._begun:
                return
            if error is None:
                self._write("finished")
            elif isinstance(error, (KeyboardInterrupt, SystemExit)):
                self._write("interrupted")
            else:
                self._content["error"] = first_line(error)
                with contextlib.suppress(OSError):  # a full disk must not hide the error
                    self._write("failed")
        finally:
            self._lock.release()

    def _write(self, state: str) -> None:
        content = {"state": state, **self._content, "updated": now()}
        write_file(self.path / STATE, json.dumps(content, indent=2) + "\n")


def _is_locked(path: Path) -> bool:
    """Whether a running process holds the lock of a run folder."""
    if not (path / _LOCK).is_file():
        return False
    try:
        with FileLock(path / _LOCK).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # no permission to lock: trust state.json
        return True


def write_job(
    sweep: Path, number: int, run_dir: Path, overrides: Sequence[str], error: BaseException | None = None
) -> None:
    """Record a multirun job and its error in ``SWEEP/jobs/NUMBER.json``."""
    job = {
        "run_dir": str(run_dir.absolute()),
        "overrides": list(overrides),
        "noted": now(),
        "error": None if error is None else first_line(error),
    }
    write_file(sweep / "jobs" / f"{number}.json", json.dumps(job, indent=2) + "\n")


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """Jobs of all multiruns in a folder, in order. Damaged job files are skipped."""
    jobs = []
    files = [file for file in folder.rglob("jobs/*.json") if file.stem.isdecimal()]
    for file in sorted(files, key=lambda file: (file.parent, int(file.stem))):
        try:
            job = _parsed(file, json.loads)
            if not isinstance(job.get("run_dir"), str) or "\0" in job["run_dir"]:
                raise _damaged(file)
        except RunFolderError:
            log.warning("%s is damaged; its run is skipped.", file)
            continue
        jobs.append(job)
    return jobs


def now() -> str:
    """Current UTC time in ISO format, which sorts chronologically."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
