"""Weights & Biases logging, in addition to ``metrics.csv``.

Names are those of ``metrics.csv`` and ``metrics.json``: ``train/loss``, ``val/mAP``, ``test/top3/CF1``, ... over
``epoch``; summaries keep the best values. The W&B run id is stored in ``RUN/wandb_id``, so a resumed run continues the
same W&B run; ``overwrite=true`` starts another one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from gm_mlic.distributed import rank_info
from gm_mlic.errors import ConfigError
from gm_mlic.graphs import RELATIONS
from gm_mlic.io import first_line, write_file
from gm_mlic.runs import EXAMPLES

log = logging.getLogger(__name__)

ID_FILE = "wandb_id"
#: Timeouts of the first connection, and of the last upload (WANDB_FINISH_TIMEOUT overrides it): an unreachable server
#: must not block the next job.
_TIMEOUT_S, _FINISH_TIMEOUT_S = 20, 1800
_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
_F1 = ("CP", "CR", "CF1", "OP", "OR", "OF1")
#: Box classes at W&B, which colors boxes by class.
_KINDS = {"right": 1, "wrong": 2, "missed": 3}


class Tracker(Callback):
    """Context manager and callback for one W&B run; does nothing without ``logger=wandb``.

    Errors of W&B after the start are logged as warnings and training continues: the run folder is complete without it.

    The default W&B group is the name of the folder ``sweep``, the multirun of this run. ``revision`` is that of the
    code.

    Raises:
        ConfigError: on entering, if W&B is not installed, not logged in or not reachable.
    """

    def __init__(self, config: DictConfig, run_dir: Path, sweep: str | None, revision: str | None) -> None:
        self.config, self.run_dir, self.sweep, self.revision = config, run_dir, sweep, revision
        self.run: Any = None

    def __enter__(self) -> Tracker:
        if self.config.logger.name == "wandb" and rank_info().rank == 0:
            self.run = self._start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Always: a second wandb.init in this process would reuse an open run.
        if self.run is not None:
            with _not_fatal("the end of the run"):
                self.run.finish(exit_code=0 if error is None else 1)
            self.run = None

    def _start(self) -> Any:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("logger=wandb: W&B is not installed: pip install 'gm-mlic[wandb]'.") from error
        settings = self.config.logger
        if os.environ.get("WANDB_MODE") not in (None, "", *_MODES):
            raise ConfigError(f"WANDB_MODE={os.environ['WANDB_MODE']}: expected one of {', '.join(_MODES)}.")
        offline = settings.offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun")
        disabled = os.environ.get("WANDB_MODE") == "disabled"
        group = settings.group or (Path(self.sweep).name if self.sweep else None)
        id_file = self.run_dir / ID_FILE
        content: Any = OmegaConf.to_container(self.config, resolve=True)
        del content["logger"]
        arguments: dict[str, Any] = {
            "project": settings.project,
            "entity": settings.entity,
            "group": group,
            "job_type": "train",
            "name": self.run_dir.name,
            "tags": [self.config.dataset.name, self.config.model.name, *settings.tags],
            "dir": str(self.run_dir),
            "config": {**content, "ablation": _ablation(self.config), "revision": self.revision},
            "id": id_file.read_text().strip() if id_file.is_file() and not self.config.overwrite else None,
            "resume": "allow",
            "mode": "disabled" if disabled else "offline" if offline else "online",
            "settings": _settings(wandb),
        }
        try:
            with _no_stdin():
                run = wandb.init(**arguments)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(
                f"logger=wandb: {first_line(error)}: set WANDB_API_KEY or run `wandb login`, or set "
                "logger.offline=true to write to the run folder only."
            ) from error
        except wandb.errors.Error as error:
            raise ConfigError(
                f"logger=wandb: no connection to W&B ({first_line(error)}): check the network and logger.entity, or "
                "set logger.offline=true to write to the run folder only."
            ) from error
        write_file(id_file, f"{run.id}\n")
        run.define_metric("epoch", hidden=True)
        for split in ("train", "val"):
            run.define_metric(f"{split}/*", step_metric="epoch")
            run.define_metric(f"{split}/loss", step_metric="epoch", summary="min")
        for name in ("mAP", *_F1, *(f"top3/{name}" for name in _F1)):
            run.define_metric(f"val/{name}", step_metric="epoch", summary="max")
        log.info("W&B: %s", f"in {self.run_dir / 'wandb'}" if offline else run.url)
        return run

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log the values of ``metrics.csv``."""
        if self.run is None:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        with _not_fatal(f"epoch {trainer.current_epoch + 1}"):
            self.run.log({"epoch": trainer.current_epoch + 1, "lr": lr, **values})

    def log_result(self, result: Mapping[str, Any]) -> None:
        """Log the test: metrics as summaries, tables of AP per label and of photos, and the tested checkpoint."""
        if self.run is None:
            return
        with _not_fatal("the result"):
            import wandb

            test = {name: value for name, value in result["test"].items() if name != "AP"}
            summary = {f"test/{name}": value for name, value in test.items()}
            self.run.summary.update({**summary, "best_epoch": result["best_epoch"]})
            folder = self.run_dir / EXAMPLES
            photos = [_photo(folder, example) for example in json.loads((folder / "examples.json").read_text())]
            labels = [list(pair) for pair in result["test"]["AP"].items()]
            self.run.log(
                {
                    "test/AP": wandb.Table(columns=["label", "AP"], data=labels),
                    "test/photos": wandb.Table(columns=["id", "photo", "present", "predicted"], data=photos),
                }
            )
            if self.config.logger.log_model:
                name = self.config.trainer.checkpoint
                metadata = {"val/mAP": result["val"]["mAP"]} | test
                artifact = wandb.Artifact(f"{self.run.id}-{name}", type="model", metadata=metadata)
                artifact.add_file(str(self.run_dir / "checkpoints" / f"{name}.ckpt"))
                self.run.log_artifact(artifact, aliases=[name])


