"""Training and evaluation runs, from a config to checkpoints and metrics in a run folder."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from gm_mlic._version import __version__
from gm_mlic.config import changed_settings, finish, require_values, section
from gm_mlic.datasets import MultiLabelDataset, label_ratio
from gm_mlic.detection import InstanceExtractor
from gm_mlic.detection.protocol import checked_fingerprint
from gm_mlic.device import resolve_device, resolve_num_workers
from gm_mlic.distributed import rank_info
from gm_mlic.embeddings import embed_labels
from gm_mlic.errors import ConfigError, StoreError, Terminated, WeightsError, config_keys
from gm_mlic.graphs import AssignmentGraph
from gm_mlic.instances import InstanceStore, OnlineImages
from gm_mlic.instances.manifest import MANIFEST
from gm_mlic.io import atomic_write, sha256, write_file
from gm_mlic.metrics import ScoredImages, evaluate_scores, write_scored_images
from gm_mlic.metrics.evaluation import by_name
from gm_mlic.runs import CONFIG, DIVERGED, RESULT, SCORES, STATE, WRITTEN, RunState, read_epochs
from gm_mlic.training import build
from gm_mlic.training.artifacts import write_examples, write_label_states
from gm_mlic.training.data import GraphData
from gm_mlic.training.module import DivergedError, MLICModule
from gm_mlic.training.online import OnlineGraphs
from gm_mlic.training.preemption import position, restored_signal_handlers
from gm_mlic.training.tracking import Tracker
from gm_mlic.training.trainer import build_trainer, training_callbacks
from gm_mlic.zoo.metadata import ModelMetadata, load_weights, read_checkpoint

log = logging.getLogger(__name__)

#: Packages whose versions are recorded.
_VERSIONS = ("torch", "torchvision", "torch-geometric", "lightning")


@dataclass(frozen=True)
class SplitData:
    """One split of a run's data: the dataset with its instance store, or with its images in on-line mode."""

    dataset: MultiLabelDataset
    store: InstanceStore | None
    online: OnlineImages | None = None

    @property
    def skipped(self) -> dict[str, str]:
        """Reasons of unreadable images, by image id."""
        if self.store is not None:
            return dict(self.store.manifest.skipped)
        return {} if self.online is None else dict.fromkeys(self.online.unreadable, "unreadable")


def train(
    config: DictConfig,
    sweep: str | None = None,
    command: str | None = None,
    extractor: InstanceExtractor | None = None,
) -> dict[str, Any]:
    """Train a model, or resume the unfinished run in ``config.run_dir``.

    Extracts missing instance stores, trains, and tests ``trainer.checkpoint``.

    Args:
        config: the config of ``gm-mlic train``, composed and checked.
        sweep: folder of the multirun of this run.
        command: recorded command that reproduces this run; default: the command line of this process.
        extractor: a custom detector, instead of that of ``config.detector``.

    Returns:
        Content of ``metrics.json``: test metrics (all, top-3, AP per label), val metrics of the tested epoch, best
        epoch, sizes, versions.

    Raises:
        GMMLICError: for errors that the user can fix.
    """
    require_values(config)
    run_dir = Path(config.run_dir)
    # Only rank 0 writes the state of the run.
    with RunState(run_dir, command or shlex.join(sys.argv), sweep, silent=rank_info().rank > 0) as state:
        return _train(config, run_dir, state, sweep, extractor)


