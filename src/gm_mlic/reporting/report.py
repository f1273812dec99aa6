"""Report of runs: a self-contained HTML page, a Markdown version, and figures as PNG and SVG."""

from __future__ import annotations

import base64
import html
import importlib.resources
import json
import logging
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2
import yaml

from gm_mlic._version import __version__
from gm_mlic.datasets.images import read_image
from gm_mlic.errors import UnreadableImage
from gm_mlic.io import write_file
from gm_mlic.reporting import plots
from gm_mlic.reporting.annotated_images import label_box, picture_grid
from gm_mlic.reporting.groups import ABLATIONS, Group, ablation_families, families, group_runs, paired, spread
from gm_mlic.reporting.runs import as_typed, unusual
from gm_mlic.reporting.tables import F1_METRICS, gap, markdown_table, number
from gm_mlic.runs import EXAMPLES, LABEL_STATES, Run, RunFolderError, flat_settings, varying
from gm_mlic.safe_load import load_arrays

log = logging.getLogger(__name__)

#: Metrics over all labels, and over the top three labels of each image.
ALL, TOP3 = ("mAP", *F1_METRICS), tuple(f"top3/{name}" for name in F1_METRICS)
#: Exceptions raised by damaged files of a run.
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, UnreadableImage)
_CURVES = {"graph.m": "m, instances per image", "model.k": "k, convolution blocks"}


@dataclass(frozen=True)
class Table:
    """Table whose first column is text; ``strong`` rows are highlighted, ``quiet`` rows are gray."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()
    quiet: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Picture:
    """Figure in a file beside the page; a broad figure scrolls in narrow windows."""

    title: str
    file: str
    broad: bool = True


@dataclass(frozen=True)
class Section:
    """Section of the report; commands, settings and seeds of its ``groups`` of runs are listed below each item."""

    title: str
    text: str
    items: Sequence[Table | Picture]
    groups: Sequence[Group] = ()


def write_report(runs: Sequence[Run], out: Path) -> Path:
    """Write ``report.html``, ``report.md`` and the figures to ``out``.

    The sections, if the runs have data for them, are the paper's table of the dataset (Tables 1 to 3) with runs of the
    same models, metrics, ablation (Table 4), m and k (Figure 4), photos (Figure 3), label states (Figure 5), training
    curves, and unfinished runs.

    Args:
        runs: runs of one or more studies; runs that differ only in the seed are grouped.
        out: output folder; created if missing.

    Returns:
        Path of the HTML page.

    Raises:
        RunFolderError: if no run is finished.
    """
    finished = [run for run in runs if is_complete(run.result)]
    if not finished:
        states = ", ".join(f"{run.path.name} {run.state}" for run in runs[:5])
        raise RunFolderError(f"None of {len(runs)} runs is finished ({states}): run their commands again, then report.")
    out.mkdir(parents=True, exist_ok=True)
    groups = group_runs(finished)
    paper = read_paper()
    sections: list[Section] = []
    for dataset in dict.fromkeys(group.dataset for group in groups):
        of_dataset = [group for group in groups if group.dataset == dataset]
        if dataset in paper:
            sections.append(_paper_table(dataset, of_dataset, paper))
        sections += _metrics(dataset, of_dataset)
    sections += _ablations(groups, paper)
    sections += _sweeps(groups, paper, out)
    best = _method(groups)
    for make in (_photos, _label_states):
        sections += make(best, out)
    picture = plots.save(plots.draw_training(groups), out, "training")
    sections.append(Section("Training", "One line per run.", [Picture("Loss and val mAP by epoch", picture)], groups))
    sections += _unfinished([run for run in runs if not is_complete(run.result)])
    title = "GM-MLIC: " + ", ".join(dict.fromkeys(group.dataset for group in groups))
    write_file(out / "report.md", _markdown(title, sections))
    write_file(out / "report.html", _page(title, sections, out))
    return out / "report.html"


def is_complete(result: Mapping[str, Any] | None) -> bool:
    """Whether a result has all values for the tables; it may come from another version or program."""
    expected = {
        "test": dict, "val": dict, "dataset": dict, "detector": dict, "versions": dict, "convention": str,
        "command": str,
    }  # fmt: skip
    if result is None or not all(isinstance(result.get(key), kind) for key, kind in expected.items()):
        return False
    by_label, sizes = result["test"].get("AP"), result["dataset"].get("sizes")
    if not (isinstance(by_label, dict) and isinstance(sizes, dict) and "name" in result["detector"]):
        return False
    metrics = {**result["test"], "AP": None}
    values = [result["test"].get("mAP"), result["val"].get("mAP")]
    values += [value for value in (*metrics.values(), *by_label.values()) if value is not None]
    return all(isinstance(value, (int, float)) for value in values)


def read_paper() -> dict[str, Any]:
    """Read the paper's numbers by dataset, and the models of its systems, from ``paper.yaml``."""
    text = importlib.resources.files("gm_mlic.reporting").joinpath("paper.yaml").read_text()
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def _method(groups: Sequence[Group]) -> Group:
    """Group that represents the method: the best on val of those without ablation, or of all if each has one."""
    return max([group for group in groups if group.ablation == "full"] or groups, key=_val_map)


