"""Reading of detector weights, and error messages."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from gm_mlic.detection import build_extractor, checkpoints
from gm_mlic.detection.checkpoints import SCENES_WEIGHTS, save_checkpoint
from gm_mlic.detection.torchvision_detector import build_detector
from gm_mlic.errors import ConfigError, WeightsError

LABELS = ("cat", "dog")
#: The smallest detector with COCO weights of torchvision.
SMALL = "ssdlite320_mobilenet_v3_large"


def _record(**changes) -> dict:
    return {"arch": "scenes_tiny", "labels": LABELS, "min_size": 128, "max_size": 200} | changes


def _refused(weights, *named: str, arch: str = "scenes_tiny", error: type = WeightsError, **settings) -> None:
    with pytest.raises(error) as caught:
        build_extractor(arch, weights=weights, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for part in named:
        assert part in message


@pytest.fixture
def tiny() -> dict[str, torch.Tensor]:
    return build_detector("scenes_tiny", 3, seed=4).state_dict()


def test_save_and_load_weights_labels_and_input_size(tmp_path, tiny):
    path = tmp_path / "folder" / "w.safetensors"
    save_checkpoint(path, tiny, _record(note="ünïcode"))
    extractor = build_extractor("scenes_tiny", weights=path)
    assert extractor.labels == LABELS
    assert extractor.detector.transform.min_size == (128,)
    assert extractor.detector.transform.max_size == 200
    for key, tensor in extractor.detector.state_dict().items():
        assert torch.equal(tensor, tiny[key]), key
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["note"] == "ünïcode"
    assert sorted(p.name for p in path.parent.iterdir()) == ["w.json", "w.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.with_suffix(".json").stat().st_mode)


def test_input_size_can_be_overridden(tmp_path, tiny):
    save_checkpoint(tmp_path / "w.safetensors", tiny, _record())
    extractor = build_extractor("scenes_tiny", weights=tmp_path / "w.safetensors", min_size=192, max_size=256)
    assert (extractor.detector.transform.min_size, extractor.detector.transform.max_size) == ((192,), 256)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"model": t, "epoch": 3}])
def test_torch_state_dict_files(tmp_path, tiny, wrap):
    torch.save(wrap(tiny), tmp_path / "w.pth")
    extractor = build_extractor("scenes_tiny", weights=tmp_path / "w.pth", labels=LABELS)
    assert extractor.labels == LABELS
    assert torch.equal(
        extractor.detector.state_dict()["roi_heads.box_head.fc6.bias"], tiny["roi_heads.box_head.fc6.bias"]
    )


def test_torch_files_without_labels_get_numbered_labels(tmp_path, tiny):
    torch.save(tiny, tmp_path / "w.pt")
    assert build_extractor("scenes_tiny", weights=tmp_path / "w.pt").labels == ("class 1", "class 2")


def test_91_classes_are_coco_classes(tmp_path):
    torch.save(build_detector("scenes_tiny", 91).state_dict(), tmp_path / "w.pt")
    labels = build_extractor("scenes_tiny", weights=tmp_path / "w.pt").labels
    assert len(labels) == 80
    assert (labels[0], labels[11], labels[79]) == ("person", "stop sign", "toothbrush")


def test_built_in_weights_are_small_and_have_a_record():
    assert SCENES_WEIGHTS.stat().st_size < 5_000_000
    record = json.loads(SCENES_WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    with safe_open(SCENES_WEIGHTS, framework="pt") as file:
        assert json.loads(file.metadata()["gm_mlic"]) == record
    assert record["command"].startswith("gm-mlic train-detector ")
    assert record["val_ap50"][-1] > 50


def test_missing_file(tmp_path):
    _refused(tmp_path / "none.safetensors", "none.safetensors", "does not exist")
    _refused("cocoo", "'cocoo'", "`weights`")


@pytest.mark.parametrize("content", [b"", b"not at all weights", b"\x80\x02}q\x00."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_corrupt_file(tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    _refused(path, path.name)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_file(tmp_path, tiny, suffix):
    path = tmp_path / f"short{suffix}"
    if suffix == ".pt":
        torch.save(tiny, path)
    else:
        save_checkpoint(path, tiny, _record())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _refused(path, path.name)


class _Trap:
    def __reduce__(self):
        return Path.touch, (Path("trap-was-sprung"),)


def test_pickled_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": _Trap()}, tmp_path / "trap.pt")
    _refused(tmp_path / "trap.pt", "trap.pt", "state_dict()")
    assert not (tmp_path / "trap-was-sprung").exists()


def test_unknown_model(tmp_path):
    torch.save({"linear.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    _refused(tmp_path / "other.pt", "other.pt", "Faster R-CNN")
    torch.save([1, 2], tmp_path / "list.pt")
    _refused(tmp_path / "list.pt", "list.pt", "state_dict")
    save_file({"a": torch.zeros(2)}, tmp_path / "bare.safetensors")
    _refused(tmp_path / "bare.safetensors", "bare.safetensors", "labels")


@pytest.mark.parametrize("header", ["{", "[]", '{"arch": "scenes_tiny"}'])
def test_invalid_header(tmp_path, tiny, header):
    save_file(tiny, tmp_path / "odd.safetensors", metadata={"gm_mlic": header})
    _refused(tmp_path / "odd.safetensors", "odd.safetensors", "header")


def test_weights_for_another_architecture(tmp_path, tiny):
    save_checkpoint(tmp_path / "w.safetensors", tiny, _record(arch="fasterrcnn_resnet50_fpn"))
    _refused(tmp_path / "w.safetensors", "w.safetensors", "fasterrcnn_resnet50_fpn", "scenes_tiny")
    torch.save(tiny, tmp_path / "w.pt")
    arch = "fasterrcnn_mobilenet_v3_large_fpn"
    _refused(tmp_path / "w.pt", "w.pt", arch, "missing", arch=arch, min_size=64)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("backbone.fine.0.0.weight"), "missing backbone.fine.0.0.weight"),
        (lambda t: t.update({"extra.weight": torch.zeros(1)}), "unknown extra.weight"),
        (lambda t: t.update({"roi_heads.box_head.fc7.bias": torch.zeros(7)}), "shape of roi_heads.box_head.fc7.bias"),
    ],
)
def test_mismatching_tensors_are_named(tmp_path, tiny, change, named):
    change(tiny)
    save_checkpoint(tmp_path / "w.safetensors", tiny, _record())
    _refused(tmp_path / "w.safetensors", "w.safetensors", named)


def test_other_labels(tmp_path, tiny):
    save_checkpoint(tmp_path / "w.safetensors", tiny, _record())
    _refused(tmp_path / "w.safetensors", "'dog'", "'cow'", labels=("cat", "cow"))
    _refused(tmp_path / "w.safetensors", "2 instead of 3", labels=(*LABELS, "cow"))
    build_extractor("scenes_tiny", weights=tmp_path / "w.safetensors", labels=LABELS)


def test_weight_names_of_other_architectures():
    _refused("coco", "coco", "scenes_tiny", error=ConfigError)
    _refused("scenes", "scenes", arch="fasterrcnn_resnet50_fpn", error=ConfigError)


class Offer:
    """Server of a file as torchvision's COCO weights of SMALL."""

    def __init__(self, folder: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.port, self.monkeypatch = folder, port, monkeypatch

    def __call__(self, content: bytes, prefix: str | None = None) -> Path:
        """Serve ``content``; returns torch's cache path."""
        name = f"rcnn-{prefix or hashlib.sha256(content).hexdigest()[:8]}.pth"
        (self.folder / name).write_bytes(content)
        url = f"http://127.0.0.1:{self.port}/{name}"
        self.monkeypatch.setitem(checkpoints._COCO, SMALL, SimpleNamespace(url=url))
        return Path(torch.hub.get_dir()) / "checkpoints" / name


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offer]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "served").mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served")) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield Offer(tmp_path / "served", http.server_port, monkeypatch)
        http.shutdown()


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)  # as in older torchvision files
    return file.getvalue()


