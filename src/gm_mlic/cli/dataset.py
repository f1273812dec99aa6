"""Command ``gm-mlic dataset``: statistics of a dataset as tables, pictures and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from gm_mlic.config import section
from gm_mlic.datasets.statistics import statistics, unreadable_images
from gm_mlic.embeddings import embed_labels
from gm_mlic.io import Progress
from gm_mlic.reporting.statistics import cooccurrence_table, labels_table, overview_table, statistics_picture
from gm_mlic.training import build


def describe(config: DictConfig) -> dict[str, Any]:
    """Print the statistics of ``config.dataset`` and write them to ``config.run_dir``; returns ``statistics.json``.

    Missing and unreadable images and labels without a vector are listed, if the settings of the dataset allow them.
    """
    datasets = build.build_datasets(config, config.splits)
    splits = [statistics(dataset) for dataset in datasets.values()]
    unreadable = None
    if config.check:
        unreadable = {
            split: unreadable_images(dataset, Progress(f"{split}: reading", "images", len(dataset)).track)
            for split, dataset in datasets.items()
        }
    labels = splits[0].labels
    unknown = None if config.get("embedding") is None else _unknown_labels(config, labels)

    console = Console(highlight=False)
    for table in (labels_table(splits), cooccurrence_table(splits[0]), overview_table(splits, unreadable)):
        console.print(table)
    for split, stats in zip(datasets, splits, strict=True):
        _list(f"{split}: {len(stats.missing):,} missing images", stats.missing)
        bad = {} if unreadable is None else unreadable[split]
        _list(f"{split}: {len(bad):,} unreadable images", list(bad.values()))
    if unknown is not None:
        source = config.embedding.get("path", config.embedding.name)
        title = f"{len(unknown)} of {len(labels)} labels are out of vocabulary ({source})"
        _list(title, unknown, most=len(unknown))
        if not unknown:
            print(f"{title}.")

    folder = Path(config.run_dir)
    pictures = [folder / f"{split}.png" for split in datasets]
    for path, stats in zip(pictures, splits, strict=True):
        statistics_picture(path, stats)
    content = {
        "dataset": splits[0].name,
        "splits": {stats.split: stats.as_dict() for stats in splits},
        "unreadable": unreadable,
        "out_of_vocabulary": unknown,
    }
    (folder / "statistics.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"folder:   {folder}\npictures: {', '.join(path.name for path in pictures)}")
    return content


def _unknown_labels(config: DictConfig, labels: tuple[str, ...]) -> list[str]:
    """Labels with an out-of-vocabulary word."""
    settings = section(config, "embedding")
    embedding = embed_labels(labels, **settings | ({"oov": "zeros"} if "oov" in settings else {}))
    return list(embedding.out_of_vocabulary)


def _list(title: str, names: Sequence[str], most: int = 10) -> None:
    """Print a title and up to ``most`` names; nothing without names."""
    if names:
        more = f"\n  ... and {len(names) - most:,} more (statistics.json)" if len(names) > most else ""
        print(f"{title}:\n  " + "\n  ".join(names[:most]) + more)
