from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gm_mlic.datasets import CustomDataset
from gm_mlic.errors import ConfigError, DataError, UnreadableImage

NAMES = [f"{n:02}.png" for n in range(40)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """40 photos: photo n has cat if n is even, dog if 3 divides n; 20 train, 10 val, 10 test."""
    lines = ["file,labels,split"]
    for n, name in enumerate(NAMES):
        Image.new("RGB", (40, 30), (n, 0, 0)).save(tmp_path / name)
        lines.append(f"{name},{'; '.join(labels_of(n))},{'train' if n < 20 else 'val' if n < 30 else 'test'}")
    write(tmp_path, "labels.csv", lines)
    return tmp_path


def labels_of(n: int) -> list[str]:
    return ["dog"] * (n % 3 == 0) + ["cat"] * (n % 2 == 0)


def write(root: Path, name: str, lines: list[str]) -> None:
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(root: Path, **options: Any) -> CustomDataset:
    """Training split of annotations with split train for every image."""
    return CustomDataset(root, **({"val_fraction": 0.0} | options))


def refused(root: Path, error: type[Exception] = DataError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        CustomDataset(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message[-1] in ".?"
    return message


# ---- Reading ----


def test_split_column(root: Path):
    data = CustomDataset(root, "val")
    assert (data.name, data.split, data.labels, data.missing) == ("custom", "val", ("cat", "dog"), ())
    assert data.ids == tuple(NAMES[20:30])
    assert data.targets.dtype == np.int8
    expected = [[int(label in labels_of(n)) for label in data.labels] for n in range(20, 30)]
    assert data.targets.tolist() == expected
    assert [0, 0] in expected  # an image without labels is kept
    assert data.image(3).getpixel((0, 0)) == (23, 0, 0)
    assert data.boxes(0) is None


def test_one_file_per_split(root: Path):
    write(root, "a.csv", ["file,dog,cat", "00.png,1,1", "01.png,0,0"])
    write(root, "b.csv", ["file,cat,dog", "02.png,1,0"])
    files = {"train": "a.csv", "val": root / "b.csv"}
    train, val = (CustomDataset(root, split, annotations=files) for split in ("train", "val"))
    assert train.labels == val.labels == ("dog", "cat")  # the order of the first file
    assert (train.ids, val.ids) == (("00.png", "01.png"), ("02.png",))
    assert val.targets.tolist() == [[0, 1]]
    message = refused(root, split="test", annotations=files)
    assert "split 'test' has no images (train 2, val 1, test 0): set a file in `annotations['test']`" in message


def test_one_folder_per_split(root: Path):
    """The same file name in two folders is two images, as exported by annotation tools."""
    for folder, pixel in (("train", 5), ("valid", 7)):
        (root / folder).mkdir()
        Image.new("RGB", (40, 30), (pixel, 0, 0)).save(root / folder / "a.png")
        write(root, f"{folder}/labels.csv", ["file,labels", "a.png,cat"])
    files = {"train": "train/labels.csv", "val": "valid/labels.csv"}
    folders = {"train": "train", "val": "valid"}
    parts = [CustomDataset(root, split, annotations=files, folders=folders) for split in ("train", "val")]
    assert [part.ids for part in parts] == [("train/a.png",), ("valid/a.png",)]
    assert [part.image(0).getpixel((0, 0))[0] for part in parts] == [5, 7]
    assert "repeats the image 'a.png'" in refused(root, annotations=files)
    for wrong, message in (({"test": "x"}, "folders has the key 'test'"), ({"train": "../x"}, "folders['train']")):
        assert message in refused(root, ConfigError, annotations=files, folders=wrong)
    assert "folders needs" in refused(root, ConfigError, folders=folders)


def test_labels_are_collected_over_all_splits(root: Path):
    write(root, "labels.csv", ["file,labels,split", "00.png,zebra,train", "01.png,ant,test", "02.png,,val"])
    assert {CustomDataset(root, split).labels for split in ("train", "val", "test")} == {("ant", "zebra")}


def test_drawn_splits_partition_the_images(root: Path):
    parts = {split: CustomDataset(root, split, columns={"split": None}) for split in ("train", "val", "test")}
    assert abs(len(parts["test"]) - 8) <= 1  # a fifth of 40
    assert abs(len(parts["val"]) - 3.2) <= 1  # a tenth of the rest
    ids = [key for part in parts.values() for key in part.ids]
    assert sorted(ids) == NAMES
    for part in parts.values():
        assert list(part.ids) == sorted(part.ids)  # file order
        for key, target in zip(part.ids, part.targets, strict=True):
            assert {part.labels[c] for c in np.flatnonzero(target == 1)} == set(labels_of(int(key[:2])))
    assert CustomDataset(root, "test", columns={"split": None}).ids == parts["test"].ids
    others = {CustomDataset(root, "test", columns={"split": None}, seed=seed).ids for seed in range(1, 4)}
    assert others != {parts["test"].ids}


def test_drawn_splits_are_stratified(root: Path):
    """With test fraction 1/4, two of eight photos with a rare label are in test."""
    write(root, "labels.csv", ["file,labels", *(f"{name},{'rare' if n < 8 else 'x'}" for n, name in enumerate(NAMES))])
    for seed in range(5):
        test = CustomDataset(root, "test", test_fraction=0.25, seed=seed)
        assert (test.targets[:, 0] == 1).sum() == 2
        assert abs(len(test) - 10) <= 1


def test_val_is_drawn_from_train_if_not_annotated(root: Path):
    text = (root / "labels.csv").read_text().replace(",val", ",train")
    (root / "labels.csv").write_text(text)
    parts = {split: CustomDataset(root, split, val_fraction=0.2) for split in ("train", "val", "test")}
    assert parts["test"].ids == tuple(NAMES[30:])
    assert abs(len(parts["val"]) - 6) <= 1
    assert sorted(parts["train"].ids + parts["val"].ids) == NAMES[:30]
    assert "raise `val_fraction`" in refused(root, split="val", val_fraction=0.0)


def test_missing_files_do_not_change_the_splits(root: Path):
    options: dict[str, Any] = {"columns": {"split": None}, "missing": "drop"}
    before = {split: CustomDataset(root, split, **options).ids for split in ("train", "val", "test")}
    (root / before["test"][2]).unlink()
    after = {split: CustomDataset(root, split, **options) for split in before}
    assert after["train"].ids == before["train"]
    assert after["val"].ids == before["val"]
    assert after["test"].missing == (before["test"][2],)
    assert after["test"].ids == tuple(key for key in before["test"] if key != before["test"][2])
    assert len(after["test"].targets) == len(after["test"].ids)


def test_boxes_of_json_lines_are_clipped(root: Path):
    entries = [
        {"file": "00.png", "boxes": [[-1, 2, 41, 20, "dog"], [40.5, 0, 42, 5, "cat"], [1, 1, 1, 9, "cat"]]},
        {"file": "01.png", "labels": []},
        {"file": "02.png", "labels": ["cat"], "boxes": []},
    ]
    lines = [json.dumps(entry | {"split": "train"}) for entry in entries]
    write(root, "labels.jsonl", lines)
    data = train(root, annotations="labels.jsonl")
    boxes = data.boxes(0)
    assert boxes is not None
    assert boxes.boxes.tolist() == [[0, 2, 40, 20]]
    assert boxes.labels.tolist() == [data.labels.index("dog")]
    assert data.targets.tolist() == [[1, 1], [0, 0], [1, 0]]
    assert data.boxes(1) is None
    assert data.boxes(2).boxes.shape == (0, 4)

    write(root, "labels.jsonl", [json.dumps({"file": "00.png", "boxes": [[1, 2, 43, 9, "cat"]], "split": "train"})])
    with pytest.raises(DataError, match=r"line 1 has the box \[1.0, 2.0, 43.0, 9.0\], outside the image of 40 x 30"):
        train(root, annotations="labels.jsonl").boxes(0)


def test_boxes_of_photos_with_exif_rotation(root: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(root / "side.jpg", exif=exif)  # upright: 30 x 40
    write(root, "x.jsonl", [json.dumps({"file": "side.jpg", "boxes": [[0, 0, 30, 40, "cat"]], "split": "train"})])
    data = train(root, annotations="x.jsonl")
    assert data.image(0).size == (30, 40)
    assert data.boxes(0).boxes.tolist() == [[0, 0, 30, 40]]


def test_unreadable_photos(root: Path):
    (root / "00.png").write_bytes(b"")
    write(root, "x.jsonl", [json.dumps({"file": "00.png", "boxes": [[0, 0, 30, 40, "cat"]], "split": "train"})])
    data = train(root, annotations="x.jsonl")
    assert data.boxes(0) is None
    with pytest.raises(UnreadableImage, match=r"00\.png is empty"):
        data.image(0)


def test_coco_json(root: Path):
    content = {
        "images": [{"id": n, "file_name": NAMES[n], "width": 40, "height": 30, "split": "train"} for n in (3, 1)],
        "annotations": [{"id": 1, "image_id": 3, "category_id": 7, "bbox": [1, 2, 10, 20]}],
        "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "cat"}],
    }
    (root / "instances.json").write_text(json.dumps(content))
    data = train(root, annotations="instances.json")
    assert data.ids == ("01.png", "03.png")
    assert data.targets.tolist() == [[0, 0], [0, 1]]
    assert data.boxes(1).boxes.tolist() == [[1, 2, 11, 22]]
    Image.new("RGB", (30, 40)).save(root / "03.png")
    with pytest.raises(DataError, match=r"30 x 40 pixels, but .*image id 3 has 40 x 30"):
        data.image(1)


def test_label_list_defines_names_and_order(root: Path, caplog: pytest.LogCaptureFixture):
    data = CustomDataset(root, labels=["dog", "fish", "cat"])
    assert data.labels == ("dog", "fish", "cat")
    assert (data.targets[:, 1] == 0).all()
    assert data.targets[0].tolist() == [1, 0, 1]
    assert "1 label occurs in no image: fish" in caplog.text
    (root / "names.txt").write_bytes("\ufeffdog\r\n\r\n fish\r\ncat".encode())
    assert CustomDataset(root, labels="names.txt").fingerprint == data.fingerprint
    assert CustomDataset(root).fingerprint != data.fingerprint


def test_fingerprint_depends_on_file_sizes(root: Path):
    before = CustomDataset(root).fingerprint
    assert CustomDataset(root).fingerprint == before
    Image.new("RGB", (400, 300)).save(root / "00.png")
    assert CustomDataset(root).fingerprint != before


# ---- Errors ----


def test_invalid_label_lists(root: Path):
    message = refused(root, labels=["cat", "dogs"])
    assert f"{root / 'labels.csv'}: line 2: the label 'dog' is not in `labels`; did you mean 'dogs'?" in message
    assert "`labels` has the label 'cat' twice" in refused(root, labels=["cat", "cat"])
    assert "is empty: list at least one label" in refused(root, labels=[])
    assert "'Cat' and 'cat'" in refused(root, labels=["cat", "Cat", "dog"])
    assert "`labels` has the label 3" in refused(root, labels=["cat", 3])
    assert "none.txt is not a file" in refused(root, labels="none.txt")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["Cat", "cat"], "'cat' and 'Cat' ("),
        (["traffic light", "traffic_light"], "differ only in case, spaces or underscores"),
        (["traffic light", "Traffic  Light"], "differ only in case, spaces or underscores"),
        (["caf\u00e9", "cafe\u0301"], "differ only in case, spaces or underscores"),
        (["x", "cat "], "the label 'cat ' is blank or has surrounding spaces"),
        (["x", ""], "the label '' is blank or has surrounding spaces"),
        (["x", "a" * 201], "has 201 characters: if these are several labels, set `separator`."),
        (["x", "a\nb"], "the label 'a\\nb' has an unprintable character"),
        (["x", "a\u00a0b"], "has an unprintable character"),
        (["x", "a\u200bb"], "has an unprintable character"),
    ],
)
def test_near_duplicate_labels_are_refused(root: Path, labels: list[str], message: str):
    entries = [{"file": NAMES[n], "labels": [label]} for n, label in enumerate(labels)]
    write(root, "x.jsonl", [json.dumps(entry) for entry in entries])
    found = refused(root, annotations="x.jsonl")
    assert message in found
    assert "line 2" in found


def test_no_labels_at_all(root: Path):
    write(root, "labels.csv", ["file,labels,split", "00.png,,train"])
    assert "has no labels" in refused(root)


def test_inconsistent_split_files_are_refused(root: Path):
    write(root, "a.csv", ["file,labels", "00.png,cat"])
    write(root, "b.csv", ["file,labels", "01.png,cat", "./00.png,dog"])
    both = {"train": "a.csv", "test": "b.csv"}
    assert "b.csv: line 3 repeats the image '00.png'" in refused(root, annotations=both)
    assert "an image belongs to one split" in refused(root, annotations=both)
    write(root, "d.csv", ["file,labels,split", "03.png,cat,val"])
    message = refused(root, annotations={"train": "a.csv", "test": "d.csv"})
    assert "d.csv: line 2 has split 'val', but `annotations` lists its file as 'test'" in message
    write(root, "c.csv", ["file,cat,dog", "02.png,1,0"])
    message = refused(root, annotations={"train": "a.csv", "test": "c.csv"})
    assert "declare different labels (only one has 'cat')" in message
    assert "has the key 'dev': expected train, val or test" in refused(root, ConfigError, annotations={"dev": "a.csv"})
    assert "name an annotation file" in refused(root, ConfigError, annotations={})


def test_unusual_separator_is_logged(root: Path, caplog: pytest.LogCaptureFixture):
    assert CustomDataset(root).labels == ("cat", "dog")
    assert caplog.text == ""
    assert "dog; cat" in CustomDataset(root, separator="|").labels
    assert "'dog; cat' is read as one label; if these are several labels, change the separator (now '|')" in caplog.text


def test_missing_images(root: Path, caplog: pytest.LogCaptureFixture):
    (root / "00.png").rename(root / "00.PNG")
    (root / "05.png").unlink()
    (root / "06.png").unlink()
    (root / "06.png").mkdir()
    message = refused(root)
    assert (
        f"3 of 20 images of split 'train' are missing in {root} (00.png, 05.png, 06.png; similar: '00.PNG')" in message
    )
    assert "`missing='drop'`" in message
    assert len(CustomDataset(root, "val")) == 10  # missing files of other splits are ignored
    data = CustomDataset(root, missing="drop")
    assert data.missing == ("00.png", "05.png", "06.png")
    assert len(data) == 17
    assert "3 of 20 images" in caplog.text
    assert "05.png" in caplog.text


def test_file_names_without_suffix(root: Path):
    write(root, "labels.csv", ["file,labels,split", "00,cat,train", "01,,train"])
    for missing in ("error", "drop"):  # raise even with "drop" if all are missing
        assert "2 of 2 images" in (message := refused(root, missing=missing, val_fraction=0.0))
        assert "similar: '00.png'" in message
    assert train(root, suffix=".png").ids == ("00.png", "01.png")


def test_invalid_file_names_count_as_missing(root: Path):
    for name in ("x" * 300 + ".jpg", "no/such/folder/a.jpg"):
        write(root, "labels.csv", ["file,labels,split", f"{name},cat,train", "00.png,cat,train"])
        assert "1 of 2 images" in refused(root, val_fraction=0.0)


def test_annotation_path_errors(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    (root / "labels.csv").rename(elsewhere / "labels.csv")
    assert f"{elsewhere / 'labels.csv'} exists, so set this absolute path" in refused(root)
    assert len(CustomDataset(root, annotations=elsewhere / "labels.csv")) == 20
    assert "`annotations` must be relative to `root` or absolute" in refused(root, annotations="none.csv")
    assert "`annotations['test']`" in refused(root, annotations={"test": "none.csv"})
    assert "set `root` to the folder with the images" in refused(root / "none")


@pytest.mark.parametrize(
    "options",
    [
        {"split": "all"}, {"target_format": "01"}, {"missing": "keep"}, {"val_fraction": 1.0}, {"test_fraction": -0.1},
        {"missing_value": "0"}, {"separator": ""}, {"columns": {"boxes": "b"}},
    ],
)  # fmt: skip
def test_invalid_arguments(root: Path, options: dict[str, Any]):
    assert refused(root, ConfigError, **options).startswith(f"{next(iter(options))} ")


# ---- Annotations of other tools ----


def present(data: CustomDataset) -> dict[str, set[str]]:
    return {
        key: {data.labels[c] for c in np.flatnonzero(target)}
        for key, target in zip(data.ids, data.targets, strict=True)
    }


def coco_of(names: dict[int, str], **more: Any) -> str:
    """COCO JSON with category ids from 0: image n has label n % 2, with one box."""
    return json.dumps(
        {
            "images": [{"id": n, "file_name": name, "width": 40, "height": 30} for n, name in names.items()],
            "annotations": [
                {"id": n, "image_id": n, "category_id": n % 2, "bbox": [n, 2, 10, 20], "segmentation": [], "iscrowd": 0}
                for n in names
            ],
            "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
        }
        | more
    )


@pytest.mark.parametrize(
    "names",
    [
        {0: "00.png", 1: "my photo.png"},
        {0: "images/1a2b3c4d-00.png", 1: "images/99999999-my%20photo.png"},  # Label Studio
        {0: "images\\1a2b3c4d-00.png", 1: "my%20photo.png"},
        {0: "/data/upload/3/1a2b3c4d-00.png", 1: "/data/local-files/?d=my%20photo.png"},
    ],
)
def test_coco_of_annotation_tools(root: Path, names: dict[int, str], caplog: pytest.LogCaptureFixture):
    (root / "01.png").rename(root / "my photo.png")
    (root / "result.json").write_text(coco_of(names))
    options: dict[str, Any] = {"annotations": "result.json", "val_fraction": 0.0, "test_fraction": 0.0}
    data = CustomDataset(root, **options)
    assert present(data) == {"00.png": {"cat"}, "my photo.png": {"dog"}}
    assert [data.boxes(i).boxes.tolist() for i in range(2)] == [[[0, 2, 10, 22]], [[1, 2, 11, 22]]]
    assert data.image(1).getpixel((0, 0)) == (1, 0, 0)
    changed = [line for line in caplog.messages if "file names are found in another spelling" in line]
    assert len(changed) == (names[1] != "my photo.png")


def test_coco_without_boxes_or_annotations(root: Path):
    annotations = [{"id": 1, "image_id": 0, "category_id": 1}, {"id": 2, "image_id": 0, "category_id": 0, "bbox": []}]
    (root / "x.json").write_text(coco_of({0: "00.png", 1: "01.png"}, annotations=annotations))
    data = CustomDataset(root, annotations="x.json", val_fraction=0.0, test_fraction=0.0)
    assert present(data) == {"00.png": {"cat", "dog"}, "01.png": set()}
    assert data.boxes(0) is None
    content = json.loads(coco_of({0: "00.png"}))
    del content["annotations"]
    (root / "x.json").write_text(json.dumps(content))
    assert "has no list 'annotations'" in refused(root, annotations="x.json")
    (root / "x.json").write_text(coco_of({0: "00.png", 1: "1a2b3c4d-00.png"}))
    assert "image id 1 (00.png) occurs twice" in refused(root, annotations="x.json")


def test_two_uploads_of_one_name_are_not_merged(root: Path):
    write(root, "labels.csv", ["file,labels", "1a2b3c4d-00.png,cat", "5e6f7a8b-00.png,dog"])
    assert "line 3 repeats the image '00.png'" in refused(root)


def test_names_of_photos(root: Path):
    """Windows separators, decomposed characters and absolute paths; each photo is found."""
    (root / "sub").mkdir()
    for old, new in (("00", "sub/a"), ("01", "caf\u00e9")):
        (root / f"{old}.png").rename(root / f"{new}.png")
    write(root, "labels.csv", ["file,labels,split", "sub\\a.png,cat,Train", "cafe\u0301.png,dog,training",
                               f"{root / '02.png'},cat,train", "03.png,dog,dev"])  # fmt: skip
    data = train(root)
    assert present(data) == {"sub/a.png": {"cat"}, "caf\u00e9.png": {"dog"}, "02.png": {"cat"}}
    assert [data.image(i).getpixel((0, 0))[0] for i in range(3)] == [0, 1, 2]
    assert CustomDataset(root, "val").ids == ("03.png",)


def test_notes_are_logged_once(root: Path, caplog: pytest.LogCaptureFixture):
    cells = ("cat", '"[""dog""]"', "nan")
    write(root, "labels.csv", ["file,labels", *(f"{n:02}.png,{cell}" for n in range(20) for cell in cells)])
    for split in ("train", "val", "test"):
        data = CustomDataset(root, split)
        assert data.labels == ("cat", "dog")
        assert (data.targets == 1).all()
    assert [line.partition(".csv: ")[2].split(" (")[0] for line in caplog.messages] == [
        "20 missing values are read as no label, the first at line 4",
        "several rows per image",
        "20 rows repeat an earlier row and are ignored, the first is line 4",
    ]


def test_a_label_called_none(root: Path):
    write(root, "labels.csv", ["file,labels", "00.png,None", "01.png,cat"])
    options: dict[str, Any] = {"val_fraction": 0.0, "test_fraction": 0.0}
    assert present(CustomDataset(root, **options)) == {"00.png": set(), "01.png": {"cat"}}
    assert present(CustomDataset(root, labels=["cat", "None"], **options)) == {"00.png": {"None"}, "01.png": {"cat"}}


def test_missing_values(root: Path):
    write(root, "labels.csv", ["file,cat,dog", "00.png,1.0,", "01.png,NaN,1.0"])
    options: dict[str, Any] = {"val_fraction": 0.0, "test_fraction": 0.0}
    assert "line 2: column 'dog' has '': expected 1 or 0; set `missing_value='absent'`" in refused(root, **options)
    data = CustomDataset(root, missing_value="absent", **options)
    assert present(data) == {"00.png": {"cat"}, "01.png": {"dog"}}


def test_annotations_of_another_kind_are_named(root: Path):
    (root / "labels.csv").rename(root / "labels.tsv")
    (root / "data.yaml").touch()
    message = refused(root)
    assert "labels.csv is not a file" in message
    assert message.endswith(f"{root} has data.yaml, labels.tsv.")


# ---- Real photos ----


@pytest.mark.shared
def test_coco_mini_as_custom_dataset(shared_data: Path):
    """Labels and boxes equal those of COCO2014."""
    from gm_mlic.datasets import COCO2014

    root = shared_data / "coco-mini"
    files = {split: f"annotations/instances_{split}2014.json" for split in ("train", "val")}
    ours = CustomDataset(root / "val2014", "val", annotations={s: root / f for s, f in files.items()}, missing="drop")
    theirs = COCO2014(root, "test", unlabeled="keep")
    assert ours.labels == theirs.labels
    np.testing.assert_array_equal(ours.targets, theirs.targets)
    assert ours.image(5).tobytes() == theirs.image(5).tobytes()
    for row in range(len(theirs)):
        a, b = ours.boxes(row), theirs.boxes(row)
        assert a is not None
        assert a.boxes.tolist() == b.boxes.tolist()
        assert a.labels.tolist() == b.labels.tolist()
