"""Extractor compared with torchvision, with independent feature pooling, and with itself in other batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.resnet import resnet50
from torchvision.ops import box_iou, roi_align
from torchvision.ops.misc import FrozenBatchNorm2d

from gm_mlic.datasets import Scenes
from gm_mlic.datasets.images import to_tensor
from gm_mlic.detection import ARCHITECTURES, FasterRCNNExtractor, InstanceExtractor, build_extractor
from gm_mlic.errors import ConfigError

SCENES = 12


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes("test", size=SCENES, seed=3)


@pytest.fixture(scope="module")
def images(scenes: Scenes) -> list[torch.Tensor]:
    return [to_tensor(scenes.image(i)) for i in range(SCENES)]


@pytest.fixture(scope="module")
def extractor() -> FasterRCNNExtractor:
    return build_extractor("scenes_tiny", weights="scenes")


def _bare(extractor: FasterRCNNExtractor, image: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return extractor.detector([image])[0]


def _same(one, other, atol: float = 1e-4) -> None:
    assert len(one) == len(other)
    torch.testing.assert_close(one.boxes, other.boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=0)
    assert torch.equal(one.detected_labels, other.detected_labels)
    torch.testing.assert_close(one.features, other.features, atol=atol, rtol=1e-4)


def test_built_in_detector_implements_the_protocol(extractor, scenes, images):
    assert isinstance(extractor, InstanceExtractor)
    assert extractor.labels == scenes.labels
    for found in extractor(images, m=10):
        assert 1 <= len(found) <= 10
        assert found.boxes.shape == (len(found), 4)
        assert found.boxes.dtype == found.scores.dtype == found.features.dtype == torch.float32
        assert found.detected_labels.dtype == torch.int64
        assert found.features.shape == (len(found), extractor.feature_dim)
        assert found.boxes.min() >= 0
        assert found.boxes.max() <= 1
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
        assert (found.scores.diff() <= 0).all()
        assert found.scores.min() > 0.05
        assert found.detected_labels.min() >= 0
        assert found.detected_labels.max() < len(extractor.labels)
        assert not found.features.requires_grad


def test_instances_are_the_top_torchvision_detections(extractor, images):
    for image, found in zip(images, extractor(images, m=6), strict=True):
        theirs = _bare(extractor, image)
        order = theirs["scores"].argsort(descending=True, stable=True)[:6]
        torch.testing.assert_close(found.boxes * 160, theirs["boxes"][order], atol=1e-3, rtol=0)
        torch.testing.assert_close(found.scores, theirs["scores"][order], atol=1e-5, rtol=0)
        assert torch.equal(found.detected_labels, theirs["labels"][order] - 1)


def test_boxes_and_features_of_a_resized_image(extractor):
    image = torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(0))
    detector = build_extractor("scenes_tiny", weights="scenes", score_threshold=0.0).detector
    extractor = FasterRCNNExtractor(detector, extractor.labels, "oblong")
    found = extractor([image], m=5)[0]
    theirs = _bare(extractor, image)["boxes"][:5] / torch.tensor([120, 90, 120, 90])
    torch.testing.assert_close(found.boxes, theirs, atol=1e-5, rtol=0)


def test_features_equal_independent_pooling_at_final_boxes(extractor, images):
    head = extractor.detector.roi_heads.box_head
    for image, found in zip(images[:3], extractor(images[:3], m=8), strict=True):
        fine = extractor.detector.backbone(((image - 0.5) / 0.25)[None])["fine"]
        pooled = roi_align(fine, [found.boxes * 160], output_size=7, spatial_scale=1 / 4, sampling_ratio=2)
        expected = torch.relu(head.fc7(torch.relu(head.fc6(pooled.flatten(1)))))
        torch.testing.assert_close(found.features, expected, atol=1e-3, rtol=1e-3)


def test_smaller_m_gives_the_first_instances(extractor, images):
    for few, many in zip(extractor(images, m=3), extractor(images, m=9), strict=True):
        _same(few, many.top(3))


def test_batch_equals_single_images(extractor, images):
    mixed = [images[0], images[1][:, :100], images[2][:, :, 30:150], images[3], images[4][:, :100]]
    for image, found in zip(mixed, extractor(mixed, m=10), strict=True):
        _same(extractor([image], m=10)[0], found)


def test_output_is_deterministic_even_in_training_mode(extractor, images):
    first = extractor(images[:4], m=5)
    extractor.train()
    torch.manual_seed(99)
    for a, b in zip(first, extractor(images[:4], m=5), strict=True):
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.features, b.features)


def test_no_detections_give_the_whole_image(images):
    strict = build_extractor("scenes_tiny", weights="scenes", score_threshold=1.0)
    found = strict(images[:2], m=5)
    for image, instances in zip(images[:2], found, strict=True):
        assert instances.boxes.tolist() == [[0, 0, 1, 1]]
        assert instances.scores.tolist() == [0]
        assert instances.detected_labels.tolist() == [-1]
        fine = strict.detector.backbone(((image - 0.5) / 0.25)[None])["fine"]
        whole = roi_align(fine, [torch.tensor([[0.0, 0, 160, 160]])], 7, 1 / 4, 2)
        expected = strict.detector.roi_heads.box_head(whole)
        torch.testing.assert_close(instances.features, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [(2, 3000), (2000, 1), (1, 1), (1, 267)])
def test_narrow_strip(extractor, size):
    """Without special handling, resizing would remove the shorter side."""
    (found,) = extractor([torch.full((3, *size), 0.4)], m=5)
    assert 1 <= len(found) <= 5
    assert ((found.boxes >= 0) & (found.boxes <= 1)).all()
    assert found.features.isfinite().all()


def test_narrow_strip_does_not_change_later_images(images):
    """The pooling infers the strides of the maps from its first image."""
    first, second = (build_extractor("scenes_tiny", weights="scenes") for _ in range(2))
    second([torch.full((3, 2, 3000), 0.4)], m=5)
    _same(first(images[:1], m=5)[0], second(images[:1], m=5)[0], atol=0)


def test_empty_batch(extractor):
    assert extractor([], m=3) == []


def test_built_in_weights_detect_objects_and_looks(extractor, scenes, images):
    look_of = dict(zip(scenes.labels, scenes._look_of.tolist(), strict=True))
    looks = [set(scenes._look_of[scenes.boxes(i).labels].tolist()) for i in range(SCENES)]
    objects = hits = right = 0
    for i, found in enumerate(extractor(images, m=16)):
        annotated = scenes.boxes(i)
        overlap = box_iou(annotated.boxes / 160, found.boxes)
        for row, label in zip(overlap, annotated.labels.tolist(), strict=True):
            objects += 1
            hits += int(row.max() >= 0.5)
            names = {scenes.labels[k] for k in found.detected_labels[row >= 0.5].tolist()}
            right += scenes.labels[label] in names or look_of[scenes.labels[label]] in {look_of.get(n) for n in names}
    assert sum(map(len, looks)) > 20
    assert hits / objects > 0.95
    assert right / objects > 0.95


def test_fingerprint_depends_on_weights_and_settings():
    def fingerprint(**changes) -> str:
        return build_extractor("scenes_tiny", **({"labels": ("a", "b"), "seed": 1} | changes)).fingerprint

    first = fingerprint()
    changes = [
        {"seed": 2},
        {"labels": ("a", "c")},
        {"min_size": 192},
        {"max_size": 500},
        {"score_threshold": 0.1},
        {"nms_threshold": 0.4},
    ]
    assert first == fingerprint()
    assert len({first, *(fingerprint(**change) for change in changes)}) == len(changes) + 1


def test_fingerprint_follows_in_place_changes():
    extractor = build_extractor("scenes_tiny", labels=("a",))
    before = extractor.fingerprint
    state = {key: tensor.clone() for key, tensor in extractor.state_dict().items()}
    with torch.no_grad():
        extractor.detector.roi_heads.box_head.fc7.bias[3] += 1
    assert extractor.fingerprint != before
    extractor.load_state_dict(state)
    assert extractor.fingerprint == before


def test_random_weights_use_only_the_seed():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_extractor("scenes_tiny", labels=("a",), seed=8)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("trainable", "head", "backbone"), [("none", False, False), ("box_head", True, False), ("all", True, True)]
)
def test_gradients_reach_trainable_parts(images, trainable, head, backbone):
    extractor = build_extractor("scenes_tiny", weights="scenes", trainable=trainable)
    found = extractor(images[:2], m=4)
    assert found[0].features.requires_grad == head
    assert not found[0].boxes.requires_grad
    assert not found[0].scores.requires_grad
    if head:
        sum(instances.features.sum() for instances in found).backward()
    with_gradient = {name for name, p in extractor.detector.named_parameters() if p.grad is not None}
    trained = {name for name, p in extractor.detector.named_parameters() if p.requires_grad}
    assert any("box_head" in name for name in with_gradient) == head
    assert any("backbone.fine" in name for name in with_gradient) == backbone
    assert not any("rpn" in name or "box_predictor" in name for name in trained)
    with torch.no_grad():
        assert not extractor(images[:1], m=4)[0].features.requires_grad


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"name": "yolo"}, "Unknown detector 'yolo'"),
        ({"trainable": "rpn"}, "trainable must be one of none, box_head, all; got 'rpn'"),
        ({"min_size": 8}, "min_size must be an integer of at least 32"),
        ({"min_size": 300, "max_size": 200}, "`max_size` 200"),
        ({"score_threshold": 1.5}, "score_threshold must be a number from 0 to 1; got 1.5"),
        ({"nms_threshold": -0.1}, "nms_threshold must be a number from 0 to 1; got -0.1"),
    ],
)
def test_invalid_arguments(settings, named):
    with pytest.raises(ConfigError, match=named) as caught:
        build_extractor(**({"name": "scenes_tiny", "labels": ("a",)} | settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("m", [0, -3])
def test_m_must_be_positive(extractor, images, m):
    with pytest.raises(ConfigError, match=f"m must be 1 or more, got {m}"):
        extractor(images[:1], m=m)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [name for name in ARCHITECTURES if name != "scenes_tiny"])
def test_torchvisions_detectors(arch):
    extractor = build_extractor(arch, min_size=96, score_threshold=0.0)
    assert isinstance(extractor, InstanceExtractor)
    assert len(extractor.labels) == 80
    assert extractor.labels[:2] == ("person", "bicycle")
    assert extractor.feature_dim == 1024
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 100, 130, generator=generator), torch.rand(3, 120, 96, generator=generator)]
    for image, found in zip(images, extractor(images, m=5), strict=True):
        assert found.features.shape == (len(found), 1024)
        _same(extractor([image], m=5)[0], found, atol=1e-3)


def test_coco_weights_equal_torchvisions_model(monkeypatch, tmp_path):
    """Torchvision's model has frozen batch norm with eps = 0, and classes that are not labels."""
    torch.manual_seed(0)
    backbone = _resnet_fpn_extractor(resnet50(norm_layer=FrozenBatchNorm2d), 3)
    theirs = FasterRCNN(backbone, num_classes=91, min_size=64, max_size=107).eval()
    for module in theirs.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
            module.running_var.uniform_(1e-5, 3e-5)  # so small that eps matters
            module.weight.uniform_(1e-3, 2e-3)
    predictor = theirs.roi_heads.box_predictor
    with torch.no_grad():
        predictor.cls_score.weight.zero_()
        predictor.cls_score.bias.zero_()
        predictor.cls_score.bias[12] = 9.0  # N/A
        predictor.cls_score.bias[13] = 7.0  # stop sign, the 12th label
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    name = Path(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url).name
    torch.save(theirs.state_dict(), tmp_path / "hub" / "checkpoints" / name, _use_new_zipfile_serialization=False)
    ours = build_extractor("fasterrcnn_resnet50_fpn", weights="coco", min_size=64)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for level, expected in theirs.backbone(image).items():
            torch.testing.assert_close(ours.detector.backbone(image)[level], expected, rtol=1e-2, atol=1e-4)
    found = ours([image[0]], m=5)[0]
    assert {ours.labels[k] for k in found.detected_labels.tolist()} == {"stop sign"}
