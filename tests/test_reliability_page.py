"""Tests listed in docs/reliability.md exist and have the stated markers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    line
    for line in (ROOT / "docs" / "reliability.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| promise", "| ---"))
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:60])
def test_listed_test_exists(row: str) -> None:
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", row)
    assert named
    slow = []
    for file, name in named:
        assert (ROOT / file).is_file(), file
        if not name:
            continue
        functions = {
            node.name: node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{file} has no {name}"
        slow.append("pytest.mark.slow" in map(ast.unparse, functions[name].decorator_list))
    assert any(slow) == ("(slow)" in row)
