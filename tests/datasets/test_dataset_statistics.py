from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gm_mlic.datasets import COCO2014, BoxAnnotations, MultiLabelDataset
from gm_mlic.datasets.statistics import statistics, unreadable_images
from gm_mlic.errors import DataError, UnreadableImage


class FakeDataset(MultiLabelDataset):
    name, split = "made", "train"

    def __init__(self, voc: object, labels: Sequence[str] | None = None) -> None:
        self.targets, self.difficult = (np.asarray(voc) == 1).astype(np.int8), np.asarray(voc) == 0
        self.labels = tuple(labels or (f"l{c}" for c in range(self.targets.shape[1])))
        self.ids = tuple(f"i{row}" for row in range(len(self.targets)))

    def image(self, i: int) -> Image.Image:
        if i == 1:
            raise UnreadableImage("Image i1 is empty.")
        if i == 3:
            raise DataError("Image i3 has another size.")
        return Image.new("RGB", (4, 4))


class Boxed(FakeDataset):
    missing = ("gone.jpg",)

    def boxes(self, i: int) -> BoxAnnotations | None:
        if i == 0:
            return None
        labels = np.flatnonzero(self.targets[i] == 1).repeat(2)
        return BoxAnnotations(torch.zeros(len(labels), 4), torch.from_numpy(labels))


@settings(max_examples=60)
@given(st.integers(1, 6).flatmap(lambda c: st.lists(st.lists(st.sampled_from([1, 0, -1]), min_size=c, max_size=c), min_size=1, max_size=12)))  # fmt: skip  # noqa: E501
def test_statistics_equal_loops(rows: list[list[int]]):
    found = statistics(FakeDataset(rows))
    n, c = len(rows), len(rows[0])
    assert (found.images, found.boxes, found.missing) == (n, None, ())
    for a in range(c):
        assert found.positives[a] == sum(row[a] == 1 for row in rows)
        assert found.difficult[a] == sum(row[a] == 0 for row in rows)
        assert found.ratio[a] == sum(row[a] == 1 for row in rows) / n
        for b in range(c):
            both = sum(row[a] == 1 and row[b] == 1 for row in rows)
            assert found.together[a, b] == both
            if found.positives[a]:
                assert found.conditional[a, b] == both / found.positives[a]
            else:
                assert np.isnan(found.conditional[a, b])
    counts = [sum(value == 1 for value in row) for row in rows]
    assert found.per_image.tolist() == [counts.count(k) for k in range(max(counts) + 1)]
    assert found.unlabeled == counts.count(0)
    assert found.labels_per_image == pytest.approx(sum(counts) / n)

    pairs = found.strongest(count=100, support=2)
    expected = {
        (f"l{a}", f"l{b}"): found.together[a, b] / found.positives[a]
        for a in range(c) for b in range(c)
        if a != b and found.positives[a] >= 2 and found.together[a, b]
    }  # fmt: skip
    assert {(pair.given, pair.other): pair.probability for pair in pairs} == expected
    keys = [(-pair.probability, -pair.together) for pair in pairs]
    assert keys == sorted(keys)
    assert found.strongest(count=1, support=2) == pairs[:1]


def test_boxes_and_missing_images():
    found = statistics(Boxed([[1, 1], [1, 0], [1, -1]]))
    assert found.boxes.tolist() == [4, 0]  # of rows 1 and 2, two each
    assert found.missing == ("gone.jpg",)
    assert statistics(Boxed([[1, 1]])).boxes is None


def test_json():
    content = json.loads(json.dumps(statistics(Boxed([[1, 1], [1, 0]], ["cat", "dög"])).as_dict()))
    assert content["labels"] == {
        "cat": {"images": 2, "r_c": 1.0, "difficult": 0, "boxes": 2},
        "dög": {"images": 1, "r_c": 0.5, "difficult": 1, "boxes": 0},
    }
    assert content["together"] == [[2, 1], [1, 1]]
    assert content["images_with_n_labels"] == [0, 1, 1]


def test_unreadable_images_are_reported():
    seen: list[str | None] = []

    def progress(reasons):
        for reason in reasons:
            seen.append(reason)
            yield reason

    found = unreadable_images(FakeDataset(np.ones((5, 1))), progress)
    assert found == {"i1": "Image i1 is empty.", "i3": "Image i3 has another size."}
    assert len(seen) == 5


@pytest.mark.shared
def test_statistics_of_real_datasets(shared_data: Path):
    """Published numbers of the paper's datasets."""
    with np.load(shared_data / "labels" / "voc2007.npz") as voc:
        found = statistics(FakeDataset(voc["trainval"], voc["labels"].tolist()))
    assert found.images == 5011
    # Published VOC 2007 trainval counts of images with person and cat.
    person, cat = (found.labels.index(name) for name in ("person", "cat"))
    assert (found.positives[person], found.positives[cat]) == (2008, 337)
    with np.load(shared_data / "labels" / "coco2014.npz") as coco:
        targets = np.where(np.unpackbits(coco["train"], axis=1)[:, :80] == 1, 1, -1)
        found = statistics(FakeDataset(targets, coco["labels"].tolist()))
    assert found.positives[found.labels.index("person")] == 45174
    assert found.unlabeled == 0
    assert round(found.labels_per_image, 2) == 2.94


@pytest.mark.shared
def test_boxes_of_coco_mini(shared_data: Path):
    found = statistics(COCO2014(shared_data / "coco-mini", "test"))
    annotations = json.loads((shared_data / "coco-mini/annotations/instances_val2014.json").read_text())["annotations"]
    outlined = [entry for entry in annotations if not entry["iscrowd"] and min(entry["bbox"][2:]) > 0]
    assert found.boxes.sum() == len(outlined)
    assert ((found.boxes > 0) <= (found.positives > 0)).all()
