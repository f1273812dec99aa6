"""Small blocks, so that stores of a few images have several."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gm_mlic.instances import manifest


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "BLOCK_IMAGES", 4)
        yield
