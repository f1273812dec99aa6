from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gm_mlic import Predictor, build_extractor
from gm_mlic.cli.compose import compose
from gm_mlic.detection import save_detector
from gm_mlic.errors import ConfigError, WeightsError
from gm_mlic.training import run
from gm_mlic.zoo import ModelCard
from gm_mlic.zoo.pretrained import find_pretrained

CARD = ModelCard(
    "scenes: drawn", {"train": 32, "test": 12}, {"mAP": 12.25, "top3/CF1": 50.0}, "mlgcn", "mit", {"seed": 3}
)


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Path:
    return Predictor.from_checkpoint(folder / "gm/checkpoints/best.ckpt").save_pretrained(tmp_path / "model", CARD)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal up to rounding, which depends on memory alignment."""
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def probabilities(predictor: Predictor, photos: list[Path]) -> np.ndarray:
    return np.stack([prediction.probabilities for prediction in predictor(photos)])


@pytest.mark.parametrize("name", ["gm", "mil", "sparse", "candidates"])
def test_save_and_load(folder: Path, photos: list[Path], tmp_path: Path, name: str):
    before = Predictor.from_checkpoint(folder / name / "checkpoints/best.ckpt")
    path = before.save_pretrained(tmp_path / "new" / "model")
    after = Predictor.from_pretrained(path)
    same(probabilities(after, photos), probabilities(before, photos))
    assert after.metadata.labels == before.metadata.labels
    assert after.metadata.graph == before.metadata.graph
    again = after.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors", "label_vectors.safetensors"):
        assert (again / file).read_bytes() == (path / file).read_bytes()


def test_a_moved_folder_is_self_contained(folder: Path, photos: list[Path], tmp_path: Path, small: list[str]):
    """The detector's weights file, the GloVe file and the run folder are deleted."""
    weights = tmp_path / "lost" / "detector.safetensors"
    save_detector(build_extractor("scenes_tiny", weights="scenes"), weights, "scenes_tiny")
    glove = tmp_path / "lost" / "some.glove.txt"
    words = {w for label in Predictor.load(folder / "gm/checkpoints/best.ckpt").metadata.labels for w in label.split()}
    rng = np.random.default_rng(0)
    glove.write_text("".join(f"{w} {' '.join(f'{v:.3f}' for v in rng.normal(size=8))}\n" for w in sorted(words)))
    settings = [f"detector.weights={weights}", "embedding=glove", f"embedding.path={glove}", "model.widths=[8,8]"]
    run.train(
        compose("train", [*small, *settings, f"instances.root={tmp_path}/lost/s", f"run_dir={tmp_path}/lost/run"])
    )
    before = Predictor.load(tmp_path / "lost/run/checkpoints/best.ckpt")
    expected = probabilities(before, photos)
    before.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "lost")
    moved = (tmp_path / "model").rename(tmp_path / "elsewhere")
    after = Predictor.load(moved)
    same(probabilities(after, photos), expected)
    assert str(tmp_path) not in (moved / "config.json").read_text()
    with pytest.raises(Exception, match=r"some\.glove\.txt"):
        after.with_labels(["mug"])
    same(probabilities(Predictor.load(after.save_pretrained(tmp_path / "third")), photos), expected)


def test_a_detector_trained_with_the_model_is_saved(photos: list[Path], tmp_path: Path, small: list[str]):
    online = ["instances.online=true", "detector.trainable=all", "model.widths=[8,8]", "trainer.max_epochs=1"]
    run.train(compose("train", [*small, *online, f"run_dir={tmp_path}/run"]))
    before = Predictor.load(tmp_path / "run/checkpoints/best.ckpt")
    after = Predictor.load(before.save_pretrained(tmp_path / "model"))
    same(probabilities(after, photos), probabilities(before, photos))


@pytest.mark.parametrize("trained", [False, True])
def test_a_grid_detector_is_saved(photos: list[Path], tmp_path: Path, small: list[str], trained: bool):
    """Its weights come from a file, or were trained with the model."""
    weights = tmp_path / "w.safetensors"
    save_detector(build_extractor("scenes_tiny", weights=None, seed=3), weights, "scenes_tiny")
    settings = [f"detector.weights={weights}", "model=gap_linear", "detector.grid_size=3", "trainer.max_epochs=1"]
    settings += [f"instances.root={tmp_path}/stores", f"run_dir={tmp_path}/run"]
    settings += ["instances.online=true", "detector.trainable=all"] if trained else []
    run.train(compose("train", [*small, *settings]))
    before = Predictor.load(tmp_path / "run/checkpoints/best.ckpt")
    expected = probabilities(before, photos)
    path = before.save_pretrained(tmp_path / "model")
    weights.unlink()
    same(probabilities(Predictor.load(path), photos), expected)
    assert str(tmp_path) not in (path / "config.json").read_text()


def test_a_custom_detector(folder: Path, photos: list[Path], tmp_path: Path):
    before = Predictor.load(folder / "gm/checkpoints/best.ckpt")
    own = Predictor(before.model, replace(before.metadata, detector_settings={}), before.extractor)
    path = own.save_pretrained(tmp_path / "model")
    with pytest.raises(WeightsError, match=r"pass it as extractor="):
        Predictor.from_pretrained(path)
    after = Predictor.from_pretrained(path, extractor=before.extractor)
    same(probabilities(after, photos), probabilities(before, photos))
    with pytest.raises(WeightsError, match="use the detector, weights and settings it was trained with"):
        Predictor.from_pretrained(path, extractor=build_extractor("scenes_tiny", weights="scenes", score_threshold=0.5))


