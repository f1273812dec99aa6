from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_stages import Files, PixelExtractor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gm_mlic.datasets.images import to_tensor
from gm_mlic.instances import crop_and_flip, extract
from gm_mlic.instances.augment import AREA, ASPECT, view_rng


def gradient(width: int, height: int) -> Image.Image:
    """Image with the column as red and the row as green, which shows the position of a crop."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(pixels)


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 40), st.integers(0, 2**32))
def test_view_has_the_requested_size(width, height, size, seed):
    view = crop_and_flip(gradient(width, height), size, np.random.default_rng(seed))
    assert view.size == (size, size)
    assert view.mode == "RGB"


def test_crops_have_documented_area_aspect_and_flips():
    image, size = gradient(1000, 1000), 64
    mirrored, areas, aspects = 0, [], []
    for seed in range(300):
        pixels = np.asarray(crop_and_flip(image, size, np.random.default_rng(seed))).astype(float)
        # distance of adjacent view pixels, in image pixels
        across = (pixels[32, -1, 0] - pixels[32, 0, 0]) / (size - 1) * 1000 / 255
        down = (pixels[-1, 32, 1] - pixels[0, 32, 1]) / (size - 1) * 1000 / 255
        mirrored += across < 0
        assert down > 0
        areas.append(abs(across) * down * size**2 / 1e6)
        aspects.append(abs(across) / down)
    assert 0.4 < mirrored / 300 < 0.6
    assert AREA[0] - 0.03 < min(areas) < AREA[0] + 0.05
    assert AREA[1] - 0.1 < max(areas) < AREA[1] + 0.03
    assert ASPECT[0] - 0.03 < min(aspects) < 0.85
    assert 1.2 < max(aspects) < ASPECT[1] + 0.03


def test_views_depend_only_on_seed_id_and_number():
    def draws(*key):
        return tuple(view_rng(*key).random(5))

    assert draws(0, "a", 1) == draws(0, "a", 1)
    others = {draws(seed, name, view) for seed in range(5) for name in ("a", "b", "é", "\udcff") for view in range(5)}
    assert len(others) == 100


@pytest.mark.parametrize("view", [1, 2])
def test_store_contains_the_instances_of_the_views(tmp_path, view):
    dataset, extractor = Files(tmp_path / "photos", n=5), PixelExtractor()
    store = extract(dataset, extractor, tmp_path / "s", m=12, views=2, view_size=40, view_seed=3, progress=False)
    for i, image_id in enumerate(dataset.ids):
        image = crop_and_flip(dataset.image(i), 40, view_rng(3, image_id, view))
        expected = extractor([to_tensor(image)], 12)[0]
        found = store.instances(i, view)
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.boxes, expected.boxes)
        assert torch.equal(found.features, expected.features.half().float())
    assert not np.array_equal(store.features[:, 1], store.features[:, 2])
    fewer = extract(dataset, extractor, tmp_path / "t", m=12, views=1, view_size=40, view_seed=3, progress=False)
    assert np.array_equal(fewer.features, store.features[:, :2])
