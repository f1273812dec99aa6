from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real photos and vectors; the test is skipped where there is none."""
    root = Path(__file__).resolve().parents[1]
    path = Path(os.environ.get("GM_MLIC_SHARED", root.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path} (set GM_MLIC_SHARED)")
    return path
