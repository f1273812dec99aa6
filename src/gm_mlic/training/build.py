"""Builders of the parts of a run from its config: datasets, detector, stores, graphs, model, loss, metrics."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from gm_mlic.config import section
from gm_mlic.datasets import MultiLabelDataset
from gm_mlic.datasets.base import check_dataset
from gm_mlic.detection import InstanceExtractor, LookupExtractor, MultiViewExtractor, build_extractor
from gm_mlic.device import resolve_device, resolve_num_workers
from gm_mlic.distributed import rank_info
from gm_mlic.embeddings import embed_classes, labels_of, labels_of_classes
from gm_mlic.errors import ConfigError, DataError, config_keys
from gm_mlic.graphs import AssignmentBatchDataset, AssignmentGraph, AssignmentGraphDataset, label_candidates
from gm_mlic.instances import InstanceStore, extract
from gm_mlic.io import few
from gm_mlic.metrics import MultiLabelMetrics
from gm_mlic.nn import FeatureStatistics
from gm_mlic.nn.baselines import LabelStatistics
from gm_mlic.optim import build_optimizer, check_schedule
from gm_mlic.registry import DATASETS, LOSSES, MODELS
from gm_mlic.schema import as_typed
from gm_mlic.targets import positives_and_counted
from gm_mlic.zoo.metadata import ModelMetadata

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


# Datasets


def build_dataset(config: DictConfig, split: str) -> MultiLabelDataset:
    """Build one split of ``config.dataset``; ConfigError for an unknown dataset or split."""
    if split not in SPLITS:
        raise ConfigError(f"split={split}: expected one of {', '.join(SPLITS)}.")
    with config_keys("dataset", split="split", size=f"dataset.sizes.{split}"):
        dataset: MultiLabelDataset = DATASETS.build(split=split, **section(config, "dataset"))
        check_dataset(dataset)
    return dataset


def build_datasets(config: DictConfig, splits: Sequence[str] = SPLITS) -> dict[str, MultiLabelDataset]:
    """Build splits of ``config.dataset``; DataError if their labels differ."""
    datasets = {split: build_dataset(config, split) for split in splits}
    first = splits[0]
    for split, dataset in datasets.items():
        if tuple(dataset.labels) != tuple(datasets[first].labels):
            raise DataError(f"The labels of {split} and {first} differ: all splits need the same labels in one order.")
    return datasets


# Detection and instances


def build_detector(config: DictConfig) -> InstanceExtractor:
    """Build the extractor of ``config.detector`` on the trainer's device."""
    settings = section(config, "detector")
    del settings["max_instances"]
    with config_keys("detector"):
        return build_extractor(settings.pop("name"), device=resolve_device(config.trainer.accelerator), **settings)


def check_lookup(config: DictConfig, extractor: InstanceExtractor, datasets: Sequence[MultiLabelDataset]) -> None:
    """Check that the instances of datasets can be looked up, before any is; other extractors pass.

    Raises:
        ConfigError: if settings need instances of other images than the photos.
        DataError: if photos have no instances.
    """
    if not isinstance(extractor, LookupExtractor):
        return
    for key, off in (("instances.online", False), ("instances.num_augmentations", 0), ("graph.views", 1)):
        if (value := OmegaConf.select(config, key)) != off:
            raise ConfigError(
                f"{key}={as_typed(value)} with the detector {extractor.name}: its files have only the instances of "
                f"whole photos. Set {key}={as_typed(off)}."
            )
    with config_keys("detector"):
        for dataset in datasets:
            extractor.check_ids(dataset.ids)


