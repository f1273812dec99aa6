"""Trained models as folders to share, in the Hugging Face hub's conventions; nothing in them is ever unpickled.

::

    FOLDER/config.json                  everything but weights: ModelMetadata and ModelCard
    FOLDER/model.safetensors            the network's weights
    FOLDER/label_vectors.safetensors    (C, D_l) of the labels that it was trained on
    FOLDER/detector.safetensors         the detector's, unless they have a name that gm-mlic knows
    FOLDER/README.md                    the model card
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

import jinja2
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from gm_mlic._version import __version__
from gm_mlic.detection import FasterRCNNExtractor, GridExtractor, InstanceExtractor, save_detector
from gm_mlic.errors import ArgumentError, ConfigError, GMMLICError, WeightsError
from gm_mlic.registry import MODELS
from gm_mlic.zoo.metadata import ModelMetadata

CONFIG, MODEL, LABEL_VECTORS = "config.json", "model.safetensors", "label_vectors.safetensors"
DETECTOR, CARD = "detector.safetensors", "README.md"
#: What a folder holds; nothing else that lies in it is ever fetched or pushed.
FILES = (CONFIG, MODEL, LABEL_VECTORS, DETECTOR, CARD)

#: Folders of the models that come with this package.
SHIPPED = Path(__file__).parent / "models"

#: Of the layout above. A reader refuses a later one.
FORMAT = 1
#: Detector weights that need no file: shipped, torchvision's, and (None) random ones, which the seed makes again.
NAMED_WEIGHTS = ("scenes", "coco", None)
_NAME_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelCard:
    """What a model card tells besides what the model knows of itself.

    Attributes:
        dataset: name of what it was trained on.
        sizes: images of each split.
        metrics: name to per cent, on the test split.
        convention: of the metrics.
        license: of the weights, as the hub spells it (``mit``, ``cc-by-4.0``); None: not stated.
        training: further facts, name to value: seed, epochs, revision.
    """

    dataset: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    convention: str | None = None
    license: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, content: Any) -> ModelCard:
        """What :func:`dataclasses.asdict` made of one, from JSON.

        Raises:
            TypeError, ValueError: if it is none.
        """
        card = cls(**content)
        for name in ("dataset", "convention", "license"):
            if not isinstance(getattr(card, name), (str, NoneType)):
                raise TypeError(f"card.{name} is no text")
        for name, kinds in (("sizes", int), ("metrics", (int, float)), ("training", object)):
            value = getattr(card, name)
            if not isinstance(value, dict) or not all(isinstance(v, kinds) for v in value.values()):
                raise TypeError(f"card.{name} is no table of numbers")
        return card


def write_pretrained(
    folder: Path, model: nn.Module, metadata: ModelMetadata, extractor: InstanceExtractor, card: ModelCard
) -> Path:
    """Write the folder; a model that stands there is replaced file by file, ``config.json`` last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    metadata = _without_places(metadata, extractor, folder)
    _save(folder / MODEL, model.state_dict())
    _save(folder / LABEL_VECTORS, {"label_vectors": metadata.label_vectors})
    _write(folder / CARD, model_card(folder.name, metadata, card, sum(p.numel() for p in model.parameters())))
    content = {"library": "gm-mlic", "version": __version__, "format": FORMAT, **metadata.to_config()}
    content["card"] = asdict(card)
    _write(folder / CONFIG, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return folder


def read_pretrained(folder: Path) -> tuple[ModelMetadata, nn.Module, ModelCard]:
    """ModelMetadata, model with its weights, and what its card tells, of a folder that :func:`write_pretrained` wrote.

    Raises:
        WeightsError: if it is none, was written by a later version, or is damaged.
    """
    content = _read_config(folder)
    try:
        card = ModelCard.from_config(content.pop("card", {}))
        label_vectors = load_safely(folder / LABEL_VECTORS)["label_vectors"]
        metadata = ModelMetadata.from_config(content, label_vectors)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / CONFIG}: not the config of a gm-mlic model ({_reason(error)}).") from error
    weights = load_safely(folder / MODEL)
    try:
        if type(metadata.build_graph().m) is not int:
            raise ValueError("graph.m is no number")
        with torch.device("meta"):  # a config that lies about sizes costs nothing
            shapes = {name: tensor.shape for name, tensor in metadata.build_model().state_dict().items()}
    except (GMMLICError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / CONFIG}: its model or graph cannot be built ({_reason(error)}).") from error
    found = {name: tensor.shape for name, tensor in weights.items()}
    if found != shapes:
        mismatch = next(name for name in sorted(found | shapes) if found.get(name) != shapes.get(name))
        raise WeightsError(f"{folder / MODEL}: its weights do not fit the model of {CONFIG} ({mismatch}).")
    model = metadata.build_model()
    model.load_state_dict(weights)
    return metadata, model, card


