"""Configuration: the sections of a run, and the check of a composed config.

A section with a ``name`` has the settings of the registered class or function (:mod:`gm_mlic.registry`): the arguments
of its constructor, with their annotations, defaults and descriptions. The other sections are described here.
:func:`finish` completes and checks a config, before any slow stage.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from annotated_types import DocInfo, Ge, Gt, Interval, Len, Predicate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gm_mlic import registry
from gm_mlic.errors import ConfigError
from gm_mlic.registry import Registry
from gm_mlic.runs import NOT_PART_OF_A_RUN, decisive, flat_settings
from gm_mlic.schema import Natural, Positive, Probability, Setting, as_typed, settings_of


def _is_shard(text: str) -> bool:
    index, _, shards = text.partition("/")
    return index.isdecimal() and shards.isdecimal() and int(index) < int(shards)


@dataclass
class InstanceSettings:
    """Instance store: detected instances of each image, computed once.

    Args:
        root: base folder; stores are ROOT/DATASET/SPLIT-DETECTOR-HASH, with a hash of all settings that change them.
        path: folder with train/, val/ and test/; null: folders under root. Stores for other datasets or detectors are
            rejected.
        num_augmentations: augmented views (random crop and flip) of each training image; each epoch draws one of them
            or the original.
        view_size: width and height of augmented views in pixels.
        batch_size: images per batch of the detector.
        num_workers: worker processes that decode images; 0: decode in the main process; null: 0 on a CPU, 2 with a GPU.
        overwrite: true: extract existing stores again.
        shard: i/n (e.g. 0/4): extract only shard i of n, for n independent processes (gm-mlic extract only); null: all
            images. Processes of torchrun or srun share the images automatically.
        online: true: crop, flip and detect at every training step, as in the paper, without a store of training images.
    """

    root: str = "data/instances"
    path: str | None = None
    num_augmentations: Natural = 0
    view_size: Annotated[int, Ge(32)] = 448
    batch_size: Positive = 8
    num_workers: Natural | None = None
    overwrite: bool = False
    shard: Annotated[str, Predicate(_is_shard), DocInfo("i/n with 0 <= i < n, e.g. 0/4")] | None = None
    online: bool = False


@dataclass
class GraphSettings:
    """Assignment graph.

    Args:
        m: instances per image, the most confident first. The paper: 10 on VOC 2007, 35 on COCO and NUS-WIDE. Of a grid:
            all cells.
        views: views of each evaluated or predicted photo, each detected separately, with views x m instances in one
            graph: 1 (the photo), 2 (and its mirror image), or up to 6 (and its corners). Training uses one view at a
            time.
        num_neighbors: incoming edges of each instance, from its nearest instances (by box centers).
        num_label_neighbors: incoming edges of each label, from its nearest labels (by cosine similarity); null: from
            all other labels (the paper).
        labels_per_class: candidate labels per detector class, the ends of matching edges: the label with the name of
            the class, and those with the highest lift in the training images; null: all labels (the paper).
        layout: dense: batches as dense tensors, about three times faster; sparse: message passing over edge_index.
            Same results.
    """

    m: Positive = 10
    views: Annotated[int, Interval(ge=1, le=6)] = 1
    num_neighbors: Positive = 5
    num_label_neighbors: Positive | None = None
    labels_per_class: Positive | None = None
    layout: Literal["dense", "sparse"] = "dense"


@dataclass
class MetricSettings:
    """Metrics: mAP, CP, CR, CF1, OP, OR, OF1 and their top-3 variants.

    Args:
        convention: published convention of mAP.
        threshold: lowest score of a predicted label; null: the convention's (0.5 for mlgcn).
    """

    convention: Literal["mlgcn", "ssgrl", "ctran", "asl", "mmpretrain", "voc11"] = "mlgcn"
    threshold: Probability | None = None


@dataclass
class TrainerSettings:
    """Training.

    Args:
        max_epochs: number of epochs.
        min_steps: at least this many steps: few training images are repeated in each epoch.
        batch_size: images per step and device.
        num_workers: worker processes that read batches; 0: read in the main process; null: 0 on a CPU, 2 with a GPU.
        precision: precision of Lightning's Trainer.
        accelerator: accelerator of Lightning's Trainer.
        devices: devices per node: a number, -1 or auto for all, or a list of indices.
        num_nodes: number of nodes; more than 1 needs torchrun or srun.
        strategy: strategy of Lightning's Trainer: auto, ddp, ...
        compile: true: torch.compile the network: minutes of compilation (needs a C++ compiler), then faster steps.
        deterministic: true: deterministic operations only; auto: on the CPU, where the cost is small; false: no
            restriction.
        gradient_clip_val: maximum norm of the gradients; null: no clipping.
        ema_decay: decay of an exponential moving average of the weights, which is validated and saved; null: no
            averaging.
        instance_graph_warmup_epochs: first epochs trained without the instance graph, which is otherwise learned first
            and suppresses the label graph (experiments/graphs); null: none. Validation uses the instance graph, so val
            mAP is not meaningful in these epochs.
        checkpoint_every_n_minutes: minutes between checkpoints within an epoch; null: only at the end of an epoch, and
            on Ctrl-C or SIGTERM.
        checkpoint: tested checkpoint: best (of the epoch with the highest val mAP) or last. With a few hundred val
            photos, the best epoch is chosen by chance more than by quality.
        early_stopping: stop after this many epochs without a better val mAP; null: no early stopping.
    """

    max_epochs: Positive = 20
    min_steps: Natural = 0
    batch_size: Positive = 64
    num_workers: Natural | None = None
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: Positive | Literal[-1, "auto"] | Annotated[Sequence[Natural], Len(1)] = 1
    num_nodes: Positive = 1
    strategy: str = "auto"
    compile: bool = False
    deterministic: bool | Literal["auto"] = "auto"
    gradient_clip_val: Annotated[float, Gt(0)] | None = 1.0
    ema_decay: Annotated[float, Interval(gt=0, lt=1)] | None = None
    instance_graph_warmup_epochs: Natural | None = None
    checkpoint_every_n_minutes: Annotated[float, Ge(0)] | None = 10
    checkpoint: Literal["best", "last"] = "best"
    early_stopping: Positive | None = None


@dataclass
class BenchSettings:
    """Measurement of time and memory.

    Args:
        cases: voc2007, coco2014 and nuswide (the paper's sizes), large (100 instances, 500 labels, 20-nearest-neighbor
            label graph). The ratios in the last line of the output are those of the first case.
        fusions: fusions of each case.
        executions: sparse (message passing, inputs concatenated on every edge), dense, compiled (dense after
            torch.compile; needs a C++ compiler), checkpointed (model.gradient_checkpointing=true: less memory, more
            time).
        batch: images per batch.
        k: number of blocks.
        norm: LayerNorm, as model.norm.
        precision: float32, or bfloat16 (autocast).
        repeats: timed rounds of forward passes and of training steps, after a warm-up.
        curves: variables of growth curves of the first case.
        growth_batch: images per batch in growth curves of the other variables.
        shares: true: also measure the shares of detection, data loading and graph network in the time from photo to
            labels.
    """

    cases: Annotated[Sequence[Literal["voc2007", "coco2014", "nuswide", "large"]], Len(1)] = ("coco2014",)
    fusions: Annotated[Sequence[Literal["concat", "product"]], Len(1)] = ("concat",)
    executions: Annotated[Sequence[Literal["sparse", "dense", "compiled", "checkpointed"]], Len(1)] = (
        "sparse", "dense", "compiled",
    )  # fmt: skip
    batch: Positive = 16
    k: Positive = 2
    norm: Literal["none", "encoder", "all"] = "all"
    precision: Literal["float32", "bfloat16"] = "float32"
    repeats: Annotated[Sequence[Positive], Len(2, 2)] = (2, 2)
    curves: Sequence[Literal["m", "C", "k", "batch"]] = ()
    growth_batch: Positive = 2
    shares: bool = True


LOGGERS = Registry("logger", [])


@LOGGERS.register("csv")
@dataclass
class CSVLogger:
    """Only metrics.csv in the run folder, which is always written."""


@LOGGERS.register("wandb")
@dataclass
class WandbLogger:
    """Weights & Biases in addition to metrics.csv (pip install 'gm-mlic[wandb]'). WANDB_* variables apply.

    Args:
        project: W&B project.
        entity: W&B user or team; null: the default of your account.
        offline: true: write to the run folder only; upload later with `wandb sync RUN/wandb/offline-run-*`.
        group: group of the run; null: the multirun, or none.
        tags: tags in addition to the names of dataset and model.
        log_model: true: upload best.ckpt as an artifact.
    """

    project: str = "gm-mlic"
    entity: str | None = None
    offline: bool = False
    group: str | None = None
    tags: Sequence[str] = ()
    log_model: bool = True


#: Sections: a registry of what they name, or a class with their settings.
SECTIONS: Mapping[str, Registry | type] = {
    "dataset": registry.DATASETS,
    "detector": registry.DETECTORS,
    "instances": InstanceSettings,
    "embedding": registry.EMBEDDINGS,
    "graph": GraphSettings,
    "model": registry.MODELS,
    "loss": registry.LOSSES,
    "metrics": MetricSettings,
    "optimizer": registry.OPTIMIZERS,
    "scheduler": registry.SCHEDULERS,
    "trainer": TrainerSettings,
    "logger": LOGGERS,
    "bench": BenchSettings,
}
#: Settings of a section in addition to those of what it names.
_ALSO = {
    "detector": {
        "max_instances": Setting(Positive, 35, "instances per image in the store, an upper limit of graph.m.")
    },
    "optimizer": {
        "detector_lr": Setting(
            Annotated[float, Gt(0)] | None,
            None,
            "learning rate of detector parameters, if detector.trainable is not none; null: a tenth of lr.",
        )
    },
}


#: Settings whose values are fewer in a config than in Python. torch states no bounds.
_NARROWER: Mapping[str, Mapping[str, Any]] = {
    "model": {
        "edge_types": Annotated[Sequence[Literal["spatial", "semantic", "matches"]], Len(1)],
        "class_words": bool,
    },
    "optimizer": {"lr": Annotated[float, Gt(0)], "weight_decay": Annotated[float, Ge(0)], "momentum": Probability},
}


def settings_of_section(key: str, name: str | None = None) -> Mapping[str, Setting]:
    """Settings of a section of :data:`SECTIONS`, with its ``name`` if it has one.

    Raises:
        ConfigError: if the name is not registered.
    """
    kind = SECTIONS[key]
    if not isinstance(kind, Registry):
        return settings_of(kind)
    known = kind.names()
    if name not in known:
        hint = _did_you_mean(name, known) or ", or that of a plugin (plugins=[MODULE])."
        raise ConfigError(f"{key}.name={as_typed(name)}: expected one of {', '.join(known)}{hint}")
    narrower = _NARROWER.get(key, {})
    found = {**kind.settings(str(name)), **_ALSO.get(key, {})}
    return {n: replace(s, annotation=narrower.get(n, s.annotation)) for n, s in found.items()}


def section(config: DictConfig, key: str) -> dict[str, Any]:
    """Section of the config as a resolved, plain dict."""
    return dict(_plain(config, key))


def finish(config: DictConfig, fields: Mapping[str, Setting] | None = None, *, complete: bool = True) -> DictConfig:
    """Add missing settings with their defaults, derive those that follow from others, and check all values.

    Args:
        config: the composed config, which is changed and returned.
        fields: settings outside of sections; None: they are not checked.
        complete: whether all settings must have a value.

    Raises:
        ConfigError: for the first unknown setting, or missing or invalid value.
    """
    OmegaConf.set_struct(config, False)
    sections = [key for key in map(str, config) if key in SECTIONS and key not in (fields or {})]
    for key in sections:
        _finish_section(config, key)
    if fields is not None:
        _finish_settings(config, fields, also=sections)
    _derive(config)
    _check_together(config)
    if complete:
        require_values(config)
    return config


def require_values(config: DictConfig) -> None:
    """Raise ConfigError for the first setting without a value."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    for key in sorted(OmegaConf.missing_keys(own)):
        raise ConfigError(f"{key} has no value: set it with {key}=VALUE.")


