from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from gm_mlic import Predictor
from gm_mlic.errors import ConfigError
from gm_mlic.graphs import collate_instances
from gm_mlic.zoo import export as module
from gm_mlic.zoo.export import ExportError, export


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return Predictor.load(folder / "gm/checkpoints/best.ckpt")


def arrays(predictor: Predictor, photos: list[Path]) -> dict[str, np.ndarray]:
    """Padded instances of photos, and the model's outputs for them."""
    images = [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) / 255 for p in photos]
    with torch.no_grad():
        found = predictor.extractor(images, 10)
        batch = collate_instances(found, predictor.graph)
        output = predictor.model(batch)
    return {
        "features": batch.x.numpy(), "boxes": batch.box.numpy(), "mask": batch.mask.numpy(),
        "logits": output.logits.numpy(), "match_logits": output.match_logits.numpy(),
        "argmax_instance": output.argmax_instance.numpy(),
    }  # fmt: skip


@pytest.mark.slow
def test_onnx_network_in_another_process(predictor: Predictor, photos: list[Path], tmp_path: Path):
    """The process loads onnxruntime only; inputs are real instances of one image and of several."""
    path = tmp_path / "network.onnx"
    assert export(predictor, path, "onnx") <= 1e-4
    onnx.checker.check_model(path)
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]
    for name, subset in {"one": photos[:1], "many": photos}.items():
        values = arrays(predictor, subset)
        short = 6 - values["mask"].shape[1]  # the instance graph has 5 neighbors
        if short > 0:
            for key in ("features", "boxes", "mask"):
                pad = [(0, 0), (0, short)] + [(0, 0)] * (values[key].ndim - 2)
                values[key] = np.pad(values[key], pad)
        np.savez(tmp_path / f"{name}.npz", **values)
    code = (
        "import sys, json, numpy as np, onnxruntime as ort\n"
        f"s = ort.InferenceSession({str(path)!r}, providers=['CPUExecutionProvider'])\n"
        "for name in ('one', 'many'):\n"
        f"    d = dict(np.load({str(tmp_path)!r} + '/' + name + '.npz'))\n"
        "    logits, match_logits, argmax = s.run(None, {k: d[k] for k in ('features', 'boxes', 'mask')})\n"
        "    m = d['mask']\n    n = m.shape[1]\n"
        "    assert abs(logits - d['logits']).max() < 1e-4\n"
        "    real = m[:, :d['match_logits'].shape[1]]\n"
        "    assert abs(match_logits[:, :d['match_logits'].shape[1]] - d['match_logits'])[real].max() < 1e-4\n"
        "    assert (argmax == d['argmax_instance']).mean() > 0.99\n"
        "assert not any(name in sys.modules for name in ('torch', 'gm_mlic'))\n"
        "print(json.loads(s.get_modelmeta().custom_metadata_map['labels'])[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == predictor.metadata.labels[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "labels"),
    [("gm", None), ("sparse", ["cat", "zebra crossing"]), ("mil", None)],
    ids=["gm", "sparse", "mil"],
)
def test_torch_network(folder: Path, photos: list[Path], tmp_path: Path, name: str, labels: list[str] | None):
    predictor = Predictor.load(folder / name / "checkpoints/best.ckpt")
    predictor = predictor if labels is None else predictor.with_labels(labels)
    export(predictor, tmp_path / "network.pt2", "torch")
    extra = {"labels": "", "detector_labels": ""}
    program = torch.export.load(tmp_path / "network.pt2", extra_files=extra).module()
    assert json.loads(extra["labels"]) == list(predictor.metadata.labels)
    assert json.loads(extra["detector_labels"]) == list(predictor.extractor.labels)
    predictions = list(predictor(photos))
    M = max(6, max(len(p.boxes) for p in predictions))
    with torch.no_grad():
        found = predictor.extractor(
            [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) / 255 for p in photos], predictor.graph.m
        )
        for instances, prediction in zip(found, predictions, strict=True):
            pad = M - len(instances)
            features = torch.nn.functional.pad(instances.features, (0, 0, 0, pad))[None]
            boxes = torch.nn.functional.pad(instances.boxes, (0, 0, 0, pad))[None]
            logits, match_logits, _ = program(features, boxes, (torch.arange(M) < len(instances))[None])
            np.testing.assert_allclose(logits.sigmoid()[0].numpy(), prediction.probabilities, atol=1e-5)
            np.testing.assert_allclose(match_logits[0, : len(instances)].numpy(), prediction.match_logits, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), [("gm", "torch"), ("candidates", "onnx")])
