from __future__ import annotations

import pytest
from rich.console import Console

from gm_mlic.reporting.tables import (
    comparison,
    evaluation_table,
    markdown_table,
    print_evaluation,
    print_metrics,
    text_table,
)

ROWS = [("upper bound", {"mAP": 97.25, "CF1": 90.0, "OF1": 91.0, "top3/CF1": 80.0}), ("ours", {"mAP": None})]


def text(table: object) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_comparison_markdown():
    assert markdown_table(*comparison(ROWS, ("mAP", "top3/CF1"))) == (
        "|  | mAP | top-3 CF1 |\n| --- | ---: | ---: |\n| upper bound | 97.2 | 80.0 |\n| ours | - | - |\n"
    )


def test_comparison_table():
    printed = text(text_table("a title", *comparison(ROWS)))
    for word in ("a title", "upper bound", "97.2", "90.0", "top-3 OF1", "-"):
        assert word in printed


def test_metrics_table(capsys: pytest.CaptureFixture[str]):
    values = {name: float(i) for i, name in enumerate(("CP", "CR", "CF1", "OP", "OR", "OF1"))}
    values |= {f"top3/{name}": 10 + value for name, value in values.items()} | {"mAP": 66.6}
    print_metrics(values, "mlgcn", "test split")
    printed = capsys.readouterr().out
    assert "66.6" in printed
    assert "0.0" in printed
    assert "15.0" in printed


ALL = ("CP", "CR", "CF1", "OP", "OR", "OF1")


def evaluation() -> dict[str, object]:
    """Result of gm_mlic.metrics.evaluate_scores with unique numbers."""

    def values(start: int) -> dict[str, float | None]:
        names = ["mAP", *ALL, *(f"top3/{name}" for name in ALL)]
        return {name: start + i + 0.25 for i, name in enumerate(names)}

    return {
        "scores_file": "a[b].npz", "against_file": "c[d].npz", "images": 12345, "labels": 9, "target_format": "binary",
        "excluded_labels": [f"[label {i}]" for i in range(9)], "val_images": 777,
        "metrics": {"one": values(0), "two": values(20) | {"mAP": None}},
        "against": {"one": values(40), "two": values(60)},
        "calibrated": {"one": values(100), "two": values(120)},
        "bootstrap": {"resamples": 10, "seed": 3, "level": 0.95},
        "intervals": {"one": [0.1, 0.9], "two": [None, None]},
        "difference": {"one": {"interval": [-50.0, 30.0], "p": 0.04}, "two": {"interval": [None, None], "p": 0.0001}},
    }  # fmt: skip


def cells(table: object) -> list[list[str]]:
    return [line.split() for line in text(table).splitlines()]


def test_evaluation_table_shows_every_number():
    found = cells(evaluation_table(evaluation()))
    rows = [row for row in found if len(row) > 1]
    start = [
        ["%", "one", "two"], ["mAP", "0.2", "-"], ["95", "%", "from", "0.1", "-"], ["95", "%", "to", "0.9", "-"],
        ["other", "mAP", "40.2", "60.2"], ["gain", "-40.0", "-"], ["95", "%", "from", "-50.0", "-"],
        ["95", "%", "to", "30.0", "-"], ["p", "0.040", "<.001"],
    ]  # fmt: skip
    assert rows[: len(start)] == start
    rest = [row[-2:] for row in rows[len(start) :]]
    assert rest == [[f"{s + i}.2", f"{s + 20 + i}.2"] for s in (0, 100) for i in range(1, 13)]


def test_notes_of_an_evaluation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_evaluation(evaluation())
    printed = capsys.readouterr().out
    assert printed.startswith("a[b].npz: 12,345 images, 9 labels\n")
    for words in ("read as binary", "10 resamples of the images, seed 3", "c[d].npz", "777 validation images", "(9)"):
        assert words in printed
    assert "[label 7], ..." in printed
    assert "[label 8]" not in printed


def test_metrics_table_with_fitted_thresholds(capsys: pytest.CaptureFixture[str]):
    values = {name: float(i) for i, name in enumerate(("mAP", *ALL, *(f"top3/{name}" for name in ALL)))}
    fitted = {name: 50 + value for name, value in values.items()}
    print_metrics(values, "mlgcn", "test", {"calibrated": fitted})
    printed = capsys.readouterr().out
    assert "all, fitted thresholds" in printed
    assert "51.0" in printed
    assert "62.0" in printed
