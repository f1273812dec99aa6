"""From a config to the parts of a run: datasets, extractor, stores, label vectors, graphs, model, loss, trainer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

import gm_mlic.datasets
from gm_mlic.datasets.base import MultiLabelDataset, label_ratio
from gm_mlic.detection import FasterRCNNExtractor, GridExtractor, InstanceExtractor, build_extractor
from gm_mlic.embeddings import LabelEmbedding, embed_labels, labels_of
from gm_mlic.errors import ConfigError
from gm_mlic.graphs import AssignmentBatchDataset, AssignmentGraph, AssignmentGraphDataset, label_candidates
from gm_mlic.instances import InstanceStore, extract
from gm_mlic.losses import WeightedBCE
from gm_mlic.metrics import MultiLabelMetrics
from gm_mlic.nn import CountsLabels, model_arguments
from gm_mlic.training.callbacks import EpochBar, EpochCSV
from gm_mlic.training.checkpoint import WholeFiles
from gm_mlic.training.interruption import Interruption
from gm_mlic.training.processes import place, started_by
from gm_mlic.zoo.trained import Description

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


def section(config: DictConfig, key: str) -> dict[str, Any]:
    """A section of the config as a plain dict, resolved."""
    value = OmegaConf.to_container(config[key], resolve=True)
    assert isinstance(value, dict)
    return {str(k): v for k, v in value.items()}


# Datasets


def build_dataset(config: DictConfig, split: str) -> MultiLabelDataset:
    """One split of ``config.dataset``.

    Raises:
        ConfigError: for a dataset or a split that does not exist.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split}: expected one of {', '.join(SPLITS)}.")
    settings = section(config, "dataset")
    name = settings.pop("name")
    datasets = known_datasets()
    if name not in datasets:
        raise ConfigError(f"dataset.name={name}: expected one of {', '.join(sorted(datasets))}.")
    if "sizes" in settings:
        settings["size"] = settings.pop("sizes")[split]
    return datasets[name](split=split, **settings)  # type: ignore[no-any-return]


def known_datasets() -> dict[str, Any]:
    """The classes in :mod:`gm_mlic.datasets`, by name; a program of one's own may add to them."""
    return {cls.name: cls for cls in vars(gm_mlic.datasets).values() if _is_dataset(cls)}


def _is_dataset(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, MultiLabelDataset) and thing is not MultiLabelDataset


# Detection and instances


def build_detector(config: DictConfig) -> FasterRCNNExtractor | GridExtractor:
    """The extractor of ``config.detector``, on the device that the trainer would use."""
    settings = section(config, "detector")
    del settings["max_instances"]
    return build_extractor(settings.pop("arch"), device=device(config.trainer.accelerator), **settings)


def device(accelerator: str) -> str:
    """The torch device that Lightning's name of an accelerator stands for here, in this process of several."""
    if not torch.cuda.is_available() or accelerator not in ("auto", "gpu", "cuda"):
        return "cpu"
    return f"cuda:{place().local % torch.cuda.device_count()}"


def present_device(accelerator: str) -> str:
    """:func:`device`, for commands that can do without a run: who asks for a GPU there has no other use for a CPU.

    Raises:
        ConfigError: if a GPU is asked for, and there is none.
    """
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(f"accelerator={accelerator}: torch finds no GPU; auto takes one where there is one.")
    return device(accelerator)


def store_path(config: DictConfig, dataset: MultiLabelDataset, extractor: InstanceExtractor) -> Path:
    """Where the store of one split is: ``instances.path``, or a folder named after all that it depends on."""
    instances = config.instances
    if instances.path is not None:
        return Path(instances.path) / dataset.split
    views = _views(config, dataset.split)
    depends_on = [dataset.fingerprint, extractor.fingerprint, config.detector.max_instances, instances.batch_size]
    depends_on += [views, instances.view_size] if views else []
    digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:8]
    return Path(instances.root) / dataset.name / f"{dataset.split}-{extractor.name}-{digest}"


