"""Detector of an ONNX file: exported by another library, run by ONNX Runtime."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Gt
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.ops import batched_nms, box_convert, roi_align

from gm_mlic.detection.labels import label_of_class, read_labels
from gm_mlic.detection.protocol import ROUNDING, Instances
from gm_mlic.errors import ArgumentError, ConfigError, WeightsError, check_positive
from gm_mlic.io import first_line, sha256
from gm_mlic.registry import register_detector
from gm_mlic.schema import Positive, Probability, checked

log = logging.getLogger(__name__)

#: Usual names of outputs.
_NAMES = {
    "boxes": ("boxes", "pred_boxes", "bboxes", "bbox", "dets"),
    "scores": ("scores", "logits", "confs", "conf", "probs"),
    "classes": ("classes", "labels", "class_ids", "class_indices"),
}
#: Formats with separate outputs, and those they need.
_SEPARATE = {"detections": ("boxes", "classes"), "scores": ("boxes", "scores")}
#: Gray of the letterbox's borders, as in YOLO.
_GRAY = 114 / 255
#: Cells of RoIAlign, whose mean is the feature.
_CELLS = 7
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_AboveZero = Annotated[float, Gt(0)]


@register_detector("onnx")
class ONNXDetector:
    """Detector in an ONNX file, exported by another library.

    The file needs one image input, (1, 3, H, W) or (3, H, W); images are processed one by one. Only operators of ONNX
    and ONNX Runtime run: libraries of custom operators are not loaded.

    The feature of an instance is, by ``features``, the mean of 7 x 7 RoIAlign samples of a feature map in its box, or
    its row of features. Without that output it is the vector of its class scores: all C scores if the file returns
    them, else its score at its class and 0 elsewhere.

    Args:
        weights: the ``.onnx`` file. A file with external data needs it in the same folder.
        labels: class names, as a list or a text file with one per line (``N/A``: unused class); null: read from the
            file, if Ultralytics wrote it.
        format: layout of the outputs: ``detections`` (boxes (N, 4), scores (N,) and classes (N,) after non-maximum
            suppression, or boxes (N, 5) with the score), ``scores`` (boxes (N, 4) and scores (N, C) of each class),
            ``yolo`` (one output: box and C scores), ``yolo_objectness`` (one output: box, objectness and C scores),
            ``rows`` (one output: box, score and class, after non-maximum suppression); null: by names and shapes.
        boxes: name of the output of boxes, or of the only output; null: boxes, pred_boxes, bboxes, bbox, dets, or the
            first.
        scores: name of the output of scores; null: scores, logits, confs, conf or probs.
        classes: name of the output of classes; null: classes, labels, class_ids or class_indices.
        features: name of an output with a feature map (1, D, h, w) of the whole input, or features (N, D) of the boxes;
            null: class scores are the features.
        first_class: number of the first class: 1 if 0 is the background.
        activation: function that turns scores into probabilities: ``none``, ``sigmoid`` or ``softmax``. With softmax,
            a last class without a name is the background.
        box_format: ``xyxy`` (corners), ``xywh`` (left, top, width, height) or ``cxcywh`` (center, width, height); null:
            cxcywh for the formats yolo and yolo_objectness, else xyxy.
        box_units: ``pixels`` of the network's input, or ``fraction`` of its width and height.
        size: input size in pixels, one number or [height, width]; null: that of the file.
        resize: ``letterbox`` (aspect ratio kept, gray borders) or ``stretch``; both bilinear.
        value_range: largest value of a pixel in the input, 1 or 255.
        mean: subtracted from the three channels, in units of the input; null: nothing.
        std: divides the three channels, in units of the input; null: 1.
        channels: order of the channels, ``rgb`` or ``bgr``; also of ``mean`` and ``std``.
        score_threshold: detections with this confidence or less are dropped.
        nms_threshold: IoU above which the less confident of two boxes of one class is dropped, for the formats scores,
            yolo and yolo_objectness; null: none is dropped.
        device: device of the network; CUDA needs the package onnxruntime-gpu.

    Raises:
        ConfigError: if an argument is invalid, or ONNX Runtime is not installed.
        WeightsError: if the file cannot be read or its inputs and outputs are of another form.
    """

    name = "onnx"

    @checked
    def __init__(
        self,
        weights: str | Path,
        labels: str | Path | list[str] | None = None,
        format: Literal["detections", "scores", "yolo", "yolo_objectness", "rows"] | None = None,
        boxes: str | None = None,
        scores: str | None = None,
        classes: str | None = None,
        features: str | None = None,
        first_class: Literal[0, 1] = 0,
        activation: Literal["none", "sigmoid", "softmax"] = "none",
        box_format: Literal["xyxy", "xywh", "cxcywh"] | None = None,
        box_units: Literal["pixels", "fraction"] = "pixels",
        size: Positive | tuple[Positive, Positive] | None = None,
        resize: Literal["letterbox", "stretch"] = "letterbox",
        value_range: Literal[1, 255] = 1,
        mean: tuple[float, float, float] | None = None,
        std: tuple[_AboveZero, _AboveZero, _AboveZero] | None = None,
        channels: Literal["rgb", "bgr"] = "rgb",
        score_threshold: Probability = 0.05,
        nms_threshold: Probability | None = 0.5,
        device: str | torch.device = "cpu",
    ) -> None:
        self.path = Path(weights).expanduser()
        self._files, self._session = _read(self.path, torch.device(device))
        self.activation, self.box_units, self.resize, self.channels = activation, box_units, resize, channels
        self.value_range, self.score_threshold, self.nms_threshold = value_range, score_threshold, nms_threshold
        self.mean = [0.0] * 3 if mean is None else [float(x) for x in mean]
        self.std = [1.0] * 3 if std is None else [float(x) for x in std]
        metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        self._input, self._dtype, shape, self._size_input = self._inputs()
        self.size = _input_size(self.path, shape, size, metadata)
        names = read_labels(labels) if labels is not None else self._names(metadata)
        self.labels, self._label_of_class = label_of_class(names, first_class)
        self._features = features
        self._outputs = {"boxes": boxes, "scores": scores, "classes": classes, "features": features}
        # One run on a gray image shows the shapes of all outputs.
        self._wanted = [output.name for output in self._session.get_outputs()]
        found = self._run(np.full((1, 3, *self.size), 0.5 * value_range, self._dtype))
        self.format, self._by_column = self._layout(format, {name: array.shape for name, array in found.items()})
        self.box_format = box_format or ("cxcywh" if self.format.startswith("yolo") else "xyxy")
        self._wanted = list(dict.fromkeys(name for name in self._outputs.values() if name is not None))
        self._parse(found)
        self.feature_dim = self._width(found)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the settings, the class names, the file and its external data."""
        settings = [
            *(self.format, self._by_column, self._outputs, self.labels, self._label_of_class.tolist()),
            *(self.activation, self.box_format, self.box_units, self.size, self.resize, self.channels),
            *(self.value_range, self.mean, self.std, self.score_threshold, self.nms_threshold),
        ]
        files = [sha256(file) for file in self._files]
        return hashlib.sha256("".join([json.dumps(["onnx", *settings]), *files]).encode()).hexdigest()

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], m: int) -> list[Instances]:
        """Detect instances; see :class:`~gm_mlic.detection.InstanceExtractor`.

        Raises:
            ConfigError: if ``m`` is less than 1.
            WeightsError: if the network returns NaN, or scores that are no probabilities.
        """
        check_positive(m=m)
        return [self._detect(image.cpu(), m) for image in images]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, format={self.format!r}, size={self.size})"

    # The network

    def _inputs(self) -> tuple[str, Any, list[Any], str | None]:
        """Name, dtype and shape of the image input, and the name of an input of the image size, if any."""
        inputs = self._session.get_inputs()
        images = [i for i in inputs if i.type in _DTYPES and len(i.shape) in (3, 4) and _size_or(i.shape[-3], 3) == 3]
        sizes = [i for i in inputs if i.type == "tensor(int64)" and len(i.shape) == 2 and "size" in i.name]
        if len(images) != 1 or len(images) + len(sizes) != len(inputs) or len(sizes) > 1:
            shown = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise WeightsError(
                f"{self.path} has the inputs {shown}: expected one image, a tensor(float) of shape (1, 3, H, W)."
            )
        (image,) = images
        self._batch = len(image.shape) == 4
        if self._batch and _size_or(image.shape[0], 1) != 1:
            raise WeightsError(f"{self.path} takes batches of {image.shape[0]} images: export it for one image.")
        return image.name, _DTYPES[image.type], list(image.shape[-2:]), sizes[0].name if sizes else None

    def _run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """The wanted outputs of the network by name."""
        inputs = {self._input: image if self._batch else image[0]}
        if self._size_input is not None:
            inputs[self._size_input] = np.array([self.size[::-1]], np.int64)
        try:
            arrays = self._session.run(self._wanted, inputs)
        except Exception as error:
            raise WeightsError(
                f"{self.path} fails on an image of {self.size[0]} x {self.size[1]} pixels ({first_line(error)})."
            ) from error
        return dict(zip(self._wanted, arrays, strict=True))

    def _names(self, metadata: dict[str, str]) -> tuple[str, ...]:
        """Class names in the file, as Ultralytics writes them: the text of a dict or list."""
        try:
            names = ast.literal_eval(metadata["names"])
            names = [names[key] for key in sorted(names)] if isinstance(names, dict) else list(names)
            return read_labels(names, f"the metadata of {self.path}")
        except (KeyError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            problem = f"is missing, and {self.path} has no class names: give a list, or a file with a name per line."
            raise ArgumentError("labels", problem) from error

    # The outputs

    def _layout(self, form: str | None, shapes: dict[str, tuple[int, ...]]) -> tuple[str, bool]:
        """Format of the outputs, and whether the only output has a column for each box; sets names of outputs."""
        for key, name in self._outputs.items():
            if name is not None and name not in shapes:
                shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
                raise ArgumentError(key, f"is {name!r}: {self.path} has no such output, but {shown}.")
        found = {
            key: self._outputs[key] or next((name for name in names if name in shapes), None)
            for key, names in _NAMES.items()
        }
        if form is None and found["boxes"]:
            form = "detections" if found["classes"] else "scores" if found["scores"] else None
        if form not in _SEPARATE:
            name = found["boxes"] or next(iter(shapes))
            self._outputs |= {"boxes": name, "scores": None, "classes": None}
            return self._single(form, name, shapes[name])
        for key in _SEPARATE[form]:
            if found[key] is None:
                raise ArgumentError(
                    key, f"is missing: name one of the outputs of {self.path}: {', '.join(shapes)} (format {form})."
                )
        self._outputs |= found if form == "detections" else {**found, "classes": None}
        return form, False

    def _single(self, form: str | None, name: str, shape: tuple[int, ...]) -> tuple[str, bool]:
        """Format of the only output, by its shape, and whether the boxes are its last axis."""
        columns = len(self._label_of_class)
        sizes = {"yolo": 4 + columns, "yolo_objectness": 5 + columns, "rows": 6}
        axes = shape[-2:] if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1) else (0, 0)
        fits = [
            key
            for key, size in sizes.items()
            if form in (None, key) and (axes[1] == size or (key == "yolo" and axes[0] == size))
        ]
        if not fits:
            wanted = ", ".join(f"K = {size} for {key}" for key, size in sizes.items() if form in (None, key))
            raise WeightsError(
                f"{self.path}: the output {name!r} has shape {shape}, expected (1, N, K), or for yolo (1, K, N), with "
                f"{wanted}, as there are {columns} classes: set `labels`, or `format` and the names of the outputs."
            )
        if len(fits) > 1:
            raise ArgumentError("format", f"is missing: the output {name!r} {shape} can be {' or '.join(fits)}.")
        return fits[0], fits[0] == "yolo" and axes[0] == sizes["yolo"]

    def _parse(self, found: dict[str, np.ndarray]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Boxes (N, 4), scores (N,) or (N, C), and classes (N,) or None, of the outputs."""
        arrays = {
            key: torch.from_numpy(found[name].astype(np.float32))
            for key, name in self._outputs.items()
            if name is not None and key != "features"
        }
        boxes, scores, classes = arrays["boxes"], arrays.get("scores"), arrays.get("classes")
        if self.format not in _SEPARATE:
            rows = boxes.reshape(boxes.shape[-2:])
            boxes, values = (rows.T if self._by_column else rows).tensor_split([4], dim=1)
            if self.format == "rows":
                return boxes, values[:, 0], values[:, 1].round().long()
            scores = self._activated(values)
            return boxes, scores if self.format == "yolo" else scores[:, :1] * scores[:, 1:], None
        width = 4 if scores is not None else 5
        N = classes.numel() if classes is not None else boxes.numel() // width
        if boxes.numel() != N * width or boxes.shape[-1] != width:
            self._refuse("boxes", boxes.shape, f"({N if classes is not None else 'N'}, {width})")
        boxes = boxes.reshape(N, width)
        if classes is not None:
            scores = boxes[:, 4] if scores is None else self._activated(scores.flatten())
            if scores.numel() != N:
                self._refuse("scores", arrays["scores"].shape, f"({N},), as the classes")
            return boxes[:, :4], scores, classes.flatten().round().long()
        assert scores is not None
        columns = len(self._label_of_class)
        background = self.activation == "softmax" and scores.shape[-1] == columns + 1
        if scores.shape[-1] != columns + background or scores.numel() != N * scores.shape[-1]:
            self._refuse("scores", scores.shape, f"({N}, {columns}): a column for each class, from number 0")
        return boxes, self._activated(scores.reshape(N, -1))[:, :columns], None

    def _refuse(self, key: str, shape: Sequence[int], expected: str) -> None:
        raise WeightsError(
            f"{self.path}: the output {self._outputs[key]!r} has shape {tuple(shape)}, expected {expected}: set "
            "`format`, `labels`, or the names of the outputs."
        )

    def _activated(self, scores: Tensor) -> Tensor:
        """Scores as probabilities."""
        if self.activation == "softmax" and scores.dim() == 2:
            return scores.softmax(-1)
        return scores.sigmoid() if self.activation == "sigmoid" else scores

    def _width(self, found: dict[str, np.ndarray]) -> int:
        """D, the length of a feature."""
        if self._features is None:
            return len(self.labels)
        shape = found[self._features].shape
        if len(shape) not in (2, 3, 4) or (len(shape) > 2 and shape[0] != 1):
            self._refuse("features", shape, "a map (1, D, h, w), or features (N, D) of the boxes")
        return int(shape[1] if len(shape) == 4 else shape[-1])

    # An image

    def _detect(self, image: Tensor, m: int) -> Instances:
        ready, (left, top, width, height) = self._prepare(image)
        found = self._run(ready)
        boxes, scores, classes = self._parse(found)
        self._check("scores", scores, image)
        if scores.numel() and not -ROUNDING <= float(scores.min()) <= float(scores.max()) <= 1 + ROUNDING:
            worst = max(scores.flatten().tolist(), key=lambda score: abs(score - 0.5))
            raise WeightsError(
                f"{self.path} returned the score {worst:.4g}, expected 0 to 1: set `activation='sigmoid'` or "
                "`activation='softmax'` if scores are logits."
            )
        scores = scores.clamp(0, 1) if classes is None else self._of_classes(scores.clamp(0, 1), classes)
        row, number = (scores > self.score_threshold).nonzero(as_tuple=True)
        known = self._label_of_class[number] >= 0
        row, number = row[known], number[known]
        boxes, score, label = boxes[row], scores[row, number], self._label_of_class[number]
        self._check("boxes", boxes, image)
        boxes = box_convert(boxes, self.box_format, "xyxy")
        if self.box_units == "fraction":
            boxes = boxes * boxes.new_tensor([self.size[1], self.size[0]] * 2)
        if classes is None and self.nms_threshold is not None:
            kept = batched_nms(boxes, score, label, self.nms_threshold).sort().values
            boxes, row, label, score = boxes[kept], row[kept], label[kept], score[kept]
        shift, scale = boxes.new_tensor([left, top] * 2), boxes.new_tensor([width, height] * 2)
        boxes = ((boxes - shift) / scale).clamp(0, 1)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).nonzero().flatten()
        kept = kept[score[kept].sort(descending=True, stable=True).indices[:m]]
        if len(kept) == 0:
            whole = boxes.new_tensor([[0.0, 0.0, 1.0, 1.0]]) * scale + shift
            return Instances.whole_image(self._feature(found, whole, None, scores, image)[0])
        features = self._feature(found, boxes[kept] * scale + shift, row[kept], scores, image)
        return Instances(boxes[kept], score[kept], label[kept], features)

    def _prepare(self, image: Tensor) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        """The input (1, 3, H, W), and the left, top, width and height of the image in it."""
        (H, W), (h, w) = self.size, image.shape[-2:]
        left, top, width, height = 0, 0, W, H
        if self.resize == "letterbox":
            ratio = min(H / h, W / w)
            width, height = min(W, max(1, round(w * ratio))), min(H, max(1, round(h * ratio)))
            left, top = (W - width) // 2, (H - height) // 2
        if (height, width) != (h, w):
            image = interpolate(image[None], (height, width), mode="bilinear")[0]
        ready = image.new_full((3, H, W), _GRAY)
        ready[:, top : top + height, left : left + width] = image
        ready = ready.flip(0) if self.channels == "bgr" else ready
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        ready = (ready * self.value_range - mean) / std
        return ready[None].numpy().astype(self._dtype), (left, top, width, height)

    def _of_classes(self, scores: Tensor, classes: Tensor) -> Tensor:
        """Scores (N, C) of detections of one class each. Those below the threshold are 0 and may have no class."""
        columns, used = len(self._label_of_class), scores > self.score_threshold
        wrong = classes[used & ((classes < 0) | (classes >= columns))]
        if len(wrong):
            raise WeightsError(
                f"{self.path} returned the class {int(wrong[0])}, `labels` names the classes up to {columns - 1}: "
                "check `labels` and `first_class`."
            )
        column = torch.where(used, classes, 0)
        return scores.new_zeros(len(scores), columns).scatter(1, column[:, None], (scores * used)[:, None])

    def _feature(
        self, found: dict[str, np.ndarray], boxes: Tensor, row: Tensor | None, scores: Tensor, image: Tensor
    ) -> Tensor:
        """Features (M, D) of boxes in pixels of the input; ``row`` is None for the whole image."""
        if self._features is None:
            if row is None:
                return torch.zeros(1, self.feature_dim)
            return scores[row][:, self._label_of_class >= 0]
        output: Tensor = torch.from_numpy(found[self._features].astype(np.float32))
        features: Tensor
        if output.dim() == 4:
            h, w = output.shape[-2:]
            rois = boxes * boxes.new_tensor([w / self.size[1], h / self.size[0]] * 2)
            features = roi_align(output, [rois], _CELLS, aligned=True).mean(dim=(2, 3))
        else:
            rows = output.reshape(-1, self.feature_dim)
            if len(rows) != len(scores):
                self._refuse("features", output.shape, f"({len(scores)}, D), as there are {len(scores)} boxes")
            features = rows[row] if row is not None else rows.sum(dim=0, keepdim=True) / max(len(rows), 1)
        self._check("features", features, image)
        return features

    def _check(self, key: str, tensor: Tensor, image: Tensor) -> None:
        if not bool(tensor.isfinite().all()):
            name = self._outputs[key] or self._outputs["boxes"]
            raise WeightsError(
                f"{self.path}: the output {name!r} has NaN or infinite {key} for an image of {image.shape[1]} x "
                f"{image.shape[2]} pixels: check the file, and `mean`, `std` and `value_range`."
            )


def _read(path: Path, device: torch.device) -> tuple[list[Path], Any]:
    """Files of a model, itself first, and its session."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ConfigError(f"The detector onnx needs {error.name}: pip install 'gm-mlic[onnx]'.") from error
    if not path.is_file():
        raise WeightsError(f"The weights {path} do not exist: expected an .onnx file.")
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.output:
            raise ValueError("it has no outputs")
    except Exception as error:
        raise WeightsError(f"{path} is not an ONNX file, or damaged ({first_line(error)}).") from error
    files = [path]
    for name in sorted(set(_external(model.graph))):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise WeightsError(f"{path} refers to {name!r}, which is outside its folder: export it again.")
        files.append(path.parent / name)
        if not files[-1].is_file():
            raise WeightsError(f"{path} needs its external data, {name}, in the same folder: copy it there.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal; errors are raised
    options.intra_op_num_threads = torch.get_num_threads()
    options.use_deterministic_compute = True
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        else:
            log.warning("The installed ONNX Runtime has no CUDA support (pip install onnxruntime-gpu): using the CPU.")
    try:
        return files, onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise WeightsError(f"{path} cannot be run by ONNX Runtime ({first_line(error)}).") from error


def _external(graph: Any) -> Iterator[str]:
    """Files of the tensors that are stored outside of a model, including those of subgraphs."""
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _external(inner)
    for tensor in tensors:
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def _input_size(
    path: Path, shape: list[Any], size: int | Sequence[int] | None, metadata: dict[str, str]
) -> tuple[int, int]:
    """Height and width of the input."""
    if size is None and all(isinstance(side, int) for side in shape):
        size = shape
    if size is None:
        try:
            size = [int(side) for side in ast.literal_eval(metadata["imgsz"])]
        except (KeyError, ValueError, SyntaxError, TypeError, OverflowError):
            raise ArgumentError(
                "size", f"is missing, and {path} takes images of any size: give one number, or [height, width]."
            ) from None
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ArgumentError("size", f"is {size}: expected a number, or [height, width], in pixels.")
    for given, static in zip(sides, shape, strict=True):
        if isinstance(static, int) and static != given:
            raise ArgumentError("size", f"is {size}, but {path} takes images of {shape[0]} x {shape[1]}: leave it out.")
    return sides[0], sides[1]


def _size_or(size: Any, default: int) -> int:
    """A size in the shape of an input, or ``default`` if it is dynamic: a name, or None."""
    return size if isinstance(size, int) else default
