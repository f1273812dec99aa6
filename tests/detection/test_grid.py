"""Grid extractor compared with the backbone's map and with itself in other batches; weights files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet101
from torchvision.models.resnet import Bottleneck, ResNet

from gm_mlic.datasets import Scenes
from gm_mlic.datasets.images import to_tensor
from gm_mlic.detection import GridExtractor, InstanceExtractor, build_extractor, checkpoints, grid
from gm_mlic.detection.torchvision_detector import build_detector
from gm_mlic.errors import ConfigError, WeightsError


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    scenes = Scenes("test", size=3, seed=3)
    return [to_tensor(scenes.image(i)) for i in range(3)]


@pytest.fixture(scope="module")
def extractor() -> GridExtractor:
    return build_extractor("scenes_tiny", weights="scenes", grid_size=10)


def small_resnet(weights: None = None) -> ResNet:
    """A ResNet with one narrow block in each stage, and the widths of ResNet-101 after them."""
    return ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=4)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A random small network, built instead of ResNet-101, whose files are large."""
    monkeypatch.setattr(grid, "resnet101", small_resnet)
    return small_resnet().eval()


def test_grid_implements_the_protocol(extractor, images):
    assert isinstance(extractor, InstanceExtractor)
    assert (extractor.name, extractor.labels, extractor.feature_dim) == ("scenes_tiny-grid10", (), 48)
    for found in extractor(images, m=100):
        assert found.boxes.shape == (100, 4)
        assert found.features.shape == (100, 48)
        assert found.boxes.dtype == found.scores.dtype == found.features.dtype == torch.float32
        assert found.scores.tolist() == [1.0] * 100
        assert found.detected_labels.tolist() == [-1] * 100
        assert not found.features.requires_grad
    assert extractor([], m=100) == []
    assert len(extractor(images[:1], m=150)[0]) == 100
    assert repr(extractor) == "GridExtractor('scenes_tiny-grid10', grid_size=10, size=160)"


def test_cells_are_averages_of_the_box_heads_map(extractor, images):
    detector = build_extractor("scenes_tiny", weights="scenes").detector
    for image, found in zip(images, extractor(images, m=100), strict=True):
        with torch.no_grad():
            fine = detector.backbone(((image - 0.5) / 0.25)[None])["fine"][0]
        assert fine.shape == (48, 40, 40)
        for i, box in enumerate(found.boxes):
            row, column = divmod(i, 10)
            torch.testing.assert_close(box, torch.tensor([column, row, column + 1, row + 1]) / 10)
            x1, y1, x2, y2 = (40 * box).round().int().tolist()
            torch.testing.assert_close(found.features[i], fine[:, y1:y2, x1:x2].mean(dim=(1, 2)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", ["fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn"])
def test_feature_pyramid_uses_the_last_map_of_the_body(arch):
    detector = build_detector(arch, 3, min_size=64).eval()
    extractor = GridExtractor.of_detector(detector, 2, arch)
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        last = list(detector.backbone.body(detector.transform.normalize(image)[None]).values())[-1]
    assert extractor.feature_dim == last.shape[1] == {"fasterrcnn_resnet50_fpn": 2048}.get(arch, 960)
    expected = last[0].flatten(1).T if last.shape[-1] == 2 else None
    assert expected is not None
    torch.testing.assert_close(extractor([image], m=4)[0].features, expected, atol=1e-4, rtol=1e-4)


def test_images_are_resized_to_squares(extractor, images):
    mixed = [images[0], images[1][:, :100], images[2][:, :, 30:150]]
    together = extractor(mixed, m=100)
    for image, found in zip(mixed, together, strict=True):
        torch.testing.assert_close(extractor([image], m=100)[0].features, found.features, atol=1e-4, rtol=1e-4)
        square = nn.functional.interpolate(image[None], (160, 160), mode="bilinear")[0]
        torch.testing.assert_close(extractor([square], m=100)[0].features, found.features, atol=1e-4, rtol=1e-4)


def test_fingerprint_depends_on_weights_size_and_cells():
    def fingerprint(**changes) -> str:
        return build_extractor(
            "scenes_tiny", **({"labels": ("a", "b"), "seed": 1, "grid_size": 4} | changes)
        ).fingerprint

    first = fingerprint()
    changes = [{"seed": 2}, {"min_size": 192}, {"grid_size": 5}, {"grid_size": None}]
    assert first == fingerprint()
    # Box settings have no effect.
    assert first == fingerprint(score_threshold=0.2, max_size=500)
    assert len({first, *(fingerprint(**change) for change in changes)}) == len(changes) + 1
    extractor = build_extractor("scenes_tiny", grid_size=4)
    before = extractor.fingerprint
    with torch.no_grad():
        next(extractor.body.parameters()).add_(1)
    assert extractor.fingerprint != before


@pytest.mark.parametrize("trainable", ["none", "all"])
def test_gradients_reach_trainable_parts(images, trainable):
    extractor = build_extractor("scenes_tiny", weights="scenes", grid_size=4, trainable=trainable)
    extractor.train()
    assert not extractor.body.training
    found = extractor(images[:2], m=16)
    assert found[0].features.requires_grad == (trainable == "all")
    if trainable == "all":
        sum(instances.features.sum() for instances in found).backward()
        assert all(p.grad is not None for p in extractor.parameters())
    else:
        assert not any(p.requires_grad for p in extractor.parameters())
    with torch.no_grad():
        assert not extractor(images[:1], m=16)[0].features.requires_grad


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"grid_size": 41}, "grid_size is 41: the feature map of an image of 160 pixels has 40 x 40 cells"),
        ({"grid_size": 0}, "grid_size must be an integer of at least 1, or None; got 0"),
        ({"grid_size": 4, "trainable": "box_head"}, "trainable is 'box_head': with `grid_size`"),
        ({"name": "resnet18", "grid_size": 7}, "Unknown detector 'resnet18'"),
    ],
)
def test_invalid_arguments(settings, named):
    with pytest.raises(ConfigError, match=named) as caught:
        build_extractor(**({"name": "scenes_tiny"} | settings))
    assert "\n" not in str(caught.value)


