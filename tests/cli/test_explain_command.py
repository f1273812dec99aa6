from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from gm_mlic import Scenes
from gm_mlic.cli.main import run


def test_explain_writes_a_picture_and_json(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    Scenes("test", size=1, image_size=96).image(0).save("a photo.png")
    arguments = ["explain", f"checkpoint={checkpoint}", "image=a photo.png"]
    assert run([*arguments, "label=fence post"]) == 0
    out = capsys.readouterr().out
    assert "fence post: argmax instance" in out
    assert "runs/explanations/a-photo-fence-post.png" in out
    with Image.open("runs/explanations/a-photo-fence-post.png") as picture:
        assert picture.size == (1800, 624)
        assert len(picture.convert("RGB").getcolors(maxcolors=10**6) or []) > 500
    found = json.loads(Path("runs/explanations/a-photo-fence-post.json").read_text())
    assert found["label"] == "fence post"
    assert len(found["match_logits"]) == len(found["boxes"])
    assert found["influences"]
    assert {
        (*influence["edge_type"], influence["source"], influence["target"]) for influence in found["influences"]
    } <= {
        ("instance", "spatial", "instance", "instance", "instance"),
        ("label", "semantic", "label", "label", "label"),
        ("instance", "matches", "label", "instance", "label"),
        ("instance", "matches", "label", "label", "instance"),
    }
    assert all(set(i) == {"edge_type", "source", "target", "neighbor", "change"} for i in found["influences"])
    from gm_mlic import Predictor
    from gm_mlic.reporting.explanation import explanation_picture
    from gm_mlic.zoo import explain

    predictor = Predictor.load(checkpoint).with_labels([r"$5 \frac{", "$x$", "汽车"])
    with Image.open("a photo.png") as photo:
        explanation_picture(explain(predictor, photo, "$x$"), photo.convert("RGB"), Path("dollars.png"))
    assert run([*arguments, "label=unicorn"]) == 2
    assert "label is 'unicorn': the labels are mug" in capsys.readouterr().err
    Path("torn.jpg").write_bytes(b"\xff\xd8")
    assert run(["explain", arguments[1], "image=torn.jpg"]) == 2
    assert "torn.jpg" in capsys.readouterr().err
