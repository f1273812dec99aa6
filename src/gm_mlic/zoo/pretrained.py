"""Pretrained model folders in the format of the Hugging Face hub; reading them unpickles nothing.

::

    FOLDER/config.json                  ModelMetadata and ModelCard
    FOLDER/model.safetensors            weights of the network
    FOLDER/label_vectors.safetensors    (C, D_l) vectors of the training labels
    FOLDER/detector.safetensors         weights of the detector, unless shipped or torchvision's
    FOLDER/README.md                    model card
"""

from __future__ import annotations

import fnmatch
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from gm_mlic._version import __version__
from gm_mlic.detection import FasterRCNNExtractor, GridExtractor, InstanceExtractor, save_detector
from gm_mlic.errors import ArgumentError, ConfigError, GMMLICError, WeightsError
from gm_mlic.io import first_line, write_file
from gm_mlic.registry import MODELS
from gm_mlic.zoo.metadata import ModelMetadata, check_fields, load_weights

CONFIG, MODEL, LABEL_VECTORS = "config.json", "model.safetensors", "label_vectors.safetensors"
DETECTOR, CARD = "detector.safetensors", "README.md"
log = logging.getLogger(__name__)

#: Files of a model folder; no other file is downloaded or uploaded.
FILES = (CONFIG, MODEL, LABEL_VECTORS, DETECTOR, CARD)

#: Folder of the shipped models.
SHIPPED = Path(__file__).parent / "models"

#: Version of the folder layout. Other versions are rejected.
FORMAT = 1
#: Detector weights that need no file: shipped, torchvision's, or (None) random ones, given by the seed.
NAMED_WEIGHTS = ("scenes", "coco", None)
_NAME_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelCard:
    """Content of a model card beyond the model's metadata.

    Attributes:
        dataset: name of the training dataset.
        sizes: number of images per split.
        metrics: test metrics in percent, by name.
        convention: convention of the metrics.
        license: license of the weights, an identifier of the hub (``mit``, ``cc-by-4.0``); None: not stated.
        training: further facts by name: seed, epochs, revision.
    """

    dataset: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    convention: str | None = None
    license: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, content: Any) -> ModelCard:
        """Model card from the JSON form of :func:`dataclasses.asdict`; TypeError if the content is invalid."""
        card = cls(**content)
        check_fields(card)
        return card


def write_pretrained(
    folder: Path, model: nn.Module, metadata: ModelMetadata, extractor: InstanceExtractor, card: ModelCard
) -> Path:
    """Write a model folder; an existing model is replaced file by file, ``config.json`` last."""
    folder.mkdir(parents=True, exist_ok=True)
    _check_replaceable(folder)
    (folder / CONFIG).unlink(missing_ok=True)
    metadata = _without_paths(metadata, extractor, folder)
    _save(folder / MODEL, model.state_dict())
    _save(folder / LABEL_VECTORS, {"label_vectors": metadata.label_vectors})
    write_file(folder / CARD, model_card(folder.name, metadata, card, sum(p.numel() for p in model.parameters())))
    content = {"library": "gm-mlic", "version": __version__, "format": FORMAT, **metadata.to_checkpoint()}
    del content["label_vectors"]
    content["card"] = asdict(card)
    write_file(folder / CONFIG, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return folder


def _check_replaceable(folder: Path) -> None:
    """Raise ConfigError if the files of a folder, except hidden ones, are not those of a model folder."""
    files = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    replaceable = not files or MODEL in files  # an interrupted export has no config.json
    if CONFIG in files:
        try:
            replaceable = json.loads((folder / CONFIG).read_text())["library"] == "gm-mlic"
        except (KeyError, TypeError, ValueError):
            replaceable = False
    if not replaceable:
        raise ConfigError(f"{folder} has files that are not of an exported model: choose an empty folder.")


def read_pretrained(folder: Path) -> tuple[ModelMetadata, nn.Module, ModelCard]:
    """Read a folder of :func:`write_pretrained`; returns metadata, model with weights, and model card.

    Raises:
        WeightsError: if it is not a model folder, has another format version, or is damaged.
    """
    content = _read_config(folder)
    try:
        card = ModelCard.from_config(content.pop("card", {}))
        label_vectors = load_safely(folder / LABEL_VECTORS)["label_vectors"]
        metadata = ModelMetadata.from_config(content, label_vectors)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / CONFIG}: not the config of a gm-mlic model ({first_line(error)}).") from error
    if (model_name := metadata.model.get("name")) not in MODELS.names():
        raise WeightsError(
            f"{folder}: its model, {model_name}, is not registered: name its module with plugins=[MODULE], or install "
            "its package."
        )
    weights = load_safely(folder / MODEL)
    try:
        if type(metadata.build_graph(evaluation=True).m) is not int:
            raise ValueError("graph.m is not a number")
        with torch.device("meta"):  # allocates nothing if the config has wrong sizes
            shapes = {name: tensor.shape for name, tensor in metadata.build_model().state_dict().items()}
    except (GMMLICError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / CONFIG}: the model or graph cannot be built ({first_line(error)}).") from error
    found = {name: tensor.shape for name, tensor in weights.items()}
    if found != shapes:
        mismatch = next(name for name in sorted(found | shapes) if found.get(name) != shapes.get(name))
        raise WeightsError(f"{folder / MODEL}: the weights do not fit the model of {CONFIG} ({mismatch}).")
    model = metadata.build_model()
    model.load_state_dict(weights)
    return metadata, model, card


