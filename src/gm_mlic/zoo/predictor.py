"""From photos to labels, and to the boxes that explain them, with a trained model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch_geometric.data import Batch, HeteroData

from gm_mlic.datasets.images import read_image, to_tensor
from gm_mlic.detection import FasterRCNNExtractor, GridExtractor, InstanceExtractor, Instances, build_extractor
from gm_mlic.embeddings import embed_labels
from gm_mlic.errors import ArgumentError, ConfigError, UnreadableImage, WeightsError, config_keys
from gm_mlic.graphs import collate_instances, to_hetero_data
from gm_mlic.nn import GMMLIC
from gm_mlic.zoo.metadata import ModelMetadata, load_weights, read_checkpoint
from gm_mlic.zoo.pretrained import DETECTOR, ModelCard, find_pretrained, load_safely, read_pretrained, write_pretrained

log = logging.getLogger(__name__)

#: A file, or an image that is open already.
Photo: TypeAlias = "str | Path | Image.Image"


@dataclass(frozen=True)
class LabelPrediction:
    """One label of one photo.

    Attributes:
        label: its name.
        probability: p of eq. 14, in [0, 1].
        box: (x1, y1, x2, y2) in pixels: the instance that won the label (its match logit is the largest).
        instance: that instance's number; 0 is the detector's most confident one.
    """

    label: str
    probability: float
    box: tuple[float, float, float, float]
    instance: int


@dataclass(frozen=True)
class Prediction:
    """What a model says of one photo.

    Attributes:
        photo: its file, or None for an image that was open.
        size: width and height in pixels.
        labels: the C names.
        probabilities: (C,) p of eq. 14.
        matches: (M, C) match logits of eq. 13: how well each instance fits each label; -inf where no edge joins the two
            (``graph.candidates``).
        boxes: (M, 4) of the instances, (x1, y1, x2, y2) in pixels.
        scores: (M,) confidences of the detector.
        detected: (M,) the detector's own names of them; None where it has none.
    """

    photo: Path | None
    size: tuple[int, int]
    labels: tuple[str, ...]
    probabilities: np.ndarray
    matches: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    detected: tuple[str | None, ...]

    def top(self, k: int = 3) -> list[LabelPrediction]:
        """The k most probable labels, best first."""
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [self._found(int(c)) for c in order]

    def above(self, threshold: float = 0.5) -> list[LabelPrediction]:
        """The labels whose probability reaches ``threshold``, best first."""
        return [found for found in self.top(len(self.labels)) if found.probability >= threshold]

    def _found(self, c: int) -> LabelPrediction:
        winner = int(self.matches[:, c].argmax())
        x1, y1, x2, y2 = map(float, self.boxes[winner])
        return LabelPrediction(self.labels[c], float(self.probabilities[c]), (x1, y1, x2, y2), winner)


class Predictor:
    """Predicts the labels of photos.

    Args:
        model: from assignment graphs to :class:`~gm_mlic.nn.ModelOutput`, with trained weights.
        metadata: what it was trained on.
        extractor: the detector it was trained with.
        card: what its model card tells, where it has one.

    Raises:
        WeightsError: if it was trained with candidates for another number of the detector's classes.
    """

    def __init__(
        self, model: nn.Module, metadata: ModelMetadata, extractor: InstanceExtractor, card: ModelCard | None = None
    ) -> None:
        self.model = model.eval()
        self.metadata = metadata
        self.extractor = extractor
        self.card = card or ModelCard()
        self.device = next(model.parameters()).device
        self.graph = metadata.build_graph()
        if (table := self.graph.candidates) is not None and len(table) != len(extractor.labels):
            raise WeightsError(
                f"The model's candidates are for {len(table)} classes, its detector {extractor.name} has "
                f"{len(extractor.labels)}: it is damaged, or this is another detector."
            )
        self._label_cache: Any = None

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu", **detector_settings: Any) -> Predictor:
        """:meth:`from_checkpoint` for files, :meth:`from_pretrained` for folders and names on the hub."""
        is_file = Path(name).is_file() or Path(name).suffix == ".ckpt"
        return (cls.from_checkpoint if is_file else cls.from_pretrained)(name, device, **detector_settings)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: str | torch.device = "cpu", **detector_settings: Any
    ) -> Predictor:
        """The model of ``RUN/checkpoints/NAME.ckpt``.

        Args:
            path: the checkpoint.
            device: where to predict.
            **detector_settings: changes to the detector's, as ``weights="elsewhere.safetensors"``.

        Raises:
            WeightsError: if it is not such a checkpoint, or the detector is not the one it was trained with.
        """
        path = Path(path)
        metadata, content = read_checkpoint(path)
        settings = {**metadata.detector_settings, **detector_settings}
        settings.pop("max_instances", None)
        extractor = _built(settings, device, path)
        trained = any(name.startswith("online.detector.") for name in content["state_dict"])
        if trained:  # along with the model
            load_weights(extractor, content, path, prefix="online.detector.")
        else:
            metadata.check_detector(extractor.name, extractor.fingerprint, path)
        model = metadata.build_model()
        load_weights(model, content, path)
        return cls(model.to(device), metadata, extractor)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | torch.device = "cpu",
        *,
        revision: str | None = None,
        extractor: InstanceExtractor | None = None,
        **detector_settings: Any,
    ) -> Predictor:
        """A model that :meth:`save_pretrained` wrote.

        Args:
            name: its folder, which needs no network; or USER/NAME on the Hugging Face hub (extra ``hub``).
            device: where to predict.
            revision: branch, tag or commit on the hub.
            extractor: the detector, where it is one of your own.
            **detector_settings: changes to the detector's, as ``weights="elsewhere.safetensors"``.

        Raises:
            WeightsError: if there is no such model, it is damaged, or the detector is not the one it was trained with.
        """
        folder = find_pretrained(name, revision)
        metadata, model, card = read_pretrained(folder)
        settings = {**metadata.detector_settings, **detector_settings}
        settings.pop("max_instances", None)
        of_body = None
        if settings.get("weights") == DETECTOR:
            of_body = folder / DETECTOR if settings.get("grid_size") is not None else None
            settings["weights"] = None if of_body else folder / DETECTOR
        if extractor is None:
            if "name" not in settings:
                raise WeightsError(
                    f"{folder}: its detector, {metadata.detector}, is none of gm-mlic's: give it as extractor=."
                )
            extractor = _built(settings, device, folder)
            if of_body is not None and isinstance(extractor, GridExtractor):
                load_weights(extractor.body, {"state_dict": load_safely(of_body)}, of_body, prefix="")
        metadata.check_detector(extractor.name, extractor.fingerprint, folder)
        return cls(model.to(device), metadata, extractor, card)

    def save_pretrained(self, folder: str | Path, card: ModelCard | None = None) -> Path:
        """Write a folder that holds all :meth:`from_pretrained` needs, in the conventions of the Hugging Face hub.

        Weights as safetensors, ``config.json``, the label vectors, the detector's weights unless they have a name that
        gm-mlic knows, and a model card, ``README.md``. No path of this machine goes into it.

        Args:
            folder: where; a model that is there is replaced.
            card: what the model card is to tell of data, metrics and license; default: what this model's own tells.
        """
        return write_pretrained(Path(folder), self.model, self.metadata, self.extractor, card or self.card)

    def with_labels(self, labels: Sequence[str], **embedding: Any) -> Predictor:
        """The same model for other labels: no parameter of GM-MLIC belongs to a label.

        How well it does on labels that it was not trained on depends on how their vectors relate to those of the labels
        that it was. Where only candidates have matching edges (``graph.candidates``), each instance may be any of the
        new ones.

        Args:
            labels: C' different names.
            **embedding: changes to the settings of :func:`~gm_mlic.embeddings.embed_labels` that made the vectors of
                training, as ``path="elsewhere.txt"``.

        Raises:
            ConfigError: if the model has a classifier for each label.
            DataError: for labels out of vocabulary.
        """
        if not isinstance(self.model, GMMLIC):
            raise ConfigError(f"{type(self.model).__name__} has a classifier for each label: it knows no others.")
        found = embed_labels(labels, **{**self.metadata.embedding, **embedding})
        metadata = self.metadata.with_labels(tuple(labels), found.vectors, found.source)
        return Predictor(self.model, metadata, self.extractor)

    def __call__(
        self, photos: Iterable[Photo], batch_size: int = 8, skipped: dict[str, str] | None = None
    ) -> Iterator[Prediction]:
        """Predict, batch by batch, in the order of ``photos``.

        Args:
            photos: files, or open images.
            batch_size: photos at a time.
            skipped: where given, photos that cannot be read are entered here with the reason, and left out.

        Raises:
            UnreadableImage: for the first photo that cannot be read, unless ``skipped`` is given.
        """
        if batch_size < 1:
            raise ArgumentError("batch_size", f"must be 1 or more, got {batch_size}.")
        rest = iter([photos] if isinstance(photos, (str, Path, Image.Image)) else photos)
        while batch := list(islice(rest, batch_size)):
            read = [(photo, image) for photo in batch if (image := self._read(photo, skipped)) is not None]
            if read:
                yield from self._predict(read)

    @torch.no_grad()
    def assignment_graph(self, photo: Photo) -> HeteroData:
        """The assignment graph of one photo, as PyG has graphs, on the predictor's device.

        Raises:
            UnreadableImage: if the photo cannot be read.
        """
        image = self._read(photo, None)
        assert image is not None
        assert self.graph.m is not None
        (found,) = self.extractor([to_tensor(image)], self.graph.m)
        return self._joined(found)

    @staticmethod
    def _read(photo: Photo, skipped: dict[str, str] | None) -> Image.Image | None:
        if isinstance(photo, Image.Image):
            return photo.convert("RGB")
        try:
            return read_image(photo)
        except UnreadableImage as error:
            if skipped is None:
                raise
            skipped[str(photo)] = str(error)
            return None

    @torch.no_grad()
    def _predict(self, read: list[tuple[Photo, Image.Image]]) -> Iterator[Prediction]:
        m = self.graph.m
        assert m is not None
        found = [instances.top(m) for instances in self.extractor([to_tensor(image) for _, image in read], m)]
        logits, matches = self._scored(found)
        probabilities = torch.sigmoid(logits.float()).cpu().numpy()
        for (photo, image), instances, p, matrix in zip(read, found, probabilities, matches, strict=True):
            scale = torch.tensor([image.width, image.height] * 2)
            names = [self.extractor.labels[i] if i >= 0 else None for i in instances.detected_labels.tolist()]
            yield Prediction(
                None if isinstance(photo, Image.Image) else Path(photo),
                image.size,
                self.metadata.labels,
                p,
                matrix.numpy(),
                (instances.boxes.cpu() * scale).numpy(),
                instances.scores.cpu().numpy(),
                tuple(names),
            )

    def _scored(self, found: list[Instances]) -> tuple[Tensor, list[Tensor]]:
        """Label logits (B, C), and of each image the match logits (M, C)."""
        counts = [len(instances) for instances in found]
        if self.metadata.graph["layout"] == "sparse":
            output = self.model(Batch.from_data_list([self._joined(instances) for instances in found]))
        else:
            batch = collate_instances(found, self.graph, self.device)
            if isinstance(self.model, GMMLIC) and self._label_cache is None:
                self._label_cache = self.model.precompute_labels(batch)
            output = self.model(batch) if self._label_cache is None else self.model(batch, self._label_cache)
        matrix = output.match_logits.float().cpu()
        return output.logits, [matrix[i, :count] for i, count in enumerate(counts)]

    def _joined(self, instances: Instances) -> HeteroData:
        graph: HeteroData = self.graph(to_hetero_data(instances).to("cpu"))
        return graph.to(self.device)


def _built(settings: dict[str, Any], device: str | torch.device, source: Path) -> FasterRCNNExtractor | GridExtractor:
    """The detector of a model's settings, which may come from anywhere."""
    try:
        with config_keys("detector"):
            return build_extractor(device=device, **settings)
    except TypeError as error:
        raise WeightsError(f"{source}: its detector cannot be built ({error}).") from error