def pretrained_models(pattern: str = "*") -> list[str]:
    """Names of all models whose weights come with this package, sorted."""
    return sorted(fnmatch.filter([folder.parent.name for folder in SHIPPED.glob(f"*/{CONFIG}")], pattern))


def create_model(name: str, pretrained: bool | str | Path = False, **overrides: Any) -> nn.Module:
    """Build a registered model.

    Args:
        name: one of :func:`~gm_mlic.list_models`.
        pretrained: True: with the weights that come with this package, for the names in :func:`pretrained_models`; a
            folder that ``gm-mlic export`` wrote: with its settings and weights.
        **overrides: arguments of the model's constructor, over the named preset's or the folder's.

    Raises:
        WeightsError: if there are no such weights, or they do not fit.
        ConfigError: for an unknown name, naming the closest one, or an unknown or missing argument, naming it.
    """
    if pretrained is False:
        return MODELS.build(name, **overrides)  # type: ignore[no-any-return]
    MODELS.entry(name)
    if pretrained is True and name not in pretrained_models():
        raise WeightsError(
            f"No weights of {name!r} come with this package: there are some of {', '.join(pretrained_models())}. Give "
            "pretrained=FOLDER for others."
        )
    folder = SHIPPED / name if pretrained is True else Path(pretrained)
    metadata, trained, _ = read_pretrained(folder)
    if not overrides:
        return trained
    model: nn.Module = MODELS.build(**{**metadata.model, **overrides})
    try:
        model.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        mismatch = str(error).splitlines()[1].strip()
        raise WeightsError(
            f"{folder}: its weights do not fit {name} with these settings ({mismatch[:200]})."
        ) from error
    return model


def find_pretrained(name: str | Path, revision: str | None = None) -> Path:
    """The folder of ``name``: itself, a shipped one, or what the hub has as USER/NAME, fetched once and kept.

    Args:
        name: a folder, a model that comes with this package (``gm_mlic_scenes``), or a name on the hub.
        revision: on the hub: branch, tag or commit; default: its main branch.

    Raises:
        WeightsError: if there is no such folder, or it cannot be fetched.
        ConfigError: if huggingface_hub, which fetches, is not installed.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ArgumentError(
                "revision", f"is {revision!r}, but {folder} is a folder: revisions are for names on the hub."
            )
        return folder
    if revision is None and str(name) in pretrained_models():
        return SHIPPED / str(name)
    if not isinstance(name, str) or not _NAME_ON_HUB.fullmatch(name):
        raise WeightsError(
            f"{name}: no such folder, none of {', '.join(pretrained_models())}, and no name on the hub (USER/NAME)."
        )
    hub = _hub()
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # of several libraries: network, names, permissions, disks
        raise WeightsError(f"{name}: there is no such folder, and the hub gave none ({_reason(error)}).") from error


def push(folder: Path, repo_id: str, *, private: bool = True) -> str:
    """Upload a folder of :func:`write_pretrained` to the hub; returns its address.

    Raises:
        WeightsError: if it is no such folder, or the hub refuses it.
        ConfigError: if huggingface_hub is not installed.
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
            f"`repo_id={repo_id!r}`: the hub did not take it ({_reason(error)}); is HF_TOKEN set, or hf auth login "
            "done?"
        ) from error
    return str(address)


def model_card(name: str, metadata: ModelMetadata, card: ModelCard, parameters: int) -> str:
    """The model card, in Markdown with the hub's YAML header."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gm_mlic", "zoo"), trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters["yaml"] = lambda value: json.dumps(str(value), ensure_ascii=False)
    # HTML tags and line ends of a label's name would become part of the page.
    environment.filters["plain"] = lambda value: " ".join(str(value).replace("<", "&lt;").split())
    template = environment.get_template("model_card.md.jinja")
    return template.render(name=name, metadata=metadata, card=card, parameters=parameters, version=__version__)


def _without_places(metadata: ModelMetadata, extractor: InstanceExtractor, folder: Path) -> ModelMetadata:
    """The metadata without paths of this machine; the detector's weights go into the folder where they need to."""
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
        raise WeightsError(f"{folder}: no model of gm-mlic to share ({hint}).") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: cannot be read ({_reason(error)}).") from error
    if not isinstance(content, dict) or content.pop("library", None) != "gm-mlic":
        raise WeightsError(f"{path}: not the config of a gm-mlic model.")
    written_by = content.pop("version", "?")
    if (version := content.pop("format", None)) != FORMAT:
        raise WeightsError(f"{path}: of format {version}, by gm-mlic {written_by}; this one reads {FORMAT}: update it.")
    return content


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    part = path.with_name(path.name + ".part")
    part.write_bytes(serialise(on_cpu, metadata={"format": "pt"}))
    part.replace(path)


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def load_safely(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be read ({_reason(error)}): fetch or write it again.") from error
    return tensors


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError("Names on the hub need the extra: pip install 'gm-mlic[hub]'.") from error
    return huggingface_hub


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
