"""MODEL_ZOO.md is up to date, and built-in models can be used."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from gm_mlic import Predictor, Scenes, create_model, list_models, pretrained_models
from gm_mlic.errors import ConfigError, WeightsError
from gm_mlic.metrics import MultiLabelMetrics
from gm_mlic.zoo.pretrained import SHIPPED

ROOT = Path(__file__).resolve().parents[1]


def test_page_is_up_to_date():
    made = runpy.run_path(str(ROOT / "docs" / "model_zoo.py"))["zoo"]()
    assert (ROOT / "MODEL_ZOO.md").read_text() == made, "run make model-zoo"
    for name in list_models():
        assert f"| `{name}` |" in made


def test_built_in_model_on_scenes():
    """On new scenes, mAP equals the model card, up to sampling error."""
    import torch

    assert pretrained_models() == ["gm_mlic_scenes"]
    scenes = Scenes("test", size=120, seed=77)
    predictor = Predictor.load("gm_mlic_scenes")
    assert predictor.metadata.labels == tuple(scenes.labels)
    found = np.stack([p.probabilities for p in predictor([scenes.image(i) for i in range(120)], 24)])
    metrics = MultiLabelMetrics(len(scenes.labels))
    metrics.update(torch.from_numpy(found), torch.from_numpy(scenes.targets))
    assert float(metrics.compute()["mAP"]) > 88


def test_pretrained_models_by_name():
    model = create_model("gm_mlic_scenes", pretrained=True)
    same = Predictor.load("gm_mlic_scenes").model
    for (name, a), (_, b) in zip(model.state_dict().items(), same.state_dict().items(), strict=True):
        assert a.equal(b), name
    again = create_model("gm_mlic", pretrained=SHIPPED / "gm_mlic_scenes", gradient_checkpointing=True)
    assert again.gradient_checkpointing
    with pytest.raises(WeightsError, match="the weights do not fit the model"):
        create_model("gm_mlic_scenes", pretrained=True, widths=(8, 8))
    with pytest.raises(WeightsError, match=r"'ml_gcn' has no shipped weights; models that do: gm_mlic_scenes"):
        create_model("ml_gcn", pretrained=True, instance_dim=4, num_labels=2, label_dim=3)
    with pytest.raises(WeightsError, match="nowhere: not a gm-mlic model folder"):
        create_model("gm_mlic", pretrained="nowhere")
    with pytest.raises(ConfigError, match="Did you mean"):
        create_model("gm_mlic_scene", pretrained=True)


def test_names_by_pattern():
    assert list_models("*scenes*") == ["gm_mlic_scenes"]
    assert list_models("*voc*") == []
    assert pretrained_models("*voc*") == []
