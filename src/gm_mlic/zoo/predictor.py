"""Prediction of photo labels and their boxes with a trained model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch_geometric.data import Batch, HeteroData

from gm_mlic.datasets.images import read_image, to_tensor
from gm_mlic.detection import GridExtractor, MultiViewExtractor
from gm_mlic.detection.protocol import InstanceExtractor, Instances, LookupExtractor, build_extractor, detect
from gm_mlic.embeddings import embed_classes, embed_labels, labels_of_classes
from gm_mlic.errors import ConfigError, DataError, UnreadableImage, WeightsError, check_positive, config_keys
from gm_mlic.graphs import collate_instances, to_hetero_data
from gm_mlic.nn import GMMLIC, LabelCache
from gm_mlic.registry import DETECTORS
from gm_mlic.zoo.metadata import ModelMetadata, load_weights, read_checkpoint
from gm_mlic.zoo.pretrained import DETECTOR, ModelCard, find_pretrained, load_safely, read_pretrained, write_pretrained

#: A file or an open image.
Photo: TypeAlias = "str | Path | Image.Image"


@dataclass(frozen=True)
class LabelPrediction:
    """Predicted probability and argmax instance of one label of a photo.

    Attributes:
        label: name of the label.
        probability: p of eq. 14, in [0, 1].
        box: (x1, y1, x2, y2) of the argmax instance (largest match logit) in pixels.
        instance: index of the argmax instance; 0 is the detector's most confident instance.
    """

    label: str
    probability: float
    box: tuple[float, float, float, float]
    instance: int


@dataclass(frozen=True)
class Prediction:
    """Model outputs for one photo.

    Attributes:
        photo: the file; None for an open image.
        size: width and height in pixels.
        labels: the C label names.
        probabilities: (C,) p of eq. 14.
        match_logits: (M, C) match logits of eq. 13; -inf without a matching edge (``graph.candidates``).
        boxes: (M, 4) instance boxes (x1, y1, x2, y2) in pixels.
        scores: (M,) detector confidences.
        detected: (M,) detector class names; None for an instance without a class.
    """

    photo: Path | None
    size: tuple[int, int]
    labels: tuple[str, ...]
    probabilities: np.ndarray
    match_logits: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    detected: tuple[str | None, ...]

    def top(self, k: int = 3) -> list[LabelPrediction]:
        """The k most probable labels, highest probability first."""
        found = []
        for c in np.argsort(-self.probabilities, kind="stable")[:k]:
            instance = int(self.match_logits[:, c].argmax())
            x1, y1, x2, y2 = map(float, self.boxes[instance])
            found.append(LabelPrediction(self.labels[c], float(self.probabilities[c]), (x1, y1, x2, y2), instance))
        return found

    def above(self, threshold: float = 0.5) -> list[LabelPrediction]:
        """The labels with a probability of at least ``threshold``, highest first."""
        return [label for label in self.top(len(self.labels)) if label.probability >= threshold]


class _Detected(NamedTuple):
    photo: Photo
    image: Image.Image
    instances: Instances


class Predictor:
    """Predictor of photo labels.

    Args:
        model: a trained model, from assignment graphs to :class:`~gm_mlic.nn.ModelOutput`.
        metadata: metadata of the model.
        extractor: the detector that the model was trained with.
        card: content of the model card; default: empty.

    Raises:
        WeightsError: if the model's candidates are for another number of detector classes.
    """

    def __init__(
        self, model: nn.Module, metadata: ModelMetadata, extractor: InstanceExtractor, card: ModelCard | None = None
    ) -> None:
        self.model = model.eval()
        self.metadata = metadata
        self.detector = extractor
        self.extractor = extractor if metadata.views == 1 else MultiViewExtractor(extractor, metadata.views)
        self.card = card or ModelCard()
        self.device = next(model.parameters()).device
        self.graph = metadata.build_graph(evaluation=True)
        for table in (self.graph.candidates, self.graph.class_labels):
            if table is not None and len(table) != max(1, len(extractor.labels)):
                raise WeightsError(
                    f"The model's tables are for {len(table)} classes, its detector {extractor.name} has "
                    f"{len(extractor.labels)}: the model is damaged, or the detector is another one."
                )

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu", **detector_settings: Any) -> Predictor:
        """Load a model: :meth:`from_checkpoint` for files, :meth:`from_pretrained` for folders and names on the hub."""
        is_file = Path(name).is_file() or Path(name).suffix == ".ckpt"
        return (cls.from_checkpoint if is_file else cls.from_pretrained)(name, device, **detector_settings)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        /,  # the detector may have a setting `path`
        device: str | torch.device = "cpu",
        *,
        extractor: InstanceExtractor | None = None,
        **detector_settings: Any,
    ) -> Predictor:
        """Load the model of a checkpoint, ``RUN/checkpoints/NAME.ckpt``.

        Args:
            path: the checkpoint.
            device: device of the model and the detector.
            extractor: the detector, if it is a custom one.
            **detector_settings: changed detector settings, e.g. ``weights="elsewhere.safetensors"``.

        Raises:
            WeightsError: if it is not a checkpoint of ``gm-mlic train``, or the detector differs from training.
        """
        path = Path(path)
        metadata, content = read_checkpoint(path)
        if extractor is None:
            settings = metadata.detector_settings | detector_settings
            extractor = _built(settings, device, path, metadata.detector)
        trained = any(name.startswith("online.detector.") for name in content["state_dict"])
        if trained and isinstance(extractor, nn.Module):
            load_weights(extractor, content, path, prefix="online.detector.")
        else:
            metadata.check_extractor(extractor, path)
        model = metadata.build_model()
        load_weights(model, content, path)
        return cls(model.to(device), metadata, extractor)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        /,
        device: str | torch.device = "cpu",
        *,
        revision: str | None = None,
        extractor: InstanceExtractor | None = None,
        **detector_settings: Any,
    ) -> Predictor:
        """Load a model saved with :meth:`save_pretrained`.

        Args:
            name: a local folder, or USER/NAME on the Hugging Face hub (needs the extra ``hub``).
            revision: branch, tag or commit on the hub.
            device, extractor, detector_settings: see :meth:`from_checkpoint`.

        Raises:
            WeightsError: if the model does not exist or is damaged, or the detector differs from training.
        """
        folder = find_pretrained(name, revision)
        metadata, model, card = read_pretrained(folder)
        settings = metadata.detector_settings | detector_settings
        file = folder / DETECTOR
        if in_folder := settings.get("weights") == DETECTOR:
            settings["weights"] = None if settings.get("grid_size") is not None else file
        if extractor is None:
            extractor = _built(settings, device, folder, metadata.detector)
            if in_folder and isinstance(extractor, GridExtractor):
                load_weights(extractor.body, {"state_dict": load_safely(file)}, file, prefix="")
        metadata.check_extractor(extractor, folder)
        return cls(model.to(device), metadata, extractor, card)

    def save_pretrained(self, folder: str | Path, card: ModelCard | None = None) -> Path:
        """Save the model as a folder for :meth:`from_pretrained`, in the format of the Hugging Face hub.

        The folder holds the weights as safetensors, ``config.json``, the label vectors, the detector's weights unless
        they are shipped or torchvision's, and a model card, ``README.md``. It contains no local paths.

        Args:
            folder: output folder; an existing model in it is replaced.
            card: content of the model card; default: the card of this model.
        """
        return write_pretrained(Path(folder), self.model, self.metadata, self.detector, card or self.card)

    def with_labels(self, labels: Sequence[str], **embedding: Any) -> Predictor:
        """Predictor with the same model for other labels; GM-MLIC has no per-label parameters.

        Accuracy on unseen labels depends on how their vectors relate to those of the training labels. With
        ``graph.candidates``, unseen labels are candidates of every instance.

        Args:
            labels: C' unique label names.
            **embedding: changed arguments of :func:`~gm_mlic.embeddings.embed_labels`, e.g. ``path="elsewhere.txt"``;
                default: those of training.

        Raises:
            ConfigError: if the model has a classifier for each label.
            DataError: for out-of-vocabulary labels.
        """
        if not isinstance(self.model, GMMLIC):
            raise ConfigError(f"{type(self.model).__name__} has a classifier for each label: labels are fixed.")
        same = embedding.get("name") in (None, self.metadata.embedding.get("name"))
        settings = {**self.metadata.embedding, **embedding} if same else embedding
        found = embed_labels(labels, **settings)
        classes, class_labels = self.extractor.labels, None
        if classes and self.graph.class_labels is not None:
            words = embed_classes(classes, **settings)
            class_labels = labels_of_classes(classes, labels, words.numpy(), found.vectors.numpy())
        metadata = self.metadata.with_labels(tuple(labels), found.vectors, found.source, class_labels)
        return Predictor(self.model, metadata, self.detector)

    def __call__(
        self, photos: Iterable[Photo], batch_size: int = 8, skipped: dict[str, str] | None = None
    ) -> Iterator[Prediction]:
        """Predict photos batch by batch, in order.

        Features that depend on labels only are computed once per call.

        Args:
            photos: files or open images.
            batch_size: photos per batch.
            skipped: receives unreadable photos with the reason; they are left out of the output. Default: raise.

        Raises:
            UnreadableImage: for an unreadable photo, unless ``skipped`` is given.
            DataError: for a photo without instances, if the detector looks them up in files.
            ConfigError: for an open image without a file name, if the detector looks instances up.
        """
        check_positive(batch_size=batch_size)
        label_cache = None
        rest = iter([photos] if isinstance(photos, (str, Path, Image.Image)) else photos)
        while batch := list(islice(rest, min(batch_size, sys.maxsize))):
            detected = self._detect(batch, skipped)
            if not detected:
                continue
            if label_cache is None:
                label_cache = self._precompute_labels(detected[0].instances)
            yield from self._predict(detected, label_cache)

    @torch.no_grad()
    def assignment_graph(self, photo: Photo) -> HeteroData:
        """Assignment graph of one photo as ``HeteroData``, on the predictor's device; UnreadableImage if unreadable."""
        (detected,) = self._detect([photo], None)
        return self._to_graph(detected.instances)

    @torch.no_grad()
    def _detect(self, photos: Sequence[Photo], skipped: dict[str, str] | None) -> list[_Detected]:
        """Instances of the photos that are readable and have any."""
        read: list[tuple[Photo, Image.Image]] = []
        for photo in photos:
            try:
                read.append((photo, photo.convert("RGB") if isinstance(photo, Image.Image) else read_image(photo)))
            except UnreadableImage as error:
                if skipped is None:
                    raise
                skipped[str(photo)] = str(error)
        m = self.graph.m
        assert m is not None
        if not isinstance(self.extractor, LookupExtractor):
            images = [to_tensor(image) for _, image in read]
            found = detect(self.extractor, images, m, [photo for photo, _ in read]) if read else []
            return [_Detected(*item, instances.top(m)) for item, instances in zip(read, found, strict=True)]
        names = [str(getattr(photo, "filename", "") if isinstance(photo, Image.Image) else photo) for photo, _ in read]
        if "" in names:
            raise ConfigError(
                f"The detector {self.detector.name} looks instances up by the name of a photo, which an open image "
                "does not have: give the path of the file."
            )
        looked_up = self.extractor.look_up(names, [image.size for _, image in read], m)
        self.extractor.log_corrections()
        detected = []
        for name, item, instances in zip(names, read, looked_up, strict=True):
            if not isinstance(instances, str):
                detected.append(_Detected(*item, instances))
            elif skipped is None:
                raise DataError(f"{instances}: add it there, or leave the photo out.")
            else:
                skipped[name] = instances
        return detected

    @torch.no_grad()
    def _precompute_labels(self, instances: Instances) -> LabelCache | None:
        if self.metadata.graph["layout"] == "sparse" or not isinstance(self.model, GMMLIC):
            return None
        return self.model.precompute_labels(collate_instances([instances], self.graph, self.device))

    @torch.no_grad()
    def _predict(self, detected: list[_Detected], label_cache: LabelCache | None) -> Iterator[Prediction]:
        found = [instances for _, _, instances in detected]
        if self.metadata.graph["layout"] == "sparse":
            output = self.model(Batch.from_data_list([self._to_graph(instances) for instances in found]))
        else:
            batch = collate_instances(found, self.graph, self.device)
            output = self.model(batch) if label_cache is None else self.model(batch, label_cache)
        probabilities = torch.sigmoid(output.logits.float()).cpu().numpy()
        match_logits = output.match_logits.float().cpu().numpy()
        for (photo, image, instances), p, matrix in zip(detected, probabilities, match_logits, strict=True):
            scale = torch.tensor([image.width, image.height] * 2)
            names = [self.extractor.labels[i] if i >= 0 else None for i in instances.detected_labels.tolist()]
            yield Prediction(
                None if isinstance(photo, Image.Image) else Path(photo),
                image.size,
                self.metadata.labels,
                p,
                matrix[: len(instances)],
                (instances.boxes.cpu() * scale).numpy(),
                instances.scores.cpu().numpy(),
                tuple(names),
            )

    def _to_graph(self, instances: Instances) -> HeteroData:
        graph: HeteroData = self.graph(to_hetero_data(instances).to("cpu"))
        return graph.to(self.device)


def _built(settings: dict[str, Any], device: str | torch.device, source: Path, name: str) -> InstanceExtractor:
    """Build the detector of a model; its settings are not trusted."""
    if "name" not in settings:
        raise WeightsError(f"{source}: its detector, {name}, is a custom one: pass it as extractor=.")
    if settings["name"] not in DETECTORS.names():
        raise WeightsError(
            f"{source}: its detector, {settings['name']}, is not registered: name its module with plugins=[MODULE], or "
            "install its package."
        )
    settings = {key: value for key, value in settings.items() if key != "max_instances"}
    try:
        with config_keys("detector"):
            return build_extractor(device=device, **settings)
    except (TypeError, ConfigError) as error:
        raise WeightsError(f"{source}: the detector cannot be built ({error}).") from error