def pretrained_models(pattern: str = "*") -> list[str]:
    """Sorted names of the models with shipped weights that match ``pattern``."""
    return sorted(fnmatch.filter([folder.parent.name for folder in SHIPPED.glob(f"*/{CONFIG}")], pattern))


def create_model(name: str, pretrained: bool | str | Path = False, **overrides: Any) -> nn.Module:
    """Build a registered model.

    Args:
        name: a name of :func:`~gm_mlic.list_models`.
        pretrained: True: shipped weights, for names of :func:`pretrained_models`; a folder of ``gm-mlic export``: its
            settings and weights; default: random weights.
        **overrides: arguments of the model's constructor; they override those of the preset or the folder.

    Raises:
        WeightsError: if the weights do not exist or do not fit.
        ConfigError: for an unknown name, or an unknown or missing argument.
    """
    if pretrained is False:
        return MODELS.build(name, **overrides)  # type: ignore[no-any-return]
    MODELS.entry(name)
    if pretrained is True and name not in pretrained_models():
        raise WeightsError(
            f"{name!r} has no shipped weights; models that do: {', '.join(pretrained_models())}. Pass "
            "pretrained=FOLDER for others."
        )
    folder = SHIPPED / name if pretrained is True else Path(pretrained)
    metadata, trained, _ = read_pretrained(folder)
    if not overrides:
        return trained
    model: nn.Module = MODELS.build(**{**metadata.model, **overrides})
    load_weights(model, {"state_dict": trained.state_dict()}, folder, prefix="")
    return model