def build_store(config: DictConfig, dataset: MultiLabelDataset, extractor: InstanceExtractor) -> InstanceStore | None:
    """The store of one split: opened, or extracted first (what a killed extraction left is kept).

    Processes that were started together (torchrun, srun) share the images out among them.

    Returns:
        The complete store; None if this process did its shard and others have not yet done theirs.

    Raises:
        StoreError: if the store at ``instances.path`` was made for something else.
    """
    instances = config.instances
    here = place()
    index, shards = (here.rank, here.count) if instances.shard is None else map(int, instances.shard.split("/"))
    store = extract(
        dataset,
        extractor,
        store_path(config, dataset, extractor),
        m=config.detector.max_instances,
        views=_views(config, dataset.split),
        view_size=instances.view_size,
        batch_size=instances.batch_size,
        num_workers=instances.workers,
        overwrite=instances.overwrite,
        shard=(index, shards),
        together=instances.shard is None,
    )
    if store is not None and store.manifest.skipped:
        names = list(store.manifest.skipped)
        log.warning(
            "%s: %d of %d images cannot be read and are left out: %s%s",
            dataset.split, len(names), len(dataset), ", ".join(names[:5]), ", ..." if len(names) > 5 else "",
        )  # fmt: skip
    return store


def _views(config: DictConfig, split: str) -> int:
    """Only training images have augmented views."""
    return int(config.instances.views) if split == "train" else 0


# Labels and graphs


def build_embedding(config: DictConfig, labels: Sequence[str]) -> LabelEmbedding:
    """Vectors for these labels, as ``config.embedding`` says."""
    return embed_labels(labels, **section(config, "embedding"))


def graph_settings(config: DictConfig) -> dict[str, Any]:
    """``graph`` of a :class:`Description`: ``config.graph``, and the graphs that the model has; no candidates yet."""
    relations = {name: config.model.get(name, False) for name in ("instance_graph", "label_graph")}
    return section(config, "graph") | relations | {"candidates": None}


def learn_candidates(store: InstanceStore, m: int, candidates: int) -> list[list[int]]:
    """The labels that each class of the detector may be (:func:`~gm_mlic.graphs.label_candidates`), from a store.

    Args:
        store: of the training images.
        m: how many instances of each image the graphs have.
        candidates: how many labels for each class.
    """
    detected_label = torch.from_numpy(store.detected_labels[store.rows, 0, :m]).long()
    score = torch.from_numpy(store.scores[store.rows, 0, :m])
    seen = store.targets[store.rows] == 1
    if store.difficult is not None:  # difficult objects are seen as well
        seen |= store.difficult[store.rows]
    own = torch.tensor(labels_of(store.manifest.detector_labels, store.manifest.labels), dtype=torch.int64)
    table = label_candidates(detected_label, score, torch.from_numpy(seen), candidates, own)
    return [row.nonzero().flatten().tolist() for row in table]


def build_graphs(
    store: InstanceStore, graph: AssignmentGraph, *, execution: str, augment: bool = False, seed: int = 0
) -> AssignmentBatchDataset | AssignmentGraphDataset:
    """The assignment graphs of a store: whole batches where the model takes them, single graphs otherwise."""
    kind = AssignmentGraphDataset if execution == "explicit" else AssignmentBatchDataset
    return kind(store, graph, augment=augment, seed=seed)


# Model, loss, metrics


def model_settings(
    config: DictConfig, *, instance_dim: int, label_dim: int, labels: Sequence[str], detector_labels: Sequence[str]
) -> dict[str, Any]:
    """Arguments of ``create_model``: ``config.model``, and of what the data decide those that it takes."""
    settings = section(config, "model")
    of_data = {
        "instance_dim": instance_dim,
        "label_dim": label_dim,
        "num_labels": len(labels),
        "labels": list(labels),
        "detector_labels": list(detector_labels),
    }
    taken = model_arguments(settings["name"])
    return settings | {name: value for name, value in of_data.items() if name in taken}


