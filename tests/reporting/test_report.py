"""Reports of synthetic run folders, parsed and opened in a browser."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from gm_mlic import list_models
from gm_mlic.reporting.groups import ablation_families, families, group_runs, paired, spread
from gm_mlic.reporting.report import ALL, TOP3, read_paper, write_report
from gm_mlic.runs import Run, RunFolderError, find_runs

Study = Callable[..., Path]
LABELS = ["aeroplane", "bicycle", "<script>alert(1)</script>", 'a|b*"c"', "電車", "person"]


def write_run(path: Path, *, finished: bool = True, mAP: float = 80.0, seed: int = 0, **changes: Any) -> Path:
    """Write a run folder; ``changes`` are settings with ``__`` for the dot."""
    config: dict[str, Any] = {
        "seed": seed, "run_dir": str(path), "dataset": {"name": "scenes"}, "detector": {"weights": None},
        "graph": {"m": 10}, "trainer": {"max_epochs": 2},
        "model": {"name": "gm_mlic", "k": 2, "widths": [64, 64], "fusion": "product",
                  "edge_types": ["spatial", "semantic", "matches"]},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "metrics.csv").write_text("epoch,train/loss,val/mAP\n1,0.5,60\n2,0.3,70\n")
    if not finished:
        state = {"state": "failed", "error": "The loss is <b>not finite</b>"}
        (path / "state.json").write_text(json.dumps(state))
        return path
    test = {name: mAP - number for number, name in enumerate(ALL + TOP3)}
    result = {
        "test": test | {"AP": {name: mAP + c if c else None for c, name in enumerate(LABELS)}},
        "val": {"mAP": mAP + 1}, "best_epoch": 2, "epochs": 2, "seed": seed, "convention": "mlgcn",
        "dataset": {"name": config["dataset"]["name"], "labels": 6, "sizes": {"train": 3, "val": 2, "test": 2}},
        "detector": {"name": "scenes_tiny", "fingerprint": "0"}, "versions": {"gm-mlic": "0.1.0"}, "revision": "abc",
        "command": f"gm-mlic train seed={seed} 'x=<b>'",
    }  # fmt: skip
    (path / "metrics.json").write_text(json.dumps(result))
    (path / "examples").mkdir()
    Image.new("RGB", (96, 64), (200, 180, 40)).save(path / "examples" / "00.jpg")
    top = [{"label": name, "score": 0.9, "box": [0.1, 0.1, 0.6, 0.8], "kind": "right"} for name in LABELS[:3]]
    example = {"id": "../../x", "file": "00.jpg", "width": 96, "height": 64, "targets": LABELS[:1], "top": top}
    (path / "examples" / "examples.json").write_text(json.dumps([example]))
    rng = np.random.default_rng(seed)
    states = {"states": rng.normal(size=(len(LABELS), 8)), "input": rng.normal(size=(len(LABELS), 5))}
    np.savez(path / "label_states.npz", labels=np.array(LABELS), **states)
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ablations and a sweep over m with three seeds each, a baseline, and a failed run."""
    root = tmp_path_factory.mktemp("study")
    for seed in range(3):
        write_run(root / f"full-{seed}", seed=seed, mAP=90 + seed)
        write_run(root / f"gl-{seed}", seed=seed, mAP=85 + seed, model__edge_types=["spatial", "matches"])
        write_run(root / f"go-{seed}", seed=seed, mAP=80 + 2 * seed, model__edge_types=["semantic", "matches"])
        write_run(root / f"ilm-{seed}", seed=seed, mAP=70, model__edge_types=["spatial", "semantic"])
        write_run(root / f"m5-{seed}", seed=seed, mAP=60 + seed, graph__m=5)
    mil = write_run(root / "mil", mAP=50)
    config = yaml.safe_load((mil / "config.yaml").read_text())
    config["model"] = {"name": "mil_max", "width": 64}
    (mil / "config.yaml").write_text(yaml.safe_dump(config))
    write_run(root / "failed", finished=False, seed=9)
    return root


@pytest.fixture(scope="module")
def page(study: Path) -> Path:
    return write_report(find_runs([study]), study / "report")


