"""Fuzzing of file readers: malformed files raise only GMMLICError.

Each reader gets valid files modified by hypothesis: bytes are flipped, removed, duplicated, or replaced by tokens that
are difficult for parsers. ``GM_MLIC_FUZZ=N`` tries N files per reader (default 100).
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from gm_mlic.datasets import COCO2014, NUSWIDE, VOC2007, CustomDataset
from gm_mlic.datasets.images import read_image
from gm_mlic.detection import build_extractor
from gm_mlic.embeddings import embed_labels
from gm_mlic.errors import GMMLICError
from gm_mlic.instances import InstanceStore, extract
from gm_mlic.metrics import read_scored_images
from gm_mlic.runs import find_runs, read_run
from gm_mlic.zoo import ModelMetadata, Predictor, create_model, read_checkpoint

TOKENS = [
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b"\xe2\x80\xa8", b'"', b"'", b",", b";", b":", b"-", b"#",
    b"nan", b"inf", b"-1", b"0", b"1e999", b"1e-999", b"9" * 40, b"9" * 5000, b"0x10", b"1_000", "\u0661".encode(),
    b"null", b"true", b"[]", b"{}", b"[[", b"{", b"}", b'""', b"../../x", b"/etc/passwd", b"<", b"</object>", b"&lt;",
    b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"<?xml version='1.0' encoding='utf-16'?>", b"<?xml encoding='x'?>", b"&b;",
    b"&a", b"*a", b"!!python/name:os.system", b"[" * 3000, b"<a>" * 3000, b"\\", b"\\ud800", "\u00e9".encode("latin1"),
]  # fmt: skip

EXAMPLES = int(os.environ.get("GM_MLIC_FUZZ", "100"))


@st.composite
def changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Function that damages file content."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["replace", "insert", "cut", "double", "flip", "end"]),
                st.floats(0, 1, exclude_max=True),
                st.integers(1, 60),
                st.sampled_from(TOKENS) | st.binary(max_size=8),
            ),
            min_size=1,
            max_size=4,
        )
    )

    def change(content: bytes) -> bytes:
        for kind, where, length, token in steps:
            at = int(where * (len(content) + 1))
            if kind == "replace":
                content = content[:at] + token + content[at + length :]
            elif kind == "insert":
                content = content[:at] + token + content[at:]
            elif kind == "cut":
                content = content[:at] + content[at + length :]
            elif kind == "double":
                content = content[: at + length] + content[at:]
            elif kind == "flip" and content:
                at = min(at, len(content) - 1)
                content = content[:at] + bytes([content[at] ^ (1 << length % 8)]) + content[at + 1 :]
            elif kind == "end":
                content = content[:at]
        return content

    return change


def sibling(name: str) -> ModuleType:
    """Import another test module for its valid files."""
    path = Path(__file__).parent / "datasets" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"files_of_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), "teal").save(path)


# ---- Readers: each creates files and returns those to damage and a function that reads them ----

Case = tuple[list[Path], Callable[[], object]]


def voc(root: Path) -> Case:
    files = sibling("test_voc")
    folder = root / "VOCdevkit" / "VOC2007"
    ids = ["000001", "000002", "000003"]
    files.write_set(folder, "test", ids, np.tile([[1], [0], [-1]], (1, 20)))
    (folder / "Annotations").mkdir()
    for one in ids:
        photo(folder / "JPEGImages" / f"{one}.jpg")
        (folder / "Annotations" / f"{one}.xml").write_text(files.annotation([("dog", 0, (1, 1, 40, 30))]))

    def read() -> None:
        dataset = VOC2007(root, "test")
        for i in range(len(dataset)):
            dataset.boxes(i)

    return [folder / "Annotations" / "000001.xml", folder / "ImageSets" / "Main" / "dog_test.txt"], read


def coco(root: Path) -> Case:
    files = sibling("test_coco")
    path = files.write(root, "val2014", files.instances("val2014", 4, first=500))

    def read() -> None:
        dataset = COCO2014(root, "test")
        for i in range(len(dataset)):
            dataset.boxes(i)

    return [path], read


def nuswide(root: Path) -> Case:
    files = sibling("test_nuswide")
    names = [f"sky\\{n}.jpg" for n in range(4)]
    files.write_lists(root, "Test", names, np.eye(4, 3) > 0, files.CONCEPTS)
    for name in names:
        photo(root / "Flickr" / name.replace("\\", "/"))
    damaged = ["ImageList/TestImagelist.txt", "TrainTestLabels/Labels_sky_Test.txt", "ConceptsList/Concepts81.txt"]
    return [root / name for name in damaged], lambda: NUSWIDE(root, "test")


def own(suffix: str, text: str) -> Callable[[Path], Case]:
    def make(root: Path) -> Case:
        for name in ("a.jpg", "b.jpg", "c d.jpg"):
            photo(root / name)
        path = root / f"labels{suffix}"
        path.write_text(text)

        def read() -> None:
            dataset = CustomDataset(root, "train", annotations=path.name, val_fraction=0.0)
            for i in range(len(dataset)):
                dataset.boxes(i)

        return [path], read

    return make


def own_boxes(annotations: str, **texts: str) -> Callable[[Path], Case]:
    """A folder with the photo ``images/a.jpg``, and files by their name with ``__`` for ``/`` and ``_`` for the dot."""

    def make(root: Path) -> Case:
        photo(root / "images" / "a.jpg")
        files = [root / name.replace("__", "/").replace("_", ".") for name in texts]
        for file, text in zip(files, texts.values(), strict=True):
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)

        def read() -> None:
            dataset = CustomDataset(root, "train", annotations=annotations, val_fraction=0.0, test_fraction=0.0)
            for i in range(len(dataset)):
                dataset.boxes(i)

        return files, read

    return make


def vectors(suffix: str) -> Callable[[Path], Case]:
    def make(root: Path) -> Case:
        path = root / f"vectors{suffix}"
        words = {"dog": [1.0, 2.0], "cat": [0.5, -1.0], "hot": [3.0, 1e-3]}
        if suffix == ".txt":
            path.write_text("".join(f"{word} {' '.join(map(str, values))}\n" for word, values in words.items()))
        elif suffix == ".npz":
            np.savez(path, labels=list(words), vectors=np.array(list(words.values()), dtype=np.float32))
        else:
            torch.save({word: torch.tensor(values) for word, values in words.items()}, path)
        return [path], lambda: embed_labels(["dog", "hot dog"], name="glove", path=str(path))

    return make


def scores(suffix: str) -> Callable[[Path], Case]:
    def make(root: Path) -> Case:
        values = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
        targets = np.array([[1, 0], [0, 1], [0, 1]])
        path, truth = root / f"scores{suffix}", root / "targets.npz"
        names = {"ids": np.array(["a", "b", "c"]), "labels": np.array(["cat", "dog"])}
        np.savez(truth, targets=targets, **names)
        if suffix == ".csv":
            path.write_text("id,cat,dog\n" + "".join(f"{n},{x},{y}\n" for n, (x, y) in zip("abc", values, strict=True)))
        elif suffix == ".npz":
            np.savez(path, scores=values, **names)
        else:
            torch.save({"scores": torch.from_numpy(values), "ids": ["a", "b", "c"], "labels": ["cat", "dog"]}, path)
        return [path], lambda: read_scored_images([path], truth)

    return make


def store(root: Path) -> Case:
    files = sibling("test_custom")
    lines = ["file,labels,split", *(f"{n}.jpg,cat,train" for n in range(5))]
    for n in range(5):
        photo(root / f"{n}.jpg")
    files.write(root, "labels.csv", lines)
    dataset = CustomDataset(root, "train", val_fraction=0.0)
    detector = build_extractor("scenes_tiny", weights=None)
    extract(dataset, detector, root / "store", m=2, progress=False)

    def read() -> None:
        opened = InstanceStore.open(root / "store")
        opened.check(dataset, detector, m=2)
        opened.verify()

    return [*sorted((root / "store").iterdir())], read


def run_folder(root: Path) -> Case:
    (root / "jobs").mkdir()
    (root / "config.yaml").write_text("seed: 0\ngraph:\n  m: 10\ntrainer: {max_epochs: 2}\n")
    (root / "state.json").write_text(json.dumps({"state": "failed", "error": "x", "pid": 1}))
    (root / "metrics.json").write_text(json.dumps({"test": {"mAP": 31.0}}))
    (root / "metrics.csv").write_text("epoch,val/mAP\n1,20\n2,30.5\n")
    (root / "jobs" / "0.json").write_text(json.dumps({"run_dir": str(root), "overrides": ["seed=0"]}))
    return [*sorted(root.glob("*.*")), root / "jobs" / "0.json"], lambda: (read_run(root), find_runs([root]))


def checkpoint(root: Path) -> Case:
    path = root / "best.ckpt"
    torch.save({"gm_mlic": {"labels": ["cat"]}, "state_dict": {"w": torch.zeros(3)}, "epoch": 1}, path)
    return [path], lambda: read_checkpoint(path)


def detector(root: Path) -> Case:
    path = root / "detector.safetensors"
    save_file({"w": torch.zeros(3)}, path, {"arch": "scenes_tiny"})
    return [path], lambda: build_extractor("scenes_tiny", weights=str(path))


def pretrained(root: Path) -> Case:
    settings = {"instance_dim": 3, "label_dim": 2, "k": 1, "widths": [4], "fusion": "concat"}
    metadata = ModelMetadata(
        labels=("cat", "dog"), label_vectors=torch.randn(2, 2), label_source="hashed",
        model={"name": "gm_mlic", **settings}, graph={"m": 3, "num_neighbors": 2},
        detector="own", detector_fingerprint="f", detector_settings={}, embedding={},
    )  # fmt: skip
    own = SimpleNamespace(name="own", fingerprint="f", labels=(), feature_dim=3)
    Predictor(metadata.build_model(), metadata, own).save_pretrained(root)  # type: ignore[arg-type]
    files = [root / name for name in ("config.json", "model.safetensors", "label_vectors.safetensors")]

    def read() -> None:
        Predictor.from_pretrained(root, extractor=own)  # type: ignore[arg-type]
        create_model("gm_mlic", pretrained=root)

    return files, read


def image(kind: str) -> Callable[[Path], Case]:
    def make(root: Path) -> Case:
        path = root / f"image.{kind}"
        content = io.BytesIO()
        Image.effect_noise((24, 20), 60).convert("RGB").save(content, kind)
        path.write_bytes(content.getvalue())
        return [path], lambda: read_image(path)

    return make


READERS: dict[str, Callable[[Path], Case]] = {
    "voc": voc,
    "coco": coco,
    "nuswide": nuswide,
    "csv, labels in one column": own(".csv", 'file,labels,split\na.jpg,cat;dog,train\n"c d.jpg",dog,train\n'),
    "csv, a column each": own(".csv", "file,cat,dog,split\na.jpg,1,0,train\nb.jpg,0,1,train\n"),
    "json lines": own(
        ".jsonl",
        '{"file": "a.jpg", "labels": ["cat"], "boxes": [[1, 2, 3, 4, "cat"]], "split": "train"}\n'
        '{"file": "b.jpg", "labels": ["dog"], "split": "train"}\n',
    ),
    "yolo": own_boxes("data.yaml", data_yaml="train: images\nnames: [cat, dog]\n", labels__a_txt="1 0.5 0.5 0.2 0.2\n"),
    "voc of own classes": own_boxes(
        "xml",
        xml__a_xml="<annotation><filename>a.jpg</filename><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
        "<xmax>5</xmax><ymax>5</ymax></bndbox></object></annotation>",
    ),
    "glove": vectors(".txt"),
    "vectors npz": vectors(".npz"),
    "vectors pt": vectors(".pt"),
    "scores csv": scores(".csv"),
    "scores npz": scores(".npz"),
    "scores pt": scores(".pt"),
    "store": store,
    "run folder": run_folder,
    "checkpoint": checkpoint,
    "detector weights": detector,
    "pretrained model": pretrained,
    "jpeg": image("jpeg"),
    "png": image("png"),
    "gif": image("gif"),
}


@pytest.mark.parametrize("reader", READERS)
def test_malformed_files_raise_only_package_errors(reader: str, tmp_path: Path) -> None:
    files, read = READERS[reader](tmp_path)
    if reader not in ("checkpoint", "detector weights"):  # their test files are too small to be valid
        read()
    contents = [file.read_bytes() for file in files]

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(files) - 1), changes())
    def attack(number: int, change: Callable[[bytes], bytes]) -> None:
        files[number].write_bytes(change(contents[number]))
        try:
            read()
        except GMMLICError as error:
            messages.append(str(error).strip())
        finally:
            files[number].write_bytes(contents[number])

    messages: list[str] = []
    attack()
    assert messages  # some files were refused
    assert all(message and "\n" not in message for message in messages)
