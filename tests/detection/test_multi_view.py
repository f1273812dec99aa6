"""Detection in several views, with an extractor whose boxes are known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gm_mlic.detection import InstanceExtractor, Instances, MultiViewExtractor
from gm_mlic.errors import ArgumentError


class BrightPixels:
    """Each pixel above 0.5 of the first channel is an instance: its box, and its value as confidence and feature.

    An image without such a pixel gets the placeholder of the protocol.
    """

    name, labels, feature_dim = "bright", ("pixel",), 1

    def __init__(self, fingerprint: str = "0" * 64) -> None:
        self.fingerprint = fingerprint
        self.sizes: list[list[tuple[int, int]]] = []

    def __call__(self, images: Sequence[Tensor], m: int) -> list[Instances]:
        self.sizes.append([(image.shape[-1], image.shape[-2]) for image in images])
        return [self._one(image).top(m) for image in images]

    def _one(self, image: Tensor) -> Instances:
        H, W = image.shape[-2:]
        y, x = (image[0] > 0.5).nonzero().unbind(1)
        if not len(x):
            whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
            return Instances(whole, torch.zeros(1), torch.full((1,), -1), torch.zeros(1, 1))
        boxes = torch.stack([x / W, y / H, (x + 1) / W, (y + 1) / H], dim=1)
        scores, order = image[0, y, x].sort(descending=True, stable=True)
        return Instances(boxes[order], scores, torch.zeros(len(x), dtype=torch.int64), scores[:, None])


def photo(W: int, H: int, pixels: dict[tuple[int, int], float]) -> Tensor:
    image = torch.zeros(3, H, W)
    for (x, y), value in pixels.items():
        image[0, y, x] = value
    return image


@pytest.mark.parametrize("views", range(2, 7))
@pytest.mark.parametrize(("W", "H"), [(8, 12), (11, 7), (1, 1), (3, 50)])
def test_boxes_are_mapped_back_to_the_photo(W: int, H: int, views: int):
    """Every view that contains a pixel finds it at its place in the photo, to rounding."""
    for x, y in {(0, 0), (W - 1, H - 1), (W // 2, H // 3), (W - 1, 0)}:
        (found,) = MultiViewExtractor(BrightPixels(), views)([photo(W, H, {(x, y): 0.9})], 20)
        expected = torch.tensor([x / W, y / H, (x + 1) / W, (y + 1) / H])
        assert len(found) >= 2
        torch.testing.assert_close(found.boxes, expected.expand(len(found), 4), rtol=0, atol=1e-6)
        assert found.scores.tolist() == pytest.approx([0.9] * len(found))


def test_views_are_the_photo_its_mirror_image_and_its_corners():
    extractor = BrightPixels()
    image = photo(8, 12, {(0, 0): 0.9, (7, 11): 0.8})
    (found,) = MultiViewExtractor(extractor, 6)([image], 20)
    assert [size for (size,) in extractor.sizes] == [(8, 12), (8, 12), *[(6, 9)] * 4]
    # Each corner is in the photo, its mirror image and one of the four other views.
    assert found.scores.tolist() == pytest.approx([0.9] * 3 + [0.8] * 3)
    assert len(MultiViewExtractor(extractor, 2)([image], 20)[0]) == 4


def test_a_smaller_m_returns_the_first_of_a_larger_one():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 9, 9, generator=generator)
    image[0, 4] = 0.75  # equal scores
    extractor = MultiViewExtractor(BrightPixels(), 6)
    (everything,) = extractor([image], 1000)
    assert bool((everything.scores.diff() <= 0).all())
    assert everything.detected_labels.tolist() == [0] * len(everything)
    for m in (1, 2, 7, 30):
        (found,) = extractor([image], m)
        for ours, all_of_them in zip(vars(found).values(), vars(everything).values(), strict=True):
            assert torch.equal(ours, all_of_them[:m])


def test_images_do_not_depend_on_their_batch():
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, h, w, generator=generator) for h, w in ((5, 9), (8, 3), (6, 6))]
    extractor = MultiViewExtractor(BrightPixels(), 4)
    for image, together in zip(images, extractor(images, 5), strict=True):
        (alone,) = extractor([image], 5)
        assert all(torch.equal(a, b) for a, b in zip(vars(alone).values(), vars(together).values(), strict=True))
    assert extractor([], 5) == []


def test_placeholder_of_an_empty_view_is_dropped_unless_all_are_empty():
    only_top_left = photo(8, 8, {(0, 0): 0.9})
    detected, empty = MultiViewExtractor(BrightPixels(), 6)([only_top_left, torch.zeros(3, 8, 8)], 20)
    assert detected.detected_labels.tolist() == [0, 0, 0]
    assert empty.boxes.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    assert (empty.scores.tolist(), empty.detected_labels.tolist()) == ([0.0], [-1])


def test_multi_view_extractor_implements_the_protocol():
    extractor = MultiViewExtractor(BrightPixels(), 3)
    assert isinstance(extractor, InstanceExtractor)
    assert (extractor.name, extractor.labels, extractor.feature_dim) == ("bright-3_views", ("pixel",), 1)


def test_fingerprint_covers_the_extractor_and_the_views():
    prints = [MultiViewExtractor(BrightPixels(), views).fingerprint for views in range(2, 7)]
    prints += [BrightPixels().fingerprint, MultiViewExtractor(BrightPixels("1" * 64), 2).fingerprint]
    assert len(set(prints)) == 7
    assert all(len(value) == 64 for value in prints)
    assert prints[0] == MultiViewExtractor(BrightPixels(), 2).fingerprint


@pytest.mark.parametrize("views", [0, 1, 7])
def test_views_out_of_range(views: int):
    with pytest.raises(ArgumentError, match=f"must be 2 to 6, got {views}"):
        MultiViewExtractor(BrightPixels(), views)