def test_model_card_content(saved: Path):
    text = (saved / "README.md").read_text()
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    head = yaml.safe_load(head)
    assert head["license"] == "mit"
    assert head["library_name"] == "gm-mlic"
    assert head["datasets"] == ["scenes: drawn"]
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "mAP", "value": 12.25}, {"type": "top3/CF1", "value": 50.0}]
    for text in ("mug, cheese, lemon", "convention `mlgcn`", "| 12.2 | 50.0 |", "- seed: 3", "32 train, 12 test"):
        assert text in body
    assert "\n\n\n" not in body


def test_the_card_is_kept_when_a_model_is_saved_again(saved: Path, tmp_path: Path):
    again = Predictor.from_pretrained(saved).save_pretrained(tmp_path / "again" / "model")
    assert (again / "README.md").read_text() == (saved / "README.md").read_text()
    assert (again / "config.json").read_text() == (saved / "config.json").read_text()
    shipped = find_pretrained("gm_mlic_scenes")
    again = Predictor.from_pretrained(shipped).save_pretrained(tmp_path / "gm_mlic_scenes")
    assert (again / "README.md").read_text() == (shipped / "README.md").read_text()
    other = Predictor.from_pretrained(saved).with_labels(["cat", "dog"])
    assert "Not stated" in (other.save_pretrained(tmp_path / "other") / "README.md").read_text()


@pytest.mark.parametrize("other", ["README.md", "config.json"])
def test_a_folder_with_other_files_is_not_overwritten(saved: Path, tmp_path: Path, other: str):
    model, mine = Predictor.from_pretrained(saved), tmp_path / "mine"
    mine.mkdir()
    (mine / other).write_text("{}")
    with pytest.raises(ConfigError, match="has files that are not of an exported model: choose an empty folder"):
        model.save_pretrained(mine)
    assert [(path.name, path.read_text()) for path in mine.iterdir()] == [(other, "{}")]
    (mine / other).rename(mine / ".hidden")
    assert model.save_pretrained(model.save_pretrained(mine)) == mine
    (mine / "config.json").unlink()  # as after an interruption
    assert model.save_pretrained(mine) == mine


def test_an_empty_card(folder: Path, tmp_path: Path):
    predictor = Predictor.load(folder / "mil/checkpoints/best.ckpt")
    text = (predictor.save_pretrained(tmp_path / "m") / "README.md").read_text()
    assert text.count("Not stated") == 3
    assert "with_labels" not in text  # labels are fixed
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "gm-mlic"


def test_hostile_or_damaged_folders_are_rejected(saved: Path, folder: Path, tmp_path: Path):
    run_folder = folder / "gm"
    config = json.loads((saved / "config.json").read_text())

    def refused(match: str, name: str = "config.json", text: str | bytes | None = None, **changes: object) -> None:
        folder = Path(shutil.copytree(saved, tmp_path / "copy", dirs_exist_ok=True))
        if text is None:
            text = json.dumps({**config, **changes})
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises((WeightsError, ConfigError), match=match) as caught:
            Predictor.from_pretrained(folder)
        assert "\n" not in str(caught.value)

    refused("cannot be read", text="{")
    refused("cannot be read", text="[" * 100_000)
    refused("not the config of a gm-mlic model", text="[]")
    refused("not the config", library="other")
    refused("format 2, written by gm-mlic 9.0", format=2, version="9.0")
    refused("not the config", labels=[1, 2])
    refused("not the config", labels=config["labels"][:-1])
    refused("not the config", model="gm_mlic")
    refused("not the config", surplus=1)
    for card in ("x", {"surplus": 1}, {"sizes": {"train": "many"}}, {"metrics": [1]}, {"license": 3}):
        refused("not the config", card=card)
    refused("os.system, is not registered", model={**config["model"], "name": "os.system"})
    refused("cannot be built", model={**config["model"], "widths": "x"})
    for graph in (
        {"surplus": 1},
        {"m": None},
        {"m": "x"},
        {"m": 3, "num_neighbors": "y"},
        {"m": 3, "num_label_neighbors": -1},
    ):
        refused("cannot be built", graph=graph)
    # wrong sizes are rejected before tensors of that size are allocated
    refused("do not fit", model={**config["model"], "widths": [10**7, 10**7]})
    refused("do not fit|cannot be built", model={**config["model"], "k": 1, "widths": None})
    refused("detector", detector_settings={**config["detector_settings"], "name": "nothing"})
    refused("cannot be built", detector_settings={**config["detector_settings"], "surplus": 1})
    refused("use the detector", detector_settings={**config["detector_settings"], "weights": None})
    refused("cannot be read", "model.safetensors", b"\x80\x04pickle")
    refused("cannot be read", "label_vectors.safetensors", b"")
    folder = Path(shutil.copytree(saved, tmp_path / "other"))
    weights = load_file(folder / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "decoder" not in name}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"do not fit the model of config\.json \(decoder"):
        Predictor.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        Predictor.from_pretrained(folder)
    with pytest.raises(WeightsError, match=r"it has no config\.json"):
        Predictor.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"run folder: its model is .*best\.ckpt"):
        Predictor.from_pretrained(run_folder)
    with pytest.raises(WeightsError, match="no such folder"):
        Predictor.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="revision is 'x', but"):
        Predictor.from_pretrained(saved, revision="x")


def test_missing_extra_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'gm-mlic\[hub\]'"):
        find_pretrained("me/model")


def test_weights_keep_their_dtype(saved: Path):
    assert {w.dtype for w in load_file(saved / "model.safetensors").values()} == {torch.float32}