def build_store(config: DictConfig, dataset: MultiLabelDataset, extractor: InstanceExtractor) -> InstanceStore | None:
    """Open the store of one split, or extract it; an interrupted extraction is resumed.

    It is in ``instances.path``, or in a folder named with the hash of everything it depends on. Processes of one
    torchrun or srun job share the images.

    Returns:
        The complete store; None if the shard of this process is finished and others are not.

    Raises:
        StoreError: if the store at ``instances.path`` was made for another dataset or detector.
    """
    instances, split = config.instances, dataset.split
    check_lookup(config, extractor, [dataset])
    m, views = stored_instances(config, split), instances.num_augmentations if split == "train" else 0
    if split != "train" and config.graph.views > 1:
        with config_keys("graph"):
            extractor = MultiViewExtractor(extractor, config.graph.views)
    if instances.path is not None:
        path = Path(instances.path) / split
    else:
        depends_on = [dataset.fingerprint, extractor.fingerprint, m, instances.batch_size]
        depends_on += [views, instances.view_size] if views else []
        digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:8]
        path = Path(instances.root) / dataset.name / f"{split}-{extractor.name}-{digest}"
    ranks = rank_info()
    index, shards = (ranks.rank, ranks.world_size) if instances.shard is None else map(int, instances.shard.split("/"))
    keys = {"m": "detector.max_instances", "views": "instances.num_augmentations", "path": "instances.root"}
    keys |= {name: f"instances.{name}" for name in ("view_size", "batch_size", "num_workers", "overwrite", "shard")}
    with config_keys("detector", **keys):  # the other arguments are the detector's
        store = extract(
            dataset,
            extractor,
            path,
            m=m,
            views=views,
            view_size=instances.view_size,
            batch_size=instances.batch_size,
            num_workers=resolve_num_workers(instances.num_workers, resolve_device(config.trainer.accelerator)),
            overwrite=instances.overwrite,
            shard=(index, shards),
            together=instances.shard is None,
        )
    if store is not None and store.manifest.skipped:
        names = list(store.manifest.skipped)
        text = "%s: %d of %d images cannot be read and are left out: %s"
        log.warning(text, split, len(names), len(dataset), few(names, 5))
    return store


def stored_instances(config: DictConfig, split: str) -> int:
    """Instances per image in the store of a split."""
    return int(config.detector.max_instances * (1 if split == "train" else config.graph.views))


# Labels and graphs


def graph_settings(config: DictConfig) -> dict[str, Any]:
    """``graph`` of a :class:`ModelMetadata`: ``config.graph`` and the model's edge types, without candidates."""
    settings = section(config, "graph")
    del settings["labels_per_class"]
    edge_types = list(config.model.edge_types) if "edge_types" in config.model else []
    return settings | {"edge_types": edge_types, "candidates": None}


def class_vectors(config: DictConfig, classes: Sequence[str]) -> torch.Tensor | None:
    """Word vectors (D, D_l) of detector classes, zeros for unknown words; None without classes."""
    if not classes:
        return None
    with config_keys("embedding"):
        return embed_classes(classes, **section(config, "embedding"))


def prior_tables(
    dataset: MultiLabelDataset, extractor: InstanceExtractor, label_vectors: torch.Tensor, words: torch.Tensor | None
) -> dict[str, Any]:
    """``class_labels`` and ``label_counts`` of ``graph``, for models that use the detector's classes."""
    lists = labels_of_classes(
        extractor.labels, dataset.labels, None if words is None else words.numpy(), label_vectors.numpy()
    )
    named = sorted({c for of_class in lists for c in of_class})
    if not named:
        log.warning(
            "The prior is off: no label has the name of a class of the detector %s (%s), or a similar one.",
            extractor.name, ", ".join(extractor.labels[:3]) or "it has no classes",
        )  # fmt: skip
    elif len(named) < len(dataset.labels):
        rest = [label for c, label in enumerate(dataset.labels) if c not in named]
        log.info("labels without a class of the detector: %s", few(rest, 5))
    present, _ = positives_and_counted(dataset.targets == 1, dataset.difficult, "positive")
    return {"class_labels": lists or [[]], "label_counts": present.sum(axis=0).tolist()}


def learn_candidates(store: InstanceStore, m: int, labels_per_class: int) -> list[list[int]]:
    """Label candidates of each detector class (:func:`~gm_mlic.graphs.label_candidates`), learned from a store."""
    detected_label = torch.from_numpy(store.detected_labels[store.rows, 0, :m]).long()
    score = torch.from_numpy(store.scores[store.rows, 0, :m])
    difficult = None if store.difficult is None else store.difficult[store.rows]
    present, _ = positives_and_counted(store.targets[store.rows] == 1, difficult, "positive")  # they are in the image
    class_to_label = torch.tensor(labels_of(store.manifest.detector_labels, store.manifest.labels), dtype=torch.int64)
    with config_keys("graph"):
        table = label_candidates(detected_label, score, torch.from_numpy(present), labels_per_class, class_to_label)
    return [row.nonzero().flatten().tolist() for row in table]


