from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from gm_mlic.errors import ConfigError
from gm_mlic.nn import GMMLIC, MILMax, create_model, list_models, model_arguments, register_model, registry

IMAGE, WORDS = {"instance_dim": 4, "num_labels": 3}, {"label_dim": 3}
INPUTS: dict[str, dict[str, Any]] = {
    "detector": {"labels": ["cat", "dog"], "detector_labels": ["dog"]},
    "mil_max": IMAGE,
    "resnet101": IMAGE,
    "query2label": IMAGE,
    "ml_gcn": IMAGE | WORDS,
    "ssgrl": IMAGE | WORDS,
}


def test_list_is_sorted_and_filtered() -> None:
    assert list_models() == sorted(list_models())
    assert {"gm_mlic", "gm_mlic_paper", "gm_mlic_scenes", "mil_max"} <= set(list_models())
    assert list_models("mil*") == ["mil_max"]
    assert list_models("nothing*") == []


@pytest.mark.parametrize("name", list_models())
def test_every_model_is_built_by_its_name(name: str) -> None:
    assert isinstance(create_model(name, **INPUTS.get(name, {"instance_dim": 4, "label_dim": 3})), nn.Module)


def test_arguments_are_those_of_what_is_built() -> None:
    assert model_arguments("mil_max") == ["instance_dim", "num_labels", "width"]
    assert model_arguments("gm_mlic_paper") == model_arguments("gm_mlic")
    for name in list_models():
        assert INPUTS.get(name, {"instance_dim": 4, "label_dim": 3}).keys() <= set(model_arguments(name))
        assert ("num_labels" in model_arguments(name)) == ("num_labels" in INPUTS.get(name, {}))
    with pytest.raises(ConfigError, match="Did you mean 'mil_max'"):
        model_arguments("mil_mx")


def test_presets_and_overrides() -> None:
    paper = create_model("gm_mlic_paper")
    assert isinstance(paper, GMMLIC)
    assert (paper.k, paper.widths, paper.fusion, paper.encoder_width) == (2, (512, 256), "concat", 512)
    scenes = create_model("gm_mlic_scenes")
    assert isinstance(scenes, GMMLIC)
    assert (scenes.widths, scenes.fusion, scenes.norm) == ((64, 64), "product", "all")
    changed = create_model("gm_mlic_paper", k=1, widths=(8,), fusion="product", instance_dim=4)
    assert isinstance(changed, GMMLIC)
    assert (changed.k, changed.widths, changed.fusion, changed.label_dim) == (1, (8,), "product", 300)
    assert isinstance(create_model("mil_max", instance_dim=4, num_labels=3, width=8), MILMax)


def test_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"There is no model 'gm_mlic_papr'. Did you mean 'gm_mlic_paper'\?") as error:
        create_model("gm_mlic_papr")
    assert "mil_max" in str(error.value)
    with pytest.raises(ConfigError, match=r"There is no model 'zzz'\. Known: "):
        create_model("zzz")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("gm_mlic_paper", {"depth": 3}, "GMMLIC has no argument 'depth'. It takes: instance_dim, label_dim, k, widths"),
        ("gm_mlic", {}, "GMMLIC needs instance_dim and label_dim"),
        ("mil_max", {"instance_dim": 4, "num_labels": 3, "k": 2}, "MILMax has no argument 'k'. It takes: .*width"),
        ("mil_max", {"instance_dim": 4, "num_labels": 0}, "1 or more"),
        ("gm_mlic_paper", {"k": 3}, "model.widths must have k = 3"),
    ],
)
def test_bad_arguments(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        create_model(name, **overrides)
    assert "\n" not in str(error.value)


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @register_model
    def my_model(width: int = 2) -> nn.Module:
        return nn.Linear(width, 1)

    assert "my_model" in list_models()
    layer = create_model("my_model", width=5)
    assert isinstance(layer, nn.Linear)
    assert layer.in_features == 5
    with pytest.raises(ConfigError, match=r"my_model has no argument 'depth'\. It takes: width"):
        create_model("my_model", depth=5)
    # What goes wrong inside a constructor is no matter of arguments, and shows as it is.
    with pytest.raises(TypeError):
        create_model("my_model", width="wide")
    with pytest.raises(ValueError, match="registered already"):
        register_model(my_model)