def test_m_less_than_number_of_cells_is_refused(extractor, images):
    with pytest.raises(ConfigError, match=r"^m is 99, .* has 100 cells: set it to 100"):
        extractor(images, m=99)


# ResNet-101


@pytest.mark.parametrize(
    ("build", "save", "file"), [(resnet101, torch.save, "r.pth"), (small_resnet, save_file, "r.safetensors")]
)
def test_resnet101_equals_torchvision_without_last_layers(tmp_path: Path, monkeypatch, build, save, file):
    monkeypatch.setattr(grid, "resnet101", build)
    random_resnet = build().eval()
    save(random_resnet.state_dict(), tmp_path / file)
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    pooled: list[torch.Tensor] = []
    hook = random_resnet.avgpool.register_forward_hook(lambda module, inputs, output: pooled.append(output))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        random_resnet(((image - mean[:, None, None]) / std[:, None, None])[None])
    hook.remove()
    extractor = build_extractor("resnet101", weights=tmp_path / file, grid_size=1, min_size=64)
    assert (extractor.name, extractor.feature_dim) == ("resnet101-grid1", 2048)
    torch.testing.assert_close(extractor([image], m=1)[0].features, pooled[0].flatten(1), atol=1e-4, rtol=1e-4)


def test_random_weights_use_only_the_seed(small: nn.Module):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_extractor("resnet101", grid_size=2, min_size=64, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_imagenet_weights_are_verified_by_hash(tmp_path: Path, monkeypatch, small: nn.Module):
    torch.save(small.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "w.pth").read_bytes()
    served = tmp_path / f"r-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    served.write_bytes(content)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(checkpoints, "_IMAGENET", SimpleNamespace(url=served.as_uri()))
    extractor = build_extractor("resnet101", weights="imagenet", grid_size=2, min_size=64)
    assert torch.equal(extractor.body.state_dict()["conv1.weight"], small.state_dict()["conv1.weight"])
    wrong = tmp_path / "r-00000000.pth"
    wrong.write_bytes(b"something else")
    monkeypatch.setattr(checkpoints, "_IMAGENET", SimpleNamespace(url=wrong.as_uri()))
    with pytest.raises(WeightsError, match=r"could not be downloaded .*invalid hash value"):
        build_extractor("resnet101", weights="imagenet", grid_size=2)


def test_invalid_weights(tmp_path: Path, small: nn.Module):
    tensors = {key: t for key, t in small.state_dict().items() if key != "layer3.0.bn1.bias"}
    torch.save(tensors, tmp_path / "short.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    for weights, named in (
        (tmp_path / "short.pt", "missing layer3.0.bn1.bias"),
        (tmp_path / "broken.safetensors", "cannot be read"),
        (tmp_path / "none.pt", "does not exist"),
        ("coco", "expected null, imagenet, or a path"),
    ):
        with pytest.raises(WeightsError, match=named) as caught:
            build_extractor("resnet101", weights=weights, grid_size=2)
        assert "\n" not in str(caught.value)
