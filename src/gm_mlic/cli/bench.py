"""Command ``gm-mlic bench``: time and memory of dense and sparse execution."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from gm_mlic._version import __version__
from gm_mlic.bench import CASES, compare, grow, ratios, shares
from gm_mlic.config import section
from gm_mlic.device import resolve_device
from gm_mlic.reporting.runtime import draw_comparison, draw_growth, runtime_markdown, runtime_tables, shares_table
from gm_mlic.training import build

log = logging.getLogger(__name__)

#: Largest share of the memory that a training step is expected to need; executions above it are left out.
_MEMORY_SHARE = 0.7


def bench(config: DictConfig) -> dict[str, Any]:
    """Run the benchmarks of ``config.bench``; returns the content of ``results.json``."""
    settings = section(config, "bench")
    device = resolve_device(config.device)
    machine = describe_machine(device)
    limit = int(_MEMORY_SHARE * machine["memory"])
    shared = {name: settings[name] for name in ("batch", "k", "norm", "precision")}
    start = replace(CASES[settings["cases"][0]], **shared)
    options: dict[str, Any] = {"device": device, "memory_limit": limit, "log": log.info}
    results = [
        compare(
            replace(CASES[name], name=f"{name}, {fusion}", fusion=fusion, **shared),
            settings["executions"],
            repeats=tuple(settings["repeats"]),
            **options,
        )
        for name in settings["cases"]
        for fusion in settings["fusions"]
    ]
    summary = ratios(results[0])
    content: dict[str, Any] = {"machine": machine, "results": results, "summary": summary}

    folder = Path(config.run_dir)
    title = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"
    text = runtime_markdown(results)
    draw_comparison(folder / "executions.png", results)
    pictures = ["executions.png"]
    if settings["curves"]:
        eager = [name for name in settings["executions"] if name != "compiled"]
        curves = grow(
            replace(start, batch=settings["growth_batch"], fusion=settings["fusions"][0]),
            settings["curves"],
            eager,
            **options,
        )
        content["curves"] = curves
        draw_growth(folder / "growth.png", curves)
        pictures.append("growth.png")
    console = Console(highlight=False)
    print(title)
    for table in runtime_tables(results):
        console.print(table)
    if settings["shares"]:
        log.info("time from photo to labels")
        detector = build.build_detector(
            OmegaConf.create({"detector": config.detector, "trainer": {"accelerator": config.device}})
        )
        images = [torch.rand(3, 375, 500) for _ in range(4)]
        content["shares"] = shares(detector, images, start, device)
        console.print(shares_table(content["shares"], len(images), detector.name))
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "results.md").write_text(f"{title}\n\n{text}")
    print(f"folder:   {folder}\npictures: {', '.join(pictures)}")
    print(json.dumps({key: value if value is None else round(value, 3) for key, value in summary.items()}))
    return content


def describe_machine(device: str) -> dict[str, Any]:
    """Description of the machine: processor, threads, memory in bytes, versions."""
    if device != "cpu":
        processor, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    else:
        processor, memory = _processor(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor,
        "device": device,
        "threads": torch.get_num_threads(),
        "memory": memory,
        "torch": torch.__version__,
        "gm-mlic": __version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
