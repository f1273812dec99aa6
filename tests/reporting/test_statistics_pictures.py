from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image
from rich.console import Console

from gm_mlic.datasets import MultiLabelDataset, Scenes
from gm_mlic.datasets.scenes import LABELS, THEMES
from gm_mlic.datasets.statistics import DatasetStatistics, statistics
from gm_mlic.reporting.statistics import (
    MOST_LABELS,
    cooccurrence_table,
    grouped,
    labels_table,
    overview_table,
    statistics_picture,
)


class Made(MultiLabelDataset):
    name, split = "made", "train"

    def __init__(self, targets: np.ndarray, labels: list[str], difficult: np.ndarray | None = None) -> None:
        self.targets, self.labels, self.difficult = targets, tuple(labels), difficult
        self.ids = tuple(map(str, range(len(targets))))

    def image(self, i: int) -> Image.Image:
        raise NotImplementedError


def made(labels: list[str], images: int = 60, share: float = 0.3, difficult: float = 0.0) -> DatasetStatistics:
    rng = np.random.default_rng(0)
    dice = rng.random((images, len(labels)))
    return statistics(Made(dice < share, labels, (dice >= share) & (dice < share + difficult)))


def text(table: object) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


# ---- Tables ----


def test_tables_show_the_numbers_and_labels_as_they_are():
    one = made(["cat", "[red]dog[/red]", "$x"], difficult=0.1)
    shown = text(labels_table([one, one]))
    for c, label in enumerate(one.labels):
        (row,) = [line for line in shown.splitlines() if label in line]
        assert row.split("│")[2].strip() == row.split("│")[3].strip() == str(one.positives[c])
        assert f"{one.ratio[c]:.4f}" in row
        assert f"{one.difficult[c]} / {one.difficult[c]}" in row
    assert "difficult" not in text(labels_table([made(["cat", "dog"])]))
    shown = text(cooccurrence_table(one))
    assert "[red]dog[/red]" in shown
    assert f"{one.strongest()[0].probability:.2f}" in shown


def test_the_overview_says_what_was_not_looked_at():
    one = made(["cat", "dog"])
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in text(overview_table([one])).splitlines() if "│" in line}  # noqa: E501  # fmt: skip
    assert rows["images"] == "60"
    assert rows["images without label"] == str(one.unlabeled)
    assert rows["boxes"] == "none"
    assert rows["unreadable images"] == "check=true"
    assert "unreadable images       │     1" in text(overview_table([one], {"train": {"7": "empty"}}))


# ---- The order of the heat map ----


def test_labels_of_a_theme_are_neighbours():
    """Scenes have four themes of four labels: each is found again as four neighbours."""
    one = statistics(Scenes("train", size=2000))
    order = grouped(one.together, one.images)
    assert sorted(order) == list(range(len(LABELS)))
    place = np.argsort(order)
    for theme in range(len(THEMES)):
        places = place[4 * theme : 4 * theme + 4]
        assert places.max() - places.min() == 3


def test_any_counts_have_an_order():
    for labels in (0, 1, 2, 5):
        for counts in (np.zeros((labels, labels)), np.full((labels, labels), 7)):  # never, and always present
            assert sorted(grouped(counts.astype(np.int64), 7)) == list(range(labels))


# ---- The picture ----


def texts(path: Path, one: DatasetStatistics, monkeypatch: pytest.MonkeyPatch) -> tuple[Bbox, list[tuple[str, Bbox]]]:
    """Draw it; where each text is, and the whole."""
    found: list[Any] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        renderer = self.canvas.get_renderer()
        names = [*self.texts]
        for axes in self.axes:
            names += [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels(), axes.title, axes._left_title]
        found.append(self.bbox)
        found.append([(t.get_text(), t.get_window_extent(renderer)) for t in names if t.get_text() and t.get_visible()])

    monkeypatch.setattr(Figure, "savefig", keep)
    statistics_picture(path, one)
    whole, boxes = found
    return whole, boxes


@pytest.mark.parametrize("count", [1, 2, 20, 26, 81])
def test_no_text_overlaps_another_or_leaves_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int):
    labels = [f"a label, number {n}" if n % 5 else f"n{n}" for n in range(count)]
    whole, boxes = texts(tmp_path / "new" / "x.png", made(labels, 300, difficult=0.05), monkeypatch)
    for n, (name, box) in enumerate(boxes):
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1, name
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1, name
        inner = Bbox.from_extents(box.x0 + 1, box.y0 + 1, box.x1 - 1, box.y1 - 1)
        for other, theirs in boxes[n + 1 :]:
            assert not inner.overlaps(theirs), (name, other)
    with Image.open(tmp_path / "new" / "x.png") as picture:
        assert picture.width / picture.height == pytest.approx(whole.width / whole.height, rel=0.01)


def test_labels_that_are_hard_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labels = ["$\\frac{", "猫", "a very long name of a label that would not fit", "100 % ^_{x}", "no\\such"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, boxes = texts(tmp_path / "x.png", made(labels), monkeypatch)
    shown = [name for name, _ in boxes]
    assert shown.count("$\\frac{") == 3  # at the bars, and at both sides of the heat map
    assert "a very long name of a lab…" in shown
    assert all(whole.x0 <= box.x0 and box.y1 <= whole.y1 for _, box in boxes)


def test_the_most_frequent_of_many_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = made([f"n{n}" for n in range(MOST_LABELS + 30)], 100, 0.1)
    _, boxes = texts(tmp_path / "x.png", one, monkeypatch)
    shown = {name for name, _ in boxes}
    frequent = np.argsort(-one.positives, kind="stable")
    assert one.labels[frequent[0]] in shown
    assert one.labels[frequent[-1]] not in shown
    assert any("the 120 most frequent" in name for name in shown)


def test_labels_that_never_occur_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    statistics_picture(tmp_path / "none.png", made(["a", "b"], 5, 0.0))
    assert (tmp_path / "none.png").read_bytes().startswith(b"\x89PNG")
    targets = np.array([[1, 0, 1, 0, 0], [0, 0, 0, 1, 1], [1, 0, 1, 0, 0]])
    _, boxes = texts(tmp_path / "x.png", statistics(Made(targets, ["a", "never", "c", "d", "e"])), monkeypatch)
    places = {name: box.y0 for name, box in boxes if len(name) < 6}  # the last one of a name: beside the heat map
    assert places["never"] == min(places[name] for name in ("a", "never", "c", "d", "e"))
    assert abs(places["a"] - places["c"]) < 1.5 * abs(places["d"] - places["e"])
