"""Small detectors with random weights, made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_maps import FeatureMaps
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSD
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from gm_mlic.detection.detectors.torchvision_one_stage import OneStageExtractor

#: Class 2 has no label.
ID2LABEL = {0: "cat", 1: "dog", 2: "N/A", 3: "boat"}


@pytest.fixture(scope="session")
def small_one_stage() -> Callable[..., OneStageExtractor]:
    """Factory of small one-stage detectors, see :func:`one_stage`."""
    return one_stage


@pytest.fixture(scope="session")
def transformer_folder(tmp_path_factory) -> Callable[..., Path]:
    """Factory of folders with a small model of Hugging Face transformers and its image processor."""
    pytest.importorskip("transformers")
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("models") / kind
            save_transformer(kind, made[kind])
        return made[kind]

    return folder


def save_transformer(kind: str, folder: Path, seed: int = 0) -> None:
    """Save a model with 4 classes, about 6 queries and inputs of about 64 pixels."""
    import transformers

    small = {
        "d_model": 32,
        "num_queries": 6,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "id2label": ID2LABEL,
    }
    sides = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    stages = ["stage2", "stage3", "stage4"]
    plain = {"backbone_config": transformers.ResNetConfig(**sides, layer_type="basic", out_features=stages)}
    fast = {
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [16, 24, 32],
        "decoder_in_channels": [32, 32, 32],
        "num_denoising": 0,
    }
    resnet = {"backbone_config": transformers.RTDetrResNetConfig(**sides, layer_type="basic", out_features=stages)}
    hgnet = transformers.HGNetV2Config(
        embedding_size=8, stem_channels=[3, 8, 8], hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1],
        stage_in_channels=[8, 8, 16, 24], stage_mid_channels=[8, 8, 8, 8], stage_out_channels=[8, 16, 24, 32],
        stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1], out_features=stages,
    )  # fmt: skip
    keeps_ratio = {"size": {"shortest_edge": 64, "longest_edge": 96}}
    square = {"size": {"height": 64, "width": 64}}
    config, processor = {
        "detr": lambda: (
            transformers.DetrConfig(**small, **plain), transformers.DetrImageProcessor(**keeps_ratio),
        ),
        "conditional_detr": lambda: (
            transformers.ConditionalDetrConfig(**small, **plain),
            transformers.ConditionalDetrImageProcessor(**keeps_ratio),
        ),
        "dab-detr": lambda: (
            transformers.DabDetrConfig(hidden_size=32, **_without(small, "d_model"), **plain),
            transformers.ConditionalDetrImageProcessor(**keeps_ratio),
        ),
        "deformable_detr": lambda: (
            transformers.DeformableDetrConfig(**small | {"d_model": 64}, **plain, with_box_refine=True),
            transformers.DeformableDetrImageProcessor(**keeps_ratio),
        ),
        "rt_detr": lambda: (
            transformers.RTDetrConfig(**small, **fast, **resnet), transformers.RTDetrImageProcessor(**square),
        ),
        "rt_detr_v2": lambda: (
            transformers.RTDetrV2Config(**small, **fast, **resnet), transformers.RTDetrImageProcessor(**square),
        ),
        "d_fine": lambda: (
            transformers.DFineConfig(**small, **fast, backbone_config=hgnet),
            transformers.RTDetrImageProcessor(**square),
        ),
        "yolos": lambda: (
            transformers.YolosConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=[64, 96],
                num_detection_tokens=6, id2label=ID2LABEL, use_mid_position_embeddings=False,
            ),
            transformers.YolosImageProcessor(**keeps_ratio),
        ),
    }[kind]()  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForObjectDetection.from_config(config)
        for name, parameter in model.named_parameters():  # else scores hardly depend on the image
            if "bbox" not in name and parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    if kind in ("detr", "yolos"):  # else all queries may be of the class without a label
        last = [m for m in model.class_labels_classifier.modules() if isinstance(m, nn.Linear)][-1]
        last.bias.data[2] -= 2
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _without(settings: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != key}


def one_stage(kind: str, seed: int = 0, score_thresh: float = 0.0, **settings: Any) -> OneStageExtractor:
    """Small RetinaNet, FCOS or SSD with 3 classes besides the background, of which class 2 has no label."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body, thresholds = FeatureMaps(), {"score_thresh": score_thresh, "nms_thresh": 0.5, **settings}
        if kind == "ssd":
            boxes = DefaultBoxGenerator([[2], [2], [2]], min_ratio=0.2, max_ratio=0.9)
            detector = SSD(body, boxes, (64, 64), 4, **thresholds)
        else:
            layers = {"layer1": "0", "layer2": "1", "layer3": "2"}
            pyramid = BackboneWithFPN(body, layers, [12, 16, 20], 64, LastLevelP6P7(64, 64))
            pyramid.body = body
            sizes = {"min_size": 64, "max_size": 107, **thresholds}
            if kind == "retinanet":
                anchors = AnchorGenerator(tuple((8 * 2**i,) for i in range(5)), ((0.5, 1.0),) * 5)
                detector = RetinaNet(pyramid, 4, anchor_generator=anchors, **sizes)
            else:
                detector = FCOS(pyramid, 4, **sizes)
        for name, parameter in detector.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.03 if "head" in name else 0.2)
    return OneStageExtractor(detector, ["cat", "N/A", "boat"], f"small_{kind}")
