"""YOLO and Pascal VOC datasets, read from real files."""

from __future__ import annotations

import functools
import io
import random
import xml.sax.saxutils
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gm_mlic.datasets import VOC2007, CustomDataset
from gm_mlic.errors import DataError

SIZE = (40, 20)


def photo(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def thousand(path: Path, size: int) -> None:
    """A photo of about 1000 x 1000 pixels, so that boxes of whole thousandths are exact; encoded once per size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_encoded(size))


@functools.cache
def _encoded(size: int) -> bytes:
    stream = io.BytesIO()
    Image.new("1", (size, size)).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def read(root: Path, annotations: Any, split: str = "train", **options: Any) -> CustomDataset:
    return CustomDataset(
        root, split, annotations=annotations, **({"val_fraction": 0.0, "test_fraction": 0.0} | options)
    )


def refused(root: Path, annotations: Any, **options: Any) -> str:
    def read_boxes() -> None:
        data = read(root, annotations, **options)
        for i in range(len(data)):
            data.boxes(i)

    with pytest.raises(DataError) as caught:
        read_boxes()
    message = str(caught.value)
    assert "\n" not in message
    assert message[-1] in ".?"
    assert len(message) < 800
    return message


def labels_of(data: CustomDataset) -> dict[str, set[str]]:
    return {
        key: {data.labels[c] for c in np.flatnonzero(target)}
        for key, target in zip(data.ids, data.targets, strict=True)
    }


def boxes_of(data: CustomDataset, i: int) -> list[tuple[str, list[float]]]:
    found = data.boxes(i)
    assert found is not None
    return [(data.labels[c], box) for c, box in zip(found.labels.tolist(), found.boxes.tolist(), strict=True)]


# ---- YOLO ----


DATA_YAML = "train: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n"


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    for name in ("train/a", "train/b", "val/c"):
        photo(tmp_path / "images" / f"{name}.jpg")
    write(tmp_path / "data.yaml", DATA_YAML)
    write(tmp_path / "labels" / "train" / "a.txt", "1 0.5 0.5 0.25 0.5\n0 0.05 0.5 0.2 1\n\n")
    write(tmp_path / "labels" / "val" / "c.txt", "0 0.1 0.2 0.6 0.2 0.3 0.8\n")  # a triangle
    return tmp_path


def test_yolo(yolo: Path, caplog: pytest.LogCaptureFixture):
    data = read(yolo, "data.yaml")
    assert data.labels == ("cat", "dog")
    assert labels_of(data) == {"images/train/a.jpg": {"cat", "dog"}, "images/train/b.jpg": set()}
    (dog, first), (cat, second) = boxes_of(data, 0)
    assert (dog, cat) == ("dog", "cat")
    assert first == pytest.approx([15, 5, 25, 15])
    assert second == pytest.approx([0, 0, 6, 20])  # clipped at the left border
    assert boxes_of(data, 1) == []
    (line,) = caplog.messages
    assert line.endswith("1 images have no text file and are read as images without labels, such as b.txt")

    val = read(yolo, "data.yaml", "val")
    assert labels_of(val) == {"images/val/c.jpg": {"cat"}}
    assert boxes_of(val, 0)[0][1] == pytest.approx([4, 4, 24, 16])
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    "text",
    [
        DATA_YAML,
        "path: .\n" + DATA_YAML,
        "path: /content/drive/set\n" + DATA_YAML,
        DATA_YAML.replace("images/", "../images/"),  # Roboflow
        DATA_YAML.replace("images/", "./images/").replace("[cat, dog]", "{0: cat, 1: dog}"),
        DATA_YAML.replace("images/", "images\\"),
        DATA_YAML.replace("val:", "valid:").replace("images/train", "[images/train]"),
        DATA_YAML.replace("images/train", "train.txt"),
    ],
)
def test_spellings_of_data_yaml(yolo: Path, text: str):
    write(yolo / "data.yaml", text)
    write(yolo / "train.txt", f"./images/train/a.jpg\n\n{yolo}/images/train/b.jpg\n")
    assert labels_of(read(yolo, "data.yaml")) == {"images/train/a.jpg": {"cat", "dog"}, "images/train/b.jpg": set()}
    assert labels_of(read(yolo, "data.yaml", "val")) == {"images/val/c.jpg": {"cat"}}


def test_absolute_path_of_data_yaml(yolo: Path):
    write(yolo / "data.yaml", f"path: {yolo}\n" + DATA_YAML)
    assert len(read(yolo, "data.yaml")) == 2


def test_yolo_with_one_split_is_drawn(yolo: Path):
    write(yolo / "data.yaml", "train: images\nnames: [cat, dog]\n")
    parts = [read(yolo, "data.yaml", split, val_fraction=0.4, test_fraction=0.4) for split in ("train", "val", "test")]
    assert sorted(key for part in parts for key in part.ids) == [
        "images/train/a.jpg", "images/train/b.jpg", "images/val/c.jpg",
    ]  # fmt: skip


def test_yolo_with_classes_txt(yolo: Path):
    """Label Studio's and labelImg's export: no data.yaml. Folders called as splits are the splits."""
    (yolo / "data.yaml").unlink()
    write(yolo / "classes.txt", "cat\ndog\n")
    assert set(labels_of(read(yolo, "labels"))) == {"images/train/a.jpg", "images/train/b.jpg"}
    assert labels_of(read(yolo, "labels", "val")) == {"images/val/c.jpg": {"cat"}}


@pytest.mark.parametrize("tool", ["labelImg", "CVAT"])
def test_yolo_with_text_files_beside_the_images(tmp_path: Path, tool: str):
    photo(tmp_path / "x" / "a.png")
    write(tmp_path / "x" / "a.txt", "0 0.5 0.5 1 1\n")
    write(tmp_path / ("x/classes.txt" if tool == "labelImg" else "obj.names"), "cat\n")
    data = read(tmp_path, "x")
    assert labels_of(data) == {"x/a.png": {"cat"}}
    assert boxes_of(data, 0) == [("cat", [0, 0, 40, 20])]


def test_keypoints_follow_the_box(yolo: Path):
    write(yolo / "data.yaml", DATA_YAML + "kpt_shape: [2, 3]\n")
    write(yolo / "labels" / "train" / "a.txt", "1 0.5 0.5 0.25 0.5 0.1 0.1 2 0 0 0\n")
    assert boxes_of(read(yolo, "data.yaml"), 0)[0][1] == pytest.approx([15, 5, 25, 15])


def test_boxes_are_relative_to_the_upright_photo(yolo: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE).save(yolo / "images" / "train" / "a.jpg", exif=exif)  # upright: 20 x 40
    data = read(yolo, "data.yaml")
    assert data.image(0).size == (20, 40)
    assert boxes_of(data, 0)[0][1] == pytest.approx([7.5, 10, 12.5, 30])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.5 0.5", "a.txt: line 1 has the class '2': the classes are 0 to 1."),
        ("-1 0.5 0.5 0.5 0.5", "has the class '-1'"),
        ("0.5 0.5 0.5 0.5 0.5", "has the class '0.5'"),
        ("nan 0.5 0.5 0.5 0.5", "has the class 'nan'"),
        ("cat 0.5 0.5 0.5 0.5", "expected a class number and four numbers"),
        ("0", "line 1 has 0 numbers after the class: expected four"),
        ("0 0.5 0.5", "has 2 numbers after the class"),
        ("0 0.5 0.5 0.5 0.5 0.9", "has 5 numbers after the class"),
        ("0 0.5 0.5 0.5 0.5 0.9 0.1 0.2", "has 7 numbers after the class"),
        ("0 20 10 5 5", "not pixels"),
        ("0 0.5 0.5 -0.5 0.5", "expected fractions"),
        ("0 nan 0.5 0.5 0.5", "expected fractions"),
        ("0 0.5 inf 0.5 0.5", "expected fractions"),
        ("0 " + "9" * 10_000, "numbers after the class"),
        ("x" * 1_000_000, "expected a class number"),
    ],
)
def test_malformed_yolo_lines(yolo: Path, line: str, message: str):
    write(yolo / "labels" / "train" / "a.txt", line + "\n")
    assert message in refused(yolo, "data.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no list 'names': expected YOLO's data.yaml"),
        ("[1]", "has no list 'names'"),
        ("names: []\ntrain: images", "has no list 'names'"),
        ("names: cat\ntrain: images", "has no list 'names'"),
        ("names: [cat, 3]\ntrain: images", "has the label 3: expected a text"),
        ("names: [yes, no]\ntrain: images", "has the label True: expected a text, in quotes"),
        ("names: [cat, cat]\ntrain: images", "has the label 'cat' twice"),
        ("names: {1: cat, 2: dog}\ntrain: images", "has names with the keys [1, 2]: expected 0, 1, 2"),
        ("names: [cat, dog]", "has none of the keys train, val and test"),
        ("names: [cat, dog]\ntrain: none", "train is 'none', which is no folder in"),
        ("names: [cat, dog]\ntrain: ../..", "which is no folder in"),
        ("names: [cat, dog]\ntrain: /etc", "which is no folder in"),
        ("names: [cat, dog]\ntrain: 3", "train is 3: expected the folder"),
        ("path: 3\nnames: [cat, dog]\ntrain: images", "expected the folder"),
        ('path: "a\\0b"\nnames: [cat, dog]\ntrain: none', "train is 'none', which is no folder in"),
        ('names: [cat, dog]\ntrain: "a\\0b"', "train is 'a\\x00b', which is no folder in"),
        ('names: [cat, dog]\ntrain: "a\\ud800b"', "train is 'a\\ud800b', which is no folder in"),
        ("names: [cat, dog]\ntrain: " + "x" * 5000, "which is no folder in"),
        ("names: [cat, dog]\ntrain: classes.txt", "has no rows: expected one per image"),
        ("names: [cat, dog]\ntrain: labels", "has no images: copy them into it"),
        (
            "names: [cat, dog]\ntrain: images\nval: images/val",
            "with the split 'val' instead of 'train'",
        ),
        ("names: [cat, dog", "is not valid YAML"),
        ("names: !!python/object/apply:os.system [ls]\ntrain: images", "is not valid YAML"),
        ("x: " + "[" * 600, "is not valid YAML (maximum recursion depth"),
    ],
)
def test_malformed_data_yaml(yolo: Path, text: str, message: str):
    write(yolo / "data.yaml", text + "\n")
    write(yolo / "classes.txt", "\n")
    assert message in refused(yolo, "data.yaml")


def test_lists_of_images_that_do_not_exist(yolo: Path):
    write(yolo / "data.yaml", "names: [cat, dog]\ntrain: train.txt\n")
    for name in ("x" * 300 + ".jpg", "no/such/folder/a.jpg"):
        write(yolo / "train.txt", f"images/train/a.jpg\n{name}\n")
        assert "1 of 2 images of split 'train' are missing" in refused(yolo, "data.yaml")


def test_nested_aliases_in_yaml_are_refused(yolo: Path):
    """Ten levels of ten references would be 10^10 values."""
    levels = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
    )
    write(yolo / "data.yaml", levels + "names: *a9\ntrain: images\n")
    assert "has the label [[" in refused(yolo, "data.yaml")


def test_yolo_without_label_files(yolo: Path):
    for path in (yolo / "labels").rglob("*.txt"):
        path.unlink()
    message = refused(yolo, "data.yaml")
    assert f"no image has a file with its labels: expected {yolo / 'labels' / 'train' / 'a.txt'}" in message
    assert f"set `annotations='{yolo / 'data.yaml'}'`" in refused(yolo, "labels")
    (yolo / "data.yaml").unlink()
    assert "is a folder without annotations: expected .xml files" in refused(yolo, "labels")


NUMBERS = st.integers(0, 1000)


@settings(max_examples=40, deadline=None)
@given(
    images=st.lists(st.lists(st.tuples(st.integers(0, 3), NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=4), min_size=1),
    polygon=st.booleans(),
)
def test_yolo_round_trip(tmp_path_factory: pytest.TempPathFactory, images: list, polygon: bool):
    """Boxes of whole thousandths of the image, as boxes and as polygons."""
    root = tmp_path_factory.mktemp("yolo")
    names = ["a b", "c: d", "caf\u00e9", "0"]
    write(root / "data.yaml", f"train: images\nnames: {names!r}\n")
    expected = []
    for n, boxes in enumerate(images):
        thousand(root / "images" / f"{n:03}.png", 1000)
        lines, corners = [], set()
        for label, *values in boxes:
            (x1, x2), (y1, y2) = sorted(values[:2]), sorted(values[2:])
            corners |= {(names[label], x1, y1, x2, y2)} if x2 > x1 and y2 > y1 else set()
            numbers = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
            if polygon:
                numbers = [x2, y1, x1, y1, x1, y2, x2, y2]
            lines.append(f"{label} " + " ".join(f"{number / 1000:.6f}" for number in numbers))
        write(root / "labels" / f"{n:03}.txt", "\n".join(lines))
        expected.append(({names[label] for label, *_ in boxes}, corners))
    data = read(root, "data.yaml")
    assert list(labels_of(data).values()) == [labels for labels, _ in expected]
    for i, (_, corners) in enumerate(expected):
        assert {(label, *map(round, box)) for label, box in boxes_of(data, i)} == corners


# ---- Pascal VOC ----


def voc_xml(objects: list[tuple[str, tuple[float, ...]]], filename: str = "", size: str = "", extra: str = "") -> str:
    items = "".join(
        f"<object><name>{xml.sax.saxutils.escape(name)}</name>{extra}<bndbox>"
        + "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for name, box in objects
    )
    return f"<annotation><folder>x</folder><filename>{filename}</filename>{size}{items}</annotation>"


SIZE_XML = "<size><width>40</width><height>20</height><depth>3</depth></size>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.png", "c.jpg"):
        photo(tmp_path / "JPEGImages" / name)
    folder = tmp_path / "Annotations"
    write(folder / "a.xml", voc_xml([("dog", (1, 1, 40, 20)), ("red bird", (5, 5, 9, 9))], "a.jpg", SIZE_XML))
    write(folder / "b.xml", voc_xml([("dog", (2, 3, 4, 5))], "C:\\photos\\b.jpg"))
    write(folder / "c.xml", voc_xml([], "c"))
    return tmp_path


def test_voc(voc: Path):
    data = read(voc, "Annotations")
    assert data.labels == ("dog", "red bird")
    assert labels_of(data) == {
        "JPEGImages/a.jpg": {"dog", "red bird"}, "JPEGImages/b.png": {"dog"}, "JPEGImages/c.jpg": set(),
    }  # fmt: skip
    assert boxes_of(data, 0) == [("dog", [0, 0, 40, 20]), ("red bird", [4, 4, 9, 9])]
    assert boxes_of(data, 1) == [("dog", [1, 2, 4, 5])]
    assert boxes_of(data, 2) == []
    photo(voc / "JPEGImages" / "a.jpg", (30, 20))
    with pytest.raises(DataError, match=r"30 x 20 pixels, but .* has 40 x 20"):
        read(voc, "Annotations").image(0)


def test_links_of_yolo_out_of_the_root_are_refused(yolo: Path, tmp_path_factory: pytest.TempPathFactory):
    file = next((yolo / "labels").rglob("*.txt"))
    outside = tmp_path_factory.mktemp("outside") / "a.txt"
    file.rename(outside)
    file.symlink_to(outside)
    assert "is a link to a place outside" in refused(yolo, "data.yaml")


def test_voc_image_sets(voc: Path, caplog: pytest.LogCaptureFixture):
    write(voc / "ImageSets" / "Main" / "train.txt", "a\n")
    write(voc / "ImageSets" / "Main" / "test.txt", "b  -1\n\n")
    assert read(voc, "Annotations").ids == ("JPEGImages/a.jpg",)
    assert read(voc, "Annotations", "test").ids == ("JPEGImages/b.png",)
    (line,) = caplog.messages
    assert line.endswith("1 images are in no list of ImageSets/Main and are left out, such as c")
    write(voc / "ImageSets" / "Main" / "val.txt", "c\na\n")
    assert "lists the image 'a', which is also in train" in refused(voc, "Annotations")
    write(voc / "ImageSets" / "Main" / "val.txt", "c\n")
    assert read(voc, "Annotations", "val").ids == ("JPEGImages/c.jpg",)


def test_voc_beside_the_images(tmp_path: Path):
    """Roboflow's export: folders train and valid with images and XML files."""
    for split, name in (("train", "a"), ("valid", "a"), ("test", "b")):
        photo(tmp_path / split / f"{name}.jpg")
        write(tmp_path / split / f"{name}.xml", voc_xml([("dog", (2, 3, 4, 5))], f"{name}.jpg"))
    files = {"train": "train", "val": "valid", "test": "test"}
    assert [read(tmp_path, files, split).ids for split in files] == [
        ("train/a.jpg",), ("valid/a.jpg",), ("test/b.jpg",),
    ]  # fmt: skip


def test_difficult_objects(voc: Path):
    difficult = "<difficult>1</difficult>"
    write(voc / "Annotations" / "b.xml", voc_xml([("dog", (2, 3, 4, 5))], extra=difficult))
    assert labels_of(read(voc, "Annotations"))["JPEGImages/b.png"] == {"dog"}
    data = read(voc, "Annotations", target_format="voc")
    assert labels_of(data)["JPEGImages/b.png"] == set()
    assert data.difficult is not None
    assert data.difficult.tolist() == [[False, False], [True, False], [False, False]]
    assert boxes_of(data, 1) == []


def test_official_layout_gives_the_labels_and_boxes_of_voc2007(tmp_path: Path):
    """The same files, read by the class of the official dataset."""
    rng = random.Random(0)
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    from gm_mlic.datasets.voc import LABELS

    names = [f"{n:06}" for n in range(8)]
    present: dict[str, set[str]] = {}
    for name in names:
        photo(folder / "JPEGImages" / f"{name}.jpg")
        objects = [(rng.choice(LABELS), (rng.randint(1, 10), 2, rng.randint(11, 40), 20)) for _ in range(3)]
        present[name] = {label for label, _ in objects}
        write(folder / "Annotations" / f"{name}.xml", voc_xml(objects, f"{name}.jpg", SIZE_XML))
    for label in LABELS:
        lines = [f"{name} {1 if label in present[name] else -1}" for name in names]
        write(folder / "ImageSets" / "Main" / f"{label}_trainval.txt", "\n".join(lines))
    write(folder / "ImageSets" / "Main" / "trainval.txt", "\n".join(names))
    theirs = VOC2007(tmp_path, val_fraction=0.0)
    ours = read(folder, "Annotations", labels=list(LABELS))
    np.testing.assert_array_equal(ours.targets, theirs.targets)
    for i in range(len(names)):
        a, b = ours.boxes(i), theirs.boxes(i)
        assert a is not None
        assert (a.boxes.tolist(), a.labels.tolist()) == (b.boxes.tolist(), b.labels.tolist())


BOMB = '<!DOCTYPE x [<!ENTITY a "lol">' + "".join(
    f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9)
) + "]><annotation>&j;</annotation>"  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_documents_with_entities_are_refused(voc: Path, encoding: str):
    """A billion laughs, an external entity, and a document type alone."""
    for text in (
        BOMB,
        '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation><filename>&a;</filename></annotation>',
        '<!DOCTYPE annotation SYSTEM "x.dtd"><annotation></annotation>',
    ):
        (voc / "Annotations" / "b.xml").write_bytes(
            (f"<?xml version='1.0' encoding='{encoding}'?>" + text).encode(encoding)
        )
        assert "b.xml is not valid XML (it declares XML entities or a document type): correct or remove it." in refused(
            voc, "Annotations"
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid XML"),
        ("<annotation>", "is not valid XML"),
        ("<annotation>&x;</annotation>", "is not valid XML"),
        ("<a>" * 50_000, "is not valid XML"),
        ("<html></html>", "b.xml has the element 'html': expected Pascal VOC's <annotation>."),
        (voc_xml([("", (1, 1, 2, 2))]), "object number 0 has no name"),
        (voc_xml([("dog", (5, 1, 2, 2))]), "has the box [5.0, 1.0, 2.0, 2.0], max < min"),
        (voc_xml([("dog", (1, 1, float("nan"), 2))]), "xmax is 'nan': expected a number"),
        (voc_xml([("dog", (1, 1, 90, 2))], size=SIZE_XML), "outside the image of 40 x 20"),
        (voc_xml([("dog", (1, 1, 90, 2))]), "outside the image of 40 x 20"),
        (voc_xml([], size=SIZE_XML.replace("40", "wide")), "size/width is 'wide'"),
        (voc_xml([("Dog", (1, 1, 2, 2))]), "differ only in case"),
    ],
)
def test_malformed_voc_files(voc: Path, content: str, message: str):
    write(voc / "Annotations" / "b.xml", content)
    assert message in refused(voc, "Annotations")