def _finish_section(config: DictConfig, key: str) -> None:
    found = config[key]
    if found is None:
        return
    if not isinstance(found, DictConfig):
        raise ConfigError(f"{key}={as_typed(_plain(config, key))}: expected settings.")
    named = isinstance(SECTIONS[key], Registry)
    if named and "name" not in found:
        raise ConfigError(f"{key}.name is missing: set it (gm-mlic COMMAND --help lists the options).")
    settings = settings_of_section(key, found.name if named else None)
    _finish_settings(found, settings, f"{key}.", f" ({found.name})" if named else "", ["name"] if named else [])


def _finish_settings(
    node: DictConfig, settings: Mapping[str, Setting], path: str = "", kind: str = "", also: Sequence[str] = ()
) -> None:
    """Add and check the settings of a node; ``also``: its other keys, which are not checked here."""
    present = set(map(str, node))  # `name in node` would resolve run_dir, with a hash of the whole config
    if others := present - {*settings, *also, "hydra"}:
        raise ConfigError(unknown(path + min(others), settings if path else [*settings, *also], kind))
    for name, setting in settings.items():
        if name not in present:
            node[name] = setting.default
        if OmegaConf.is_missing(node, name):
            continue
        if isinstance(setting.default, Mapping) and isinstance(node[name], DictConfig):
            _finish_settings(node[name], setting.nested(), f"{path}{name}.")
            continue
        value = _plain(node, name)
        is_default = value == setting.default and type(value) is type(setting.default)  # True == 1
        if not is_default and not setting.accepts(value):
            raise ConfigError(f"{path}{name}={as_typed(value)}: expected {setting.expected}.")


