"""dataset.download=true on the command line, with archives in the official layout from a local server."""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gm_mlic.cli.compose import compose
from gm_mlic.cli.main import run
from gm_mlic.config import changed_settings
from gm_mlic.datasets import COCO2014, VOC2007, coco
from gm_mlic.datasets.voc import LABELS


class Quiet(SimpleHTTPRequestHandler):
    """Request handler that serves a folder and records requests."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """Served folder, its address, and the requested paths."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("Handler", (Quiet,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()


def md5(file: Path) -> str:
    return "md5:" + hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()


def voc_archives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VOC 2007 archives with 8 and 4 photos."""
    rng = np.random.default_rng(0)
    for name, image_set, first, count in (("train_set", "trainval", 1, 8), ("test_set", "test", 9, 4)):
        official, archive = getattr(VOC2007, name)
        assert official == image_set
        tree = folder.parent / f"tree-{image_set}" / "VOCdevkit"
        main, photos = tree / "VOC2007" / "ImageSets" / "Main", tree / "VOC2007" / "JPEGImages"
        main.mkdir(parents=True)
        photos.mkdir()
        boxes = tree / "VOC2007" / "Annotations"
        boxes.mkdir()
        ids = [f"{n:06d}" for n in range(first, first + count)]
        targets = rng.choice([1, -1], (count, 20), p=[0.2, 0.8])
        for c, label in enumerate(LABELS):
            lines = [f"{one} {value:2d}\n" for one, value in zip(ids, targets[:, c], strict=True)]
            (main / f"{label}_{image_set}.txt").write_text("".join(lines))
        for one in ids:
            Image.new("RGB", (20, 10), "olive").save(photos / f"{one}.jpg")
            size = "<size><width>20</width><height>10</height><depth>3</depth></size>"
            (boxes / f"{one}.xml").write_text(f"<annotation>{size}</annotation>")
        file = folder / archive.name
        with tarfile.open(file, "w") as tar:
            tar.add(tree, "VOCdevkit")
        monkeypatch.setattr(VOC2007, name, (image_set, replace(archive, hash=md5(file))))


def coco_archives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COCO archives with 6 and 3 photos."""
    annotations = folder / coco._ANNOTATIONS.name
    with zipfile.ZipFile(annotations, "w") as out:
        for archive, first, count in (("train2014", 9, 6), ("val2014", 42, 3)):
            names = {n: f"COCO_{archive}_{n:012d}.jpg" for n in range(first, first + count)}
            content = {
                "images": [{"id": n, "file_name": f, "width": 20, "height": 10} for n, f in names.items()],
                "annotations": [
                    {"id": n, "image_id": n, "category_id": 1 + n % 2, "bbox": [1, 1, 5, 5], "iscrowd": 0}
                    for n in names
                ],
                "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}],
            }
            out.writestr(f"annotations/instances_{archive}.json", json.dumps(content))
            photos = folder / f"{archive}.zip"
            with zipfile.ZipFile(photos, "w") as images:
                for file in names.values():
                    with images.open(f"{archive}/{file}", "w") as photo:
                        Image.new("RGB", (20, 10), "navy").save(photo, "JPEG")
            monkeypatch.setitem(coco._IMAGES, archive, replace(coco._IMAGES[archive], hash=md5(photos)))
    monkeypatch.setattr(coco, "_ANNOTATIONS", replace(coco._ANNOTATIONS, hash=md5(annotations)))


def test_voc_downloads_only_archives_of_the_split_once(
    served: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address, asked = served
    voc_archives(folder, monkeypatch)
    root = tmp_path / "voc"
    test = VOC2007(root, "test", download=True, mirror=address)
    assert len(test) == 4
    assert test.image(0).size == (20, 10)
    assert asked == ["/VOCtest_06-Nov-2007.tar"]
    assert len(VOC2007(root, "train", val_fraction=0, download=True, mirror=address + "/")) == 8
    assert len(asked) == 2
    VOC2007(root, "val", download=True, mirror=address)
    VOC2007(root / "VOCdevkit", "test")
    assert len(asked) == 2


def test_coco_is_downloaded(
    served: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address, asked = served
    coco_archives(folder, monkeypatch)
    test = COCO2014(tmp_path / "coco", "test", download=True, mirror=address)
    assert (len(test), test.labels) == (3, ("bicycle", "person"))
    assert sorted(asked) == ["/annotations_trainval2014.zip", "/val2014.zip"]
    assert len(COCO2014(tmp_path / "coco", "train", val_fraction=0, download=True, mirror=address)) == 6


def test_command_line_downloads_and_verifies(
    served: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, address, asked = served
    voc_archives(folder, monkeypatch)
    monkeypatch.chdir(tmp_path)
    command = ["dataset", "dataset=voc2007", "dataset.root=voc", "splits=[train]"]
    assert run(command) == 2
    assert "dataset.download=true fetches it" in capsys.readouterr().err
    fetching = [*command, "dataset.download=true", f"dataset.mirror={address}"]
    good = folder / "VOCtrainval_06-Nov-2007.tar"
    whole = good.read_bytes()
    good.write_bytes(whole[:-1] + b"x")
    assert run(fetching) == 2
    error = capsys.readouterr().err
    assert "has the wrong hash" in error
    assert "Traceback" not in error
    assert not (tmp_path / "voc" / "VOCdevkit").exists()
    good.write_bytes(whole)
    assert run(fetching) == 0
    assert "aeroplane" in capsys.readouterr().out
    server_asked = len(asked)
    assert run(command) == 0
    assert len(asked) == server_asked


def test_invalid_mirror(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["dataset", "dataset=coco2014", "dataset.download=true", "dataset.mirror=example.org/coco"]) == 2
    assert "dataset.mirror=example.org/coco: expected a URL" in capsys.readouterr().err


def test_download_settings_do_not_change_the_run() -> None:
    plain = compose("train", ["dataset=voc2007"])
    fetched = compose("train", ["dataset=voc2007", "dataset.download=true", "dataset.mirror=http://localhost"])
    assert fetched.run_dir == plain.run_dir
    assert changed_settings(plain, fetched) == []
