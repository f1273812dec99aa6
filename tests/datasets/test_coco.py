from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gm_mlic.datasets.base import label_ratio
from gm_mlic.datasets.coco import COCO2014
from gm_mlic.errors import ConfigError, DataError, UnreadableImage

Content = dict[str, Any]


def annotation(key: int, image: int, category: int, bbox: object, **more: object) -> Content:
    return {"id": key, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0, "area": 1.0} | more


def instances(archive: str, count: int, first: int = 1) -> Content:
    """COCO instances file: image n has label n % 3, image ``first + 1`` has none."""
    names = {18: "dog", 3: "car", 90: "apple"}
    images = [
        {"id": n, "file_name": f"COCO_{archive}_{n:012d}.jpg", "width": 40, "height": 30, "license": 1}
        for n in range(first, first + count)
    ]
    annotations = [
        annotation(100 + n, n, list(names)[n % 3], [1.0, 2.0, 10.5, 20.0])
        for n in range(first, first + count)
        if n != first + 1
    ]
    return {
        "info": {"year": 2014},
        "licenses": [],
        "images": images[::-1],
        "annotations": annotations,
        "categories": [{"supercategory": "x", "id": key, "name": name} for key, name in names.items()],
    }


def write(root: Path, archive: str, content: Content) -> Path:
    folder = root / archive
    folder.mkdir(parents=True, exist_ok=True)
    for entry in content["images"]:
        Image.new("RGB", (40, 30), (entry["id"] % 256, 0, 0)).save(folder / f"COCO_{archive}_{entry['id']:012d}.jpg")
    path = root / "annotations" / f"instances_{archive}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "train2014", instances("train2014", 21))
    write(tmp_path, "val2014", instances("val2014", 4, first=500))
    return tmp_path