def _train(
    config: DictConfig, run_dir: Path, state: RunState, sweep: str | None, extractor: InstanceExtractor | None
) -> dict[str, Any]:
    finished = run_dir / RESULT
    first = rank_info().rank == 0
    _check_folder(config, run_dir)
    if config.overwrite:
        _forget(run_dir, wait=not first)
    if finished.exists():
        log.info("%s: already finished (overwrite=true starts it again).", run_dir)
        result: dict[str, Any] = json.loads(finished.read_text())
        return result
    _quieten_lightning()

    # Everything that can fail is built before the stores, which may take hours.
    datasets = build.build_datasets(config)
    custom = extractor is not None
    if extractor is None:
        extractor = build.build_detector(config)
    build.check_lookup(config, extractor, list(datasets.values()))
    module, graph, words = build_module(config, datasets["train"], extractor, custom=custom)
    state.begin()
    if first:
        write_file(run_dir / CONFIG, OmegaConf.to_yaml(config, resolve=True))
    with Tracker(config, run_dir, sweep, _revision()) as tracker:
        trainer = build_trainer(config, run_dir, [*training_callbacks(config, run_dir), tracker])
        data = {split: split_data(config, dataset, extractor) for split, dataset in datasets.items()}
        if config.graph.labels_per_class is not None:
            store = data["train"].store
            assert store is not None  # config.finish excludes on-line mode
            candidates = build.learn_candidates(store, config.graph.m, config.graph.labels_per_class)
            module.metadata = replace(module.metadata, graph=module.metadata.graph | {"candidates": candidates})
            graph = module.metadata.build_graph()
        fitted_on = data["train"].store or data["val"].store  # on-line, the training images have none
        if fitted_on is not None:
            build.fit_features(module.model, fitted_on, config.graph.m, graph.label_vectors, words)
        try:
            _fit(config, trainer, module, graph, data, run_dir)
        except DivergedError as error:
            ids = [datasets["train"].ids[row] for row in error.rows]
            record = {"error": str(error), "epoch": error.epoch, "step": error.step, "images": ids}
            write_file(run_dir / DIVERGED, json.dumps(record, indent=2) + "\n")
            raise

        chosen = run_dir / "checkpoints" / f"{config.trainer.checkpoint}.ckpt"
        tested, images = _test(config, chosen, data["test"], extractor)
        result = _summary(config, run_dir, module, data, tested.test_values) | {"command": state.command}
        if first:
            _write_scores(run_dir / SCORES, images)
            write_examples(run_dir, datasets["test"], tested.examples, tested.metrics.convention.threshold)
            write_label_states(run_dir, module.metadata.labels, tested.examples, module.metadata.label_vectors)
            tracker.log_result(result)
            write_file(finished, json.dumps(result, indent=2) + "\n")
    return result


