"""Command ``gm-mlic export``: a trained model as a folder, ``torch.export`` program or ONNX file."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gm_mlic.cli.predict import for_labels, load
from gm_mlic.errors import ConfigError
from gm_mlic.runs import RESULT, read_run
from gm_mlic.zoo import ModelCard, push
from gm_mlic.zoo.export import export as write_program

log = logging.getLogger(__name__)

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}


def export(config: DictConfig) -> Path:
    """Export a model; returns the path of the output."""
    if config.push is not None and config.format != "pretrained":
        raise ConfigError(f"push={config.push} needs format=pretrained, got format={config.format}.")
    predictor = load(config)
    if config.labels is not None:
        if config.format == "pretrained":
            raise ConfigError("labels needs format=torch or format=onnx: format=pretrained keeps the model's labels.")
        predictor = for_labels(predictor, config)
    if config.format == "pretrained":
        card = card_of(Path(config.checkpoint), predictor.card)
        card = card if config.license is None else replace(card, license=config.license)
        folder = predictor.save_pretrained(Path(config.out), card)
        names = ", ".join(sorted(file.name for file in folder.iterdir() if file.is_file()))
        print(f"{folder}: {names}")
        if config.push is not None:
            print(f"uploaded to {push(folder, config.push, private=config.private)}")
        return folder
    path = Path(config.out)
    if path.suffix != SUFFIXES[config.format]:
        path = path.with_name(path.name + SUFFIXES[config.format])
    log.info("exporting %s and comparing it with the model; this can take a minute", path)
    size = None if config.size is None else (int(config.size[0]), int(config.size[1]))
    difference = write_program(predictor, path, config.format, config.part, size)
    print(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, {config.part}; largest difference from the model {difference:.1e}"
    )
    return path


def card_of(checkpoint: Path, default: ModelCard) -> ModelCard:
    """Model card from the run folder of ``RUN/checkpoints/NAME.ckpt``; ``default`` without a finished run."""
    run = checkpoint.parent.parent
    if checkpoint.parent.name != "checkpoints" or not (run / RESULT).is_file():
        return default
    result: dict[str, Any] = dict(read_run(run).result or {})
    names = ("mAP", "CF1", "OF1", "top3/CF1", "top3/OF1")
    training = {name: result[name] for name in ("seed", "best_epoch", "epochs", "revision") if result.get(name)}
    return ModelCard(
        dataset=result["dataset"]["name"],
        sizes=result["dataset"]["sizes"],
        metrics={name: result["test"][name] for name in names},
        convention=result["convention"],
        training=training | {"seed": result["seed"]},
    )
