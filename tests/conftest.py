from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.config_store import ConfigStore

from gm_mlic.config import SECTIONS
from gm_mlic.registry import Registry

#: Reasons to skip a test with ``GM_MLIC_STRICT=1``, as in continuous integration; other skipped tests fail.
ALLOWED_SKIPS = re.compile(r"requires the shared data|cannot mount|MPS is available")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """With ``GM_MLIC_STRICT=1``, report a skipped test as failed, unless its reason is allowed."""
    report = yield
    if os.environ.get("GM_MLIC_STRICT") == "1" and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2])
        if not ALLOWED_SKIPS.search(reason):
            report.outcome, report.longrepr = "failed", f"{reason} (not allowed with GM_MLIC_STRICT=1)"
    return report


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real photos and vectors next to the repository (or ``$GM_MLIC_SHARED``); skips if missing."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("GM_MLIC_SHARED", default))
    if not root.is_dir():
        pytest.skip("requires the shared data (../shared/data, or the folder in GM_MLIC_SHARED)")
    return root


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """Factory of run folders with two epochs, and test mAP 31 if finished."""

    def make(path: Path, *, finished: bool = True, **settings: object) -> Path:
        path.mkdir(parents=True)
        config = {"seed": 0, "graph": {"m": 10}, "trainer": {"num_workers": 0}, "run_dir": str(path)} | settings
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        (path / "metrics.csv").write_text("epoch,step,seconds,lr,val/mAP\n1,4,0.5,0.1,20\n2,8,0.5,0.1,30.5\n")
        if finished:
            (path / "metrics.json").write_text(json.dumps({"test": {"mAP": 31.0}}))
        return path

    return make


@pytest.fixture
def registries(tmp_path: Path) -> Iterator[None]:
    """Remove what the test registers, also from Hydra's options, and modules of its folder, after the test."""
    groups = {name: found for name, found in SECTIONS.items() if isinstance(found, Registry)}
    before = {name: set(found.names()) for name, found in groups.items()}
    yield
    for group, found in groups.items():
        for name in set(found._entries) - before[group]:
            del found._entries[name]
            for option in (name, f"_{name}"):
                ConfigStore.instance().repo.get(group, {}).pop(f"{option}.yaml", None)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__dict__", {}).get("__file__")).startswith(str(tmp_path)):
            del sys.modules[name]
