"""Extraction with the built-in detector and dataset."""

from __future__ import annotations

import numpy as np
import torch

from gm_mlic.datasets import Scenes
from gm_mlic.datasets.images import to_tensor
from gm_mlic.detection import build_extractor
from gm_mlic.instances import extract


def test_scenes_through_the_store(tmp_path):
    dataset = Scenes(split="val", size=10, seed=5)
    extractor = build_extractor("scenes_tiny", weights="scenes")
    settings = {"views": 1, "batch_size": 4, "view_size": 160, "progress": False}
    store = extract(dataset, extractor, tmp_path / "large", m=16, **settings)
    small = extract(dataset, extractor, tmp_path / "small", m=3, **settings)
    store.check(dataset, extractor, m=16, views=1)
    for name in ("features", "boxes", "scores", "detected_labels"):
        assert np.array_equal(getattr(small, name), getattr(store, name)[:, :, :3]), name
    assert store.counts.max() > 3
    for i in range(4):  # the first batch
        expected = extractor([to_tensor(dataset.image(j)) for j in range(4)], 16)[i]
        assert torch.equal(store.instances(i).boxes, expected.boxes)
        assert torch.equal(store.instances(i).features, expected.features.half().float())
