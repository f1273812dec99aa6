"""Groups of runs that differ only in the seed, and families of groups that differ only in studied settings."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from gm_mlic.reporting.runs import as_typed, followers
from gm_mlic.runs import Run, flat_settings, varying

#: Names of the ablations in the paper's Table 4.
ABLATIONS = {
    "full": "full",
    "no_semantic": "w/o Gl",
    "no_spatial": "w/o Go",
    "no_matches": "w/o ILM edges",
}
_EDGE_TYPES = "model.edge_types"
Item = TypeVar("Item")


def _removed(edge_types: Sequence[str] | None) -> list[str]:
    """Keys of :data:`ABLATIONS` for the missing edge types; empty for a model without edge types."""
    if edge_types is None:
        return []
    return [name for name in ABLATIONS if name != "full" and name.removeprefix("no_") not in edge_types]


@dataclass(frozen=True)
class Group:
    """Finished runs that differ only in the seed, sorted by it; ``name`` has the settings that distinguish them."""

    name: str
    runs: tuple[Run, ...]

    def values(self, metric: str, split: str = "test") -> dict[int, float]:
        """Values of a metric by seed, for runs that have it."""
        found = {int(run.setting("seed", 0)): (run.result or {})[split].get(metric) for run in self.runs}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def label_values(self, label: str) -> list[float]:
        """Test AP of a label, for runs that have it."""
        found = [(run.result or {})["test"]["AP"].get(label) for run in self.runs]
        return [float(value) for value in found if value is not None]

    def setting(self, key: str) -> Any:
        """Value of a setting that is the same in all runs."""
        return self.runs[0].setting(key)

    @property
    def dataset(self) -> str:
        return str(self.setting("dataset.name"))

    @property
    def ablation(self) -> str | None:
        """Key of :data:`ABLATIONS`; None for a model without edge types or with several missing ones."""
        edge_types = self.setting(_EDGE_TYPES)
        removed = _removed(edge_types)
        return None if edge_types is None or len(removed) > 1 else (removed or ["full"])[0]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group finished runs by all settings except the seed."""
    alike = _alike(runs, lambda run: run, {"seed"})
    members = [tuple(sorted(matching, key=lambda run: run.setting("seed", 0))) for matching in alike]
    names = _names([matching[0] for matching in members])
    groups = [Group(name, matching) for name, matching in zip(names, members, strict=True)]
    return sorted(
        groups, key=lambda group: (group.dataset, str(group.setting("model.name")), _numbers_first(group.name))
    )


def _numbers_first(text: str) -> list[tuple[bool, float, str]]:
    """Sort key that places ``k=10`` after ``k=9``."""
    parts = []
    for part in text.replace("=", " ").replace(",", " ").split():
        try:
            parts.append((False, float(part), ""))
        except ValueError:
            parts.append((True, 0.0, part))
    return parts


def _names(runs: Sequence[Run]) -> list[str]:
    """Name of each run: its model, if models differ, and its settings that differ between runs of that model."""
    flat = [flat_settings(run.config) for run in runs]
    several = len({settings.get("model.name") for settings in flat}) > 1
    names = []
    for settings in flat:
        model = settings.get("model.name")
        same = [run for run, other in zip(runs, flat, strict=True) if other.get("model.name") == model]
        differing = [key for key in varying(same) if key not in ("seed", "model.name")]
        hidden = {_EDGE_TYPES, *followers(differing)}
        parts = [str(model)] if several else []
        if _EDGE_TYPES in differing:
            parts += [ABLATIONS[name] for name in _removed(settings.get(_EDGE_TYPES))]
        parts += [
            f"{key.rpartition('.')[2]}={_short(settings[key])}"
            for key in differing
            if key in settings and key not in hidden and not key.startswith("dataset.")
        ]
        names.append(", ".join(parts) or ("full" if _EDGE_TYPES in differing else str(model)))
    return names


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else as_typed(value)


def families(groups: Sequence[Group], studied: str) -> list[list[Group]]:
    """Families of two or more groups that differ only in the ``studied`` setting and those that follow from it."""
    known = [group for group in groups if group.setting(studied) is not None]
    alike = _alike(known, lambda group: group.runs[0], {"seed", studied, *followers([studied])})
    return [family for family in alike if len(family) > 1]


def _alike(items: Sequence[Item], run_of: Callable[[Item], Run], left_out: Collection[str]) -> list[list[Item]]:
    """Lists of items whose runs have the same settings, except those ``left_out``."""
    found: dict[str, list[Item]] = {}
    for item in items:
        settings = {key: v for key, v in flat_settings(run_of(item).config).items() if key not in left_out}
        found.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(item)
    return list(found.values())


def ablation_families(groups: Sequence[Group]) -> list[list[Group]]:
    """Families of full models and their ablations, in the order of :data:`ABLATIONS`."""
    order = list(ABLATIONS)
    found = []
    for family in families(groups, _EDGE_TYPES):
        known = [group for group in family if group.ablation is not None]
        if len(known) > 1 and any(group.ablation == "full" for group in known):
            found.append(sorted(known, key=lambda group: order.index(str(group.ablation))))
    return found


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± sample standard deviation; a single value alone."""
    if not values:
        return "-"
    # Adding 0.0 turns -0.0 into 0.0.
    mean = f"{round(statistics.mean(values), digits) + 0.0:.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def paired(group: Group, other: Group, metric: str) -> list[float]:
    """Differences ``other - group`` of a metric, for the common seeds."""
    a, b = group.values(metric), other.values(metric)
    return [b[seed] - a[seed] for seed in a if seed in b]
