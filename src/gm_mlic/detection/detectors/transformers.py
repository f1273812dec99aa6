"""Instance extractor from the detection transformers of Hugging Face transformers: DETR and its successors, YOLOS."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Interval
from safetensors import SafetensorError
from torch import Tensor
from torchvision.ops import box_convert

from gm_mlic.detection.labels import NO_CLASS
from gm_mlic.detection.network import NetworkExtractor, stretch
from gm_mlic.detection.protocol import Instances
from gm_mlic.errors import ConfigError, WeightsError
from gm_mlic.io import first_line
from gm_mlic.registry import register_detector

#: Supported model types, and how their scores are computed: ``softmax`` over the classes and "no object", or
#: ``sigmoid`` of each class.
MODEL_TYPES = {
    "conditional_detr": "sigmoid",
    "d_fine": "sigmoid",
    "dab-detr": "sigmoid",
    "deformable_detr": "sigmoid",
    "detr": "softmax",
    "rt_detr": "sigmoid",
    "rt_detr_v2": "sigmoid",
    "yolos": "softmax",
}
#: Least length in pixels of the shorter side of a resized image; patches and strides are not larger.
_LEAST_SIDE = 32
#: Names on the hub: model, or owner/model.
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class TransformersExtractor(NetworkExtractor):
    r"""Instance extractor (:class:`~gm_mlic.detection.InstanceExtractor`) from a detection transformer.

    These detectors predict one box for each of their queries. Images are prepared by the model's own image processor.
    Scores and labels are those of the library's ``post_process_object_detection``:

    - DETR, YOLOS: softmax over the classes and "no object"; a query is one instance, of its most probable class.
    - Conditional, DAB and Deformable DETR, RT-DETR, D-FINE: sigmoid of each class; a query may be instances of several
      classes.

    Instances are the m highest scores above the threshold. There is no non-maximum suppression. The feature of a box
    (eq. 1) is the last hidden state of its query, from which the model computes box and classes. If nothing is
    detected, the feature of the whole image is the mean over all queries.

    The model is frozen.

    Args:
        model: a ``...ForObjectDetection`` model of one of :data:`MODEL_TYPES`; it is set to evaluation mode.
        processor: its image processor.
        score_threshold: detections up to this confidence are dropped.

    Shape:
        features have D = ``feature_dim`` entries: 256 for DETR and RT-DETR, 192 to 768 for YOLOS.

    Raises:
        ConfigError: if the model has another type.
    """

    def __init__(self, model: Any, processor: Any, score_threshold: float = 0.05) -> None:
        kind = str(model.config.model_type)
        if kind not in MODEL_TYPES:
            raise ConfigError(f"A model of type {kind} is no supported detector: use one of {', '.join(MODEL_TYPES)}.")
        names = {int(i): str(name).strip() for i, name in model.config.id2label.items() if name is not None}
        classes = [names.get(i) or NO_CLASS for i in range(int(model.config.num_labels))]  # those of COCO have gaps
        super().__init__(f"transformers-{kind}", classes)
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.score_threshold = score_threshold
        self.feature_dim = int(model.config.hidden_size)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the model's and image processor's settings, the threshold, and all tensors."""
        settings = json.loads(self.model.config.to_json_string(use_diff=False))
        prepared = json.loads(self.processor.to_json_string())
        for volatile in ("_name_or_path", "transformers_version", "dtype", "architectures"):
            settings.pop(volatile, None)
            prepared.pop(volatile, None)
        return self._hash([self.name, settings, prepared, self.score_threshold], self.model)

    def _prepare(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Resize, normalize and pad one image, as in training: from 8-bit colors."""
        height, width = image.shape[-2:]
        longest = dict(self.processor.size).get("longest_edge")
        if longest is not None:  # the aspect ratio is kept: a narrow strip would get too narrow
            image = stretch(image, -(-_LEAST_SIDE * max(height, width) // int(longest)))
        colors = (image * 255).round().clamp(0, 255).to(torch.uint8)
        ready = self.processor(images=[colors], return_tensors="pt", input_data_format="channels_first")
        taken = inspect.signature(self.model.forward).parameters
        inputs = {key: tensor.to(colors.device) for key, tensor in ready.items() if key in taken}
        return inputs.pop("pixel_values"), inputs

    @torch.no_grad()
    def _detect(self, pixels: Tensor, rests: Sequence[dict[str, Tensor]], m: int) -> list[Instances]:
        output = self.model(pixels, **{key: torch.cat([rest[key] for rest in rests]) for key in rests[0]})
        queries = output.logits.shape[1]
        # YOLOS: the tokens of the queries follow those of the image.
        states = output.last_hidden_state[:, -queries:].float()
        scores, classes = self._scores(output.logits.float())
        return [self._choose(*of_image, m) for of_image in zip(scores, classes, output.pred_boxes, states, strict=True)]

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and classes (B, Q, 1) or (B, Q, C) of the instances of each query."""
        if MODEL_TYPES[self.model.config.model_type] == "softmax":
            best = logits.softmax(-1)[..., :-1].max(-1, keepdim=True)
            return best.values, best.indices
        scores = logits.sigmoid()
        return scores, torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)

    def _choose(self, scores: Tensor, classes: Tensor, boxes: Tensor, states: Tensor, m: int) -> Instances:
        """Top m instances of one image, or the whole image."""
        labels = self._label_of_class[classes.flatten()]
        flat = torch.where(labels >= 0, scores.flatten(), -1.0)
        order = torch.sort(flat, descending=True, stable=True).indices[:m]
        best = order[flat[order] > self.score_threshold]
        if len(best) == 0:
            return Instances.whole_image(states.mean(dim=0))
        query = best // scores.shape[-1]
        corners = box_convert(boxes[query].float(), "cxcywh", "xyxy").clamp(0, 1)
        return Instances(corners, flat[best], labels[best], states[query])