def _val_map(group: Group) -> float:
    return mean(group.values("mAP", "val").values())


# Sections


def _paper_table(dataset: str, groups: Sequence[Group], paper: Mapping[str, Any]) -> Section:
    """One of Tables 1 to 3: all rows of the paper, and below them those of runs of the same model."""
    content, models = paper[dataset], paper["models"]
    ours = {
        system: _method(found)
        for system in content["rows"]
        if (found := [group for group in groups if group.setting("model.name") in models[system]])
    }
    columns = [name for part in content["columns"] for name in part]
    items = []
    for part in content["columns"]:
        rows: list[list[str]] = []
        strong, quiet = set(), set()
        for system, values in content["rows"].items():
            theirs = dict(zip(columns, values, strict=True))
            quiet.add(len(rows))
            rows.append([system, "paper", *(number(theirs[name]) for name in part)])
            if system in ours:
                group = ours[system]
                strong.add(len(rows))
                measured = [list(group.values(name).values()) or group.label_values(name) for name in part]
                runs = "1 run" if len(group.runs) == 1 else f"{len(group.runs)} runs"
                rows.append([system, f"{group.setting('model.name')}, {runs}", *map(spread, measured)])
                gaps = [gap(mean(v) if v else None, theirs[name]) for v, name in zip(measured, part, strict=True)]
                rows.append(["", "difference", *gaps])
        head = ["", "source", *(name.replace("top3/", "top-3 ") for name in part)]
        items.append(Table(f"{content['table']}, %", head, rows, frozenset(strong), frozenset(quiet)))
    text = (
        f"All systems of {content['table']} of Wu et al. (IJCAI 2021). Rows of source 'paper' have its printed "
        "numbers, which were not measured here. Below them are runs of the same model, if there are any: mean ± sample "
        "standard deviation over seeds, on the test split. Of several settings of a model, the best on val is shown."
    )
    return Section(f"The paper's {content['table']}: {dataset}", text, items, list(ours.values()))


def _metrics(dataset: str, groups: Sequence[Group]) -> Iterator[Section]:
    """Metrics of all groups, and AP of each label."""
    items = []
    for title, names in (("All labels", ALL), ("Top 3 labels", TOP3)):
        cells = ((spread(list(group.values(name).values())) for name in names) for group in groups)
        rows = [[group.name, str(len(group.runs)), *row] for group, row in zip(groups, cells, strict=True)]
        head = ["", "runs", *(name.removeprefix("top3/") for name in names)]
        items.append(Table(f"{title}, %", head, rows))
    text = "Mean ± sample standard deviation over seeds, on the test split. The epoch is selected on val."
    yield Section(f"Metrics on {dataset}", text, items, groups)
    yield _label_table(dataset, groups)


def _label_table(dataset: str, groups: Sequence[Group]) -> Section:
    best = {id(group) for group in sorted(groups, key=_val_map, reverse=True)[:6]}
    columns = [group for group in groups if id(group) in best]  # in the order of the tables above
    labels = list((columns[0].runs[0].result or {})["test"]["AP"])
    rows = [[label, *(spread(group.label_values(label)) for group in columns)] for label in labels]
    left_out = len(groups) - len(columns)
    text = "Labels without a positive test image are marked with -."
    if left_out:
        text += f" The columns are the {len(columns)} best on val; {left_out} more are in the tables above."
    table = Table("AP, %", ["", *(group.name for group in columns)], rows)
    return Section(f"AP of each label on {dataset}", text, [table], columns)


