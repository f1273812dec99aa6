from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gm_mlic.reporting.annotated_images import COLORS, LabelBox, _box_numbers, annotated, picture_grid


def test_nearly_equal_boxes_share_a_number():
    boxes = [(0.0, 0.0, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9), (0.01, 0.0, 0.5, 0.5), (0.0, 0.0, 0.2, 0.2)]
    assert _box_numbers(boxes) == [1, 2, 1, 3]
    assert _box_numbers([(0.3, 0.3, 0.3, 0.3)] * 2) == [1, 1]
    assert _box_numbers([]) == []


@pytest.mark.parametrize(
    ("size", "expected"), [((320, 200), (640, 400)), ((2, 2000), (4, 4096)), ((9000, 30), (4096, 14))]
)
def test_annotated_photos_have_a_readable_size(size: tuple[int, int], expected: tuple[int, int]):
    assert annotated(Image.new("RGB", size), [("cat", 0.9, (0, 0, *size))]).size == expected


def test_letters_of_other_languages_are_drawn():
    def written(name: str) -> bytes:
        return annotated(Image.new("RGB", (640, 640)), [(name, 0.9, (100, 100, 600, 600))]).tobytes()

    assert len({written(name) for name in ("é", "ж", "Ω", "–")}) == 4


def test_dollar_signs_are_not_parsed_as_math(tmp_path: Path):
    names = (r"$5 \frac{", "$x$", "_$^", "fish")
    found = [LabelBox(name, 0.9, (0.0, 0.0, 1.0, 1.0), "right") for name in names]
    picture_grid(tmp_path / "x.png", [(Image.new("RGB", (60, 40)), found)], "one")


def test_boxes_have_the_color_of_their_kind(tmp_path: Path):
    image = Image.new("RGB", (60, 40), (128, 128, 128))
    panel = (image, [LabelBox("cat", 0.9, (0.1, 0.1, 0.9, 0.9), "right")])
    path = tmp_path / "new" / "x.png"
    picture_grid(path, [panel, (image, [])], "two", columns=4)
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    green = tuple(int(COLORS["right"][i : i + 2], 16) for i in (1, 3, 5))
    assert (pixels == green).all(axis=1).any()