def test_torchvision_weights_are_downloaded_once(offer: Offer):
    theirs = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=91).state_dict()
    kept = offer(saved(theirs))
    ours = build_extractor(SMALL, weights="coco")
    name = "backbone.features.0.0.0.weight"
    assert torch.equal(ours.detector.state_dict()[name], theirs[name])
    assert len(ours.labels) == 80
    assert kept.is_file()
    (offer.folder / kept.name).unlink()
    build_extractor(SMALL, weights="coco")


def test_download_with_wrong_hash_is_refused(offer: Offer):
    kept = offer(saved({}), prefix="00000000")
    _refused("coco", "could not be downloaded", "invalid hash value", arch=SMALL)
    assert not kept.exists()


def test_downloads_are_not_unpickled(offer: Offer, tmp_path: Path):
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    kept = offer(saved({"x": Hostile()}))
    _refused("coco", f"The weights file {kept} is damaged", "delete it", arch=SMALL)
    assert not (tmp_path / "pwned").exists()


def test_failed_download_names_the_url(offer: Offer):
    offer(b"")
    next(offer.folder.iterdir()).unlink()
    named = (
        "could not be downloaded (HTTP Error 404",
        "/rcnn-e3b0c442.pth",
        "`weights='/path/to/rcnn-e3b0c442.pth'`",
    )
    _refused("coco", *named, arch=SMALL)
