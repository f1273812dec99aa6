from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image
from rich.console import Console

from gm_mlic.datasets import MultiLabelDataset, Scenes
from gm_mlic.datasets.scenes import LABELS
from gm_mlic.datasets.statistics import DatasetStatistics, statistics
from gm_mlic.reporting.statistics import (
    MOST_LABELS,
    cooccurrence_table,
    grouped,
    labels_table,
    overview_table,
    statistics_picture,
)


class FakeDataset(MultiLabelDataset):
    name, split = "fake", "train"

    def __init__(self, targets: np.ndarray, labels: list[str], difficult: np.ndarray | None = None) -> None:
        self.targets, self.labels, self.difficult = targets, tuple(labels), difficult
        self.ids = tuple(map(str, range(len(targets))))

    def image(self, i: int) -> Image.Image:
        raise NotImplementedError


def fake_statistics(
    labels: list[str], images: int = 60, share: float = 0.3, difficult: float = 0.0
) -> DatasetStatistics:
    rng = np.random.default_rng(0)
    dice = rng.random((images, len(labels)))
    return statistics(FakeDataset(dice < share, labels, (dice >= share) & (dice < share + difficult)))


def text(table: object) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


# ---- Tables ----


def test_tables_show_numbers_and_unescaped_labels():
    stats = fake_statistics(["cat", "[red]dog[/red]", "$x"], difficult=0.1)
    printed = text(labels_table([stats, stats]))
    for c, label in enumerate(stats.labels):
        (row,) = [line for line in printed.splitlines() if label in line]
        assert row.split("│")[2].strip() == row.split("│")[3].strip() == str(stats.positives[c])
        assert f"{stats.ratio[c]:.4f}" in row
        assert f"{stats.difficult[c]} / {stats.difficult[c]}" in row
    assert "difficult" not in text(labels_table([fake_statistics(["cat", "dog"])]))
    printed = text(cooccurrence_table(stats))
    assert "[red]dog[/red]" in printed
    assert f"{stats.strongest()[0].probability:.2f}" in printed


def test_the_overview_shows_unchecked_images():
    stats = fake_statistics(["cat", "dog"])
    lines = [line.split("│") for line in text(overview_table([stats])).splitlines() if "│" in line]
    rows = {line[1].strip(): line[2].strip() for line in lines}
    assert rows["images"] == "60"
    assert rows["images without labels"] == str(stats.unlabeled)
    assert rows["boxes"] == "none"
    assert rows["unreadable images"] == "check=true"
    assert re.search(r"unreadable images +│ +1 ", text(overview_table([stats], {"train": {"7": "empty"}})))


# ---- The order of the heat map ----


def test_labels_of_a_theme_are_side_by_side():
    """Scenes have four themes of four labels; each theme is four adjacent labels."""
    stats = statistics(Scenes("train", size=2000))
    order = grouped(stats.together, stats.images)
    assert sorted(order) == list(range(len(LABELS)))
    position = np.argsort(order)
    for theme in range(4):
        positions = position[4 * theme : 4 * theme + 4]
        assert positions.max() - positions.min() == 3


def test_constant_counts_have_an_order():
    for labels in (0, 1, 2, 5):
        for counts in (np.zeros((labels, labels)), np.full((labels, labels), 7)):  # always absent, always present
            assert sorted(grouped(counts.astype(np.int64), 7)) == list(range(labels))


# ---- The picture ----


def texts(path: Path, stats: DatasetStatistics, monkeypatch: pytest.MonkeyPatch) -> tuple[Bbox, list[tuple[str, Bbox]]]:
    """Draw the picture; returns its bounding box, and all texts with theirs."""
    found: list[Any] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        renderer = FigureCanvasAgg(self).get_renderer()
        names = [*self.texts]
        for axes in self.axes:
            names += [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels(), axes.title, axes._left_title]
        found.append(self.bbox)
        found.append([(t.get_text(), t.get_window_extent(renderer)) for t in names if t.get_text() and t.get_visible()])

    monkeypatch.setattr(Figure, "savefig", keep)
    statistics_picture(path, stats)
    whole, boxes = found
    return whole, boxes


@pytest.mark.parametrize("count", [1, 2, 20, 26, 81])
def test_no_text_overlaps_another_or_leaves_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int):
    labels = [f"a label, number {n}" if n % 5 else f"n{n}" for n in range(count)]
    whole, boxes = texts(tmp_path / "new" / "x.png", fake_statistics(labels, 300, difficult=0.05), monkeypatch)
    for n, (name, box) in enumerate(boxes):
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1, name
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1, name
        inner = Bbox.from_extents(box.x0 + 1, box.y0 + 1, box.x1 - 1, box.y1 - 1)
        for other, theirs in boxes[n + 1 :]:
            assert not inner.overlaps(theirs), (name, other)
    with Image.open(tmp_path / "new" / "x.png") as picture:
        assert picture.width / picture.height == pytest.approx(whole.width / whole.height, rel=0.01)


def test_labels_with_markup_other_scripts_or_excess_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labels = ["$\\frac{", "猫", "a very long name of a label that would not fit", "100 % ^_{x}", "no\\such"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, boxes = texts(tmp_path / "x.png", fake_statistics(labels), monkeypatch)
    drawn = [name for name, _ in boxes]
    assert drawn.count("$\\frac{") == 3  # at the bars and at both axes of the heat map
    assert "a very long name of a lab…" in drawn
    assert all(whole.x0 <= box.x0 and box.y1 <= whole.y1 for _, box in boxes)


def test_at_most_120_labels_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stats = fake_statistics([f"n{n}" for n in range(MOST_LABELS + 30)], 100, 0.1)
    _, boxes = texts(tmp_path / "x.png", stats, monkeypatch)
    drawn = {name for name, _ in boxes}
    frequent = np.argsort(-stats.positives, kind="stable")
    assert stats.labels[frequent[0]] in drawn
    assert stats.labels[frequent[-1]] not in drawn
    assert any("the 120 most frequent" in name for name in drawn)


def test_labels_without_positives_are_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    statistics_picture(tmp_path / "none.png", fake_statistics(["a", "b"], 5, 0.0))
    assert (tmp_path / "none.png").read_bytes().startswith(b"\x89PNG")
    targets = np.array([[1, 0, 1, 0, 0], [0, 0, 0, 1, 1], [1, 0, 1, 0, 0]])
    _, boxes = texts(tmp_path / "x.png", statistics(FakeDataset(targets, ["a", "never", "c", "d", "e"])), monkeypatch)
    y = {name: box.y0 for name, box in boxes if len(name) < 6}  # the last text of a name is beside the heat map
    assert y["never"] == min(y[name] for name in ("a", "never", "c", "d", "e"))
    assert abs(y["a"] - y["c"]) < 1.5 * abs(y["d"] - y["e"])
