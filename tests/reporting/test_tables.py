from __future__ import annotations

import pytest
from rich.console import Console

from gm_mlic.reporting.tables import comparison_markdown, comparison_table, metrics_table, print_metrics

ROWS = [("known limit", {"mAP": 97.25, "CF1": 90.0, "OF1": 91.0, "top3/CF1": 80.0}), ("ours", {"mAP": None})]


def text(table: object) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_markdown():
    assert comparison_markdown(ROWS, ("mAP", "top3/CF1")) == (
        "|  | mAP | top-3 CF1 |\n| --- | ---: | ---: |\n| known limit | 97.2 | 80.0 |\n| ours | - | - |\n"
    )


def test_the_terminal_shows_the_same_numbers():
    shown = text(comparison_table(ROWS, "some title"))
    for word in ("some title", "known limit", "97.2", "90.0", "top-3 OF1", "-"):
        assert word in shown


def test_one_model(capsys: pytest.CaptureFixture[str]):
    values = {name: float(i) for i, name in enumerate(("CP", "CR", "CF1", "OP", "OR", "OF1"))}
    values |= {f"top3/{name}": 10 + value for name, value in values.items()} | {"mAP": 66.6}
    assert "66.6" in text(metrics_table(values, "mlgcn", "test"))
    print_metrics(values, "mlgcn", "test split")
    shown = capsys.readouterr().out
    assert "0.0" in shown
    assert "15.0" in shown
