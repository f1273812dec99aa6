"""Table of runs, read from their run folders."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from gm_mlic.runs import Run, flat_settings, varying

#: Settings that follow from another setting.
_FOLLOWERS = {
    "graph.m": ("detector.max_instances",),
    "detector.grid_size": ("detector.max_instances", "graph.m"),
    "model.k": ("model.widths", "model.encoder_width"),
}
#: Largest number of settings with a column each.
_MOST_COLUMNS = 6
_COLORS = {
    "finished": "green", "running": "blue", "failed": "red", "damaged": "red", "interrupted": "yellow",
    "stopped": "yellow",
}  # fmt: skip


def runs_table(runs: Sequence[Run]) -> Table:
    """Table with a row per run: state, epochs, differing settings, val and test mAP.

    A setting that follows from others (``model.widths`` from k) is left out if another column makes the same
    distinction. If many settings differ, one column lists each run's settings that deviate from the most common values.
    """
    differing = varying(runs)
    keys = _distinct(runs, differing)
    several = len(keys) > _MOST_COLUMNS
    table = Table(title=f"{len(runs)} runs" if len(runs) != 1 else "1 run", title_justify="left")
    table.add_column("run", overflow="fold", min_width=12)
    table.add_column("state")
    table.add_column("epochs", justify="right")
    for key in ["settings"] if several else keys:
        table.add_column(escape(key), overflow="fold")
    changes = unusual(runs, differing) if several else []
    table.add_column("val mAP", justify="right")
    table.add_column("test mAP", justify="right")
    for i in sorted(range(len(runs)), key=lambda i: [_order(runs[i].setting(key)) for key in keys]):
        run = runs[i]
        best = max((row["val/mAP"] for row in run.epochs if "val/mAP" in row), default=None)
        test = run.result["test"].get("mAP") if run.result is not None else None
        table.add_row(
            escape(str(run.path)),
            f"[{_COLORS[run.state]}]{run.state}[/]",
            f"{len(run.epochs)}/{run.setting('trainer.max_epochs', '?')}",
            *([escape(changes[i])] if several else [escape(as_typed(run.setting(key))) for key in keys]),
            *("" if value is None else f"{value:.2f}" for value in (best, test)),
        )
    return table


def followers(keys: Iterable[str]) -> set[str]:
    """Settings that follow from others."""
    return {follower for key in keys for follower in _FOLLOWERS.get(key, ())}


def as_typed(value: Any) -> str:
    """Value of a setting in the syntax of the command line."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value)


def _order(value: Any) -> tuple[bool, float, str]:
    """Sort key: numbers by value, then other values by name."""
    is_number = isinstance(value, (int, float))
    return not is_number, float(value) if is_number else 0.0, "" if is_number else as_typed(value)


def unusual(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """Settings of each run that deviate from the most common values, in the syntax of the command line."""
    flat = [flat_settings(run.config) for run in runs]
    keys = [key for key in keys if key not in followers(keys)]
    usual = {key: Counter(as_typed(f[key]) for f in flat if key in f).most_common(1)[0][0] for key in keys}
    return [" ".join(f"{k}={as_typed(f[k])}" for k in keys if k in f and as_typed(f[k]) != usual[k]) for f in flat]


def _distinct(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """Keys without those that make the same distinction between runs as another key with shorter values.

    Numbers with three or more values are always kept (a search samples each independently), unless one follows from
    another.
    """
    columns = {key: [as_typed(run.setting(key)) for run in runs] for key in keys}
    kept: dict[tuple[Any, ...], str] = {}
    for key in sorted(keys, key=lambda key: len(max(columns[key], key=len))):
        pattern = tuple(map(columns[key].index, columns[key]))
        is_number = all(isinstance(run.setting(key), (int, float)) for run in runs)
        is_sampled = is_number and len(set(pattern)) > 2 and key not in followers(keys)
        kept.setdefault((key, *pattern) if is_sampled else pattern, key)
    return [key for key in keys if key in kept.values()]
