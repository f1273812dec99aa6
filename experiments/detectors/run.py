"""Speed of detectors on this CPU, with 2 threads: images per second, and the ratio to Faster R-CNN R50-FPN.

    python experiments/detectors/run.py [NAME...]     # default all; up to 10 minutes

Weights are random, so nothing is downloaded; sizes are real. An image of 640 x 480 pixels is resized as usual for the
detector, and features are extracted. All detectors are measured in turns in each of up to 5 rounds, so that other
programs on the machine slow all of them down. The ratio is the median of those within a round; images per second are
those of the fastest round. Random weights detect little, so that the time for non-maximum suppression is not included.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from gm_mlic.detection import InstanceExtractor, build_extractor
from gm_mlic.detection.detectors.transformers import TransformersExtractor

M, ROUNDS, THREADS = 35, 5, 2
#: No round is started that would probably end later.
LIMIT_S = 600
REFERENCE = "fasterrcnn_resnet50_fpn"


def transformer(config: str, processor: str, size: dict[str, int], **settings: Any) -> Callable[[], InstanceExtractor]:
    """Builder of a detector of Hugging Face transformers with random weights."""

    def build() -> InstanceExtractor:
        import transformers

        if config == "DetrConfig":
            settings["backbone_config"] = transformers.ResNetConfig(out_features=["stage4"])
        elif "backbone_config" in settings:
            settings["backbone_config"] = transformers.RTDetrResNetConfig(**settings["backbone_config"])
        made = getattr(transformers, config)(num_labels=91, **settings)
        model = transformers.AutoModelForObjectDetection.from_config(made)
        return TransformersExtractor(model, getattr(transformers, processor)(size=size))

    return build


KEEPS_RATIO = {"shortest_edge": 800, "longest_edge": 1333}
SQUARE = {"height": 640, "width": 640}
#: Builders, by names in the table.
BUILDERS: dict[str, Callable[[], InstanceExtractor]] = {
    **{
        name: lambda name=name: build_extractor(name, min_size=800, max_size=1333)  # type: ignore[misc]
        for name in (REFERENCE, "retinanet_resnet50_fpn", "fcos_resnet50_fpn")
    },
    "ssd300_vgg16": lambda: build_extractor("ssd300_vgg16"),
    "ssdlite320_mobilenet_v3_large": lambda: build_extractor("ssdlite320_mobilenet_v3_large"),
    "DETR R50": transformer(
        "DetrConfig", "DetrImageProcessor", KEEPS_RATIO, use_timm_backbone=False, use_pretrained_backbone=False,
    ),
    "RT-DETR R50": transformer("RTDetrConfig", "RTDetrImageProcessor", SQUARE),
    "RT-DETR R18": transformer(
        "RTDetrConfig", "RTDetrImageProcessor", SQUARE, decoder_layers=3, hidden_expansion=0.5,
        encoder_in_channels=[128, 256, 512],
        backbone_config={
            "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic",
            "out_features": ["stage2", "stage3", "stage4"],
        },
    ),
    "YOLOS-tiny": transformer(
        "YolosConfig", "YolosImageProcessor", {"shortest_edge": 512, "longest_edge": 1333}, hidden_size=192,
        num_attention_heads=3, intermediate_size=768, image_size=[800, 1333], use_mid_position_embeddings=False,
    ),
}  # fmt: skip


def main(names: list[str]) -> None:
    """Measure and print one row per detector."""
    begin = time.perf_counter()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    image = torch.rand(3, 480, 640)
    extractors = {name: BUILDERS[name]() for name in dict.fromkeys([REFERENCE, *(names or BUILDERS)])}
    seconds: dict[str, list[float]] = {name: [] for name in extractors}
    for i in range(ROUNDS + 1):
        round_begin = time.perf_counter()
        for name, extractor in extractors.items():
            start = time.perf_counter()
            extractor([image], m=M)
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
        print(f"round {i} of {ROUNDS}", file=sys.stderr, flush=True)
        now = time.perf_counter()
        if i and now - begin + (now - round_begin) > LIMIT_S:
            break
    print("| detector | D | parameters | images/s | ratio |\n| --- | --- | --- | --- | --- |")
    for name, extractor in extractors.items():
        ratio = median(a / b for a, b in zip(seconds[REFERENCE], seconds[name], strict=True))
        size = sum(parameter.numel() for parameter in extractor.parameters()) / 1e6
        print(f"| {name} | {extractor.feature_dim} | {size:.1f} M | {1 / min(seconds[name]):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