def build_graphs(
    store: InstanceStore, graph: AssignmentGraph, *, layout: str, augment: bool = False, seed: int = 0
) -> AssignmentBatchDataset | AssignmentGraphDataset:
    """Dataset of the assignment graphs of a store: dense batches, or ``HeteroData`` (``layout="sparse"``)."""
    kind = AssignmentGraphDataset if layout == "sparse" else AssignmentBatchDataset
    with config_keys("graph"):
        return kind(store, graph, augment=augment, seed=seed)


# Model, loss, metrics


def model_settings(
    config: DictConfig, *, instance_dim: int, label_dim: int, labels: Sequence[str], detector_labels: Sequence[str]
) -> dict[str, Any]:
    """Arguments of ``create_model``: ``config.model`` and the data-dependent arguments that the model accepts."""
    settings = section(config, "model")
    data_arguments = {
        "instance_dim": instance_dim,
        "label_dim": label_dim,
        "num_labels": len(labels),
        "labels": list(labels),
        "detector_labels": list(detector_labels),
    }
    if settings.get("class_words"):
        settings["class_words"] = len(detector_labels)
    accepted = MODELS.arguments(settings["name"])
    return settings | {name: value for name, value in data_arguments.items() if name in accepted}


def build_model(metadata: ModelMetadata, train: MultiLabelDataset) -> torch.nn.Module:
    """Build the model with new weights; fit the label statistics of models that need them on the training split."""
    with config_keys("model"):
        model = metadata.build_model()
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(f"The model {metadata.model['name']} has no parameters to train: correct its class.")
        if isinstance(model, LabelStatistics):
            difficult = None if train.difficult is None else torch.from_numpy(train.difficult)
            model.fit(torch.from_numpy(train.targets), difficult)
    return model


def fit_features(
    model: torch.nn.Module, store: InstanceStore, m: int, label_vectors: torch.Tensor, words: torch.Tensor | None
) -> None:
    """Fit the feature statistics of models that need them on the training instances, up to 100,000 of them."""
    if not isinstance(model, FeatureStatistics):
        return
    rows = store.rows[:: max(1, len(store.rows) * m // 100_000)]
    used = np.arange(min(m, store.features.shape[2])) < np.asarray(store.counts)[rows, :1]
    features = torch.from_numpy(np.asarray(store.features[rows, 0, :m])[used]).float()
    model.fit_features(features, label_vectors, words)


def loss_of(config: DictConfig, ratio: torch.Tensor) -> torch.nn.Module:
    """Build ``config.loss``, with label frequencies r_c (C,) if it has such an argument.

    It does not validate targets, which would synchronize the GPU at every step; the datasets validate them.
    """
    settings = section(config, "loss")
    given: dict[str, Any] = {"label_ratio": ratio, "validate_args": False}
    accepted = LOSSES.arguments(settings["name"])
    with config_keys("loss"):
        return LOSSES.build(**settings, **{k: v for k, v in given.items() if k in accepted})  # type: ignore[no-any-return]


def check_optimizer(config: DictConfig) -> None:
    """Check the settings of the optimizer and its schedule, which are built only when training starts."""
    with config_keys("optimizer"):
        optimizer = build_optimizer(section(config, "optimizer"), [torch.nn.Parameter(torch.zeros(1, 1))])
    with config_keys("scheduler"):
        check_schedule(section(config, "scheduler"), optimizer)


def build_metrics(config: DictConfig, labels: Sequence[str]) -> MultiLabelMetrics:
    """Build the metrics of ``config.metrics``; null options default to the convention's."""
    options = {name: value for name, value in section(config, "metrics").items() if value is not None}
    with config_keys("metrics"):
        return MultiLabelMetrics(len(labels), labels=labels, **options)


def passes(config: DictConfig, num_images: int, world_size: int) -> int:
    """How often the training images are repeated in an epoch, so that there are ``trainer.min_steps`` steps."""
    trainer = config.trainer
    steps = math.ceil(trainer.min_steps / trainer.max_epochs)  # at least, of an epoch
    return int((steps - 1) * trainer.batch_size * world_size // num_images) + 1 if steps else 1
