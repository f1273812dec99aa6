"""Training, evaluation and prediction of each baseline, and of GM-MLIC on a grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gm_mlic import Predictor, Scenes
from gm_mlic.cli.compose import compose
from gm_mlic.cli.demo import detector_scores
from gm_mlic.errors import ConfigError
from gm_mlic.graphs import AssignmentBatch
from gm_mlic.metrics import read_scored_images
from gm_mlic.nn.baselines._common import conditional_probabilities
from gm_mlic.nn.baselines.ml_gcn import reweighted_adjacency
from gm_mlic.training import run
from gm_mlic.zoo import read_checkpoint
from gm_mlic.zoo.export import export

SMALL = [
    "experiment=scenes_smoke", "dataset.sizes={train: 24, val: 8, test: 8}", "dataset.image_size=96",
    "detector.min_size=64", "trainer.batch_size=8", "trainer.max_epochs=1", "trainer.accelerator=cpu",
]  # fmt: skip
GRID = ["detector.grid_size=4"]
RUNS = {
    "gap_linear": ["model=gap_linear", "detector.grid_size=4"],
    "ml_gcn": ["model=ml_gcn", "detector.grid_size=4"],
    "ssgrl": ["model=ssgrl", "detector.grid_size=4", "model.width=16"],
    "query2label": ["model=query2label", "detector.grid_size=4"],
    "add_gcn": ["model=add_gcn", *GRID, "model.width=16"],
    "ml_decoder": ["model=ml_decoder", *GRID, "model.width=16"],
    "c_tran": ["model=c_tran", *GRID, "model.width=16"],
    "srn": ["model=srn", *GRID, "model.width=16", "model.map_size=4"],
    "tdrg": ["model=tdrg", *GRID, "model.width=16", "model.hidden=16", "model.map_size=4"],
    "cma": ["model=cma", *GRID, "model.width=16"],
    "tsgcn": ["model=tsgcn", *GRID, "model.width=16"],
    "cnn_rnn": ["model=cnn_rnn", *GRID, "model.width=16", "model.hidden=16"],
    "rnn_attention": ["model=rnn_attention", *GRID, "model.width=16", "model.map_size=4"],
    "pla": ["model=pla", *GRID, "model.width=16", "model.hidden=16"],
    "kd_wsd": ["model=kd_wsd", *GRID, "model.width=16", "model.map_size=4"],
    "mil_max": ["model=mil_max", *GRID],
    "gm_mlic": ["model.widths=[8,8]", *GRID],
}
BOXES = ["model=detector_labels", "graph.m=6"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", RUNS)
def test_train_and_predict(root: Path, name: str):
    overrides = [*SMALL, *RUNS[name], f"instances.root={root}/stores", f"run_dir={root}/{name}"]
    result = run.train(compose("train", overrides))
    assert result["model"]["name"] == name
    assert result["detector"]["name"] == "scenes_tiny-grid4"
    assert 0 < result["test"]["mAP"] <= 100
    assert len(list((root / "stores" / "scenes").glob("t*"))) == 2  # train and test: all models read the same instances

    checkpoint = root / name / "checkpoints" / "best.ckpt"
    content = read_checkpoint(checkpoint)[1]["state_dict"]
    P = conditional_probabilities(torch.from_numpy(Scenes("train", size=24, image_size=96).targets), 22)
    if name == "ml_gcn":
        torch.testing.assert_close(content["model.adjacency"], reweighted_adjacency(P))
    if name == "ssgrl":
        torch.testing.assert_close(content["model.adjacency"], P)
    expected = read_scored_images([root / name / "test.npz"], root / name / "test.npz").scores[0]
    scenes = Scenes("test", size=8, image_size=96)
    found = list(Predictor.from_checkpoint(checkpoint)(scenes.image(i) for i in range(8)))
    ours = torch.tensor([prediction.probabilities.tolist() for prediction in found])
    torch.testing.assert_close(ours, expected.float(), atol=5e-3, rtol=0)
    assert found[0].boxes.shape == (16, 4)
    assert found[0].detected == (None,) * 16


@pytest.mark.parametrize(("name", "count"), [("tdrg", 4), ("cnn_rnn", 1), ("kd_wsd", 2)])
def test_further_losses_are_added(root: Path, name: str, count: int):
    """To the loss, and not to the logged one."""
    config = compose("train", [*SMALL, *RUNS[name], f"run_dir={root}/further_{name}"])
    dataset = run.build.build_dataset(config, "train")
    module, _, _ = run.build_module(config, dataset, run.build.build_detector(config))
    batch = AssignmentBatch(
        torch.randn(3, 16, module.model.instance_dim), torch.rand(3, 16, 4), torch.ones(3, 16, dtype=torch.bool),
        torch.randn(22, 300), y=torch.from_numpy(dataset.targets[:3]),
    )  # fmt: skip
    module.log = lambda *args, **options: None
    module._watch = lambda *args: None
    torch.manual_seed(0)
    loss = module.training_step(batch, 0)
    torch.manual_seed(0)  # dropout
    output = module.model(batch)
    losses = [module.loss(logits, batch.y, None) for logits in (output.logits, *(output.auxiliary or ()))]
    assert len(losses) == count
    assert (output.loss is None) == (name == "tdrg")
    torch.testing.assert_close(loss, sum(losses) + (0 if output.loss is None else output.loss))
    assert losses[0].requires_grad == (name != "cnn_rnn")
    torch.testing.assert_close(module.train_loss.compute(), losses[0].detach())


def test_detector_labels(root: Path):
    overrides = [*SMALL, *BOXES, f"instances.root={root}/stores", f"run_dir={root}/detector"]
    result = run.train(compose("train", overrides))
    assert result["model"]["parameters"] == 2 * 22
    config = compose("train", overrides)
    test = run.split_data(config, run.build.build_dataset(config, "test"), run.build.build_detector(config))
    assert test.store is not None
    uncalibrated = run.build.build_metrics(config, test.dataset.labels)
    uncalibrated.update(torch.from_numpy(detector_scores(test.store)), torch.from_numpy(test.dataset.targets))
    assert result["test"]["mAP"] == pytest.approx(float(uncalibrated.compute()["mAP"]), abs=1e-3)

    checkpoint = root / "detector" / "checkpoints" / "best.ckpt"
    expected = read_scored_images([root / "detector" / "test.npz"], root / "detector" / "test.npz").scores[0]
    photos = [Scenes("test", size=8, image_size=96).image(i) for i in range(8)]
    predictor = Predictor.from_checkpoint(checkpoint)
    shared = Predictor.from_pretrained(predictor.save_pretrained(root / "shared"))
    for model in (predictor, shared):
        found = list(model(photos))
        ours = torch.tensor([prediction.probabilities.tolist() for prediction in found])
        torch.testing.assert_close(ours, expected.float(), atol=5e-3, rtol=0)
        best = found[0].top(1)[0]
        assert found[0].detected[best.instance] == best.label
    with pytest.raises(ConfigError, match=r"it has no network to export\. Save it .*\(format=pretrained\)"):
        export(predictor, root / "network.onnx", "onnx")
    with pytest.raises(ConfigError, match=r"None of the 22 labels .* \(it has none\)"):
        run.train(compose("train", [*SMALL, "model=detector_labels", *GRID, f"run_dir={root}/grid"]))


def test_backbone_is_trained_with_the_model(root: Path):
    overrides = [
        *SMALL, "model=ml_gcn", "detector.grid_size=4", "detector.trainable=all", "instances.online=true",
        "instances.view_size=96", f"run_dir={root}/online",
    ]  # fmt: skip
    config = compose("train", overrides)
    result = run.train(config)
    checkpoint = Path(config.run_dir) / "checkpoints" / "best.ckpt"
    trained = read_checkpoint(checkpoint)[1]["state_dict"]
    fresh = run.build.build_detector(config).state_dict()
    body = {key: tensor for key, tensor in trained.items() if key.startswith("online.detector.body.")}
    assert {key.removeprefix("online.detector.") for key in body} == fresh.keys()
    moved = [key for key, t in body.items() if not torch.equal(t, fresh[key.removeprefix("online.detector.")])]
    assert any(key.endswith("0.weight") for key in moved)
    assert not any("running" in key for key in moved)
    again = run.evaluate(checkpoint, bootstrap=0)
    assert again["metrics"]["mAP"] == pytest.approx(result["test"]["mAP"])
    found = next(Predictor.from_checkpoint(checkpoint)(Scenes("test", size=1, image_size=96).image(0)))
    expected = read_scored_images([root / "online" / "test.npz"], root / "online" / "test.npz").scores[0][0]
    torch.testing.assert_close(torch.from_numpy(found.probabilities), expected.float(), atol=1e-4, rtol=0)