def refused(root: Path, error: type[Exception] = DataError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        COCO2014(root, **({"split": "test"} | options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Reading ----


def test_test_split_is_val2014(root: Path) -> None:
    data = COCO2014(root, "test")
    assert (data.name, data.split, len(data)) == ("coco2014", "test", 3)
    assert data.ids == ("500", "502", "503")
    assert data.labels == ("apple", "car", "dog")
    assert data.targets.dtype == np.int8
    # Image n has label ("dog", "car", "apple")[n % 3].
    expected = [[int(name == ("dog", "car", "apple")[n % 3]) for name in data.labels] for n in (500, 502, 503)]
    assert data.targets.tolist() == expected
    image = data.image(1)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert abs(image.getpixel((20, 15))[0] - 502 % 256) < 4


def test_unlabeled_images_can_be_kept(root: Path) -> None:
    data = COCO2014(root, "test", unlabeled="keep")
    assert data.ids == ("500", "501", "502", "503")
    assert data.targets[1].tolist() == [0, 0, 0]
    assert data.boxes(1).boxes.shape == (0, 4)
    assert data.boxes(1).labels.shape == (0,)


def test_label_order(root: Path) -> None:
    by_name, by_id = COCO2014(root, "test"), COCO2014(root, "test", label_order="id")
    assert by_id.labels == ("car", "dog", "apple")
    columns = [by_id.labels.index(name) for name in by_name.labels]
    np.testing.assert_array_equal(by_id.targets[:, columns], by_name.targets)
    assert by_id.labels[by_id.boxes(0).labels[0]] == by_name.labels[by_name.boxes(0).labels[0]]
    assert by_name.fingerprint != by_id.fingerprint


def test_train_and_val_split_train2014(root: Path) -> None:
    train, val = COCO2014(root, "train"), COCO2014(root, "val")
    assert len(val) == 2
    assert len(train) == 18
    assert set(train.ids).isdisjoint(val.ids)
    assert {int(key) for key in train.ids + val.ids} == set(range(1, 22)) - {2}
    assert list(map(int, train.ids)) == sorted(map(int, train.ids))
    assert COCO2014(root, "val").fingerprint == val.fingerprint
    assert any(COCO2014(root, "val", seed=seed).ids != val.ids for seed in (1, 2))
    assert len(COCO2014(root, "val", val_fraction=0.5)) == 10
    assert len(COCO2014(root, "val", val_fraction=0.001)) == 1
    assert len(COCO2014(root, "train", val_fraction=0)) == 20
    assert "leaves no image" in refused(root, ConfigError, split="val", val_fraction=0)
    assert "leaves no image" in refused(root, ConfigError, split="train", val_fraction=0.99)


def test_boxes_and_crowds(root: Path) -> None:
    content = instances("val2014", 1)
    content["annotations"] = [
        annotation(1, 1, 18, [1.0, 2.0, 10.5, 20.0]),
        annotation(2, 1, 3, [0, 0, 40, 30], iscrowd=1, segmentation={"counts": [0, 1200], "size": [30, 40]}),
        annotation(3, 1, 90, [5, 5, 0, 7]),  # no area
        annotation(4, 1, 18, [-0.5, 10, 41.9, 21.5]),  # slightly beyond the border
        annotation(5, 1, 18, [40.5, 0, 1, 5]),  # entirely outside the image
    ]
    write(root, "val2014", content)
    data = COCO2014(root, "test")
    assert data.targets.tolist() == [[1, 1, 1]]  # crowds and boxes without area count as present labels
    assert data.boxes(0).boxes.tolist() == [[1, 2, 11.5, 22], [0, 10, 40, 30]]
    assert [data.labels[c] for c in data.boxes(0).labels] == ["dog", "dog"]


def test_only_images_of_the_split_must_exist(root: Path) -> None:
    val = COCO2014(root, "val")
    for row in range(len(val)):
        (val.folder / f"COCO_train2014_{int(val.ids[row]):012d}.jpg").unlink()
    assert len(COCO2014(root, "train")) == 18
    assert "2 of 2 images" in refused(root, split="val")


# ---- Errors ----


def first(kind: str, **change: object) -> Callable[[Content], None]:
    return lambda content: content[kind][0].update(change)


def twice(kind: str, **change: object) -> Callable[[Content], None]:
    return lambda content: content[kind].append(copy.deepcopy(content[kind][0]) | change)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (first("annotations", category_id=77), "annotation 600 (image id 500) has unknown category_id 77"),
        (first("annotations", category_id="dog"), "annotation 600 has category_id 'dog'"),
        (first("annotations", image_id=9), "annotation 600 has unknown image_id 9"),
        (first("annotations", image_id=None), "annotation 600 has image_id None"),
        (first("annotations", bbox=[50, 40, 5, 5]), "annotation 600 (image id 500"),
        (first("annotations", bbox=[0, 0, 43, 5]), "outside the image of 40 x 30"),
        (first("annotations", bbox=[-3, 0, 10, 5]), "outside the image of 40 x 30"),
        (first("annotations", bbox=[-50, 0, 10, 5]), "outside the image of 40 x 30"),
        (first("annotations", bbox=[1, 1, -2, 5]), "must not be negative"),
        (first("annotations", bbox=[1, 1, float("nan"), 5]), "four finite numbers"),
        (first("annotations", bbox=[1, 1, float("inf"), 5]), "four finite numbers"),
        (first("annotations", bbox=[1, 1, 5]), "four finite numbers"),
        (first("annotations", bbox=["1", 1, 5, 5]), "four finite numbers"),
        (twice("images"), "image id 503 (COCO_val2014_000000000503.jpg) occurs twice"),
        (twice("images", id=999), "image id 999 (COCO_val2014_000000000503.jpg) occurs twice"),
        (first("images", id="503"), "image number 0 has id '503'"),
        (first("images", width=0), "image id 503 has size 0 x 30"),
        (first("images", height=None), "image id 503 has height None"),
        (first("images", file_name="../../etc/passwd"), "must stay inside"),
        (first("images", file_name="/etc/passwd"), "must stay inside"),
        (first("images", file_name="..\\secret.jpg"), "must stay inside"),
        (first("images", file_name="C:secret.jpg"), "must stay inside"),
        (first("images", file_name=""), "expected a file name"),
        (first("annotations", bbox=None), "four finite numbers"),
        (first("images", file_name=7), "has file_name 7: expected a file name"),
        (first("categories", name=None), "category 18 has the label None"),
        (twice("categories"), "category 18 ('dog') occurs twice"),
        (twice("categories", id=19), "category 19 ('dog') occurs twice"),
        (lambda content: content.pop("categories"), "no list 'categories'"),
        (lambda content: content.update(images={}), "no list 'images'"),
        (lambda content: content["images"].append(3), "not an object"),
        (lambda content: content.update(images=[], annotations=[]), "no images"),
        (lambda content: content.update(annotations=[]), "no images"),  # none is left with unlabeled="drop"
        (lambda content: content.update(categories=[], annotations=[]), "no images"),
    ],
)
def test_malformed_file_is_named_in_the_error(root: Path, corrupt: Callable[[Content], None], message: str) -> None:
    content = instances("val2014", 4, first=500)
    path = write(root, "val2014", content)
    corrupt(content)
    path.write_text(json.dumps(content))
    text = refused(root)
    assert message in text
    assert str(path) in text or "no images" in text


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff\xfe", '{"images": 1}', "[" * 100_000])
def test_invalid_json_and_other_formats_are_refused(root: Path, text: str) -> None:
    path = root / "annotations" / "instances_val2014.json"
    path.write_bytes(text.encode("latin-1"))
    assert str(path) in refused(root)


def test_missing_files_error_names_the_expected_path(root: Path) -> None:
    assert "expected" in refused(root / "elsewhere")
    (root / "val2014" / "COCO_val2014_000000000502.jpg").unlink()
    message = refused(root)
    assert "1 of 3 images" in message
    assert "COCO_val2014_000000000502.jpg" in message
    (root / "annotations" / "instances_val2014.json").unlink()
    assert "instances_val2014.json" in refused(root)
    (root / "val2014").rename(root / "val2015")
    assert f"expected {root / 'val2014'} under `root`" in refused(root)


def test_file_name_that_no_file_can_have(root: Path) -> None:
    content = instances("val2014", 4, first=500)
    path = write(root, "val2014", content)
    content["images"][0]["file_name"] = "x" * 300
    path.write_text(json.dumps(content))
    assert "1 of 3 images" in refused(root)


def test_many_missing_images_are_counted(root: Path) -> None:
    for path in (root / "train2014").glob("*.jpg"):
        path.unlink()
    message = refused(root, split="train", val_fraction=0)
    assert "20 of 20" in message
    assert message.count("COCO_train2014_") == 3


def test_unreadable_photo_and_wrong_size(root: Path) -> None:
    data = COCO2014(root, "test")
    path = root / "val2014" / "COCO_val2014_000000000500.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UnreadableImage, match=path.name):
        data.image(0)
    Image.new("RGB", (30, 40)).save(path)
    with pytest.raises(DataError, match="30 x 40 pixels, but"):
        data.image(0)


def test_invalid_arguments(root: Path) -> None:
    for key, value in (("split", "trainval"), ("unlabeled", "yes"), ("label_order", "random"), ("val_fraction", 1.0)):
        assert refused(root, ConfigError, **{key: value}).startswith(f"{key} must be ")


# ---- Real photos ----


@pytest.mark.shared
def test_coco_mini(shared_data: Path) -> None:
    root = shared_data / "coco-mini"
    kept = [COCO2014(root, split, unlabeled="keep") for split in ("train", "val", "test")]
    assert [len(data) for data in kept] == [232, 26, 82]
    labeled = COCO2014(root, "train", val_fraction=0)
    assert len(labeled) == 255
    with np.load(shared_data / "glove" / "coco2014.npz") as table:
        assert labeled.labels == tuple(table["labels"].tolist())
    assert COCO2014(root, "test", label_order="id").labels[:3] == ("person", "bicycle", "car")
    for data in kept:
        for row in range(len(data)):
            boxes = data.boxes(row)
            image = data.folder / f"COCO_{data.folder.name}_{int(data.ids[row]):012d}.jpg"
            with Image.open(image) as photo:
                width, height = photo.size
            assert (boxes.boxes[:, :2] >= 0).all()
            assert (boxes.boxes[:, 2] <= width).all()
            assert (boxes.boxes[:, 3] <= height).all()
            assert (boxes.boxes[:, 2:] > boxes.boxes[:, :2]).all()
            assert all(data.targets[row, c] == 1 for c in boxes.labels)
    assert label_ratio(labeled.targets)[labeled.labels.index("person")] > 0.3


@pytest.mark.shared
def test_coco_mini_against_pycocotools(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels and boxes equal those of pycocotools."""
    coco = pytest.importorskip("pycocotools.coco").COCO(
        str(shared_data / "coco-mini" / "annotations" / "instances_val2014.json")
    )
    data = COCO2014(shared_data / "coco-mini", "test", unlabeled="keep")
    assert [int(key) for key in data.ids] == sorted(coco.getImgIds())
    names = {entry["id"]: entry["name"] for entry in coco.loadCats(coco.getCatIds())}
    for row, key in enumerate(data.ids):
        entries = coco.loadAnns(coco.getAnnIds(imgIds=[int(key)]))
        present = {data.labels[c] for c in np.flatnonzero(data.targets[row] == 1)}
        assert present == {names[entry["category_id"]] for entry in entries}
        outlined = [entry for entry in entries if not entry["iscrowd"] and min(entry["bbox"][2:]) > 0]
        boxes = data.boxes(row)
        assert [data.labels[c] for c in boxes.labels] == [names[entry["category_id"]] for entry in outlined]
        expected = np.array([entry["bbox"] for entry in outlined]).reshape(-1, 4)
        expected[:, 2:] += expected[:, :2]
        np.testing.assert_allclose(boxes.boxes, expected, atol=2)