def _settings(wandb: ModuleType) -> Any:
    settings: dict[str, Any] = {"init_timeout": _TIMEOUT_S, "silent": True}
    fields = getattr(wandb.Settings, "model_fields", {})  # not all releases have finish_timeout
    if "finish_timeout" in fields and "WANDB_FINISH_TIMEOUT" not in os.environ:
        settings["finish_timeout"] = _FINISH_TIMEOUT_S
    return wandb.Settings(**settings)


@contextlib.contextmanager
def _not_fatal(what: str) -> Iterator[None]:
    """Log exceptions as warnings; W&B passes on those of its service, files and HTTP library."""
    try:
        yield
    except Exception as error:
        log.warning("W&B: logging %s failed (%s); the run folder has the data.", what, first_line(error))


@contextlib.contextmanager
def _no_stdin() -> Iterator[None]:
    """Replace stdin by /dev/null, so that a missing login is an error instead of a prompt."""
    terminal = sys.stdin
    with Path(os.devnull).open() as devnull:
        sys.stdin = devnull
        try:
            yield
        finally:
            sys.stdin = terminal


def _ablation(config: DictConfig) -> str:
    """``full``, or the edge types that the model lacks, named as in ``conf/ablation``."""
    present = config.model.get("edge_types", RELATIONS)
    return "+".join(f"no_{name}" for name in RELATIONS if name not in present) or "full"


def _photo(folder: Path, example: Mapping[str, Any]) -> list[Any]:
    """Row of the table of photos, with boxes as a W&B overlay."""
    import wandb

    boxes = [
        {
            "position": dict(zip(("minX", "minY", "maxX", "maxY"), found["box"], strict=True)),
            "class_id": _KINDS[found["kind"]],
            "box_caption": f"{found['label']} {found['score']:.2f}",
            "scores": {"score": found["score"]},
        }
        for found in example["top"]
    ]
    overlay = {"argmax boxes": {"box_data": boxes, "class_labels": {number: kind for kind, number in _KINDS.items()}}}
    with Image.open(folder / example["file"]) as image:
        photo = wandb.Image(image.copy(), boxes=overlay)
    predicted = [f"{label['label']} {label['score']:.2f}" for label in example["top"] if label["kind"] != "missed"]
    return [example["id"], photo, ", ".join(example["targets"]), ", ".join(predicted)]
