from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from gm_mlic.reporting.runs import runs_table
from gm_mlic.runs import find_runs

MakeRun = Callable[..., Path]


def printed(tmp_path: Path, width: int = 200) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(runs_table(find_runs([tmp_path])))
    return console.export_text().splitlines()


def test_differing_settings_are_columns_and_sort_keys(tmp_path: Path, make_run: MakeRun):
    for name, m, seed in (("a", 10, 0), ("b", 5, 1), ("c", 5, 0)):
        make_run(tmp_path / name, graph={"m": m}, seed=seed, trainer={"max_epochs": 2}, dataset={"name": "scenes"})
    lines = printed(tmp_path)
    assert "graph.m" in lines[2]
    assert "seed" in lines[2]
    assert "dataset.name" not in lines[2]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "finished" in line]
    assert [row[0][-1] for row in rows] == ["c", "b", "a"]
    assert rows[0][1:] == ["finished", "2/2", "5", "0", "30.50", "31.00"]


def test_settings_that_follow_from_another_are_hidden(tmp_path: Path, make_run: MakeRun):
    for k in (1, 2):
        make_run(tmp_path / str(k), model={"k": k, "widths": [64] * k})
    head = next(line for line in printed(tmp_path) if "state" in line)
    assert "model.k" in head
    assert "model.widths" not in head


def test_models_and_datasets_that_differ_are_columns(tmp_path: Path, make_run: MakeRun):
    for model, dataset in (("mil_max", "scenes"), ("query2label", "voc2007"), ("query2label", "scenes")):
        make_run(tmp_path / f"{model}-{dataset}", model={"name": model}, dataset={"name": dataset})
    head, *rows = (line for line in printed(tmp_path) if "state" in line or "finished" in line)
    titles = [title.strip() for title in head.strip("┃").split("┃")]
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    shown = sorted((row[titles.index("model.name")], row[titles.index("dataset.name")]) for row in cells)
    assert shown == [("mil_max", "scenes"), ("query2label", "scenes"), ("query2label", "voc2007")]


def test_all_settings_of_a_search_are_shown(tmp_path: Path, make_run: MakeRun):
    for n in (1, 2, 3):
        make_run(tmp_path / str(n), optimizer={"lr": n / 1000, "weight_decay": n / 10})
    head = next(line for line in printed(tmp_path) if "state" in line)
    assert "optimizer.lr" in head
    assert "optimizer.weight_decay" in head


def test_many_differing_settings_are_listed_in_one_column(tmp_path: Path, make_run: MakeRun):
    usual = {f"s{n}": 0 for n in range(8)}
    make_run(tmp_path / "usual", model=usual)
    for n in range(8):
        make_run(tmp_path / str(n), model=usual | {f"s{n}": 5, "s0": 7 if n == 3 else usual["s0"]})
    text = printed(tmp_path)
    assert "settings" in next(line for line in text if "state" in line)
    listed = {line.split("│")[1].strip()[-1]: line.split("│")[4].strip() for line in text if "finished" in line}
    assert listed["2"] == "model.s2=5"
    assert listed["3"] == "model.s0=7 model.s3=5"
    assert listed["l"] == ""


def test_states_of_unfinished_runs(tmp_path: Path, make_run: MakeRun):
    make_run(tmp_path / "half", finished=False)
    failed = make_run(tmp_path / "[red]failed", finished=False)
    (failed / "state.json").write_text(json.dumps({"state": "failed", "error": "no [bold]disk"}))
    text = "\n".join(printed(tmp_path))
    assert "stopped" in text
    assert "[red]failed" in text
    assert "2/?" in text


def test_result_of_another_version(tmp_path: Path, make_run: MakeRun):
    run = make_run(tmp_path / "a")
    (run / "metrics.json").write_text('{"test": {}}')
    assert "finished" in "\n".join(printed(tmp_path))


def test_the_table_fits_a_terminal(tmp_path: Path, make_run: MakeRun):
    make_run(tmp_path / "a-run-with-quite-a-long-name-in-a-deep-folder")
    assert all(len(line) <= 80 for line in printed(tmp_path, width=80))
