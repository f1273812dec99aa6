from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from gm_mlic import create_model, list_models, register_model
from gm_mlic.errors import ConfigError
from gm_mlic.nn import GMMLIC, MILMax
from gm_mlic.registry import MODELS

IMAGE, WORDS = {"instance_dim": 4, "num_labels": 3}, {"label_dim": 3}
INPUTS: dict[str, dict[str, Any]] = {
    "detector_labels": {"labels": ["cat", "dog"], "detector_labels": ["dog"]},
    "mil_max": IMAGE,
    "gap_linear": IMAGE,
    "query2label": IMAGE,
    "add_gcn": IMAGE,
    "ml_decoder": IMAGE,
    "c_tran": IMAGE,
    "srn": IMAGE,
    "tdrg": IMAGE,
    "cma": IMAGE,
    "cnn_rnn": IMAGE,
    "rnn_attention": IMAGE,
    "pla": IMAGE,
    "kd_wsd": IMAGE,
    "tsgcn": IMAGE | WORDS,
    "ml_gcn": IMAGE | WORDS,
    "ssgrl": IMAGE | WORDS,
}


def test_list_is_sorted_and_filtered() -> None:
    assert list_models() == sorted(list_models())
    assert {"gm_mlic", "gm_mlic_paper", "gm_mlic_scenes", "mil_max"} <= set(list_models())
    assert list_models("mil*") == ["mil_max"]
    assert list_models("nothing*") == []


@pytest.mark.parametrize("name", list_models())
def test_every_model_is_built_by_name(name: str) -> None:
    assert isinstance(create_model(name, **INPUTS.get(name, {"instance_dim": 4, "label_dim": 3})), nn.Module)


def test_arguments_equal_the_constructor() -> None:
    head = ["prior", "linear", "components", "shrinkage", "ridge", "pooling"]
    assert MODELS.arguments("mil_max") == ["instance_dim", "num_labels", "width", *head]
    assert MODELS.arguments("gm_mlic_paper") == MODELS.arguments("gm_mlic")
    for name in list_models():
        assert INPUTS.get(name, {"instance_dim": 4, "label_dim": 3}).keys() <= set(MODELS.arguments(name))
        assert ("num_labels" in MODELS.arguments(name)) == ("num_labels" in INPUTS.get(name, {}))
    with pytest.raises(ConfigError, match="Did you mean 'mil_max'"):
        MODELS.arguments("mil_mx")


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
    with pytest.raises(ConfigError, match=r"Unknown model 'gm_mlic_papr'. Did you mean 'gm_mlic_paper'\?") as error:
        create_model("gm_mlic_papr")
    assert "mil_max" in str(error.value)
    with pytest.raises(ConfigError, match=r"Unknown model 'zzz'\. Choose from "):
        create_model("zzz")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("gm_mlic_paper", {"depth": 3}, "GMMLIC has no argument 'depth'. It takes: instance_dim, label_dim, k, widths"),
        ("gm_mlic", {}, "GMMLIC needs instance_dim and label_dim"),
        ("mil_max", {"instance_dim": 4, "num_labels": 3, "k": 2}, "MILMax has no argument 'k'. It takes: .*width"),
        ("mil_max", {"instance_dim": 4, "num_labels": 0}, "num_labels must be an integer of at least 1; got 0"),
        ("gm_mlic_paper", {"widths": (8,)}, "widths must have k = 2"),
    ],
)
def test_invalid_arguments(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        create_model(name, **overrides)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("registries")
def test_register() -> None:
    @register_model("my_model")
    @register_model("my_wide_model", "A preset", width=7)
    def build(width: int = 2) -> nn.Module:
        """A Linear.

        And more.
        """
        return nn.Linear(width, 1)

    assert {"my_model", "my_wide_model"} <= set(list_models("my*"))
    assert MODELS.entry("my_model").summary == "A Linear"
    assert MODELS.entry("my_wide_model").summary == "A preset"
    for name, overrides, width in (
        ("my_model", {"width": 5}, 5), ("my_wide_model", {}, 7), ("my_wide_model", {"width": 3}, 3),
    ):  # fmt: skip
        layer = create_model(name, **overrides)
        assert isinstance(layer, nn.Linear)
        assert layer.in_features == width
    with pytest.raises(ConfigError, match=r"build has no argument 'depth'\. It takes: width"):
        create_model("my_model", depth=5)
    # Errors inside a constructor are passed on.
    with pytest.raises(TypeError):
        create_model("my_model", width="wide")
    with pytest.raises(ValueError, match="already registered"):
        register_model("my_model")(build)
