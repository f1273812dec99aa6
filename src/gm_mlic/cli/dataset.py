"""``gm-mlic dataset``: what is in a dataset, as tables, a picture of each split and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from gm_mlic.datasets import MultiLabelDataset
from gm_mlic.datasets.statistics import statistics, unreadable_images
from gm_mlic.embeddings import embed_labels
from gm_mlic.reporting.statistics import cooccurrence_table, labels_table, overview_table, statistics_picture
from gm_mlic.training import build
from gm_mlic.validation import section


def describe(config: DictConfig) -> dict[str, Any]:
    """Count what is in the splits of ``config.dataset``, print it and write it into ``config.run_dir``.

    Returns:
        What ``statistics.json`` holds.

    Raises:
        GMMLICError: for a dataset that cannot be read. Missing and unreadable images, and labels without a vector, are
            part of the answer, as far as the dataset's own settings let them pass.
    """
    datasets = {split: build.build_dataset(config, split) for split in config.splits}
    splits = [statistics(dataset) for dataset in datasets.values()]
    unreadable = {split: _check(dataset) for split, dataset in datasets.items()} if config.check else None
    labels = splits[0].labels
    unknown = None if config.get("embedding") is None else _unknown_labels(config, labels)

    console = Console(highlight=False)
    for table in (labels_table(splits), cooccurrence_table(splits[0]), overview_table(splits, unreadable)):
        console.print(table)
    for split, stats in zip(datasets, splits, strict=True):
        _list(f"{split}: {len(stats.missing):,} images are missing", stats.missing)
        bad = {} if unreadable is None else unreadable[split]
        _list(f"{split}: {len(bad):,} images cannot be read", list(bad.values()))
    if unknown is not None:
        title = f"{len(unknown)} of {len(labels)} labels are out of vocabulary ({config.embedding.path or 'hashed'})"
        _list(title, unknown, every=True)

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


def _check(dataset: MultiLabelDataset) -> dict[str, str]:
    def bar(reasons: Iterable[str | None]) -> Iterable[str | None]:
        title = f"{dataset.split}: reading {len(dataset):,} images"
        return track(reasons, title, total=len(dataset), console=Console(stderr=True))

    return unreadable_images(dataset, bar)


def _unknown_labels(config: DictConfig, labels: tuple[str, ...]) -> list[str]:
    """Labels with a word that the embedding has no vector for."""
    embedding = embed_labels(labels, **section(config, "embedding") | {"oov": "zeros"})
    return list(embedding.out_of_vocabulary)


def _list(what: str, names: Iterable[str], every: bool = False) -> None:
    """Print what there is too much of; ten of them, or every one. Nothing if it is none and need not be said."""
    names = list(names)
    if names:
        printed = names if every else names[:10]
        more = "" if len(printed) == len(names) else f"\n  ... and {len(names) - len(printed):,} more (statistics.json)"
        print(f"{what}:\n  " + "\n  ".join(printed) + more)
    elif every:
        print(f"{what}.")
