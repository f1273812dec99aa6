"""Runs as a table, from their folders alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from gm_mlic.runs import Run, varying

#: Settings that only name what others say already.
_NAMES = ("dataset.name", "model.name")
_COLOURS = {"finished": "green", "running": "blue", "failed": "red", "interrupted": "yellow", "stopped": "yellow"}


def runs_table(runs: Sequence[Run]) -> Table:
    """A row for each run: state, epochs, the settings that are not the same for all, val and test mAP.

    A setting that follows from others (``model.widths`` from k) is left out where another column tells the runs apart
    in the same way.
    """
    keys = _distinct(runs, [key for key in varying(runs) if key not in _NAMES])
    table = Table(title=f"{len(runs)} runs" if len(runs) != 1 else "1 run", title_justify="left")
    table.add_column("run", overflow="fold", min_width=12)
    table.add_column("state")
    table.add_column("epochs", justify="right")
    for key in keys:
        table.add_column(escape(key), overflow="fold")
    table.add_column("val mAP", justify="right")
    table.add_column("test mAP", justify="right")
    for run in sorted(runs, key=lambda run: [_order(run.setting(key)) for key in keys]):
        best = max((row["val/mAP"] for row in run.epochs if "val/mAP" in row), default=None)
        test = run.result["test"]["mAP"] if run.result is not None else None
        table.add_row(
            escape(str(run.path)),
            f"[{_COLOURS[run.state]}]{run.state}[/]",
            f"{len(run.epochs)}/{run.setting('trainer.max_epochs', '?')}",
            *(escape(shown(run.setting(key))) for key in keys),
            *("" if value is None else f"{value:.2f}" for value in (best, test)),
        )
    return table


def shown(value: Any) -> str:
    """A setting's value as it is typed."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value)


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then all else by name."""
    is_number = isinstance(value, (int, float))
    return not is_number, float(value) if is_number else 0.0, "" if is_number else shown(value)


def _distinct(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """Of keys that tell runs apart in the same way, the first with the shortest values."""
    kept: dict[tuple[int, ...], str] = {}
    for key in keys:
        values = [shown(run.setting(key)) for run in runs]
        pattern = tuple(values.index(value) for value in values)
        if pattern not in kept or len(max(values, key=len)) < max(
            len(shown(run.setting(kept[pattern]))) for run in runs
        ):
            kept[pattern] = key
    return [key for key in keys if key in kept.values()]
