from __future__ import annotations

import pytest
from rich.console import Console

from gm_mlic.reporting.tables import (
    comparison_markdown,
    comparison_table,
    evaluation_table,
    metrics_table,
    print_evaluation,
    print_metrics,
)

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


ALL = ("CP", "CR", "CF1", "OP", "OR", "OF1")


def evaluation() -> dict[str, object]:
    """A result of gm_mlic.metrics.evaluate_scores in which every number is another."""

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


def test_an_evaluation_shows_every_number_once():
    found = cells(evaluation_table(evaluation()))
    rows = [row for row in found if len(row) > 1]
    start = [
        ["%", "one", "two"], ["mAP", "0.2", "-"], ["95", "%", "from", "0.1", "-"], ["95", "%", "to", "0.9", "-"],
        ["other", "mAP", "40.2", "60.2"], ["gain", "-40.0", "-"], ["95", "%", "from", "-50.0", "-"],
        ["95", "%", "to", "30.0", "-"], ["p", "0.040", "<.001"],
    ]  # fmt: skip
    assert rows[: len(start)] == start
    shown = [row[-2:] for row in rows[len(start) :]]
    assert shown == [[f"{s + i}.2", f"{s + 20 + i}.2"] for s in (0, 100) for i in range(1, 13)]


def test_an_evaluation_says_how_to_read_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_evaluation(evaluation())
    shown = capsys.readouterr().out
    assert shown.startswith("a[b].npz: 12,345 images, 9 labels\n")
    for words in ("read as binary", "10 resamples of the images, seed 3", "c[d].npz", "777 validation images", "(9)"):
        assert words in shown
    assert "[label 7], ..." in shown
    assert "[label 8]" not in shown


def test_fitted_thresholds_of_one_model():
    values = {name: float(i) for i, name in enumerate(("mAP", *ALL, *(f"top3/{name}" for name in ALL)))}
    fitted = {name: 50 + value for name, value in values.items()}
    shown = text(metrics_table(values, "mlgcn", "test", fitted))
    assert "all, fitted thresholds" in shown
    assert "51.0" in shown
    assert "62.0" in shown