def test_voc_without_photos(voc: Path, caplog: pytest.LogCaptureFixture):
    (voc / "JPEGImages" / "c.jpg").unlink()
    assert "1 of 3 images" in refused(voc, "Annotations")
    assert len(read(voc, "Annotations", missing="drop")) == 2
    write(voc / "Annotations" / "sub" / "a.xml", voc_xml([]))
    assert "repeats the image 'JPEGImages/a.jpg'" in refused(voc, "Annotations")


#: Names that differ by more than case, with characters that XML escapes.
TEXT = st.sampled_from(["cat", "dog", "a & b", "<x>", "caf\u00e9", "it's", '"q"', "\u65e5\u672c", "0", "a/b;c"])


@settings(max_examples=40, deadline=None)
@given(images=st.lists(st.dictionaries(TEXT, st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), min_size=1), min_size=1))
def test_voc_round_trip(tmp_path_factory: pytest.TempPathFactory, images: list):
    """Whole pixels; x1 and y1 are written with 1 added, as in Pascal VOC."""
    root = tmp_path_factory.mktemp("voc")
    expected = []
    for n, boxes in enumerate(images):
        thousand(root / "images" / f"{n:03}.png", 1001)
        corners = [(name, min(a, b), min(c, d), max(a, b) + 1, max(c, d) + 1) for name, (a, b, c, d) in boxes.items()]
        objects = [(name, (x1 + 1, y1 + 1, x2, y2)) for name, x1, y1, x2, y2 in corners]
        write(root / "labels" / f"{n:03}.xml", voc_xml(objects))
        expected.append(set(corners))
    data = read(root, "labels")
    for i, corners in enumerate(expected):
        assert {(label, *map(round, box)) for label, box in boxes_of(data, i)} == corners
