from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gm_mlic import Scenes
from gm_mlic.cli.main import run


@pytest.mark.slow
def test_export_to_a_folder_and_a_program(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The exported folder is exported again, converted to a program, and used for prediction."""
    monkeypatch.chdir(tmp_path)
    assert run(["export", f"checkpoint={checkpoint}", "out=model", "license=cc-by-4.0"]) == 0
    out = capsys.readouterr().out
    assert "model: README.md, config.json, label_vectors.safetensors, model.safetensors" in out
    card = Path("model/README.md").read_text()
    for text in ('license: "cc-by-4.0"', "`scenes`: 16 train, 8 val, 8 test.", "- seed: 0", "`mlgcn`", "| mAP | CF1 |"):
        assert text in card
    assert run(["export", "checkpoint=model", "out=again", "license=mit"]) == 0
    assert Path("again/README.md").read_text() == card.replace("cc-by-4.0", "mit").replace(
        "# model\n", "# again\n"
    ).replace('name: "model"', 'name: "again"')
    assert run(["export", "checkpoint=model", "out=network", "format=torch", "labels=cat, zebra crossing"]) == 0
    assert "network.pt2:" in capsys.readouterr().out
    assert Path("network.pt2").is_file()
    extra = {"labels": ""}
    torch.export.load("network.pt2", extra_files=extra)
    assert json.loads(extra["labels"]) == ["cat", "zebra crossing"]
    capsys.readouterr()
    assert run(["export", "checkpoint=model", "out=network.pt2/x"]) == 2
    assert "network.pt2/x: part of this path is a file" in capsys.readouterr().err
    assert run(["export", "checkpoint=model", "out=network.pt2"]) == 2
    assert "network.pt2: a file with this name exists" in capsys.readouterr().err
    Scenes("test", size=1).image(0).save("photo.png")
    assert run(["predict", "checkpoint=model", "images=photo.png"]) == 0
    assert Path("runs/predictions/predictions.jsonl").read_text().startswith('{"image": "photo.png"')
    assert not Path("runs/multirun").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=x"], "checkpoint has no value"),
        (["checkpoint=gone.ckpt", "out=x"], "gone.ckpt: no such checkpoint"),
        (["checkpoint=gone", "out=x"], "gone: no such folder"),
        (["checkpoint=.", "out=x"], "it has no config.json"),
        (["checkpoint=c", "out=x", "format=tflite"], "format=tflite: expected one of pretrained, torch, onnx"),
        (["checkpoint=c", "out=x", "format=onnx", "push=a/b"], "push=a/b needs format=pretrained"),
        (["checkpoint=c", "out=x", "size=448"], "size=448: expected [HEIGHT,WIDTH]"),
        (["checkpoint=c", "out=x", "push=ab"], "push=ab: expected USER/NAME"),
    ],
)
def test_invalid_settings(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["export", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_pretrained_format_rejects_labels(checkpoint: Path, tmp_path: Path, capsys):
    assert run(["export", f"checkpoint={checkpoint}", f"out={tmp_path}/m", "labels=[cat]"]) == 2
    assert "format=pretrained keeps the model's labels" in capsys.readouterr().err