def _plain(parent: DictConfig, name: str) -> Any:
    value = parent[name]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def unknown(key: str, known: Iterable[str], kind: str = "") -> str:
    """Error message for an unknown key, with a suggestion and the known settings of its section (of a ``kind``)."""
    parent, _, name = key.rpartition(".")
    known = sorted(known)
    section = f" of {parent}{kind}" if parent else ""
    hint = _did_you_mean(name, known, f"{parent}." if parent else "") or "."
    return f"{key}: unknown setting{hint} Settings{section}: {', '.join(known)}."


def _did_you_mean(name: Any, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


# Settings that depend on each other


def _derive(config: DictConfig) -> None:
    """A model on a grid gets one, and m is its number of cells; candidates are for models with matching edges."""
    if "model" not in config or "detector" not in config or "graph" not in config:
        return
    model, detector, graph = config.model, config.detector, config.graph
    if registry.MODELS.attribute(model.name, "input", "instances") == "grid" and not detector.get("grid_size"):
        if "grid_size" not in detector:
            raise ConfigError(
                f"model.name={model.name} needs the feature map of a backbone, and detector.name={detector.name} has "
                "none: choose another detector, e.g. detector=resnet101."
            )
        # For scenes_tiny (40 x 40 at 160 pixels), cells of 16 pixels suit its objects of 8 to 45 pixels. 14 is the last
        # feature map of a ResNet at 448 pixels.
        detector.grid_size = 10 if detector.name == "scenes_tiny" else 14
    if detector.get("grid_size"):
        graph.m = detector.max_instances = detector.grid_size**2
    if "edge_types" not in model:
        graph.labels_per_class = None


#: Settings that exclude others: key, value that excludes none, words, other key, its only allowed value, and reason.
_EXCLUSIONS = (
    ("trainer.compile", False, "excludes", "model.gradient_checkpointing", False,
     "the compiler controls recomputation"),
    ("detector.trainable", "none", "excludes", "instances.online", True, "stores hold instances of a frozen detector"),
    ("detector.trainable", "none", "excludes", "model.components", None,
     "the statistics of its features would not stay valid"),
    ("detector.trainable", "none", "excludes", "graph.views", 1, "its photos are detected in one view"),
    ("graph.labels_per_class", None, "is incompatible with", "detector.grid_size", None, "a grid has no classes"),
    ("graph.labels_per_class", None, "is incompatible with", "instances.online", False,
     "candidates are learned from a store"),
)  # fmt: skip


def _check_together(config: DictConfig) -> None:
    def get(key: str) -> Any:
        return OmegaConf.select(config, key, default=None)

    m, stored = get("graph.m"), get("detector.max_instances")
    if m and stored and m > stored:
        raise ConfigError(
            f"graph.m={m} exceeds the instances per image in the store (detector.max_instances={stored}): raise "
            "detector.max_instances or lower graph.m."
        )
    widths, k = get("model.widths"), get("model.k")
    if OmegaConf.is_list(widths) and k is not None and len(widths) != k:
        raise ConfigError(
            f"model.widths={as_typed(list(widths))} has {len(widths)} widths, model.k={k}: set one width per block."
        )
    for key, off, words, other, allowed, reason in _EXCLUSIONS:
        if get(key) not in (None, off) and get(other) not in (None, allowed):
            raise ConfigError(
                f"{key}={as_typed(get(key))} {words} {other}={as_typed(get(other))}: {reason}. Set "
                f"{other}={as_typed(allowed)}."
            )
    after, epochs = get("trainer.instance_graph_warmup_epochs"), get("trainer.max_epochs")
    if "spatial" in (get("model.edge_types") or ()) and after is not None:
        if epochs is not None and after >= epochs:
            raise ConfigError(
                f"trainer.instance_graph_warmup_epochs={after} with trainer.max_epochs={epochs}: the instance graph "
                "would never be trained. Train longer, or remove it with model.edge_types=[semantic,matches]."
            )
        patience = get("trainer.early_stopping")
        if patience is not None and patience <= after:
            raise ConfigError(
                f"trainer.early_stopping={patience} could stop before the instance graph is trained, after {after} "
                "epochs (trainer.instance_graph_warmup_epochs): set a larger value."
            )


# Identity of a run


def run_identity(config: DictConfig) -> dict[str, Any]:
    """Resolved settings that determine the result of a run."""
    # run_dir is left out before it is resolved: it depends on the identity.
    return decisive({key: _plain(config, key) for key in map(str, config) if key not in NOT_PART_OF_A_RUN[""]})


def changed_settings(before: DictConfig, now: DictConfig) -> list[str]:
    """Settings (``key=before -> now``) in which two configs describe different runs."""
    a, b = (flat_settings(run_identity(config)) for config in (before, now))
    return [f"{key}={a.get(key)} -> {b.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def finished_copy(config: DictConfig) -> DictConfig:
    """Copy of a config that is being composed, as :func:`finish` completes it; unchanged if it is invalid."""
    copy = config.copy()
    try:
        return finish(copy, complete=False)
    except (ConfigError, OmegaConfBaseException):
        return config
