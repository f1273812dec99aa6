"""Rules of `InstanceExtractor`, for every kind of detector with boxes."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch

from gm_mlic.detection import InstanceExtractor, Instances, build_extractor
from gm_mlic.errors import ConfigError

ONE_STAGE = ("fcos", "retinanet", "ssd")
TRANSFORMERS = (
    "conditional_detr", "d_fine", "dab-detr", "deformable_detr", "detr", "rt_detr", "rt_detr_v2", "yolos",
)  # fmt: skip
#: Height and width; the last three have the same size after resizing in some detectors.
SIZES = [(1, 1), (1, 500), (500, 1), (31, 17), (64, 64), (128, 128), (64, 64)]
Make = Callable[..., InstanceExtractor]


@pytest.fixture(scope="module", params=["scenes_tiny", *ONE_STAGE, *TRANSFORMERS])
def make(request) -> Make:
    """Factory of an extractor, with a setting of its score threshold."""
    kind = request.param
    if kind in ONE_STAGE:
        small = request.getfixturevalue("small_one_stage")
        return lambda threshold=0.0: small(kind, score_thresh=threshold)
    if kind in TRANSFORMERS:
        folder = request.getfixturevalue("transformer_folder")(kind)
        return lambda threshold=0.0: build_extractor("transformers", weights=folder, score_threshold=threshold)
    return lambda threshold=0.01: build_extractor("scenes_tiny", weights="scenes", score_threshold=threshold)


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    """Images of odd sizes; the last one has equal colors."""
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6, generator=generator), size, mode="bilinear")[0]
        for size in SIZES
    ]
    made[-1] = made[-1].mean(dim=0, keepdim=True).expand(3, -1, -1)  # a gray photo
    return [(image * 255).round() / 255 for image in made]


def same(one: Instances, other: Instances, tolerance: float = 1e-4) -> None:
    assert len(one) == len(other)
    torch.testing.assert_close(one.boxes, other.boxes, atol=tolerance, rtol=0)
    torch.testing.assert_close(one.scores, other.scores, atol=tolerance, rtol=0)
    assert torch.equal(one.detected_labels, other.detected_labels)
    torch.testing.assert_close(one.features, other.features, atol=10 * tolerance, rtol=10 * tolerance)


def test_rules(make, images):
    """Types, ranges and order; prefixes; independence of the batch and of earlier images; no use of randomness."""
    extractor = make()
    assert isinstance(extractor, InstanceExtractor)
    assert "/" not in extractor.name
    assert extractor([], m=3) == []
    before = extractor.fingerprint
    many = extractor(images, m=9)
    for found in many:
        assert 1 <= len(found) <= 9
        assert found.boxes.shape == (len(found), 4)
        assert found.features.shape == (len(found), extractor.feature_dim)
        assert found.boxes.dtype == found.scores.dtype == found.features.dtype == torch.float32
        assert found.detected_labels.dtype == torch.int64
        assert found.boxes.min() >= 0
        assert found.boxes.max() <= 1
        assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
        assert (found.scores.diff() <= 0).all()
        assert found.scores.min() >= 0
        assert found.scores.max() <= 1
        assert found.detected_labels.min() >= -1
        assert found.detected_labels.max() < len(extractor.labels)
        assert found.features.isfinite().all()
        assert not found.features.requires_grad
    assert max(map(len, many)) > 3
    assert not torch.allclose(many[4].features[:1], many[5].features[:1])  # it depends on the image
    for few, all_of in zip(extractor(images, m=3), many, strict=True):
        same(few, all_of.top(3))
    extractor.train()
    for image, found in zip(reversed(images), reversed(many), strict=True):
        torch.manual_seed(99)
        (alone,) = extractor([image], m=9)
        if min(image.shape[1:]) > 1:
            same(alone, found)
        else:  # equal rows or columns: equal scores, whose order depends on rounding
            torch.testing.assert_close(alone.scores, found.scores, atol=1e-4, rtol=0)
    assert extractor.fingerprint == before


def test_no_detections_give_the_whole_image(make, images):
    found = make(threshold=1.0)(images, m=5)
    for instances in found:
        assert instances.boxes.tolist() == [[0, 0, 1, 1]]
        assert instances.scores.tolist() == [0]
        assert instances.detected_labels.tolist() == [-1]
        assert instances.features.isfinite().all()
    assert not torch.allclose(found[4].features, found[5].features)


def test_fingerprint_and_copies(make, images):
    extractor = make()
    first = extractor.fingerprint
    assert make().fingerprint == first
    assert make(threshold=0.3).fingerprint != first
    copy = pickle.loads(pickle.dumps(extractor)).to(torch.device("cpu"))
    assert copy.fingerprint == first
    same(copy(images[3:5], m=4)[1], extractor(images[3:5], m=4)[1])
    with torch.no_grad():
        next(p for p in copy.parameters() if p.dim() > 1).view(-1)[0] += 1
    assert copy.fingerprint != first
    with pytest.raises(ConfigError, match="m must be 1 or more, got 0"):
        extractor(images[:1], m=0)