def _ablations(groups: Sequence[Group], paper: Mapping[str, Any]) -> Iterator[Section]:
    """Ablation as in Table 4."""
    found = ablation_families(groups)
    for family in found:
        full = family[0]
        theirs = paper.get(full.dataset, {}).get("ablation", {})
        measures = [name for name in ALL if name in theirs.get("full", {})]
        metrics = [name for name in ALL if name in {"mAP", "CF1", "OF1", *measures}]
        rows = []
        for group in family:
            cells = [spread(list(group.values(name).values())) for name in metrics]
            differences = paired(group, full, "mAP") if group is not full else []
            difference = spread(differences) if differences else ""
            row = [ABLATIONS[str(group.ablation)], str(len(group.runs)), *cells, difference]
            rows.append(row + [number(theirs[str(group.ablation)].get(name)) for name in measures])
        head = ["", "runs", *metrics, "full - this, mAP", *(f"paper, {name}" for name in measures)]
        name = f"Ablation on {full.dataset}" + (f": {_common(family)}" if len(found) > 1 else "")
        text = (
            "Contribution of each edge type (the paper's Table 4): without label graph (Gl), instance graph (Go), or "
            "states on the instance-label matching edges. Differences are paired by seed."
        )
        yield Section(name, text, [Table("Ablation, %", head, rows, frozenset({0}))], family)


def _common(family: Sequence[Group]) -> str:
    """Common parts of the groups' names."""
    parts = [set(group.name.split(", ")) for group in family]
    shared = set.intersection(*parts)
    return ", ".join(part for part in family[0].name.split(", ") if part in shared) or family[0].name


def _sweeps(groups: Sequence[Group], paper: Mapping[str, Any], out: Path) -> Iterator[Section]:
    """Curves over m and k, as in Figure 4."""
    for key, label in _CURVES.items():
        found = families(groups, key)
        if not found:
            continue
        short = key.rpartition(".")[2]
        file = plots.save(plots.draw_sweep(found, key, label), out, f"sweep_{short}")
        used = [group for family in found for group in family]
        text = f"As the paper's Figure 4, for {label}: mean over seeds; the band is one standard deviation."
        for dataset in dict.fromkeys(group.dataset for group in used):
            if key in (chosen := paper.get(dataset, {}).get("chosen", {})):
                text += f" The paper chose {short} = {chosen[key]} on {dataset}."
        yield Section(f"Effect of {short}", text, [Picture(f"Test mAP by {short}", file, broad=False)], used)


def _photos(group: Group, out: Path) -> Iterator[Section]:
    """Example photos, as in Figure 3."""
    run = next((run for run in group.runs if (run.path / EXAMPLES / "examples.json").is_file()), None)
    if run is None:
        return
    folder = run.path / EXAMPLES
    panels = []
    try:
        for example in json.loads((folder / "examples.json").read_text()):
            image = read_image(folder / Path(example["file"]).name)
            panels.append((image, list(map(label_box, example["top"][:3]))))
    except _DAMAGED as error:
        log.warning("Photos left out: %s is damaged (%s).", folder, error)
        return
    if not panels:
        return
    picture_grid(out / "photos.jpg", panels, f"{group.name}: top 3 labels and their argmax boxes")
    text = f"As the paper's Figure 3, from {run.path}: the first test photos, without selection."
    picture = Picture("Top 3 labels and their argmax boxes", "photos.jpg")
    yield Section("Photos", text, [picture], [Group(group.name, (run,))])


def _label_states(group: Group, out: Path) -> Iterator[Section]:
    """Map of label states, as in Figure 5."""
    run = next((run for run in group.runs if (run.path / LABEL_STATES).is_file()), None)
    if run is None:
        return
    try:
        content = load_arrays(run.path / LABEL_STATES)
        labels = [str(name) for name in content["labels"]]
        states = {"label vectors (input)": content["input"], "label states after the last block": content["states"]}
        if len(labels) < 4:
            return
        figure = plots.draw_label_map(labels, states)
    except ImportError:
        log.warning("Map of label states left out: it needs scikit-learn (pip install 'gm-mlic[report]').")
        return
    except _DAMAGED as error:
        log.warning("Map of label states left out: %s is damaged (%s).", run.path / LABEL_STATES, error)
        return
    text = "As the paper's Figure 5: t-SNE with cosine distance; labels with similar states are close."
    picture = Picture("Map of labels", plots.save(figure, out, "label_map"))
    yield Section("Learned label states", text, [picture], [Group(group.name, (run,))])


