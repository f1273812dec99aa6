"""Tables of metrics, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

#: Columns of a table that compares models, in the order of the literature.
COMPARISON = ("mAP", "CF1", "OF1", "top3/CF1", "top3/OF1")

#: Columns of a table of one model.
_ONE = ("CP", "CR", "CF1", "OP", "OR", "OF1")


def number(value: float | None) -> str:
    """A metric in per cent with one decimal; a dash where there is none."""
    return "-" if value is None else f"{value:.1f}"


def comparison_table(
    rows: Sequence[tuple[str, Mapping[str, Any]]], title: str, columns: Sequence[str] = COMPARISON
) -> Table:
    """One row for each model.

    Args:
        rows: names and metric values in per cent.
        title: above the table.
        columns: which metrics.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column.replace("top3/", "top-3 "), justify="right")
    for name, values in rows:
        table.add_row(name, *(number(values.get(column)) for column in columns))
    return table


def comparison_markdown(rows: Sequence[tuple[str, Mapping[str, Any]]], columns: Sequence[str] = COMPARISON) -> str:
    """The same as a Markdown table."""
    head = ["", *(column.replace("top3/", "top-3 ") for column in columns)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [
        "| " + " | ".join([name, *(number(values.get(column)) for column in columns)]) + " |" for name, values in rows
    ]
    return "\n".join(lines) + "\n"


def metrics_table(values: Mapping[str, Any], preset: str, title: str) -> Table:
    """All metrics of one model: over all labels, and over each image's three best.

    Args:
        values: metric values in per cent.
        preset: the convention they follow.
        title: above the table.
    """
    table = Table(title=f"{title}: mAP {number(values['mAP'])}", title_justify="left")
    table.add_column(f"{preset}, %")
    for column in _ONE:
        table.add_column(column, justify="right")
    for name, prefix in (("all", ""), ("top 3", "top3/")):
        table.add_row(name, *(number(values.get(prefix + column)) for column in _ONE))
    return table


def print_metrics(values: Mapping[str, Any], preset: str, title: str) -> None:
    """Print :func:`metrics_table` on stdout."""
    Console().print(metrics_table(values, preset, title))
