"""One-stage detectors compared with torchvision's own output, and with independent feature pooling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import get_model, get_model_weights
from torchvision.ops import roi_align

from gm_mlic.detection import build_extractor
from gm_mlic.detection.checkpoints import _COCO, load_into, read_checkpoint, save_checkpoint
from gm_mlic.detection.detectors.torchvision_one_stage import _DETECTORS, OneStageExtractor
from gm_mlic.errors import ConfigError, WeightsError

KINDS = ("fcos", "retinanet", "ssd")


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8, generator=generator), size, mode="bilinear")[0]
        for size in [(64, 64), (90, 70), (50, 120)]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_instances_are_the_top_detections_of_torchvision(kind, small_one_stage, images):
    extractor = small_one_stage(kind)
    for image, found in zip(images, extractor(images, m=20), strict=True):
        with torch.no_grad():
            (theirs,) = extractor.detector([image])
        side = (theirs["boxes"][:, 2:] - theirs["boxes"][:, :2]).amin(dim=1)
        kept = ((theirs["labels"] == 1) | (theirs["labels"] == 3)) & (side > 0.01)
        height, width = image.shape[-2:]
        boxes = theirs["boxes"][kept][:20] / torch.tensor([width, height] * 2)
        torch.testing.assert_close(found.boxes, boxes, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.scores, theirs["scores"][kept][:20], atol=1e-6, rtol=0)
        assert torch.equal(found.detected_labels, theirs["labels"][kept][:20] // 2)
        assert len(found) == 20
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_feature_is_pooled_from_the_pyramid_level_of_the_box(kind, small_one_stage):
    """Boxes below 224 x 224 pixels are on P3."""
    extractor = small_one_stage(kind, min_size=256, max_size=256)
    image = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(1))
    (found,) = extractor([image], m=60)
    ready = extractor.detector.transform([image])[0].tensors
    with torch.no_grad():
        maps = extractor.detector.backbone(ready)
    sides = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(dim=1).sqrt() * 256
    for level, stride, chosen in (("0", 8, sides < 223), ("1", 16, sides > 225)):
        boxes = found.boxes[chosen] * 256
        expected = roi_align(maps[level], [boxes], 7, 1 / stride, 2).mean(dim=(2, 3))
        torch.testing.assert_close(found.features[chosen], expected, atol=1e-4, rtol=1e-3)
    assert (sides < 223).any()


def test_ssd_features_are_pooled_from_the_two_finest_maps(small_one_stage, images):
    extractor = small_one_stage("ssd")
    assert extractor.feature_dim == 12 + 16
    (found,) = extractor(images[:1], m=10)
    with torch.no_grad():
        maps = extractor.detector.backbone(((images[0] - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
                                            / torch.tensor([0.229, 0.224, 0.225])[:, None, None])[None])  # fmt: skip
    parts = [roi_align(maps[key], [found.boxes * 64], 7, 1 / stride, 2) for key, stride in (("0", 8), ("1", 16))]
    torch.testing.assert_close(found.features, torch.cat(parts, dim=1).mean(dim=(2, 3)), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_image_has_the_feature_of_its_box(kind, small_one_stage, images):
    extractor = small_one_stage(kind, score_thresh=1.0)
    (found,) = extractor(images[:1], m=3)
    with torch.no_grad():
        maps = extractor.detector.backbone(extractor.detector.transform(images[:1])[0].tensors)
    whole = [torch.tensor([[0.0, 0, 64, 64]])]
    parts = [roi_align(maps["0"], whole, 7, 1 / 8, 2), roi_align(maps["1"], whole, 7, 1 / 16, 2)]
    expected = torch.cat(parts if kind == "ssd" else parts[:1], dim=1).mean(dim=(2, 3))
    torch.testing.assert_close(found.features, expected, atol=1e-4, rtol=1e-3)


def test_number_of_labels_must_fit(small_one_stage):
    with pytest.raises(ConfigError, match="has 3 classes, but 1 labels"):
        OneStageExtractor(small_one_stage("ssd").detector, ["cat"], "other")


def test_names_and_coco_weights_are_torchvisions():
    assert set(_DETECTORS) < set(_COCO)
    for name in _DETECTORS:
        assert _COCO[name] is get_model_weights(name).COCO_V1
        assert tuple(_COCO[name].meta["categories"]) == read_checkpoint(name, None, None).categories


def test_settings_of_ssdlite(tmp_path):
    """The only detector of them that is small; its state_dict is saved, read and checked."""
    name = "ssdlite320_mobilenet_v3_large"
    extractor = build_extractor(name, labels=("cat", "dog"), seed=3)
    assert (extractor.detector.score_thresh, extractor.detector.nms_thresh) == (0.001, 0.55)
    assert extractor.detector.topk_candidates == 300
    assert extractor.feature_dim == 1152
    (found,) = extractor([torch.rand(3, 50, 40)], m=4)
    assert found.features.shape == (4, 1152)
    torch.save(extractor.detector.state_dict(), tmp_path / "w.pth")
    loaded = build_extractor(name, labels=("cat", "dog"), weights=tmp_path / "w.pth")
    assert loaded.fingerprint == extractor.fingerprint
    assert read_checkpoint(name, tmp_path / "w.pth", None).categories[1:] == ("class 1", "class 2")
    assert build_extractor(name, labels=("cat", "dog"), seed=4).fingerprint != extractor.fingerprint
    assert build_extractor(name, labels=("cat", "dog"), seed=3, nms_threshold=0.5).fingerprint != extractor.fingerprint


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "cannot be read"),
        (b"\x80\x02}q\x00.", "w.pth"),
        ({"linear.weight": torch.zeros(2, 2)}, "expected a torchvision ssdlite320_mobilenet_v3_large"),
        ({"head.classification_head.module_list.0.1.weight": torch.zeros(18, 2)}, "missing"),
    ],
)
def test_weights_that_do_not_fit(content, named, tmp_path):
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=named) as caught:
        build_extractor("ssdlite320_mobilenet_v3_large", weights=path, labels=("cat", "dog"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"weights": "scenes"}, "requires `name='scenes_tiny'`"),
        ({"min_size": 8}, "min_size must be an integer of at least 32"),
        ({"score_threshold": 1.5}, "score_threshold must be a number from 0 to 1; got 1.5"),
        ({"nms_threshold": -0.5}, "nms_threshold must be a number from 0 to 1; got -0.5"),
    ],
)
def test_invalid_settings(settings, named):
    with pytest.raises(ConfigError, match=named) as caught:
        build_extractor("fcos_resnet50_fpn", **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", _DETECTORS)
def test_coco_weights_equal_torchvisions_model(name, monkeypatch, tmp_path):
    """Torchvision reads the same file, with its own batch norm."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    tensors = get_model(name, weights=None, weights_backbone=None, num_classes=91).state_dict()
    frozen = name in ("retinanet_resnet50_fpn", "fcos_resnet50_fpn")
    if frozen:
        tensors = {key: t for key, t in tensors.items() if not key.endswith("num_batches_tracked")}
    for key, t in tensors.items():
        if key.endswith("running_var") and frozen:
            t.uniform_(1e-5, 3e-5)  # so small that eps matters
            tensors[key.replace("running_var", "weight")].uniform_(1e-3, 2e-3)
    torch.save(tensors, tmp_path / "hub" / "checkpoints" / Path(_COCO[name].url).name)
    size = {} if "ssd" in name else {"min_size": 96, "max_size": 160}
    theirs = get_model(name, weights="COCO_V1", **size).eval()
    ours = build_extractor(name, weights="coco", score_threshold=0.0, **size)
    assert len(ours.labels) == 80
    side = 320 if "ssd" in name else 96
    image = torch.rand(1, 3, side, side)
    with torch.no_grad():
        expected = theirs.head(list(theirs.backbone(image).values()))
        found = ours.detector.head(list(ours.detector.backbone(image).values()))
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-2, atol=1e-3)
    assert 1 <= len(ours([image[0]], m=5)[0]) <= 5


def test_checkpoint_of_gm_mlic(small_one_stage, tmp_path):
    """A .safetensors file with labels, as of Faster R-CNN."""
    detector = small_one_stage("ssd").detector
    record = {"arch": "ssd300_vgg16", "labels": ["a", "b", "c"], "min_size": 300, "max_size": 300}
    save_checkpoint(tmp_path / "w.safetensors", detector.state_dict(), record)
    checkpoint = read_checkpoint("ssd300_vgg16", tmp_path / "w.safetensors", None)
    assert checkpoint.categories[1:] == ("a", "b", "c")
    load_into(small_one_stage("ssd", seed=1).detector, checkpoint, "ssd300_vgg16")
