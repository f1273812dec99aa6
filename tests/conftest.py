from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photos and vectors beside the repository (or ``$GM_MLIC_SHARED``); skips where absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("GM_MLIC_SHARED", default))
    if not root.is_dir():
        pytest.skip("needs the shared data (../shared/data, or the folder named by GM_MLIC_SHARED)")
    return root