def build_model(description: Description, train: MultiLabelDataset) -> torch.nn.Module:
    """The model with fresh weights, and the co-occurrences of the training split where it has a use for them."""
    model = description.build_model()
    if isinstance(model, CountsLabels):
        difficult = None if train.difficult is None else torch.from_numpy(train.difficult)
        model.count(torch.from_numpy(train.targets), difficult)
    return model


def build_loss(config: DictConfig, train: MultiLabelDataset) -> WeightedBCE:
    """The weighted cross-entropy, with r_c from the training split.

    It does not check targets, which would wait for the GPU at every step: graphs and on-line images checked them.
    """
    ratio = torch.from_numpy(label_ratio(train.targets, train.difficult))
    return WeightedBCE(ratio, **section(config, "loss"), validate_args=False)


def build_metrics(config: DictConfig, labels: Sequence[str]) -> MultiLabelMetrics:
    """The metrics of ``config.metrics``; options that are null are the preset's."""
    options = {name: value for name, value in section(config, "metrics").items() if value is not None}
    return MultiLabelMetrics(len(labels), labels=labels, **options)


# Trainer


def build_trainer(config: DictConfig, run_dir: Path | None, callbacks: Sequence[Callback] = ()) -> Trainer:
    """A Lightning trainer with our log lines instead of its own.

    Args:
        config: with ``trainer``.
        run_dir: None for evaluation only.
        callbacks: besides those that the config asks for.

    Raises:
        ConfigError: if there is no such accelerator, device, strategy or precision here.
    """
    settings = config.trainer
    if settings.num_nodes > 1 and started_by() not in ("torchrun", "srun"):
        raise ConfigError(
            f"trainer.num_nodes={settings.num_nodes}: start the processes of several machines with torchrun or srun "
            "(docs/reliability.md has the commands)."
        )
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow, finds only bugs
    try:
        trainer = Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=settings.strategy,
            precision=settings.precision,
            deterministic="warn" if _is_deterministic(config) else None,
            max_epochs=settings.max_epochs,
            gradient_clip_val=settings.gradient_clip_val,
            callbacks=list(callbacks),
            plugins=[WholeFiles()],
            default_root_dir=run_dir,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=run_dir is not None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"trainer.accelerator={settings.accelerator}, devices={settings.devices}, strategy={settings.strategy}, "
            f"precision={settings.precision} cannot be had here: {str(error).splitlines()[0]}"
        ) from error
    count = place().count
    if trainer.world_size != count and started_by() in ("torchrun", "srun"):
        raise ConfigError(
            f"{started_by()} started {count} processes, but trainer.devices={settings.devices} and trainer.num_nodes="
            f"{settings.num_nodes} make a run of {trainer.world_size}: set them to the processes of a machine and the "
            "number of machines, and trainer.strategy=ddp."
        )
    return trainer


def _is_deterministic(config: DictConfig) -> bool:
    wanted = config.trainer.deterministic
    return bool(device(config.trainer.accelerator) == "cpu" if wanted == "auto" else wanted)


def training_callbacks(config: DictConfig, run_dir: Path) -> list[Callback]:
    """Bar, CSV log, checkpoints of best and last epoch, and what the config asks for."""
    settings = config.trainer
    checkpoints: dict[str, Any] = {
        "dirpath": run_dir / "checkpoints",
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
    }
    callbacks: list[Callback] = [
        EpochBar(),
        EpochCSV(run_dir / "metrics.csv"),
        # Two of them, because ModelCheckpoint(save_last=True) only writes last.ckpt when the best one changes. The best
        # comes first: last.ckpt then knows of it, and a run killed between the two repeats that epoch.
        ModelCheckpoint(filename="best", monitor="val/mAP", mode="max", **checkpoints),
        ModelCheckpoint(filename="last", **checkpoints),
    ]
    if settings.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=settings.ema))
    if settings.early_stopping is not None:
        callbacks.append(
            EarlyStopping("val/mAP", mode="max", patience=settings.early_stopping, check_on_train_epoch_end=True)
        )
    # After those that change something at the end of a step.
    return [*callbacks, Interruption(run_dir / "checkpoints" / "last.ckpt", settings.save_minutes)]