@register_detector("transformers", "detection transformer of Hugging Face: DETR, RT-DETR, D-FINE, YOLOS, ...")
def transformers_detector(
    *,
    weights: str | Path,
    revision: str | None = None,
    min_size: Annotated[int, Ge(32)] | None = None,
    score_threshold: Annotated[float, Interval(ge=0, le=1)] = 0.05,
    device: str | torch.device = "cpu",
) -> TransformersExtractor:
    """Build an instance extractor from a detection transformer of Hugging Face transformers.

    Args:
        weights: name of a model on the hub, e.g. ``facebook/detr-resnet-50`` (downloaded once), or a folder written by
            ``save_pretrained`` of the model and its image processor. Only safetensors files are read.
        revision: branch, tag or commit of the model on the hub; null: the newest.
        min_size: shorter side of resized images in pixels (RT-DETR and D-FINE: both sides, a multiple of 32); null: as
            in training.
        score_threshold: detections below this confidence are dropped.
        device: device of the detector.

    Raises:
        ConfigError: if a package is missing, or the model is no supported detector.
        WeightsError: if the weights are missing or cannot be read.
    """
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection
        from transformers.utils import logging
    except ImportError as error:
        raise ConfigError(
            "The detector 'transformers' needs the package transformers: pip install 'gm-mlic[transformers]'."
        ) from error
    source = str(Path(weights).expanduser()) if Path(weights).expanduser().exists() else str(weights)
    _check_source(source)
    given = {"revision": revision, "trust_remote_code": False}
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # missing tensors are an error below
    if Path(source).is_dir() or not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source, **given)
        if config.model_type not in MODEL_TYPES:
            raise ConfigError(
                f"`weights` is {source!r}, a model of type {config.model_type}: use one of {', '.join(MODEL_TYPES)}."
            )
        processor = AutoImageProcessor.from_pretrained(source, **given)
        model, info = AutoModelForObjectDetection.from_pretrained(
            source,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are an error below
            output_loading_info=True,
            **given,
        )
    except ImportError as error:
        package = "timm" if "timm" in str(error) else "transformers"
        raise ConfigError(
            f"The model {source} needs the package {package}: pip install 'gm-mlic[transformers]'."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"The model {source} cannot be read ({first_line(error)}): set `weights` to a detector on "
            "huggingface.co/models, or to a folder with config.json, preprocessor_config.json and safetensors."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if absent:
        raise WeightsError(
            f"The weights of {source} lack {absent[0]} of its config.json ({len(absent)} tensors in all): copy or "
            "download the folder again."
        )
    if min_size is not None:
        processor.size = _resized(dict(processor.size), min_size)
    return TransformersExtractor(model, processor, score_threshold).to(device)


def _check_source(source: str) -> None:
    """Raise WeightsError if ``source`` is neither a folder with a model nor a name on the hub."""
    folder = Path(source)
    if folder.is_dir():
        for name in ("config.json", "preprocessor_config.json"):
            if not (folder / name).is_file():
                raise WeightsError(
                    f"The folder {source} has no {name}: write it with save_pretrained of the model and its image "
                    "processor."
                )
    elif folder.exists() or not _HUB_NAME.fullmatch(source):
        what = "is a file" if folder.exists() else "does not exist"
        raise WeightsError(f"`weights` is {source!r}, which {what}: expected a folder, or a name on the hub.")


def _resized(size: dict[str, Any], min_size: int) -> dict[str, int]:
    """Size of an image processor with another shorter side, in its own terms."""
    if "shortest_edge" in size:
        longest = size.get("longest_edge") or size["shortest_edge"] * 5 / 3
        return {"shortest_edge": min_size, "longest_edge": round(longest * min_size / size["shortest_edge"])}
    return dict.fromkeys(size, min_size)
