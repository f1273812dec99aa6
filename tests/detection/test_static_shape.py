from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gm_mlic import Scenes, build_extractor
from gm_mlic.datasets.images import to_tensor
from gm_mlic.detection import FixedDetector

SCENES = Scenes("test", size=5)


def compare(extractor, images: list[Tensor], m: int) -> list[int]:
    """Compare every image; returns the number of instances of each."""
    fixed = FixedDetector(extractor, tuple(images[0].shape[1:]), m).eval()
    counts = []
    with torch.no_grad():
        for image in images:
            (expected,) = extractor([image], m)
            features, boxes, mask, scores, detected_labels = fixed(image)
            n = len(expected)
            assert features.shape[0] == boxes.shape[0] == len(scores) == m
            assert mask.tolist() == [True] * n + [False] * (m - n)
            torch.testing.assert_close(features[:n], expected.features, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(boxes[:n], expected.boxes, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(scores[:n], expected.scores, rtol=1e-4, atol=1e-5)
            assert detected_labels.tolist() == [*expected.detected_labels.tolist(), *[-1] * (m - n)]
            assert not features[n:].any()
            assert not boxes[n:].any()
            counts.append(n)
    return counts


@pytest.mark.parametrize("m", [3, 12])
@pytest.mark.parametrize("size", [(160, 160), (96, 200), (300, 250)])
def test_equals_the_extractor(size: tuple[int, int], m: int):
    """Images that are enlarged, reduced, padded, or unchanged."""
    extractor = build_extractor("scenes_tiny", weights="scenes", score_threshold=0.1)
    images = [to_tensor(SCENES.image(i).resize(size[::-1])) for i in range(5)]
    counts = compare(extractor, images, m)
    assert len(set(counts)) > 1 or m == 3


def test_image_without_detections():
    extractor = build_extractor("scenes_tiny", weights="scenes")
    assert compare(extractor, [torch.zeros(3, 160, 160)], 5) == [1]


def test_feature_pyramid_levels():
    """Each box is pooled from the level for its size."""
    extractor = build_extractor("fasterrcnn_resnet50_fpn", labels=["a", "b"], min_size=256, max_size=320, seed=1)
    rpn = extractor.detector.rpn
    rpn._pre_nms_top_n = rpn._post_nms_top_n = {"training": 60, "testing": 60}  # instead of 1000, for speed
    images = [torch.from_numpy(np.random.default_rng(0).random((3, 256, 320), dtype=np.float32))]
    assert compare(extractor, images, 20) == [20]
    pool = extractor.detector.roi_heads.box_roi_pool
    (found,) = extractor(images, 20)
    assert len(set(pool.map_levels([found.boxes * torch.tensor([320, 256, 320, 256])]).tolist())) > 1