def _unfinished(runs: Sequence[Run]) -> Iterator[Section]:
    rows = []
    for run, settings in zip(runs, unusual(runs, varying(runs)), strict=True):
        state, error = run.state, run.error or ""
        if run.result is not None:
            state, error = "damaged", "metrics.json is from another version: run the command again with overwrite=true"
        rows.append([str(run.path), state, settings, error])
    if rows:
        text = "These runs are in no table. Run their commands again to resume them."
        yield Section("Unfinished runs", text, [Table("", ["run", "state", "settings", "error"], rows)])


# Provenance


def made_by(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Provenance of a table: names and values of seeds, convention, detector, versions, settings and commands."""
    runs = [run for group in groups for run in group.runs]
    results = [run.result or {} for run in runs]

    def all_of(values: Sequence[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values))

    weights = [
        f"{r['detector']['name']} ({as_typed(run.setting('detector.weights'))})"
        for run, r in zip(runs, results, strict=True)
    ]
    sizes = [", ".join(f"{n} {split}" for split, n in result["dataset"]["sizes"].items()) for result in results]
    facts = [
        ("seeds", all_of(sorted({int(run.setting("seed", 0)) for run in runs}))),
        ("metric convention", all_of([result["convention"] for result in results])),
        ("detector (weights)", all_of(weights)),
        ("label vectors", all_of([result.get("label_vectors", "-") for result in results])),
        ("images", all_of(sizes)),
        ("versions", all_of([", ".join(f"{k} {v}" for k, v in result["versions"].items()) for result in results])),
        ("revision", all_of([result.get("revision", "-") for result in results])),
    ]
    flat = [flat_settings(run.config) for run in runs]
    shared = [f"{k}={as_typed(v)}" for k, v in flat[0].items() if k != "seed" and all(f.get(k, ...) == v for f in flat)]
    facts.append(("settings" if len(groups) == 1 else "settings of all", " ".join(shared)))
    commands = list(dict.fromkeys(result["command"] for result in results))
    listed = commands[:20] + ([f"... and {len(commands) - 20} more"] if len(commands) > 20 else [])
    return [*facts, ("commands" if len(commands) > 1 else "command", "\n".join(listed))]


# Markdown


def _markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f"# {_md(title)}", "", f"Made by gm-mlic {__version__}.", ""]
    for section in sections:
        lines += [f"## {_md(section.title)}", "", _md(section.text), ""]
        for item in section.items:
            if isinstance(item, Picture):
                lines += [f"![{_md(item.title)}]({item.file})", ""]
            else:
                if item.title:
                    lines += [f"**{_md(item.title)}**", ""]
                lines.append(markdown_table(list(map(_md, item.head)), (list(map(_md, row)) for row in item.rows)))
        for name, value in made_by(section.groups) if section.groups else ():
            if name.startswith(("command", "settings")):
                lines += [f"- {name}:", "", *(f"      {line}" for line in value.splitlines())]
            else:
                lines.append(f"- {name}: {_md(value)}")
        lines.append("")
    return "\n".join(lines)


def _md(text: str) -> str:
    """Text in one line, escaped for Markdown and HTML."""
    plain = html.escape(" ".join(text.split()), quote=False)
    for mark in ("\\", "|", "*", "_", "`", "[", "]"):
        plain = plain.replace(mark, f"\\{mark}")
    return plain


# HTML


def _page(title: str, sections: Sequence[Section], out: Path) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = importlib.resources.files("gm_mlic.reporting").joinpath("report.html.jinja").read_text()
    return environment.from_string(template).render(
        title=title,
        sections=sections,
        version=__version__,
        made_by=made_by,
        inline=lambda file: _data_uri(out / file),
        is_picture=lambda item: isinstance(item, Picture),
    )


def _data_uri(path: Path) -> str:
    """Data URI of a picture."""
    return f"data:{mimetypes.guess_type(path)[0]};base64,{base64.b64encode(path.read_bytes()).decode()}"
