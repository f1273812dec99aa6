from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from gm_mlic.reporting.runtime import (
    draw_comparison,
    draw_growth,
    runtime_markdown,
    runtime_rows,
    runtime_tables,
    shares_table,
)


def result(m: int = 10, **executions: dict[str, Any]) -> dict[str, Any]:
    case = {"name": "voc2007, concat", "m": m, "C": 20, "k": 2, "batch": 16, "norm": "all", "precision": "float32"}
    return {"case": case, "executions": executions}


def row(forward: float, train: float, memory: int, **more: Any) -> dict[str, Any]:
    return {"forward": {"median": forward}, "train": {"median": train}, "memory": memory, **more}


SPARSE = row(8.0, 30.0, 6 * 2**30, roofline={"forward": 0.7, "train": 0.7})
DENSE = row(1.0, 5.0, 2**30, roofline={"forward": 0.55, "train": 0.6})


def test_rows_show_the_improvement_over_sparse() -> None:
    ((case, rows),) = runtime_rows([result(sparse=SPARSE, dense=DENSE)])
    assert case == "voc2007, concat (m=10, C=20, k=2, batch 16, norm all, float32)"
    assert rows[0] == ("sparse", "8 s", "", "30 s", "", "6144 MiB", "", "70 %")
    assert rows[1] == ("dense", "1 s", "8.0", "5 s", "6.0", "1024 MiB", "6.0", "55 %")


def test_rows_of_left_out_executions() -> None:
    ((_, rows),) = runtime_rows([result(sparse={"left_out": "needs about 90 GiB to train"}, dense=DENSE)])
    assert rows[0][0] == "sparse: needs about 90 GiB to train"
    assert rows[1][2] == ""


def test_tables_fit_in_80_columns() -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    for table in runtime_tables([result(sparse=SPARSE, dense=DENSE, compiled=DENSE)]):
        console.print(table)
    console.print(shares_table({"detection": 0.6, "data": 0.001, "graph": 0.2, "train": 0.9}, 4, "resnet50_fpn"))
    text = console.export_text()
    assert "…" not in text
    assert "dense" in text
    assert "600.0" in text
    assert "74.9 %" in text


def test_markdown() -> None:
    text = runtime_markdown([result(sparse=SPARSE, dense=DENSE)])
    lines = text.splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == lines[3].count("|")
    assert "| dense | 1 s | 8.0 |" in text


def test_pictures(tmp_path: Path) -> None:
    results = [result(sparse=SPARSE, dense=DENSE), result(sparse={"left_out": "x"}, dense=DENSE)]
    draw_comparison(tmp_path / "bars.png", results)
    curves = {"m": [result(5, sparse=SPARSE, dense=DENSE), result(50, sparse={"left_out": "x"}, dense=DENSE)]}
    draw_growth(tmp_path / "curves.png", curves)
    for name in ("bars.png", "curves.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
