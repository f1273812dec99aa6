"""Tables of metrics for the terminal and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gm_mlic.io import few

#: Columns of the comparison of models, in the order of the literature.
COMPARISON = ("mAP", "CF1", "OF1", "top3/CF1", "top3/OF1")

#: Metrics of predicted labels.
F1_METRICS = ("CP", "CR", "CF1", "OP", "OR", "OF1")


def number(value: float | None) -> str:
    """Metric in percent with one decimal; a dash for None."""
    return "-" if value is None else f"{value:.1f}"


def text_table(
    title: str | Text, head: Sequence[str], rows: Iterable[Sequence[str | Text]], texts: int = 1, **settings: Any
) -> Table:
    """Table for the terminal. The first ``texts`` columns are aligned left, the others (numbers) right."""
    made = Table(title=title, title_justify="left", **settings)
    for number, name in enumerate(head):
        made.add_column(name, justify="left" if number < texts else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Table in Markdown, aligned as :func:`text_table`."""
    lines = [head, ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def comparison(
    rows: Iterable[tuple[str, Mapping[str, Any]]], columns: Sequence[str] = COMPARISON
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table that compares models, from their names and metrics in percent."""
    head = ["", *(column.replace("top3/", "top-3 ") for column in columns)]
    return head, [[name, *(number(values.get(column)) for column in columns)] for name, values in rows]


def print_metrics(
    values: Mapping[str, Any], convention: str, title: str, evaluation: Mapping[str, Any] | None = None
) -> None:
    """Print the metrics of one model in percent, over all labels and over the top three of each image.

    Further results of ``gm-mlic eval`` are in ``evaluation``: ``calibrated``, ``intervals``, ``bootstrap``.
    """
    found = evaluation or {}
    rows = [("all", "", values), ("top 3", "top3/", values)]
    if (fitted := found.get("calibrated")) is not None:
        rows += [("all, fitted thresholds", "", fitted), ("top 3, fitted thresholds", "top3/", fitted)]
    cells = ([name, *(number(source.get(prefix + column)) for column in F1_METRICS)] for name, prefix, source in rows)
    console = Console()
    heading = f"{title}: mAP {number(values['mAP'])}"
    console.print(text_table(heading, [f"{convention}, %", *F1_METRICS], cells))
    if "intervals" in found:
        low, high = map(number, found["intervals"][convention])
        console.print(f"95 % interval of mAP: {low} to {high} ({_resamples(found)}).", highlight=False)


def evaluation_table(result: Mapping[str, Any]) -> Table:
    """Metrics of all conventions side by side, in 80 columns, from :func:`gm_mlic.metrics.evaluate_scores`."""
    metrics = result["metrics"]
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    made.add_column("%", no_wrap=True)
    for name in metrics:
        made.add_column(name, justify="right", no_wrap=True)

    def add(title: str, values: Iterable[float | None]) -> None:
        made.add_row(title, *map(number, values))

    def add_intervals(intervals: Iterable[Sequence[float | None]]) -> None:
        for title, ends in zip(("95 % from", "95 % to"), zip(*intervals, strict=True), strict=True):
            add(title, ends)

    add("mAP", (values["mAP"] for values in metrics.values()))
    if "intervals" in result:
        add_intervals(result["intervals"].values())
    if "difference" in result:
        made.add_section()
        other, differences = result["against"], result["difference"].values()
        add("other mAP", (values["mAP"] for values in other.values()))
        made.add_row("gain", *(gap(metrics[name]["mAP"], other[name]["mAP"]) for name in metrics))
        add_intervals(difference["interval"] for difference in differences)
        made.add_row("p", *(f"{d['p']:.3f}" if d["p"] >= 0.0005 else "<.001" for d in differences))
    for heading, source in (("", metrics), ("fitted", result.get("calibrated", {}))):
        for prefix, words in (("", ""), ("top3/", "top-3 ")) if source else ():
            made.add_section()
            if heading and not prefix:
                made.add_row(f"[italic]{heading}[/]")
            for column in F1_METRICS:
                add(words + column, (values[prefix + column] for values in source.values()))
    return made


def print_evaluation(result: Mapping[str, Any]) -> None:
    """Print the result of :func:`gm_mlic.metrics.evaluate_files` as a table with notes."""
    console = Console()
    console.print(
        f"{result['scores_file']}: {result['images']:,} images, {result['labels']} labels",
        highlight=False,
        markup=False,
    )
    console.print(evaluation_table(result))
    notes = [f"Targets are read as {result['target_format']}."]
    if "bootstrap" in result:
        notes.append(f"95 %: percentile interval, {_resamples(result)}.")
    if "against" in result:
        notes.append(f"Gain: mAP over {result['against_file']}; p two-sided, from the same resamples.")
    if "calibrated" in result:
        notes.append(f"Fitted: per-label thresholds with the best F1 on {result['val_images']:,} validation images.")
    if result["excluded_labels"]:
        names = result["excluded_labels"]
        notes.append(f"Labels without a positive, excluded from means over labels: {few(names, 8)} ({len(names)}).")
    for note in notes:
        console.print(note, highlight=False, markup=False)


def _resamples(result: Mapping[str, Any]) -> str:
    bootstrap = result["bootstrap"]
    return f"{bootstrap['resamples']} resamples of the images, seed {bootstrap['seed']}"


def gap(ours: float | None, other: float | None) -> str:
    """Difference of two metrics in percent, with its sign; a dash if one is None."""
    return "-" if ours is None or other is None else f"{ours - other:+.1f}"
