"""The commands: their settings, config groups and help."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import DocInfo, Gt, Interval, Len, Predicate

from gm_mlic.errors import ConfigError
from gm_mlic.schema import Natural, Positive, Probability, Seed, Setting, settings_of, summary_of

_Names = Annotated[str | Annotated[Sequence[str], Len(1)], DocInfo("names, e.g. [cat,zebra crossing]")]
_DEVICE = Literal["auto", "cpu", "cuda"]
_Splits = Annotated[Sequence[Literal["train", "val", "test"]], Len(1)]
#: Config groups of a run, with their default options. A dataset selects its default detector, so it comes after it.
_RUN: Mapping[str, str | None] = MappingProxyType({
    "detector": "scenes_tiny", "dataset": "scenes", "instances": "default", "embedding": "hashed", "graph": "default",
    "model": "gm_mlic_small", "loss": "weighted_bce", "metrics": "default", "optimizer": "adamw",
    "scheduler": "onecycle", "trainer": "default",
})  # fmt: skip
#: Groups that change settings of other groups.
_PRESETS: Mapping[str, str | None] = MappingProxyType({"experiment": None, "ablation": "full"})


@dataclass(frozen=True)
class NewLabels:
    """Vectors of labels that the model was not trained on.

    Args:
        path: file of vectors for new labels; null: the embedding of training.
    """

    path: str | None = None


@dataclass(frozen=True)
class Moved:
    """Files of the detector of a trained model, if they were moved since training; null: as in training.

    Args:
        weights: its weights.
        path: its file or folder of instances (detector.name=precomputed).
        missing: photos without instances there: ``error``, or ``skip`` to leave them out.
    """

    weights: str | None = None
    path: str | None = None
    missing: Literal["error", "skip"] | None = None


class Command:
    """Base of commands, which are dataclasses of their settings."""

    #: Config groups, with their default options.
    groups: ClassVar[Mapping[str, str | None]] = MappingProxyType({})
    #: Settings of sections that differ from those of the groups.
    changed: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @staticmethod
    def exclusions(config: Mapping[str, Any]) -> None:
        """Raise ConfigError for settings that exclude each other."""


_PLUGINS = Setting(
    Sequence[str],
    [],
    "modules that register models, detectors, datasets or embeddings (docs/plugins.md), e.g. plugins=[my_module]. "
    "Plugins of installed packages are always available.",
)


@dataclass
class Train(Command):
    """Train and test a model; resumes an unfinished run.

    Extracts missing instance stores, trains, and tests the epoch with the best val mAP. Writes
    checkpoints/{best,last}.ckpt, metrics.csv (every epoch), metrics.json (the result) and config.yaml to run_dir.
    The same command resumes an unfinished run and prints the result of a finished one.

    Examples::

      gm-mlic train                                        GM-MLIC on scenes, without downloads
      gm-mlic train experiment=scenes_smoke                all stages, in under a minute
      gm-mlic train model.k=3 graph.m=8 seed=1             change settings
      gm-mlic train ablation=no_semantic                   the paper's ablations
      gm-mlic train model=ml_gcn                           a published baseline
      gm-mlic train optimizer=RAdam scheduler=CosineAnnealingLR
      gm-mlic train -m graph.m=5,10,15 seed=0,1,2          nine runs; repeat to run failed ones again
      gm-mlic train sweep=ablation hydra/launcher=joblib   a named multirun, in parallel
      gm-mlic train dataset=coco2014 dataset.root=DIR embedding=glove embedding.path=glove.6B.300d.txt

    Args:
        seed: seed of initial weights, order of images and augmentation. Splits depend on dataset.seed.
        run_dir: run folder. The default contains a hash of the settings that change the result.
        overwrite: true: delete an earlier run in run_dir and start again.
    """

    groups = MappingProxyType({**_RUN, "logger": "csv", **_PRESETS, "sweep": None})

    seed: Seed = 0
    run_dir: str = "runs/${dataset.name}-${model.name}-${gm_mlic.digest:}"
    overwrite: bool = False


@dataclass
class Extract(Command):
    """Run the detector on a dataset and store its instances.

    Writes one instance store per split to instances.root. The same command resumes an interrupted extraction;
    unreadable images are listed and skipped. gm-mlic train extracts missing stores automatically; use extract to do it
    in advance or in several processes. `extract experiment=NAME` creates the stores for `train experiment=NAME`.

    Examples::

      gm-mlic extract                                      stores of scenes
      gm-mlic extract dataset=coco2014 dataset.root=DIR detector.weights=coco instances.num_augmentations=4
      gm-mlic extract dataset=coco2014 dataset.root=DIR instances.shard=0/4    a quarter of the images

    Args:
        splits: splits to extract.
        run_dir: output folder of the log. Stores are written to instances.root or instances.path.
    """

    groups = MappingProxyType({**_RUN, **_PRESETS})

    splits: _Splits = ("train", "val", "test")
    run_dir: str = "runs/extract-${dataset.name}-${gm_mlic.digest:dataset,detector,instances}"


@dataclass
class Plan(Command):
    """Estimate time, memory and disk space of a run.

    Measures the detector on a few images and the network on a few batches, and extrapolates. Published datasets need
    not be downloaded, since their sizes are known. Writes nothing. Keep the machine idle during the measurement.

    Examples::

      gm-mlic plan experiment=nuswide devices=8            NUS-WIDE on eight devices
      gm-mlic plan dataset=custom dataset.root=DIR trainer.max_epochs=50

    Args:
        devices: number of devices; linear speedup is assumed.
        seed: seed of the initial weights of the measured network.
    """

    groups = MappingProxyType({**_RUN, **_PRESETS})

    devices: Positive = 1
    seed: Seed = 0


@dataclass
class Eval(Command):
    """Evaluate a checkpoint on a split, or the scores of any model in a file.

    Checkpoint: rebuilds model and data from the checkpoint and the config.yaml of its run. Prints the metrics and
    writes them to eval/SPLIT.json in the run folder, and the scores to eval/SPLIT.npz.
    Files: prints the metrics of all published conventions side by side, with 95 % bootstrap intervals of mAP, and
    writes them, with AP of each label, to runs/eval-NAME/NAME.json.
    A .csv file has a header (id, then the label names) and a line per image. An .npz or .pt file has entries scores or
    targets (images, labels), and optionally ids, labels, and difficult, a mask of difficult labels.

    Examples::

      gm-mlic eval checkpoint=runs/NAME/checkpoints/best.ckpt
      gm-mlic eval checkpoint=runs/NAME/checkpoints/best.ckpt split=val overrides=[metrics.threshold=0.3]
      gm-mlic eval checkpoint=runs/NAME/checkpoints/best.ckpt overrides=[dataset.root=/elsewhere]
      gm-mlic eval checkpoint=runs/NAME/checkpoints/best.ckpt calibrate=true
      gm-mlic eval scores=scores.csv targets=targets.csv
      gm-mlic eval scores=mine.npz targets=mine.npz against=theirs.npz bootstrap=2000
      gm-mlic eval scores=test.npz targets=test.npz calibrate=true val_scores=val.npz val_targets=val.npz

    Args:
        checkpoint: checkpoint, e.g. runs/NAME/checkpoints/best.ckpt; settings are read from the config.yaml of its run.
            null: evaluate scores instead.
        split: train, val or test.
        overrides: changed settings of the run, as a list: overrides=[dataset.root=/elsewhere,metrics.threshold=0.3]
        scores: file of scores: .npz, .pt or .csv.
        targets: file of targets: .npz, .pt or .csv; it may be the file of scores. Rows are matched by id if both have
            ids.
        target_format: format of targets: binary (1 present, 0 absent) or voc (1 present, 0 difficult, -1 absent).
        allow_all_present: true: accept voc targets without any -1. false: reject them, since 0 most likely means
            absent.
        against: scores of another model on the same images, for a paired test of the difference in mAP; null: none.
        calibrate: true: also compute metrics with per-label thresholds of best F1, fitted on the val split of the run,
            or on val_scores and val_targets.
        val_scores: file of scores of the val split, as scores.
        val_targets: file of targets of the val split, as targets.
        bootstrap: bootstrap resamples of the images for 95 % intervals of mAP and the paired test; 0: none.
        seed: seed of the resamples.
        run_dir: output folder of the log, the metrics (SPLIT.json, or NAME.json for NAME.npz), and the scores of a
            checkpoint (SPLIT.npz).
    """

    checkpoint: str | None = None
    split: Literal["train", "val", "test"] = "test"
    overrides: Sequence[str] = ()
    scores: str | None = None
    targets: str | None = None
    target_format: Literal["binary", "voc"] = "binary"
    allow_all_present: bool = False
    against: str | None = None
    calibrate: bool = False
    val_scores: str | None = None
    val_targets: str | None = None
    bootstrap: Natural = 1000
    seed: Seed = 0
    run_dir: str = "${gm_mlic.evaluation_of:${checkpoint},${scores}}"

    @staticmethod
    def exclusions(config: Mapping[str, Any]) -> None:
        if (config["checkpoint"] is None) == (config["scores"] is None):
            raise ConfigError("set either checkpoint=FILE, or scores=FILE and targets=FILE.")
        if config["scores"] is not None and config["targets"] is None:
            raise ConfigError("targets has no value: set it with targets=FILE (may be the same file as scores).")
        for key in ("targets", "against", "val_scores", "val_targets"):
            if config["scores"] is None and config[key] is not None:
                raise ConfigError(f"{key}={config[key]} needs scores=FILE instead of checkpoint.")
        for key in ("val_scores", "val_targets"):
            if config["scores"] is not None and config["calibrate"] and config[key] is None:
                raise ConfigError(f"calibrate=true fits thresholds on validation images: set {key}=FILE.")
            if not config["calibrate"] and config[key] is not None:
                raise ConfigError(f"{key}={config[key]} needs calibrate=true.")


class OfModel(Command):
    """Base of commands that use a trained model.

    Args:
        checkpoint: model: runs/NAME/checkpoints/best.ckpt, a folder of gm-mlic export, or USER/NAME on the Hugging Face
            hub.
        device: device of model and detector.
        embedding: vectors of new labels.
        detector: files of the detector, if they were moved since training, e.g. detector.weights=FILE.
    """


@dataclass
class Predict(OfModel):
    """Predict the labels of photos and their argmax boxes.

    Writes predictions.jsonl (a line per photo), predictions.csv (a line per label) and, with pictures=true, photos with
    labels and boxes. Unreadable photos are listed and left out.

    Examples::

      gm-mlic predict checkpoint=runs/NAME/checkpoints/best.ckpt images=PHOTOS
      gm-mlic predict checkpoint=FILE images='photos/*.jpg' top=5 pictures=true
      gm-mlic predict checkpoint=FILE images=a.jpg labels=[cat,"zebra crossing"]

    Args:
        images: photo, folder (searched recursively), pattern (``photos/*.jpg``), or a list of these.
        labels: labels, e.g. labels=[cat,"zebra crossing"]; null: those of the model.
        top: minimum number of labels per photo in the output.
        threshold: lowest probability of predicted labels, all of which are in the output.
        pictures: true: draw each photo with its labels and argmax boxes; labels below 0.01 are not drawn. Pictures
            listed in an earlier predictions.jsonl in run_dir are removed in any case.
        batch_size: photos per batch.
        run_dir: output folder of predictions.jsonl, predictions.csv and pictures/.
    """

    checkpoint: str
    images: str | Annotated[Sequence[str], Len(1)]
    labels: _Names | None = None
    top: Positive = 3
    threshold: Probability = 0.5
    pictures: bool = False
    batch_size: Positive = 8
    device: _DEVICE = "auto"
    run_dir: str = "runs/predictions"
    embedding: NewLabels = NewLabels()
    detector: Moved = Moved()


@dataclass
class Explain(OfModel):
    """Explain a predicted label of a photo: match matrix and influence of each edge.

    Writes a picture (photo with instances, match matrix, largest edge influences) and a JSON file with all values. The
    influence of an edge to the argmax instance or to the label is the label's logit minus its logit without the edge.

    Examples::

      gm-mlic explain checkpoint=runs/NAME/checkpoints/best.ckpt image=a.jpg
      gm-mlic explain checkpoint=my-model image=a.jpg label="tennis racket"

    Args:
        image: photo.
        label: label of the model; null: the most probable one.
        run_dir: output folder of the picture and the JSON file.
    """

    checkpoint: str
    image: str
    label: str | None = None
    device: _DEVICE = "auto"
    run_dir: str = "runs/explanations"
    detector: Moved = Moved()


@dataclass
class Serve(OfModel):
    """Serve a local web page for interactive prediction.

    Drop a photo, edit the labels, and see which instance matches which label. Nothing leaves the machine; photos are
    not stored.

    Programs get the same as JSON: GET /model returns labels and detector of the model. POST /predict, with a photo as
    the body and optionally labels as in /predict?label=cat&label=dog, returns labels by descending probability,
    probabilities, argmax_instance and match_probabilities in the same order, and boxes, scores and detected of the
    instances; or status 400 or 413 and an error.

    Examples::

      gm-mlic serve checkpoint=runs/NAME/checkpoints/best.ckpt
      gm-mlic serve checkpoint=my-model port=8080
      curl --data-binary @a.jpg http://127.0.0.1:7860/predict

    Args:
        host: IP address. 127.0.0.1: this machine only; 0.0.0.0: all hosts on the network, without a password.
        port: port; 0: any free port.
    """

    checkpoint: str
    embedding: NewLabels = NewLabels()
    host: Annotated[
        str, Predicate(lambda v: bool(ipaddress.ip_address(v))), DocInfo("an IP address, e.g. 127.0.0.1")
    ] = "127.0.0.1"
    port: Annotated[int, Interval(ge=0, le=65535)] = 7860
    device: _DEVICE = "auto"
    detector: Moved = Moved()


@dataclass
class Export(OfModel):
    """Export a trained model as a folder to share, or to torch.export or ONNX.

    format=pretrained writes a folder for Predictor.from_pretrained in the format of the Hugging Face hub;
    push=USER/NAME uploads it. format=torch and format=onnx write a program, reload it and compare it with the model;
    the file is removed if outputs differ by more than 1e-4.

    Examples::

      gm-mlic export checkpoint=runs/NAME/checkpoints/best.ckpt out=my-model license=mit
      gm-mlic export checkpoint=my-model out=network.onnx format=onnx
      gm-mlic export checkpoint=my-model out=photos.onnx format=onnx part=all size=[448,600]

    Args:
        out: output: a folder for format=pretrained, a file for other formats.
        format: pretrained: safetensors, config, label vectors, model card. torch: torch.export. onnx: ONNX (extra
            export).
        part: part to export, for torch and onnx. network: from instances to labels, any number of images and instances;
            detector: from a photo to instances; all: from a photo to labels.
        size: height and width of the photos in pixels, for parts with a detector; null: a square of the detector's
            shorter side.
        labels: labels, for torch and onnx, e.g. [cat,zebra crossing]; null: those of the model.
        license: license of the weights for the model card (mit, cc-by-4.0, ...); null: not stated.
        push: USER/NAME: upload to the Hugging Face hub (extra hub; log in with HF_TOKEN); null: no upload.
        private: visibility of the uploaded model. true: private; false: public.
    """

    checkpoint: str
    out: str
    format: Literal["pretrained", "torch", "onnx"] = "pretrained"
    part: Literal["network", "detector", "all"] = "network"
    size: (
        Annotated[Sequence[Annotated[int, Interval(ge=32)]], Len(2, 2), DocInfo("[HEIGHT,WIDTH], each at least 32")]
        | None
    ) = None
    labels: _Names | None = None
    embedding: NewLabels = NewLabels()
    license: str | None = None
    push: Annotated[str, Predicate(lambda v: v.count("/") == 1), DocInfo("USER/NAME")] | None = None
    private: bool = True
    detector: Moved = Moved()


@dataclass
class Dataset(Command):
    """Show statistics of a dataset: images, labels, co-occurrences, missing files.

    Prints the number of images, label frequencies (r_c), co-occurrences, missing images, and labels that are out of
    vocabulary in an embedding. Writes a picture of each split (label frequencies, co-occurrences) and statistics.json
    to run_dir. With check=true every image is decoded.

    Examples::

      gm-mlic dataset                                      statistics of scenes
      gm-mlic dataset dataset=coco2014 dataset.root=DIR embedding=glove embedding.path=glove.6B.300d.txt
      gm-mlic dataset dataset=custom dataset.root=DIR dataset.annotations=labels.csv check=true

    Args:
        splits: splits to read.
        check: true: decode every image and list unreadable ones.
        run_dir: output folder of the log, pictures (SPLIT.png) and statistics.json.
    """

    groups = MappingProxyType({"detector": "scenes_tiny", "dataset": "scenes", "embedding": None})

    splits: _Splits = ("train", "val", "test")
    check: bool = False
    run_dir: str = "runs/dataset-${dataset.name}-${gm_mlic.digest:dataset}"


@dataclass
class TrainDetector(Command):
    """Train a detector on a dataset with boxes, for use as detector.weights=FILE.

    Writes weights (.safetensors) and metadata (.json: labels, settings, AP50 on the val split).

    Examples::

      gm-mlic train-detector                               the tiny detector on scenes
      gm-mlic train-detector dataset=coco2014 dataset.root=DIR detector=mobilenet_v3_large_fpn epochs=26
      gm-mlic train-detector dataset=coco2014 dataset.root=DIR detector=scenes_tiny detector.weights=null

    Args:
        epochs: passes over the training split.
        batch_size: images per step.
        lr: peak learning rate of AdamW with one cycle: 2e-3 for scenes_tiny, 1e-4 for other detectors.
        weight_decay: weight decay of AdamW.
        num_workers: worker processes that read images; 0: read in the main process; null: 0 on a CPU, 2 with a GPU.
        device: device of the detector.
        out: output file of the weights (.safetensors; labels, settings and AP are written to a .json beside it).
        seed: seed of initial weights, order of images and flips.
        run_dir: output folder of the log.
    """

    groups = MappingProxyType({"detector": "scenes_tiny", "dataset": "scenes"})
    changed = MappingProxyType({"detector": {"weights": None}})

    epochs: Positive = 8
    batch_size: Positive = 8
    lr: Annotated[float, Gt(0)] = 2e-3
    weight_decay: Annotated[float, Interval(ge=0)] = 1e-3
    num_workers: Natural | None = None
    device: _DEVICE = "auto"
    out: str = "${run_dir}/detector.safetensors"
    seed: Seed = 0
    run_dir: str = "runs/detector-${dataset.name}-${gm_mlic.digest:}"


@dataclass
class Demo(Command):
    """Train and compare three models on synthetic scenes, in minutes, without downloads.

    Draws scenes, extracts instances, and trains GM-MLIC (both fusions) and a baseline without graphs on them. Prints a
    table of metrics and draws test scenes with their labels and argmax boxes.

    Examples::

      gm-mlic demo
      gm-mlic demo seed=1 trainer.max_epochs=20

    Args:
        seed: seed of initial weights, order of images and augmentation.
        run_dir: run folder. The default contains a hash of all settings: the same command resumes the demo.
        overwrite: true: delete an earlier demo in run_dir and start again.
    """

    groups = MappingProxyType({**_RUN, "logger": "csv", "experiment": "scenes"})

    seed: Seed = 0
    run_dir: str = "runs/demo-${gm_mlic.digest:}"
    overwrite: bool = False


@dataclass
class Bench(Command):
    """Measure time and memory of dense and sparse execution.

    Runs all executions of the same network interleaved on random instances. Prints time, memory, improvement over
    sparse, and the fraction of the machine's matrix-product rate. Writes tables, pictures and results.json to run_dir.
    The last line of the output is JSON: forward_ratio, train_ratio and memory_ratio (sparse divided by the best other
    execution), arithmetic_ratio (the same for FLOPs), roofline_fraction (forward) and train_roofline_fraction. Keep the
    machine idle during the measurement.

    Examples::

      gm-mlic bench                                 sizes of MS-COCO, in minutes
      gm-mlic bench bench=full                      all sizes of the paper, and growth curves
      gm-mlic bench bench.cases=[voc2007] bench.executions=[sparse,dense]
      gm-mlic bench device=cuda bench.precision=bfloat16

    Args:
        device: device of the network.
        run_dir: output folder of results.json, tables and pictures.
    """

    groups = MappingProxyType({"detector": "resnet50_fpn", "bench": "coco2014"})

    device: _DEVICE = "auto"
    run_dir: str = "runs/bench"


@dataclass
class Runs(Command):
    """List runs with their state, differing settings and mAP.

    Reads run folders only. States: finished, running, failed (with the error), interrupted (Ctrl-C or SIGTERM), stopped
    (killed, or the machine went down). Run the command of an unfinished run again to resume it.

    Examples::

      gm-mlic runs                                 all runs in runs/
      gm-mlic runs runs/multirun/2026-11-23_10-00-00
      gm-mlic runs runs/a runs/b elsewhere/

    Args:
        folders: run folders, folders that contain runs, or folders of multiruns.
    """

    folders: Sequence[str] = ("runs",)


@dataclass
class Report(Command):
    """Write tables and figures of runs beside the paper's, as one page.

    Groups runs that differ only in the seed. The sections, if the runs have data for them: metrics and AP of each label
    beside the paper's, ablations with paired differences, curves over m and k, photos with argmax boxes, a map of the
    label states, training curves. Writes report.html (self-contained), report.md, and the figures as PNG and SVG.
    Unfinished runs are only listed.

    Examples::

      gm-mlic report                               all runs in runs/, to runs/report
      gm-mlic report runs/multirun/2026-11-23_10-00-00
      gm-mlic report runs/a runs/b out=ab

    Args:
        folders: run folders, folders that contain runs, or folders of multiruns.
        out: output folder of report.html, report.md and the figures; null: report/ in the first of the folders.
    """

    folders: Sequence[str] = ("runs",)
    out: str | None = None


@dataclass
class Dashboard(Command):
    """Create a W&B workspace for runs logged with logger=wandb.

    Panels: val mAP and losses by epoch, test mAP by m and by k, parallel coordinates of settings and mAP, ablation bars
    (mean and standard deviation over seeds), AP of each label, test photos with boxes. The workspace is saved at W&B if
    you are logged in (wandb login, or WANDB_API_KEY); otherwise, or with WANDB_MODE=offline, its definition is written
    to a file.

    Examples::

      gm-mlic dashboard
      gm-mlic dashboard project=my-project entity=my-team

    Args:
        project: W&B project.
        entity: W&B user or team; null: the default of your account.
        out: output file of the workspace definition without a W&B login.
    """

    project: str = "gm-mlic"
    entity: str | None = None
    out: str = "runs/dashboard.json"


COMMANDS: Mapping[str, type[Command]] = {
    "demo": Demo, "train": Train, "eval": Eval, "predict": Predict, "explain": Explain, "serve": Serve,
    "export": Export, "dataset": Dataset, "extract": Extract, "train-detector": TrainDetector, "plan": Plan,
    "runs": Runs, "report": Report, "dashboard": Dashboard, "bench": Bench,
}  # fmt: skip
#: Commands that write nothing, or only files named by their arguments: no log file and no folder of Hydra.
WITHOUT_FOLDER = ("explain", "serve", "export", "plan", "runs", "report", "dashboard")


def fields_of(command: str) -> dict[str, Setting]:
    """Settings of a command outside of its config groups."""
    return {**settings_of(COMMANDS[command]), "plugins": _PLUGINS}  # type: ignore[arg-type]


def summary(command: str) -> str:
    """One line about a command."""
    text = summary_of(COMMANDS[command])
    return text[0].lower() + text[1:]