def runs(study: Path) -> list[Run]:
    return [run for run in find_runs([study]) if run.result is not None]


# Groups


def test_runs_that_differ_in_the_seed_are_one_group(study: Path) -> None:
    groups = group_runs(runs(study))
    assert sorted(len(group.runs) for group in groups) == [1, 3, 3, 3, 3, 3]
    full = next(group for group in groups if group.ablation == "full" and group.setting("graph.m") == 10)
    assert full.values("mAP") == {0: 90.0, 1: 91.0, 2: 92.0}
    assert len({group.name for group in groups}) == len(groups)
    assert [group.name for group in groups if group.setting("model.name") == "mil_max"] == ["mil_max"]


def test_ablations_are_grouped_with_their_full_model(study: Path) -> None:
    (family,) = ablation_families(group_runs(runs(study)))
    assert [group.ablation for group in family] == [
        "full", "no_semantic", "no_spatial", "no_matches"
    ]  # fmt: skip
    assert {group.setting("graph.m") for group in family} == {10}
    assert paired(family[2], family[0], "mAP") == [10, 9, 8]


def test_runs_of_a_sweep_are_one_family(study: Path) -> None:
    (family,) = families(group_runs(runs(study)), "graph.m")
    assert sorted(group.setting("graph.m") for group in family) == [5, 10]
    assert {group.ablation for group in family} == {"full"}
    assert families(group_runs(runs(study)), "model.k") == []


def test_settings_that_follow_from_the_studied_one_are_ignored(tmp_path: Path) -> None:
    for k in (1, 2, 3):
        write_run(tmp_path / str(k), model__k=k, model__widths=[64] * k)
    (family,) = families(group_runs(runs(tmp_path)), "model.k")
    assert [group.name for group in family] == ["k=1", "k=2", "k=3"]


def test_spread() -> None:
    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert spread([1.25], 2) == "1.25"
    assert spread([]) == "-"
    assert spread([-0.01, 0.0]) == "0.0 ± 0.0"


# The page


