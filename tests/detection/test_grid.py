from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet101_Weights, resnet101

from gm_mlic import Scenes, build_extractor
from gm_mlic.datasets.images import to_tensor
from gm_mlic.detection import GridExtractor, save_detector
from gm_mlic.errors import ConfigError, WeightsError

SCENES = Scenes("test", size=3)
IMAGES = [to_tensor(SCENES.image(i)) for i in range(3)]


def grid(**settings) -> GridExtractor:
    extractor = build_extractor("scenes_tiny", **{"weights": "scenes", "grid": 4, **settings})
    assert isinstance(extractor, GridExtractor)
    return extractor


def test_cells_against_the_map_itself():
    extractor = grid()
    found = extractor(IMAGES, 16)
    detector = extractor.detector
    for image, instances in zip(IMAGES, found, strict=True):
        coarse = detector.backbone(((image - 0.5) / 0.25)[None])["coarse"][0]  # (48, 20, 20): cells of 5 x 5
        assert instances.features.shape == (16, extractor.feature_dim) == (16, 48)
        for row in range(4):
            for column in range(4):
                k = 4 * row + column
                cell = coarse[:, 5 * row : 5 * row + 5, 5 * column : 5 * column + 5].mean(dim=(1, 2))
                torch.testing.assert_close(instances.features[k], cell, rtol=1e-4, atol=1e-5)
                box = [column / 4, row / 4, (column + 1) / 4, (row + 1) / 4]
                assert instances.boxes[k].tolist() == pytest.approx(box)
        assert instances.scores.tolist() == [1.0] * 16
        assert instances.detected_labels.tolist() == [-1] * 16
        assert not instances.features.requires_grad


def test_images_of_any_size_alone_or_together():
    extractor = grid()
    images = [torch.rand(3, 50, 80), torch.rand(3, 300, 200), IMAGES[0]]
    together = extractor(images, 16)
    for image, instances in zip(images, together, strict=True):
        (alone,) = extractor([image], 16)
        torch.testing.assert_close(alone.features, instances.features, rtol=1e-4, atol=1e-5)


def test_the_fingerprint_tells_grids_apart(tmp_path: Path):
    prints = {
        grid().fingerprint,
        grid(grid=5).fingerprint,
        grid(min_size=192).fingerprint,
        grid(weights=None).fingerprint,
    }
    prints.add(build_extractor("scenes_tiny", weights="scenes").fingerprint)
    assert len(prints) == 5
    assert grid().fingerprint == grid().fingerprint
    save_detector(grid(), tmp_path / "w.safetensors", "scenes_tiny")
    assert grid(weights=tmp_path / "w.safetensors").fingerprint == grid().fingerprint


def test_training_reaches_the_backbone_alone():
    extractor = grid(trainable="all")
    extractor(IMAGES, 16)[0].features.sum().backward()
    reached = {name for name, p in extractor.named_parameters() if p.grad is not None}
    assert reached
    assert all(name.startswith(("detector.backbone", "body")) for name in reached)
    assert {name for name, p in extractor.named_parameters() if p.requires_grad} == reached
    with pytest.raises(ConfigError, match="a grid has no boxes"):
        grid(trainable="box_head")


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match=r"makes 16 instances of an image, not 10: set graph\.m=16"):
        grid()(IMAGES, 10)
    with pytest.raises(ConfigError, match=r"detector\.grid is 0"):
        grid(grid=0)
    with pytest.raises(ConfigError, match="gives a backbone only"):
        build_extractor("fasterrcnn_resnet101_fpn", weights="imagenet")
    with pytest.raises(ConfigError, match="imagenet exists for fasterrcnn_resnet101_fpn"):
        grid(weights="imagenet")


def test_resnet101_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From a file where torch.hub keeps it, as the download leaves it."""
    torch.manual_seed(0)
    model = resnet101().eval()
    name = Path(ResNet101_Weights.IMAGENET1K_V2.url).name
    (tmp_path / "checkpoints").mkdir()
    torch.save(model.state_dict(), tmp_path / "checkpoints" / name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    extractor = build_extractor("fasterrcnn_resnet101_fpn", weights="imagenet", grid=2, min_size=64)
    assert extractor.feature_dim == 2048
    assert extractor.name == "fasterrcnn_resnet101_fpn-grid2"
    image = torch.rand(3, 64, 64)
    (found,) = extractor([image], 4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        x = ((image - mean[:, None, None]) / std[:, None, None])[None]
        x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        x = model.layer4(model.layer3(model.layer2(model.layer1(x))))  # (1, 2048, 2, 2)
    torch.testing.assert_close(found.features, x[0].flatten(1).T, rtol=1e-4, atol=1e-5)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "checkpoints" / name)
    with pytest.raises(WeightsError, match="holds something else"):
        build_extractor("fasterrcnn_resnet101_fpn", weights="imagenet", grid=2)