def test_detector_and_network_equal_the_predictor(
    folder: Path, photos: list[Path], tmp_path: Path, name: str, form: str
):
    """A model that reads the detector's classes, and one that does not."""
    predictor = Predictor.load(folder / name / "checkpoints/best.ckpt")
    assert export(predictor, tmp_path / "all", form, "all", (96, 96)) <= 1e-4
    names = [*module.MATCH_OUTPUTS, "boxes", "mask"]
    if form == "onnx":
        session = onnxruntime.InferenceSession(tmp_path / "all", providers=["CPUExecutionProvider"])
        (image,) = [value.name for value in session.get_inputs()]
        assert [value.name for value in session.get_outputs()] == names
    else:
        program = torch.export.load(tmp_path / "all").module()
    for photo, prediction in zip(photos, predictor(photos), strict=True):
        pixels = np.array(Image.open(photo)).transpose(2, 0, 1).astype(np.float32) / 255
        if form == "onnx":
            values = session.run(None, {image: pixels})
        else:
            with torch.no_grad():
                values = [value.numpy() for value in program(torch.from_numpy(pixels))]
        out = dict(zip(names, values, strict=True))
        n = len(prediction.boxes)
        assert out["mask"].tolist() == [True] * n + [False] * (len(out["mask"]) - n)
        np.testing.assert_allclose(1 / (1 + np.exp(-out["logits"][0])), prediction.probabilities, atol=1e-4)
        np.testing.assert_allclose(out["boxes"][:n] * 96, prediction.boxes, atol=1e-2)
        np.testing.assert_allclose(out["match_logits"][0, :n], prediction.match_logits, atol=1e-3)


@pytest.mark.slow
def test_torch_detector(predictor: Predictor, photos: list[Path], tmp_path: Path):
    export(predictor, tmp_path / "detector.pt2", "torch", "detector", (96, 96))
    program = torch.export.load(tmp_path / "detector.pt2").module()
    pixels = torch.from_numpy(np.array(Image.open(photos[0]))).permute(2, 0, 1) / 255
    (expected,) = predictor.extractor([pixels], predictor.graph.m)
    features, _, mask, _, _ = program(pixels)
    torch.testing.assert_close(features[mask], expected.features, rtol=1e-3, atol=1e-4)


def test_differing_export_is_removed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    predictor = Predictor.load(folder / "mil/checkpoints/best.ckpt")  # the fastest export
    (tmp_path / "network.pt2").write_text("previous file")
    loaded = module._loaded_program

    def wrong(path: Path):
        run = loaded(path)
        return lambda trial: [out + 1e-3 if out.is_floating_point() else out for out in run(trial)]

    monkeypatch.setattr(module, "_loaded_program", wrong)
    with pytest.raises(ExportError, match=r"differs from the model by 1\.0e-03"):
        export(predictor, tmp_path / "network.pt2", "torch")
    assert [file.name for file in tmp_path.iterdir()] == ["network.pt2"]
    assert (tmp_path / "network.pt2").read_text() == "previous file"


def test_nan_is_a_difference():
    logits, other = torch.tensor([1.0, -torch.inf]), torch.tensor([1.5, -torch.inf])
    assert module._difference("match_logits", logits, other) == 0.5
    assert module._difference("match_logits", logits, torch.tensor([1.0, torch.nan])) == torch.inf
    assert module._difference("match_logits", logits, torch.tensor([1.0, 3.0])) == torch.inf


def test_invalid_arguments_are_rejected(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="formats are torch, onnx"):
        export(predictor, tmp_path / "x", "tensorflow")
    with pytest.raises(ConfigError, match="parts network, detector, all"):
        export(predictor, tmp_path / "x", "torch", "decoder")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"pip install 'gm-mlic\[export\]'"):
        export(predictor, tmp_path / "x", "onnx")
    own = Predictor(predictor.model, predictor.metadata, lambda images, m: [])  # type: ignore[arg-type]
    own.extractor.name, own.extractor.labels = "mine", ()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"mine is no Faster R-CNN of torchvision: export `part='network'`"):
        export(own, tmp_path / "x", "torch", "all")
