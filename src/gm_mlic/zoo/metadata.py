"""Metadata stored with a trained model: everything needed to use or reject it without its run folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gm_mlic.detection.multi_view import VIEWS
from gm_mlic.detection.protocol import InstanceExtractor, LookupExtractor
from gm_mlic.errors import ConfigError, WeightsError
from gm_mlic.graphs import AssignmentGraph
from gm_mlic.io import first_line
from gm_mlic.registry import MODELS
from gm_mlic.safe_load import load_tensors
from gm_mlic.schema import settings_of

#: Key of the metadata in a Lightning checkpoint.
KEY = "gm_mlic"


@dataclass(frozen=True)
class ModelMetadata:
    """Metadata of a trained model: everything except its weights.

    Attributes:
        labels: the C label names, in output order.
        label_vectors: (C, D_l) float32.
        label_source: source of the vectors.
        model: arguments of :func:`~gm_mlic.create_model`, including ``name``.
        graph: arguments of :class:`~gm_mlic.graphs.AssignmentGraph`, with ``candidates`` and ``class_labels`` as lists
            of label indices per detector class, ``label_counts`` as a list, ``layout``: ``dense`` or ``sparse``,
            and ``views`` of each photo in evaluation (default: 1).
        detector: name of the instance extractor.
        detector_settings: arguments of :func:`~gm_mlic.detection.build_extractor`, plus ``max_instances``.
        detector_fingerprint: fingerprint of the extractor that the model was trained with.
        embedding: arguments of :func:`~gm_mlic.embeddings.embed_labels` that made the vectors; used for new labels.
    """

    labels: tuple[str, ...]
    label_vectors: Tensor
    label_source: str
    model: dict[str, Any]
    graph: dict[str, Any]
    detector: str
    detector_fingerprint: str
    detector_settings: dict[str, Any]
    embedding: dict[str, Any]

    def build_model(self) -> torch.nn.Module:
        """Build the model with newly initialized weights."""
        model = MODELS.build(**self.model)
        if not isinstance(model, torch.nn.Module):
            kind = type(model).__name__
            raise ConfigError(f"The model {self.model['name']} is a {kind}, expected a torch.nn.Module.")
        return model

    @property
    def views(self) -> int:
        """Views of each photo in evaluation, whose instances are in one graph."""
        views = self.graph.get("views", 1)
        if type(views) is not int or not 1 <= views <= len(VIEWS):
            raise ValueError(f"graph.views is not 1 to {len(VIEWS)}")
        return views

    def build_graph(self, *, evaluation: bool = False) -> AssignmentGraph:
        """Build the assignment-graph transform for these labels.

        Args:
            evaluation: with m times as many instances as evaluation has views.

        Raises:
            ConfigError, TypeError, ValueError: for invalid settings.
        """
        settings = {name: value for name, value in self.graph.items() if name != "layout"}
        settings["views"] = self.views if evaluation else 1
        C = len(self.labels)
        for name in ("candidates", "class_labels"):
            if (lists := settings.get(name)) is None:
                continue
            are_lists = isinstance(lists, list) and lists and all(isinstance(numbers, list) for numbers in lists)
            if not are_lists or not all(type(c) is int and 0 <= c < C for numbers in lists for c in numbers):
                raise ValueError(f"graph.{name} is not a list of indices of its {C} labels for each class")
            settings[name] = torch.tensor([[c in numbers for c in range(C)] for numbers in lists])
        if (counts := settings.get("label_counts")) is not None:
            if not isinstance(counts, list) or not all(type(n) in (int, float) for n in counts):
                raise ValueError("graph.label_counts is not a list of numbers")
            settings["label_counts"] = torch.tensor(counts, dtype=torch.float32)
        return AssignmentGraph(self.label_vectors, **settings)

    def with_labels(
        self,
        labels: tuple[str, ...],
        label_vectors: Tensor,
        label_source: str,
        class_labels: list[list[int]] | None = None,
    ) -> ModelMetadata:
        """Copy for C' other labels; ``class_labels`` are their indices by detector class, for models that read classes.

        Labels that the model was not trained on are candidates of every class and have 0 training images. With a prior
        and shrinkage, only the prior scores those that are classes of the detector, which is better than what is
        learned for other labels (experiments/photos).
        """
        graph, before = dict(self.graph), {label: c for c, label in enumerate(self.labels)}
        if (lists := graph.get("candidates")) is not None:
            graph["candidates"] = [
                [new for new, label in enumerate(labels) if label not in before or before[label] in numbers]
                for numbers in lists
            ]
        if graph.get("class_labels") is not None:
            graph["class_labels"] = class_labels or [[] for _ in graph["class_labels"]]
        if (counts := graph.get("label_counts")) is not None:
            graph["label_counts"] = [counts[before[label]] if label in before else 0 for label in labels]
        return replace(self, labels=labels, label_vectors=label_vectors, label_source=label_source, graph=graph)

    def to_checkpoint(self) -> dict[str, Any]:
        """Plain containers and tensors, which load with ``weights_only=True``."""
        return {**asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_checkpoint(cls, content: dict[str, Any]) -> ModelMetadata:
        return cls(**{**content, "labels": tuple(content["labels"])})

    @classmethod
    def from_config(cls, content: dict[str, Any], label_vectors: Tensor) -> ModelMetadata:
        """Metadata from the JSON form of everything except the label vectors; TypeError or ValueError if invalid."""
        metadata = cls.from_checkpoint({**content, "label_vectors": label_vectors})
        check_fields(metadata, "label_vectors")
        labels = metadata.labels
        if len(set(labels)) != len(labels):
            raise ValueError("labels are not unique")
        if label_vectors.dim() != 2 or len(label_vectors) != len(labels):
            raise ValueError(f"{len(labels)} labels, but label vectors of shape {tuple(label_vectors.shape)}")
        return metadata

    def check_labels(self, labels: tuple[str, ...], path: Path) -> None:
        """Raise :class:`WeightsError` unless the model has exactly these labels in this order."""
        if labels == self.labels:
            return
        if len(labels) != len(self.labels):
            difference = f"it has {len(self.labels)} labels, the dataset {len(labels)}"
        else:
            i = next(i for i, (a, b) in enumerate(zip(self.labels, labels, strict=True)) if a != b)
            difference = f"its label {i} is {self.labels[i]!r}, the dataset's is {labels[i]!r}"
        raise WeightsError(f"{path}: trained on other labels ({difference}): choose the dataset it was trained on.")

    def check_extractor(self, extractor: InstanceExtractor, path: Path) -> None:
        """Raise :class:`WeightsError` unless the model was trained with this extractor.

        The files of a :class:`~gm_mlic.detection.LookupExtractor` may be others than in training, with other photos.
        Whether they are of the same detector cannot be told; only the name and the length of features are compared.
        """
        if isinstance(extractor, LookupExtractor) and extractor.name == self.detector:
            expected = self.model.get("instance_dim", extractor.feature_dim)
            if extractor.feature_dim != expected:
                raise WeightsError(
                    f"{path}: trained on features of length {expected}, the precomputed ones have length "
                    f"{extractor.feature_dim}: use files of the same detector."
                )
        elif extractor.fingerprint != self.detector_fingerprint:
            raise WeightsError(
                f"{path}: trained with detector {self.detector} ({self.detector_fingerprint[:8]}), got "
                f"{extractor.name} ({extractor.fingerprint[:8]}): use the detector, weights and settings it was "
                "trained with."
            )


def check_fields(found: object, *others: str) -> None:
    """Raise TypeError unless all fields of a dataclass, except ``others``, have JSON content of the annotated types."""
    for name, field in settings_of(type(found), others).items():  # type: ignore[arg-type]
        if not field.accepts(getattr(found, name)):
            raise TypeError(f"{name} is not {field.expected}")


def read_checkpoint(path: Path) -> tuple[ModelMetadata, dict[str, Any]]:
    """Read a checkpoint; returns its metadata and its full content.

    Raises:
        WeightsError: if the file does not exist or is not a checkpoint of ``gm-mlic train``.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint; gm-mlic train writes runs/NAME/checkpoints/best.ckpt.")
    try:
        content = load_tensors(path)
        return ModelMetadata.from_checkpoint(content[KEY]), content
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{path}: not a checkpoint of gm-mlic train, or damaged ({first_line(error)}): restore a copy, or delete "
            "it and run its command again."
        ) from error


def load_weights(model: torch.nn.Module, content: dict[str, Any], path: Path, prefix: str = "model.") -> None:
    """Load weights whose names start with ``prefix`` into ``model``; WeightsError if names or shapes differ."""
    weights = {name.removeprefix(prefix): w for name, w in content["state_dict"].items() if name.startswith(prefix)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise WeightsError(
            f"{path}: the weights do not fit the model ({str(error).splitlines()[1].strip()})."
        ) from error