def evaluate(
    checkpoint: str | Path,
    split: str = "test",
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    *,
    calibrate: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
    extractor: InstanceExtractor | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint on one split, with the settings of its run.

    Args:
        checkpoint: ``RUN/checkpoints/NAME.ckpt``; the settings are read from ``RUN/config.yaml``.
        split: ``train``, ``val`` or ``test``.
        overrides: changed settings, e.g. ``dataset.root=/elsewhere``.
        out: output folder for the result, ``SPLIT.json``, and the scores, ``SPLIT.npz``
            (:func:`gm_mlic.metrics.read_scored_images`); default: nothing is written.
        calibrate: also compute the metrics with per-label thresholds fitted on ``val`` (``calibrated``).
        bootstrap: resamples of the images for the 95 % interval of mAP (``intervals``); 0: none.
        seed: seed of the resampling.
        extractor: the detector of the run, if it is a custom one.

    Raises:
        ConfigError: if thresholds would be fitted on the evaluated split.
        WeightsError: if it is not a checkpoint of ``gm-mlic train``, or labels or detector differ.
    """
    path = Path(checkpoint)
    metadata, _ = read_checkpoint(path)
    config = _run_config(path, overrides)
    _quieten_lightning()
    dataset = build.build_dataset(config, split)
    if calibrate and split == "val":
        raise ConfigError("calibrate=true fits thresholds on val: evaluate another split, e.g. split=test.")
    metadata.check_labels(tuple(dataset.labels), path)
    extractor = build.build_detector(config) if extractor is None else extractor
    metadata.check_extractor(extractor, path)
    data = split_data(config, dataset, extractor)
    tested, images = _test(config, path, data, extractor)
    val = None
    if calibrate:
        _, val = _test(config, path, split_data(config, build.build_dataset(config, "val"), extractor), extractor)
    convention = config.metrics.convention
    rules = {convention: tested.metrics.convention}
    found = evaluate_scores(images, val=val, conventions=rules, bootstrap=bootstrap, seed=seed)
    result: dict[str, Any] = {
        "checkpoint": str(path),
        "split": split,
        "dataset": {"name": dataset.name, "sizes": {split: len(dataset)}},
        "convention": convention,
        "skipped": {split: data.skipped},
    }
    result |= {key: found[key][convention] for key in ("metrics", "calibrated", "thresholds") if key in found}
    result |= {key: found[key] for key in ("bootstrap", "intervals") if key in found}
    if out is not None and rank_info().rank == 0:
        _write_scores(Path(out) / f"{split}.npz", images)
        write_file(Path(out) / f"{split}.json", json.dumps(result, indent=2) + "\n")
    return result


# The parts of a run


def split_data(config: DictConfig, dataset: MultiLabelDataset, extractor: Any) -> SplitData:
    """A split with its instance store, extracted if missing; or with its images, for on-line detection."""
    train = dataset.split == "train"
    # Evaluation images are not augmented: with a frozen detector their instances can be stored.
    if _trains_detector(config) or (config.instances.online and train):
        images = OnlineImages(dataset, train=train, size=config.instances.view_size, seed=config.seed)
        return SplitData(dataset, None, images)
    store = build.build_store(config, dataset, extractor)
    if store is None:
        raise StoreError(
            f"instances.shard={config.instances.shard}: other shards are not finished; leave instances.shard out to "
            "extract the rest in this process."
        )
    return SplitData(dataset, store)


def _trains_detector(config: DictConfig) -> bool:
    return bool(config.detector.get("trainable", "none") != "none")


def _online_graphs(config: DictConfig, metadata: ModelMetadata, graph: AssignmentGraph, extractor: Any) -> OnlineGraphs:
    dense = metadata.graph["layout"] == "dense"
    return OnlineGraphs(extractor, graph, dense=dense, trained=_trains_detector(config))


def build_module(
    config: DictConfig, dataset: MultiLabelDataset, extractor: Any, *, custom: bool = False
) -> tuple[MLICModule, AssignmentGraph, Tensor | None]:
    """Build the Lightning module, its graph transform for the labels of a training split, and the class vectors.

    A ``custom`` detector is another one than that of the config, and is passed to ``Predictor`` again.
    """
    labels = tuple(dataset.labels)
    with config_keys("embedding"):
        embedding = embed_labels(labels, **section(config, "embedding"))
    model = build.model_settings(
        config,
        instance_dim=extractor.feature_dim,
        label_dim=int(embedding.vectors.shape[1]),
        labels=labels,
        detector_labels=extractor.labels,
    )
    tables, words = {}, None
    if any(model.get(name) for name in ("prior", "linear", "class_words")):
        words = build.class_vectors(config, extractor.labels)
        tables = build.prior_tables(dataset, extractor, embedding.vectors, words)
    metadata = ModelMetadata(
        labels=labels,
        label_vectors=embedding.vectors,
        label_source=embedding.source,
        model=model,
        graph=build.graph_settings(config) | tables,
        detector=extractor.name,
        detector_fingerprint=checked_fingerprint(extractor),
        detector_settings={} if custom else section(config, "detector"),
        embedding=section(config, "embedding"),
    )
    with config_keys("graph"):
        graph = metadata.build_graph()
    build.check_optimizer(config)
    seed_everything(config.seed, workers=True, verbose=False)  # directly before the weights are initialized
    module = MLICModule(
        build.build_model(metadata, dataset),
        build.loss_of(config, torch.from_numpy(label_ratio(dataset.targets, dataset.difficult))),
        build.build_metrics(config, labels),
        section(config, "optimizer"),
        section(config, "scheduler"),
        metadata,
        _online_graphs(config, metadata, graph, extractor) if config.instances.online else None,
        config.trainer.instance_graph_warmup_epochs or 0,
        len(dataset),
    )
    return module, graph, words


def _fit(
    config: DictConfig,
    trainer: Trainer,
    module: MLICModule,
    graph: AssignmentGraph,
    data: dict[str, SplitData],
    run_dir: Path,
) -> None:
    layout = module.metadata.graph["layout"]
    train = _readable(data["train"], graph, layout, augment=config.instances.num_augmentations > 0, seed=config.seed)
    train.passes = build.passes(config, len(train), trainer.world_size)
    val = _readable(data["val"], module.metadata.build_graph(evaluation=True), layout)
    last, content = _newest(run_dir / "checkpoints")
    first = (0, 0)
    if content is not None:
        first = position(content)
        if _stopped_early(content) or first[0] >= (trainer.max_epochs or 0):
            return
        log.info("resuming %s after epoch %d%s", run_dir, first[0], f" and {first[1]} steps" if first[1] else "")
    workers = resolve_num_workers(config.trainer.num_workers, resolve_device(config.trainer.accelerator))
    loaders = GraphData({"train": train, "val": val}, config.trainer.batch_size, config.seed, workers, first)
    if config.trainer.compile:
        # In place, which keeps the names in checkpoints; dynamic, for batches of all sizes.
        module.model.compile(dynamic=True)
    try:
        with restored_signal_handlers():
            trainer.fit(module, loaders, ckpt_path=None if content is None else str(last), weights_only=True)
    except Terminated:
        raise
    except SystemExit as stop:  # Lightning's translation of Ctrl-C
        raise KeyboardInterrupt from stop


def _newest(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """Path and content of the checkpoint to resume from: last, or best if last is damaged; None without a last one."""
    last, best = folder / "last.ckpt", folder / "best.ckpt"
    if not last.exists():
        return last, None
    try:
        return last, read_checkpoint(last)[1]
    except WeightsError as error:
        if not best.exists():
            raise
        content = read_checkpoint(best)[1]
        log.warning("%s Resuming from %s, after epoch %d.", error, best, position(content)[0])
        with atomic_write(last) as part:
            shutil.copyfile(best, part)
        return last, content


def _readable(data: SplitData, graph: AssignmentGraph, layout: str, **settings: Any) -> Any:
    """Dataset for a loader: the graphs of the split's store, or its images."""
    if data.store is None:
        return data.online
    return build.build_graphs(data.store, graph, layout=layout, **settings)


def _stopped_early(content: dict[str, Any]) -> bool:
    return any(state.get("stopped_epoch", 0) > 0 for state in content["callbacks"].values() if isinstance(state, dict))


def _test(config: DictConfig, checkpoint: Path, data: SplitData, extractor: Any) -> tuple[MLICModule, ScoredImages]:
    """Test a checkpoint on one split; returns the module with the results, and the scores."""
    metadata, content = read_checkpoint(checkpoint)
    model = metadata.build_model()
    load_weights(model, content, checkpoint)
    split = data.dataset.split
    graph = metadata.build_graph(evaluation=split != "train")
    online = None
    if data.store is None:
        load_weights(extractor, content, checkpoint, prefix="online.detector.")
        online = _online_graphs(config, metadata, graph, extractor)
    module = MLICModule(
        model, torch.nn.Identity(), build.build_metrics(config, metadata.labels), {}, {}, metadata, online
    )
    loaders = GraphData({split: _readable(data, graph, metadata.graph["layout"])}, config.trainer.batch_size)
    build_trainer(config, None).test(module, loaders.evaluation_loader(split), verbose=False)
    assert module.test_scores is not None
    scores, targets, difficult, rows = module.test_scores
    difficult = None if difficult is None else difficult.cpu()
    ids = tuple(data.dataset.ids[row] for row in rows.tolist())
    return module, ScoredImages((scores.cpu(),), targets.cpu(), difficult, ids, metadata.labels)


def _write_scores(path: Path, images: ScoredImages) -> None:
    ids, labels = images.ids or (), images.labels or ()
    write_scored_images(path, images.scores[0], images.targets, ids, labels, images.difficult)


# The run folder


def _check_folder(config: DictConfig, run_dir: Path) -> None:
    """Raise ConfigError if the config in ``run_dir`` is of no run, or of one that must not be resumed."""
    path = run_dir / CONFIG
    if not path.exists():
        return
    begun = any((run_dir / name).exists() for name in ("checkpoints/last.ckpt", RESULT))
    if not begun and not (run_dir / STATE).exists():
        raise ConfigError(f"run_dir={run_dir} has a file {CONFIG} that is not of a run: choose another run_dir.")
    if not begun or config.overwrite:
        return
    before = OmegaConf.load(path)
    assert isinstance(before, DictConfig)
    if changed := changed_settings(before, config):
        raise ConfigError(
            f"run_dir={run_dir} holds a run with other settings ({', '.join(changed[:5])}): choose another run_dir, or "
            "overwrite=true to start it again."
        )


def _forget(run_dir: Path, wait: bool) -> None:
    """Delete the files of an earlier run; with ``wait``, wait until rank 0 has deleted it."""
    for name in WRITTEN:
        while wait and (run_dir / name).exists():
            time.sleep(0.1)
        (run_dir / name).unlink(missing_ok=True)


def _run_config(checkpoint: Path, overrides: Sequence[str]) -> DictConfig:
    path = checkpoint.parent.parent / CONFIG
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; checkpoints are evaluated with the config of their run folder.")
    text = path.read_text()
    try:
        config = OmegaConf.create(text)
    except (ValueError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise WeightsError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    # Configs of runs are resolved. Interpolations in untrusted files could read the environment (${oc.env:...}).
    if not isinstance(config, DictConfig) or "${" in text:
        raise WeightsError(f"{path} is not the config of a run: evaluate a checkpoint in its run folder.")
    OmegaConf.set_struct(config, True)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"overrides: {override!r} is not KEY=VALUE.")
        try:
            config.merge_with_dotlist([override])
        except OmegaConfBaseException as error:
            raise ConfigError(f"overrides: the run has no setting {key!r}; see {path}.") from error
    return finish(config)


def _summary(
    config: DictConfig, run_dir: Path, module: MLICModule, data: dict[str, SplitData], values: dict[str, Any]
) -> dict[str, Any]:
    epochs = read_epochs(run_dir)
    best = max(epochs, key=lambda row: row["val/mAP"])
    tested = epochs[-1] if config.trainer.checkpoint == "last" else best
    return {
        "test": by_name(values, data["test"].dataset.labels),
        "val": {name.removeprefix("val/"): value for name, value in tested.items() if name.startswith("val/")},
        "best_epoch": int(best["epoch"]),
        "epochs": len(epochs),
        "seed": config.seed,
        "convention": config.metrics.convention,
        "dataset": {
            "name": data["train"].dataset.name,
            "labels": len(data["train"].dataset.labels),
            "sizes": {split: len(part.dataset) for split, part in data.items()},
            "fingerprints": {split: part.dataset.fingerprint for split, part in data.items()},
        },
        # A manifest contains the hashes of all arrays.
        "stores": {
            split: {"path": str(part.store.path), "manifest_sha256": sha256(part.store.path / MANIFEST)}
            for split, part in data.items()
            if part.store is not None
        },
        "label_vectors": module.metadata.label_source,
        "skipped": {split: part.skipped for split, part in data.items()},
        "model": {**module.metadata.model, "parameters": sum(p.numel() for p in module.model.parameters())},
        "detector": {"name": module.metadata.detector, "fingerprint": module.metadata.detector_fingerprint},
        "train_seconds": round(sum(row["seconds"] for row in epochs), 3),
        "versions": {
            "gm-mlic": __version__,
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: importlib.metadata.version(name) for name in _VERSIONS},
        },
        "revision": _revision(),
    }


def _revision() -> str | None:
    """Git revision of the code, if it runs from a checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _quieten_lightning() -> None:
    """Silence Lightning's tips and banners."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
