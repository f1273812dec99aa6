"""What the README shows works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from gm_mlic.cli.main import COMMANDS

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_python_example():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["output"].logits.shape == (8, 22)
    assert names["loss"].isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in names["model"].parameters())


def test_every_command_is_named():
    for command in COMMANDS:
        assert f"`gm-mlic {command}" in README


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"):
            assert (Path(__file__).resolve().parents[1] / link).exists(), link
