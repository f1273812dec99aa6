"""Export of trained models to ``torch.export`` and ONNX, which run without gm-mlic."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gm_mlic.datasets import Scenes
from gm_mlic.datasets.images import to_tensor
from gm_mlic.detection import FasterRCNNExtractor, FixedDetector
from gm_mlic.errors import ArgumentError, ConfigError, GMMLICError
from gm_mlic.graphs import SPATIAL, AssignmentBatch
from gm_mlic.io import atomic_write
from gm_mlic.nn import GMMLIC
from gm_mlic.zoo.predictor import Predictor

FORMATS = ("torch", "onnx")
PARTS = ("network", "detector", "all")
MATCH_OUTPUTS = ["logits", "match_logits", "argmax_instance"]
#: Tables of a graph transform.
_TABLES = ("label_vectors", "label_neighbors", "candidates", "class_labels", "label_counts")
#: Largest allowed difference of an output between an exported program and the model.
TOLERANCE = 1e-4


class MatchNetwork(nn.Module):
    """Graph network of a predictor with fixed labels, from instances to logits.

    Shapes:
        - **features:** (B, M, D_o), **boxes:** (B, M, 4) divided by image width and height, **mask:** (B, M) bool,
          False for padding, which follows the instances. B and M are dynamic; pad M to at least ``min_instances``, one
          more than the number of neighbors in the instance graph. For models that use the detector's classes also
          **detected_labels:** (B, M) int64, detector classes, -1 for none, and **scores:** (B, M)
        - **logits:** (B, C), **match_logits:** (B, M, C), -inf for padding and absent edges, **argmax_instance:**
          (B, C) int64
    """

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        graph = predictor.graph
        self.model = copy.deepcopy(predictor.model).cpu().eval()
        self.edge_types, self.num_neighbors, self.views = graph.edge_types, graph.num_neighbors, graph.views
        if "instance_dim" not in predictor.metadata.model:
            raise ConfigError(
                f"{predictor.metadata.model['name']} uses detector classes, not features: it has no network to "
                "export. Save it with Predictor.save_pretrained (format=pretrained)."
            )
        self.feature_dim = int(predictor.metadata.model["instance_dim"])
        self.min_instances = self.num_neighbors + 1 if SPATIAL in self.edge_types else 1
        for name in _TABLES:
            table = getattr(graph, name)
            self.register_buffer(name, None if table is None else table.cpu())
        self.reads_classes = len(predictor.extractor.labels) > 0 and (
            self.candidates is not None or self.class_labels is not None or bool(getattr(self.model, "class_words", 0))
        )
        self.num_classes = len(predictor.extractor.labels)
        self.label_cache = None
        if isinstance(self.model, GMMLIC):
            with torch.no_grad():
                self.label_cache = self.model.precompute_labels(self.batch(*self.example(1, self.min_instances)))

    def forward(
        self,
        features: Tensor,
        boxes: Tensor,
        mask: Tensor,
        detected_labels: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, match logits, argmax instances."""
        batch = self.batch(features, boxes, mask, detected_labels, scores)
        output = self.model(batch) if self.label_cache is None else self.model(batch, self.label_cache)
        return output.logits, output.match_logits, output.argmax_instance

    def batch(self, features: Tensor, boxes: Tensor, mask: Tensor, *classes: Tensor | None) -> AssignmentBatch:
        """Assignment graphs of the inputs."""
        detected_labels, scores = classes or (None, None)
        if self.class_labels is not None and detected_labels is None:  # a detector without classes
            detected_labels, scores = torch.full(mask.shape, -1), torch.zeros_like(boxes[..., 0])
        return AssignmentBatch.from_padded(
            features,
            boxes,
            mask,
            num_neighbors=self.num_neighbors,
            edge_types=self.edge_types,
            detected_label=detected_labels,
            score=scores,
            views=self.views,
            **{name: getattr(self, name) for name in _TABLES},
        )

    def example(self, images: int, instances: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs; the first image has all instances, later images have fewer."""
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(images, instances, self.feature_dim, generator=generator)
        corners = torch.rand(images, instances, 2, 2, generator=generator).sort(dim=2).values
        counts = torch.arange(instances, instances - images, -1).clamp(min=1)
        inputs = (features, corners.flatten(2), torch.arange(instances) < counts[:, None])
        if not self.reads_classes:
            return inputs
        detected_labels = torch.randint(-1, self.num_classes, (images, instances), generator=generator)
        return *inputs, detected_labels, torch.rand(images, instances, generator=generator)


class PhotoNetwork(nn.Module):
    """Detector and graph network in one module, for photos of a fixed size.

    Shapes:
        - **image:** (3, H, W) in [0, 1]
        - **logits:** (1, C), **match_logits:** (1, m, C), **argmax_instance:** (1, C) int64, **boxes:** (m, 4) divided
          by image width and height, **mask:** (m,) bool, False for padding
    """

    def __init__(self, detector: FixedDetector, network: MatchNetwork) -> None:
        super().__init__()
        self.detector, self.network = detector, network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Logits, match logits, argmax instances, boxes, mask."""
        features, boxes, mask, scores, detected_labels = self.detector(image)
        classes = (detected_labels, scores) if self.network.reads_classes else ()
        inputs = (features, boxes, mask, *classes)
        return *self.network(*(tensor[None] for tensor in inputs)), boxes, mask


def export(
    predictor: Predictor, path: str | Path, form: str, part: str = "network", size: tuple[int, int] | None = None
) -> float:
    """Export a predictor or a part of it, reload the program and compare its outputs with the model's.

    The file stores label names as ``labels`` and detector classes as ``detector_labels``.

    Args:
        predictor: the model with its labels.
        path: the output file.
        form: ``torch``: :func:`torch.export.save` (``.pt2``); ``onnx``: ONNX (needs the extra ``export``).
        part: ``network``: :class:`MatchNetwork`, with any number of images and instances; ``detector``:
            :class:`~gm_mlic.detection.FixedDetector`; ``all``: :class:`PhotoNetwork`.
        size: height and width of the photos in pixels. Programs with a detector have fixed shapes. Default: a square
            of the detector's shorter side.

    Returns:
        Largest difference from the model's outputs, on random instances (``network``) or scenes (with a detector).

    Raises:
        ConfigError: for an unknown form or part, a detector that is no Faster R-CNN, or a missing extra.
        ExportError: if the outputs of the program and the model differ.
    """
    if part not in PARTS or form not in FORMATS:
        raise ConfigError(
            f"`form={form!r}`, `part={part!r}`: formats are {', '.join(FORMATS)}, parts {', '.join(PARTS)}."
        )
    network = MatchNetwork(predictor)
    both = {"labels": predictor.metadata.labels, "detector_labels": predictor.extractor.labels}
    names = {key: json.dumps(value, ensure_ascii=False) for key, value in both.items()}
    if part == "network":
        images, instances = Dim("images"), Dim("instances", min=network.min_instances)
        inputs = network.example(3, network.min_instances + 3)
        arguments = ("features", "boxes", "mask", "detected_labels", "scores")
        free = {name: {0: images, 1: instances} for name, _ in zip(arguments, inputs, strict=False)}
        trials = [network.example(5, network.min_instances + 8, 1), network.example(1, network.min_instances, 2)]
        return _export(network, inputs, free, MATCH_OUTPUTS, trials, path, form, names)
    extractor = predictor.detector
    if part == "all" and predictor.metadata.views > 1:
        problem = f"is {part!r}, but the model uses {predictor.metadata.views} views of a photo: export "
        raise ArgumentError("part", problem + "`part='network'` and `part='detector'`.")
    if not isinstance(extractor, FasterRCNNExtractor):
        problem = f"is {part!r}, but {extractor.name} is no Faster R-CNN of torchvision: export `part='network'`."
        raise ArgumentError("part", problem)
    extractor = copy.deepcopy(extractor).cpu()
    side = int(extractor.detector.transform.min_size[-1])
    height, width = size or (side, side)
    m = predictor.graph.m
    assert m is not None
    with torch.no_grad():
        detector = FixedDetector(extractor, (height, width), m).eval()
    scenes = Scenes("test", size=4)
    photos = [(to_tensor(scenes.image(i).resize((width, height))),) for i in range(4)]
    if part == "detector":
        outputs = ["features", "boxes", "mask", "scores", "detected_labels"]
        return _export(detector, photos[0], None, outputs, photos[1:], path, form, names)
    outputs = [*MATCH_OUTPUTS, "boxes", "mask"]
    return _export(PhotoNetwork(detector, network).eval(), photos[0], None, outputs, photos[1:], path, form, names)


class ExportError(GMMLICError):
    """An exported program whose outputs differ from the model's."""


def _export(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    free: dict[str, Any] | None,
    outputs: list[str],
    trials: Sequence[tuple[Tensor, ...]],
    path: str | Path,
    form: str,
    names: dict[str, str],
) -> float:
    with atomic_write(path) as unchecked, torch.no_grad(), _quiet():
        if form == "torch":
            program = torch.export.export(module, inputs, dynamic_shapes=free)
            with unchecked.open("wb") as file:
                torch.export.save(program, file, extra_files=names)
            run = _loaded_program(unchecked)
        else:
            _write_onnx(module, inputs, free, outputs, names, unchecked)
            run = _loaded_onnx(unchecked)
        pairs = (zip(outputs, run(trial), module(*trial), strict=True) for trial in trials)
        worst = max(_difference(*pair) for of_trial in pairs for pair in of_trial)
        if not worst <= TOLERANCE:
            raise ExportError(f"{path}: differs from the model by {worst:.1e}, file removed. Please report this.")
    return worst


def _difference(name: str, found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if name == "argmax_instance":  # ties are broken by rounding
        return 0.0
    difference = torch.where(found == expected, 0.0, found.float() - expected.float())  # both may be -inf
    return float(difference.abs().nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def _loaded_program(path: Path) -> Any:
    program: ExportedProgram = torch.export.load(path)
    module = program.module()
    return lambda trial: module(*trial)


def _write_onnx(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    free: dict[str, Any] | None,
    outputs: list[str],
    names: dict[str, str],
    to: Path,
) -> None:
    try:
        import onnx
        import onnxruntime  # type: ignore[import-untyped]  # noqa: F401 - fail before the export, which takes minutes
        from onnxscript import opset18 as op
    except ImportError as error:
        raise ConfigError("`form='onnx'` needs the extra: pip install 'gm-mlic[export]'.") from error

    def stable_sort(self: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # TopK is stable: among equal values, the lower index comes first
        length = op.Shape(self, start=dim, end=dim + 1)
        return op.TopK(self, length, axis=dim, largest=int(descending), sorted=1)

    program = torch.onnx.export(
        module,
        inputs,
        dynamo=True,
        dynamic_shapes=free,
        output_names=outputs,
        verbose=False,
        custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, names)
    onnx.save(model, to)


def _loaded_onnx(path: Path) -> Any:
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(trial: tuple[Tensor, ...]) -> list[Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in zip(names, trial, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence logs and warnings of the exporters; errors are raised."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
