"""Command ``gm-mlic plan``: estimate of time, memory and disk space of a run."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from gm_mlic.bench.measure import interleaved, peak_bytes
from gm_mlic.bench.runtime import RandomStore
from gm_mlic.cli.bench import describe_machine
from gm_mlic.config import section
from gm_mlic.datasets import MultiLabelDataset
from gm_mlic.datasets.images import to_tensor
from gm_mlic.detection.protocol import InstanceExtractor, detect
from gm_mlic.device import resolve_device
from gm_mlic.errors import DataError, UnreadableImage, config_keys
from gm_mlic.graphs import AssignmentGraph
from gm_mlic.instances import Manifest
from gm_mlic.optim import build_optimizer
from gm_mlic.registry import MODELS
from gm_mlic.reporting.tables import text_table
from gm_mlic.training import build
from gm_mlic.training.data import GraphData

#: Numbers of official training and test images and of labels, for plans without the data; tests check them.
PUBLISHED: Mapping[str, tuple[int, int, int]] = {
    "voc2007": (5_011, 4_952, 20),
    "voc2012": (5_717, 5_823, 20),
    "coco2014": (82_081, 40_137, 80),
    "nuswide": (161_789, 107_859, 81),
}
#: Width and height of random images that replace missing photos.
_PHOTO = (500, 375)
_IMAGES = 4
#: The probed batch is doubled up to the run's batch size, or until a step takes this many seconds.
_STEP_S = 1.0


@dataclass(frozen=True)
class Sizes:
    """Images per split, number of labels, and the training dataset, if available."""

    images: dict[str, int]
    labels: int
    dataset: MultiLabelDataset | None


@dataclass(frozen=True)
class Probe:
    """Measurements on one device, in seconds and bytes per image.

    Attributes:
        detect: seconds of reading and detection.
        view: seconds of detection in an augmented view; 0 without views.
        train: seconds of a training step.
        evaluate: seconds of a forward pass.
        fixed: bytes of weights, gradients and optimizer state, independent of the batch size.
        growing: bytes of a training step per image.
        checkpoint: bytes of a checkpoint.
        feature_dim: size of the instance features.
    """

    detect: float
    view: float
    train: float
    evaluate: float
    fixed: int
    growing: int
    checkpoint: int
    feature_dim: int


def plan(config: DictConfig) -> dict[str, Any]:
    """Measure, extrapolate and print; returns the result of :func:`estimate`."""
    begin = time.perf_counter()
    device = resolve_device(config.trainer.accelerator)
    sizes = _sizes(config)
    probe = _measure(config, sizes, device)
    result = estimate(config, sizes, probe)
    machine = describe_machine(device)
    seconds = time.perf_counter() - begin
    _print(config, sizes, result)
    print(
        f"Measured in {seconds:.0f} s on {machine['processor']} "
        f"({machine['threads']} threads, torch {machine['torch']})"
        + (f"; linear speedup is assumed for {config.devices} devices." if config.devices > 1 else ".")
    )
    if sizes.dataset is None:
        print(f"{config.dataset.name} not found (dataset.root): published sizes and random images are used.")
    return result


def estimate(config: DictConfig, sizes: Sizes, probe: Probe) -> dict[str, Any]:
    """Extrapolate a probe: one detection per image, training and validation in each epoch, one test.

    Returns:
        ``seconds`` per phase on ``config.devices`` devices, with their ``total``; ``bytes`` of ``stores``,
        ``checkpoints`` and ``memory`` (per device, in training); ``images`` per phase.
    """
    N, n = sizes.images, config.devices
    epochs, passes = config.trainer.max_epochs, build.passes(config, N["train"], n)
    views, online = config.instances.num_augmentations, config.instances.online
    trained = config.detector.get("trainable", "none") != "none"
    stored = [split for split in N if not (trained or (online and split == "train"))]
    again = (epochs * passes * N["train"] if online else 0) + (epochs * N["val"] + N["test"] if trained else 0)
    batch = config.trainer.batch_size
    steps = math.ceil(math.ceil(passes * N["train"] / n) / batch)
    detected = sum(N[split] * (1 if split == "train" else config.graph.views) for split in stored) + again
    images = {
        "extract": detected + (views * N["train"] if "train" in stored else 0),
        "train": epochs * passes * N["train"],
        "validate": epochs * N["val"],
        "test": N["test"],
    }
    seconds = {
        "extract": detected * probe.detect / n + (views * N["train"] * probe.view / n if "train" in stored else 0.0),
        "train": epochs * steps * batch * probe.train,
        "validate": images["validate"] * probe.evaluate / n,
        "test": images["test"] * probe.evaluate / n,
    }
    return {
        "images": images,
        "seconds": seconds | {"total": sum(seconds.values())},
        "bytes": {
            "stores": sum(_store_bytes(config, sizes, split, probe.feature_dim) for split in stored),
            "checkpoints": 2 * probe.checkpoint,
            "memory": probe.fixed + batch * probe.growing,
        },
    }


def _sizes(config: DictConfig) -> Sizes:
    """Sizes of the dataset: counted, or the published ones."""
    try:
        if OmegaConf.is_missing(config.dataset, "root"):
            raise DataError("dataset.root has no value: set it with dataset.root=DIR.")
        datasets = {split: build.build_dataset(config, split) for split in build.SPLITS}
    except DataError:
        if config.dataset.name not in PUBLISHED:
            raise
        train, test, labels = PUBLISHED[config.dataset.name]
        val = round(train * config.dataset.val_fraction)
        return Sizes({"train": train - val, "val": val, "test": test}, labels, None)
    images = {split: len(dataset) for split, dataset in datasets.items()}
    return Sizes(images, len(datasets["train"].labels), datasets["train"])


def _store_bytes(config: DictConfig, sizes: Sizes, split: str, feature_dim: int) -> int:
    """Bytes of a store: its tensors, and 40 per image name in the manifest."""
    images, views = sizes.images[split], config.instances.num_augmentations if split == "train" else 0
    names: Any = dict.fromkeys(("dataset", "split", "dataset_fingerprint", "detector", "detector_fingerprint"), "")
    manifest = Manifest(
        **names, ids=("",) * images, labels=("",) * sizes.labels, detector_labels=(), feature_dim=feature_dim,
        difficult=sizes.dataset is not None and sizes.dataset.difficult is not None,
        m=build.stored_instances(config, split), views=views, view_size=None, view_seed=None, batch_size=1, versions={},
    )  # fmt: skip
    return manifest.num_bytes() + 40 * images


def _measure(config: DictConfig, sizes: Sizes, device: str) -> Probe:
    weights = config.detector.get("weights")
    if weights is not None and weights != "scenes" and not Path(weights).is_file():
        # Nothing is downloaded; random weights have the same cost.
        config = OmegaConf.merge(config, {"detector": {"weights": None}})  # type: ignore[assignment]
    extractor = build.build_detector(config)
    detect, view = _detection(config, sizes.dataset, extractor, device)
    network = _network(config, sizes.labels, extractor.feature_dim, device)
    return Probe(detect=detect, view=view, feature_dim=extractor.feature_dim, **network)


def _detection(
    config: DictConfig, dataset: MultiLabelDataset | None, extractor: InstanceExtractor, device: str
) -> tuple[float, float]:
    """Seconds per image, and per augmented view, if there are any."""
    m, side = config.detector.max_instances, config.instances.view_size

    def photos() -> list[Tensor]:
        """Readable images, spread over the dataset, or random ones."""
        found: list[Tensor] = []
        if dataset is not None:
            for i in range(0, len(dataset), max(1, len(dataset) // (2 * _IMAGES))):
                with contextlib.suppress(UnreadableImage):
                    found.append(to_tensor(dataset.image(i)))
        return (found + [torch.rand(3, _PHOTO[1], _PHOTO[0]) for _ in range(_IMAGES)])[:_IMAGES]

    views = [torch.rand(3, side, side) for _ in range(_IMAGES)]
    runs: dict[str, Callable[[], object]] = {"photo": lambda: detect(extractor, photos(), m)}
    if config.instances.num_augmentations:
        runs["view"] = lambda: detect(extractor, views, m)
    for run in runs.values():
        run()
    seconds = {name: median(times) / _IMAGES for name, times in interleaved(runs, 2, device).items()}
    return seconds["photo"], seconds.get("view", 0.0)


def _network(config: DictConfig, C: int, feature_dim: int, device: str) -> dict[str, Any]:
    """Entries ``train``, ``evaluate``, ``fixed``, ``growing`` and ``checkpoint`` of a :class:`Probe`."""
    m = min(config.graph.m, config.detector.max_instances)
    dim = config.embedding.get("dim") or 300
    graph_settings = build.graph_settings(config)
    layout, _ = graph_settings.pop("layout"), graph_settings.pop("views")
    graph_settings |= {"class_labels": torch.eye(C, dtype=torch.bool), "label_counts": torch.ones(C)}
    with config_keys("graph"):
        graph = AssignmentGraph(torch.randn(C, dim), **graph_settings)
    names = [str(c) for c in range(C)]
    settings = build.model_settings(
        config, instance_dim=feature_dim, label_dim=dim, labels=names, detector_labels=names
    )
    with config_keys("model"):
        model = MODELS.build(**settings).to(device)
    loss_of = build.loss_of(config, torch.full((C,), 0.05)).to(device)
    optimizer = build_optimizer({**section(config, "optimizer"), "lr": 1e-6}, model.parameters())
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.trainer.precision)
    autocast = partial(torch.autocast, torch.device(device).type, half, enabled=half is not None)
    full = config.trainer.batch_size
    found: list[tuple[int, int, float, float]] = []
    size = 1
    while len(found) < 2 or (size <= full and found[-1][2] * size < _STEP_S):
        store = build.build_graphs(RandomStore(size, m, C, feature_dim), graph, layout=layout)  # type: ignore[arg-type]
        data = next(iter(GraphData({"test": store}, size).evaluation_loader("test"))).to(device)

        def train(data: Any = data) -> None:
            optimizer.zero_grad()
            with autocast():
                loss: Tensor = loss_of(model(data).logits, data.y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        @torch.no_grad()
        def evaluate(data: Any = data) -> None:
            with autocast():
                model(data)

        train()
        peak = peak_bytes(train, device)
        timings = interleaved({"train": train, "evaluate": evaluate}, 3, device)
        found.append((size, peak, median(timings["train"]) / size, median(timings["evaluate"]) / size))
        size = 2 * size if 2 * size <= full or size == full or len(found) < 2 else full
    (small, low, *_), (large, high, train_seconds, evaluate_seconds) = found[-2:]
    growing = max(0, high - low) // (large - small)
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    saved = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *states])
    return {
        "train": train_seconds,
        "evaluate": evaluate_seconds,
        "fixed": saved + max(0, low - small * growing),  # the peak includes the gradients, allocated in each step
        "growing": growing,
        "checkpoint": saved,
    }


def _print(config: DictConfig, sizes: Sizes, result: Mapping[str, Any]) -> None:
    views, n, times = config.instances.num_augmentations, config.devices, result["seconds"]
    words = {
        "extract": "images" + (f", {views} views per training image" if views else ""),
        "train": f"images in {config.trainer.max_epochs} epochs",
        "validate": "images",
        "test": "images",
    }
    phases = [(phase, f"{result['images'][phase]:,} {work}", duration(times[phase])) for phase, work in words.items()]
    phases.append(("total", "", duration(times["total"])))
    splits = ", ".join(f"{count:,} {split}" for split, count in sizes.images.items())
    uses = {
        "memory": f"per device, training with batches of {config.trainer.batch_size}",
        "stores": f"on disk, in {config.instances.root}: {splits}; fastest if they fit into memory",
        "checkpoints": "on disk, in the run folder",
    }
    space = [(name, use, f"{result['bytes'][name] / 1e9:,.2f}") for name, use in uses.items()]
    console = Console(highlight=False)
    title = f"{config.dataset.name}: time on {n} device{'s' * (n > 1)}"
    console.print(text_table(title, ("phase", "work", "time"), phases, texts=2))
    console.print(text_table("memory and disk", ("", "use", "GB"), space, texts=2))


def duration(seconds: float) -> str:
    """Duration as text: ``45 s``, ``12 min``, ``3.4 h``, ``2.1 days``."""
    for limit, unit, digits, name in ((90, 1, 0, "s"), (90 * 60, 60, 0, "min"), (48 * 3600, 3600, 1, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{digits}f} {name}"
    return f"{seconds / 86400:.1f} days"