class Reader(HTMLParser):
    """Parser for text, tags and sources of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text())
    return reader


def test_sections_of_the_page(page: Path) -> None:
    text = page.read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Metrics on scenes", "AP of each label on scenes", "Ablation on scenes", "Effect of m", "Photos",
        "Learned label states", "Training", "Unfinished runs",
    ]  # fmt: skip
    assert "paper" not in read(page).text  # the paper has no numbers on scenes


def test_the_page_is_self_contained(page: Path) -> None:
    reader = read(page)
    assert all(source.startswith(("data:", "#")) for source in reader.sources)
    assert len([s for s in reader.sources if s.startswith("data:image/")]) == 4


def test_labels_and_errors_are_text_not_markup(page: Path) -> None:
    reader = read(page)
    assert "script" not in reader.tags
    assert "b" not in reader.tags
    assert "<script>alert(1)</script>" in reader.text
    assert "The loss is <b>not finite</b>" in reader.text
    markdown = (page.parent / "report.md").read_text()
    assert "<script>" not in markdown
    assert r"a\|b\*" in markdown


def test_numbers_of_the_ablation_table(page: Path) -> None:
    cells = read(page).text
    row = cells.index("w/o Go")
    values = [cell for cell in cells[row + 1 : row + 12] if cell]
    # Test metrics decrease by one in the order of ALL + TOP3: CF1 is the fourth, OF1 the seventh.
    assert values[:5] == ["3", "82.0 ± 2.0", "79.0 ± 2.0", "76.0 ± 2.0", "9.0 ± 1.0"]


def test_models_have_the_same_order_in_all_tables(page: Path) -> None:
    lines = page.with_suffix(".md").read_text().splitlines()
    metrics = lines.index("**All labels, %**") + 4
    rows = [line.split("|")[1].strip() for line in itertools.takewhile(lambda line: line, lines[metrics:])]
    heads = next(line for line in lines[lines.index("**AP, %**") :] if line.startswith("|")).split("|")[2:-1]
    assert [head.strip() for head in heads] == rows


def test_provenance_is_listed(page: Path) -> None:
    text = read(page).text
    for words in ("0, 1, 2", "mlgcn", "scenes_tiny (null)", "3 train, 2 val, 2 test"):
        assert words in text
    assert any("gm-mlic train seed=0 'x=<b>'" in part for part in text)


def test_provenance_is_below_each_table_and_picture(page: Path) -> None:
    text = page.read_text()
    tables, pictures = text.count("<table"), text.count("<figure")
    assert text.count("<summary>Provenance</summary>") == tables + pictures - 1  # not for unfinished runs
    (ablation,) = re.findall(r"<h2>Ablation on scenes</h2>.*?</section>", text, re.DOTALL)
    shared = re.search(r"<dt>settings of all</dt><dd><pre>(.*?)</pre>", ablation)
    assert shared is not None
    assert {"graph.m=10", "model.fusion=product", "trainer.max_epochs=2"} <= set(shared[1].split())
    assert "model.edge_types" not in shared[1]  # differs between the groups
    assert "seed" not in shared[1]
    assert 'model.edge_types=["spatial", "semantic", "matches"]' in html.unescape(text)  # in sections of one group


def test_figures_are_written_as_png_and_svg(page: Path) -> None:
    names = {path.name for path in page.parent.iterdir()}
    assert {f"{name}.{kind}" for name in ("sweep_m", "training", "label_map") for kind in ("png", "svg")} <= names
    for name in ("sweep_m.png", "training.png", "label_map.png", "photos.jpg"):
        with Image.open(page.parent / name) as image:
            assert image.width > 300


def test_markdown_tables_have_equal_row_lengths(page: Path) -> None:
    lines = (page.parent / "report.md").read_text().splitlines()
    widths = [len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0 for line in lines]
    assert all(a == b for a, b in itertools.pairwise(widths) if a and b)


def write_model(path: Path, name: str, **changes: Any) -> Path:
    """A run of a model without the arguments of GM-MLIC."""
    write_run(path, **changes)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["model"] = {"name": name}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def tables(page: Path, heading: str) -> list[list[list[str]]]:
    """The tables of a section of ``report.md``, as rows of cells."""
    section = page.with_suffix(".md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    parts = [part.splitlines() for part in re.split(r"\n\n", section) if part.startswith("| ")]
    return [[[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in part] for part in parts]


@pytest.mark.parametrize(
    ("dataset", "number", "systems", "width"),
    [
        ("voc2007", 1, "HCP CNN-RNN ResNet-101 RNN-Attention ML-GCN SSGRL TSGCN GM-MLIC", 21),
        ("coco2014", 2, "CNN-RNN ResNet-101 RNN-Attention SRN ML-GCN SSGRL CMA TSGCN GM-MLIC", 13),
        ("nuswide", 3, "CNN-RNN SRN MLIC-KD-WSD PLA CMA GM-MLIC", 5),
    ],
)
def test_tables_of_the_paper(tmp_path: Path, dataset: str, number: int, systems: str, width: int) -> None:
    """All rows of the paper; a run is below the row of its system."""
    for seed in (0, 1):
        write_run(tmp_path / f"ours-{seed}", dataset__name=dataset, mAP=94.0 + seed, seed=seed)
    # The paper's numbers are compared with the full model, even if an ablation is better.
    write_run(tmp_path / "better", dataset__name=dataset, mAP=99.0, model__edge_types=["semantic", "matches"])
    write_model(tmp_path / "cnn_rnn", "cnn_rnn", dataset__name=dataset, mAP=50.0)
    write_model(tmp_path / "other", "query2label", dataset__name=dataset, mAP=51.0)
    page = write_report(runs(tmp_path), tmp_path / "out")
    found = tables(page, f"The paper's Table {number}: {dataset}")
    assert sum(len(table[0]) - 2 for table in found) == width
    for head, _, *rows in found:
        assert [row[0] for row in rows if row[1] == "paper"] == systems.split()
        ours = [row for row in rows if row[1] not in ("paper", "difference")]
        assert [row[:2] for row in ours] == [["CNN-RNN", "cnn\\_rnn, 1 run"], ["GM-MLIC", "gm\\_mlic, 2 runs"]]
        for row in ours:
            theirs, gaps = rows[rows.index(row) - 1], rows[rows.index(row) + 1]
            assert (theirs[:2], gaps[:2]) == ([row[0], "paper"], ["", "difference"])
            for mine, printed, difference in zip(row[2:], theirs[2:], gaps[2:], strict=True):
                if "-" in (mine, printed):
                    assert difference == "-"
                else:
                    assert float(difference) == pytest.approx(float(mine.split()[0]) - float(printed), abs=0.06)
        if "mAP" in head:
            assert [row[head.index("mAP")] for row in ours] == ["50.0", "94.5 ± 0.7"]
    text = page.read_text()
    assert f"All systems of Table {number} of Wu et al." in text
    assert text.count('class="quiet"><td>') == len(found) * len(systems.split())


def test_the_ap_of_each_label_is_beside_the_papers(tmp_path: Path) -> None:
    write_run(tmp_path / "a", dataset__name="voc2007", mAP=80.0)
    (head, _, *rows), _, (last, *_) = tables(
        write_report(runs(tmp_path), tmp_path / "out"), "The paper's Table 1: voc2007"
    )
    assert (head[2:4], last[-2:]) == (["aeroplane", "bicycle"], ["tvmonitor", "mAP"])
    place = next(n for n, row in enumerate(rows) if row[1] == "gm\\_mlic, 1 run")
    assert [row[2:4] for row in rows[place - 1 : place + 2]] == [["99.4", "98.7"], ["-", "81.0"], ["-", "-17.7"]]


def test_the_ablation_beside_the_papers(tmp_path: Path) -> None:
    for name, edges in (("full", ["spatial", "semantic", "matches"]), ("no_semantic", ["spatial", "matches"])):
        write_run(tmp_path / name, dataset__name="voc2007", model__edge_types=edges)
    cells = [cell for cell in read(write_report(runs(tmp_path), tmp_path / "out")).text if cell]
    row = cells.index("w/o Gl", cells.index("Ablation, %"))
    assert cells[row + 1 : row + 7][-1] == "92.8"


def test_the_ablation_table_has_all_numbers_of_the_paper(tmp_path: Path) -> None:
    for name, changes in (("full", {}), ("w/o Gl", {"model__edge_types": ["spatial", "matches"]})):
        write_run(tmp_path / name.replace("/", ""), dataset__name="coco2014", **changes)
    text = read(write_report(runs(tmp_path), tmp_path / "out")).text
    table = [cell for cell in text[text.index("Ablation, %") :] if cell]
    head = ["runs", "mAP", "CP", "CR", "CF1", "OF1", "full - this, mAP", "paper, CP", "paper, CR", "paper, CF1"]
    assert table[1 : len(head) + 1] == head
    row = table[table.index("w/o Gl") :]
    assert row[8:11] == ["85.1", "68.3", "76.5"]


def test_results_of_other_versions_are_listed_as_damaged(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    for name, content in (("b", {"test": {"mAP": 3.0}}), ("c", {"test": {"mAP": 3.0, "AP": {"cat": "x"}}})):
        path = write_run(tmp_path / name, graph__m=3)
        result = json.loads((path / "metrics.json").read_text())
        (path / "metrics.json").write_text(json.dumps(content if name == "b" else result | content))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.yaml").write_text("a: [")
    text = write_report(find_runs([tmp_path]), tmp_path / "out").read_text()
    assert text.count("metrics.json is from another version: run the command again") == 2
    assert "config.yaml is damaged" in text


def test_sweeps_mention_the_papers_choice(tmp_path: Path) -> None:
    for m in (5, 10):
        write_run(tmp_path / f"m{m}", dataset__name="voc2007", graph__m=m)
    assert "The paper chose m = 10 on voc2007." in write_report(runs(tmp_path), tmp_path / "out").read_text()


def test_numbers_of_the_paper() -> None:
    """Rows have a value for each column, systems have a model, and printed means and F1s match the values.

    The paper's own exceptions are in ``paper.yaml``: SRN and SSGRL average F1 over labels, GM-MLIC's numbers differ.
    """
    paper = read_paper()
    exceptions = {"GM-MLIC", "SRN", "SSGRL"}
    systems = set()
    for dataset in ("voc2007", "coco2014", "nuswide"):
        columns = [name for part in paper[dataset]["columns"] for name in part]
        systems |= set(paper[dataset]["rows"])
        for system, values in paper[dataset]["rows"].items():
            of = dict(zip(columns, values, strict=True))
            if dataset == "voc2007" and system not in exceptions:
                assert of.pop("mAP") == pytest.approx(sum(of.values()) / 20, abs=0.051)
            for name in (name for name in of if name.endswith("F1") and dataset == "coco2014"):
                p, r = of[name.replace("F1", "P")], of[name.replace("F1", "R")]
                if p is not None and system not in exceptions:
                    assert of[name] == pytest.approx(2 * p * r / (p + r), abs=0.08)
    assert systems == set(paper["models"])
    assert [name for part in paper["coco2014"]["columns"] for name in part] == [*ALL, *TOP3]
    # Section 4.3: GM-MLIC is 0.4, 1.3 and 1.6 above TSGCN, SSGRL and ML-GCN on VOC 2007.
    mAP = {system: values[-1] for system, values in paper["voc2007"]["rows"].items()}
    gains = [round(mAP["GM-MLIC"] - mAP[system], 1) for system in ("TSGCN", "SSGRL", "ML-GCN")]
    assert gains == [0.4, 1.3, 1.6]


def test_the_models_of_the_papers_systems_exist() -> None:
    names = {name for models in read_paper()["models"].values() for name in models}
    assert names <= set(list_models())


def test_a_report_needs_a_finished_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a", finished=False)
    with pytest.raises(RunFolderError, match=r"None of 1 runs is finished \(a failed\)"):
        write_report(find_runs([tmp_path]), tmp_path / "report")
    assert not (tmp_path / "report").exists()


DAMAGED_BOX = {"label": "a", "score": 1, "box": [0, 0, 1, 1], "kind": "new"}


@pytest.mark.parametrize(
    "text",
    [
        "[", "{}", '[{"file": "00.jpg"}]', '[{"file": "00.jpg", "top": [{"box": [1]}]}]', "[0]",
        json.dumps([{"file": "00.jpg", "top": [DAMAGED_BOX]}]),
    ],
)  # fmt: skip
def test_damaged_pictures_are_left_out(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    run = write_run(tmp_path / "run")
    (run / "examples" / "examples.json").write_text(text)
    (run / "label_states.npz").write_bytes(b"PK" + text.encode())
    page = write_report(find_runs([run]), tmp_path / "out").read_text()
    assert "AP of each label" in page
    assert "Figure 3" not in page
    assert "examples is damaged" in caplog.text or text == "{}"
    assert "label_states.npz is damaged" in caplog.text


def test_label_states_of_other_shapes_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write_run(tmp_path / "run")
    np.savez(run / "label_states.npz", labels=np.array(LABELS), states=np.ones((3, 8)), input=np.ones((3, 5)))
    page = write_report(find_runs([run]), tmp_path / "out").read_text()
    assert "Figure 5" not in page
    assert "label_states.npz is damaged" in caplog.text


def test_report_of_a_single_run(tmp_path: Path) -> None:
    """The run has no examples, label states or ablations."""
    run = write_run(tmp_path / "a")
    result = json.loads((run / "metrics.json").read_text())
    del result["revision"]
    (run / "metrics.json").write_text(json.dumps(result))
    shutil.rmtree(run / "examples")
    (run / "label_states.npz").unlink()
    headings = re.findall(r"<h2>(.*?)</h2>", write_report(runs(tmp_path), tmp_path / "out").read_text())
    assert headings == ["Metrics on scenes", "AP of each label on scenes", "Training"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_browser(page: Path, tmp_path: Path, width: int) -> None:
    """The page runs no script, fetches nothing, and is not wider than the window; tables may scroll."""
    probe = tmp_path / "probe.html"
    script = (
        "<script>addEventListener('load', () => { document.title = [document.documentElement.scrollWidth, innerWidth,"
        " performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length].join(' ') })"
        "</script>"
    )
    probe.write_text(page.read_text().replace("</body>", f"{script}</body>"))
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
            f"--window-size={width},900", "--dump-dom", f"file://{probe}",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    page_width, window, fetched = map(int, title.groups())
    assert page_width <= window
    assert fetched == 0
