"""Lazy module attributes (PEP 562), imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_attributes(
    package: str, names: Mapping[str, Sequence[str]], *others: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Create ``__getattr__`` and ``__dir__`` of a module.

    Args:
        package: ``__name__`` of the module.
        names: attributes by their module, which is relative to ``package``.
        others: attributes that are already there.
    """
    homes = {name: module for module, of_module in names.items() for name in of_module}

    def getattribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return getattribute, lambda: [*homes, *others]