def find_pretrained(name: str | Path, revision: str | None = None) -> Path:
    """Find the folder of a model: local, shipped, or downloaded from the hub and cached.

    Args:
        name: a folder, a shipped model (``gm_mlic_scenes``), or USER/NAME on the hub.
        revision: branch, tag or commit on the hub; default: the main branch.

    Raises:
        WeightsError: if the model does not exist or cannot be downloaded.
        ConfigError: if ``huggingface_hub`` is not installed.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ArgumentError(
                "revision", f"is {revision!r}, but {folder} is a local folder: only models on the hub have revisions."
            )
        return folder
    if revision is None and str(name) in pretrained_models():
        return SHIPPED / str(name)
    if not isinstance(name, str) or not _NAME_ON_HUB.fullmatch(name):
        raise WeightsError(
            f"{name}: no such folder, not a shipped model ({', '.join(pretrained_models())}), and not a name on the "
            "hub (USER/NAME)."
        )
    hub = _hub()
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # of several libraries: network, names, permissions, disks
        raise WeightsError(
            f"{name}: no such folder, and download from the hub failed ({first_line(error)})."
        ) from error


def push(folder: Path, repo_id: str, *, private: bool = True) -> str:
    """Upload a folder of :func:`write_pretrained` to the hub; returns its URL.

    Raises:
        WeightsError: if it is not a model folder, or the upload fails.
        ConfigError: if ``huggingface_hub`` is not installed.
    """
    _read_config(folder)
    hub = _hub()
    try:
        api = hub.HfApi()
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(FILES), commit_message="Model of gm-mlic"
        )
    except Exception as error:
        raise WeightsError(
            f"`repo_id={repo_id!r}`: upload to the hub failed ({first_line(error)}): set HF_TOKEN or run `hf auth "
            "login`."
        ) from error
    return str(address)


def model_card(name: str, metadata: ModelMetadata, card: ModelCard, parameters: int) -> str:
    """Model card in Markdown, with the YAML header of the hub."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gm_mlic", "zoo"), trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters["yaml"] = lambda value: json.dumps(str(value), ensure_ascii=False)
    # Label names must not add HTML tags or line breaks to the page.
    environment.filters["plain"] = lambda value: " ".join(str(value).replace("<", "&lt;").split())
    template = environment.get_template("model_card.md.jinja")
    return template.render(name=name, metadata=metadata, card=card, parameters=parameters, version=__version__)


def _without_paths(metadata: ModelMetadata, extractor: InstanceExtractor, folder: Path) -> ModelMetadata:
    """Metadata without local paths; writes the detector's weights to the folder unless they are named."""
    settings = dict(metadata.detector_settings)
    settings.pop("trainable", None)
    named = settings.get("weights") in NAMED_WEIGHTS and extractor.fingerprint == metadata.detector_fingerprint
    (folder / DETECTOR).unlink(missing_ok=True)
    if not named and settings and isinstance(extractor, FasterRCNNExtractor):
        save_detector(extractor, folder / DETECTOR, settings["name"])
        settings |= {"weights": DETECTOR, "labels": None}
    elif not named and settings and isinstance(extractor, GridExtractor):
        _save(folder / DETECTOR, extractor.body.state_dict())
        settings["weights"] = DETECTOR
    elif not named:
        paths = {key: value for key, value in settings.items() if isinstance(value, str) and Path(value).exists()}
        settings |= {key: Path(value).name for key, value in paths.items()}
        for key, value in paths.items():
            log.warning("The model folder has no copy of %s: where it is used, set detector.%s=FILE.", value, key)
    embedding = dict(metadata.embedding)
    if embedding.get("path") is not None:
        embedding["path"] = Path(embedding["path"]).name
    return replace(
        metadata,
        detector_fingerprint=extractor.fingerprint,
        detector_settings=settings,
        embedding=embedding,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        best = folder / "checkpoints" / "best.ckpt"
        hint = f"it is a run folder: its model is {best}" if best.is_file() else f"it has no {CONFIG}"
        raise WeightsError(f"{folder}: not a gm-mlic model folder ({hint}).") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: cannot be read ({first_line(error)}).") from error
    if not isinstance(content, dict) or content.pop("library", None) != "gm-mlic":
        raise WeightsError(f"{path}: not the config of a gm-mlic model.")
    written_by = content.pop("version", "?")
    if (version := content.pop("format", None)) != FORMAT:
        raise WeightsError(
            f"{path}: format {version}, written by gm-mlic {written_by}; this version reads format {FORMAT}: update it."
        )
    return content


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, serialize(on_cpu, metadata={"format": "pt"}))


def load_safely(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be read ({first_line(error)}): download or export it again.") from error
    return tensors


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError("Models on the hub need the extra: pip install 'gm-mlic[hub]'.") from error
    return huggingface_hub
