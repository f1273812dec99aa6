"""Speed of every registered detector with boxes or cells, on one CPU core.

    python experiments/detectors/run.py [NAME...]     # default all; prints a table

Weights are random, sizes are real: the default input size of each detector, one image of 640 x 480 pixels, m = 35.
The best of two calls is printed, in images per second of CPU time of one thread, so that other programs on the machine
count less than in wall time. Detectors of Hugging Face transformers are built from the configs of the named models.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from gm_mlic.detection import InstanceExtractor, build_extractor
from gm_mlic.detection.detectors.transformers import TransformersExtractor

M, CALLS = 35, 2
TORCHVISION = (
    "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn",
    "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)  # fmt: skip


def transformer(config: str, processor: str, size: dict[str, int] | None = None, **settings: object) -> Callable:
    """Builder of a detector with random weights."""

    def build() -> InstanceExtractor:
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, config)(num_labels=91, **settings)
        model = transformers.AutoModelForObjectDetection.from_config(made)
        images = getattr(transformers, processor)(**({"size": size} if size else {}))
        return TransformersExtractor(model, images, score_threshold=0.0)

    return build


BUILDERS: dict[str, Callable[[], InstanceExtractor]] = {
    # thresholds of 0 let random weights detect m instances
    **{name: lambda name=name: build_extractor(name, score_threshold=0.005) for name in TORCHVISION},
    "resnet101": lambda: build_extractor("resnet101", grid_size=5),
    "facebook/detr-resnet-50": transformer("DetrConfig", "DetrImageProcessor"),
    "microsoft/conditional-detr-resnet-50": transformer("ConditionalDetrConfig", "ConditionalDetrImageProcessor"),
    "IDEA-Research/dab-detr-resnet-50": transformer("DabDetrConfig", "ConditionalDetrImageProcessor"),
    "SenseTime/deformable-detr": transformer("DeformableDetrConfig", "DeformableDetrImageProcessor"),
    "PekingU/rtdetr_r50vd": transformer("RTDetrConfig", "RTDetrImageProcessor"),
    "PekingU/rtdetr_v2_r50vd": transformer("RTDetrV2Config", "RTDetrImageProcessor"),
    "D-FINE, default config": transformer("DFineConfig", "RTDetrImageProcessor"),
    "hustvl/yolos-tiny": transformer(
        "YolosConfig", "YolosImageProcessor", {"shortest_edge": 512, "longest_edge": 1333}, hidden_size=192,
        num_attention_heads=3, intermediate_size=768, image_size=[800, 1333], use_mid_position_embeddings=False,
    ),
}  # fmt: skip


def main(names: list[str]) -> None:
    """Measure and print one row per detector."""
    torch.set_num_threads(1)
    image = torch.rand(3, 480, 640, generator=torch.Generator().manual_seed(0))
    print("| detector | D | parameters | images/s |\n| --- | --- | --- | --- |", flush=True)
    for name in names or BUILDERS:
        extractor = BUILDERS[name]()
        seconds = []
        for _ in range(CALLS):
            start = time.process_time()
            extractor([image], m=M)
            seconds.append(time.process_time() - start)
        size = sum(parameter.numel() for parameter in extractor.parameters()) / 1e6
        print(f"| {name} | {extractor.feature_dim} | {size:.1f} M | {1 / min(seconds):.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
