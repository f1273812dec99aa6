"""Detection transformers compared with the library's own preprocessing and post-processing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gm_mlic.detection import build_extractor
from gm_mlic.detection.detectors.transformers import MODEL_TYPES, TransformersExtractor
from gm_mlic.errors import ConfigError, GMMLICError, WeightsError

transformers = pytest.importorskip("transformers")

KINDS = sorted(MODEL_TYPES)


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Photos of different sizes, with smooth random colors."""
    generator = torch.Generator().manual_seed(0)
    return [
        Image.fromarray(torch.randint(0, 256, (5, 6, 3), generator=generator, dtype=torch.uint8).numpy()).resize(size)
        for size in [(120, 90), (64, 64), (70, 101)]
    ]


def tensor(photo: Image.Image) -> torch.Tensor:
    colors = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8)
    return colors.view(photo.height, photo.width, 3).permute(2, 0, 1).float() / 255


def test_supported_types_are_detectors_of_the_library():
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as NAMES

    assert set(MODEL_TYPES) <= set(NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_scores_and_labels_equal_the_librarys(kind, transformer_folder, photos):
    folder = transformer_folder(kind)
    model = transformers.AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    extractor = build_extractor("transformers", weights=folder, score_threshold=0.0)
    assert extractor.labels == ("cat", "dog", "boat")
    compared = 0
    for photo, found in zip(photos, extractor([tensor(photo) for photo in photos], m=24), strict=True):
        with torch.no_grad():
            output = model(**processor(images=photo, return_tensors="pt"))
        # all pairs of query and class; RT-DETR's processor limits them to the number of queries
        every = {"top_k": 24} if "top_k" in processor.post_process_object_detection.__code__.co_varnames else {}
        size = [(photo.height, photo.width)]
        (theirs,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=size, **every)
        known = theirs["labels"] != 2
        order = theirs["scores"][known].sort(descending=True, stable=True).indices
        names = [model.config.id2label[i] for i in theirs["labels"][known][order].tolist()]
        boxes = theirs["boxes"][known][order] / torch.tensor([photo.width, photo.height] * 2)
        compared += len(order)
        assert len(found) >= len(order)
        torch.testing.assert_close(found.scores[: len(order)], theirs["scores"][known][order], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.boxes[: len(order)], boxes.clamp(0, 1), atol=1e-5, rtol=0)
        assert [extractor.labels[i] for i in found.detected_labels[: len(order)].tolist()] == names
    assert compared > 0


@pytest.mark.parametrize("kind", KINDS)
def test_model_computes_box_and_scores_from_the_feature(kind, transformer_folder, photos):
    """The classifier's output for an instance's feature contains its score."""
    extractor = build_extractor("transformers", weights=transformer_folder(kind), score_threshold=0.0)
    (found,) = extractor([tensor(photos[0])], m=24)
    assert found.features.shape == (len(found), 64 if kind == "deformable_detr" else 32)
    modules = dict(extractor.model.named_modules())
    head = next(
        modules[name]
        for name in ("class_labels_classifier", "model.decoder.class_embed", "class_embed")
        if modules.get(name) is not None
    )
    head = head[-1] if isinstance(head, torch.nn.ModuleList) else head
    logits = head(found.features)
    scores = logits.softmax(-1)[:, :-1] if MODEL_TYPES[kind] == "softmax" else logits.sigmoid()
    of_class = scores[:, torch.tensor([0, 1, 3])].gather(1, found.detected_labels[:, None])[:, 0]
    if kind == "d_fine":  # adds a term for the quality of the box
        assert torch.corrcoef(torch.stack([of_class, found.scores]))[0, 1] > 0.5
    else:
        torch.testing.assert_close(of_class, found.scores, atol=1e-4, rtol=1e-3)


def test_sigmoid_models_give_several_instances_per_query(transformer_folder, photos):
    (found,) = build_extractor("transformers", weights=transformer_folder("rt_detr"), score_threshold=0.0)(
        [tensor(photos[0])], m=24
    )
    assert len(found) == 18  # 6 queries, 3 labels
    assert len(found.features.unique(dim=0)) == 6


def test_labels_with_gaps_and_repeated_names(transformer_folder):
    id2label = {0: "N/A", 1: "cat", 3: " dog ", 4: "cat", 9: "far", 10: "farther"}
    model = transformers.AutoModelForObjectDetection.from_pretrained(transformer_folder("yolos"))
    model.config.id2label = id2label  # num_labels is its length
    extractor = TransformersExtractor(model, transformers.YolosImageProcessor())
    assert extractor.labels == ("cat", "dog")
    assert extractor._label_of_class.tolist() == [-1, 0, -1, 1, 0, -1]


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_min_size(kind, transformer_folder):
    extractor = build_extractor("transformers", weights=transformer_folder(kind), min_size=32)
    assert min(extractor._prepare(torch.rand(3, 90, 120))[0].shape[-2:]) == 32
    assert len(extractor([torch.rand(3, 90, 120)], m=3)[0]) <= 3


@pytest.fixture
def copied(transformer_folder, tmp_path) -> Path:
    return Path(shutil.copytree(transformer_folder("detr"), tmp_path / "copy"))


def refused(weights, *named: str, error: type[GMMLICError] = WeightsError, **settings) -> None:
    with pytest.raises(error) as caught:
        build_extractor("transformers", weights=weights, **settings)
    assert "\n" not in str(caught.value)
    for part in named:
        assert part in str(caught.value)


def test_missing_files(copied, tmp_path):
    refused(tmp_path / "none", "none", "does not exist")
    refused("a name with spaces", "a name with spaces", "does not exist")
    (tmp_path / "file.bin").write_bytes(b"")
    refused(tmp_path / "file.bin", "is a file")
    refused(tmp_path, "has no config.json", "save_pretrained")
    (copied / "preprocessor_config.json").unlink()
    refused(copied, "has no preprocessor_config.json")


def test_hub_is_unreachable(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("facebook/detr-resnet-50-of-nobody", "facebook/detr-resnet-50-of-nobody", "cannot be read")


def test_other_models(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    refused(copied, "of type vit", "rt_detr", error=ConfigError)
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "nothing"}))
    refused(copied, "cannot be read")
    (copied / "config.json").write_text("{")
    refused(copied, "cannot be read")


def test_damaged_weights(copied):
    file = copied / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not at all weights"):
        file.write_bytes(damaged)
        refused(copied, "cannot be read", "copy")
    file.unlink()
    refused(copied, "cannot be read", "model.safetensors")


def test_pickles_are_not_read(copied):
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(tensors, copied / "pytorch_model.bin")
    refused(copied, "cannot be read", "safetensors")


def test_tensors_that_do_not_fit(copied):
    tensors = load_file(copied / "model.safetensors")
    name = "class_labels_classifier.weight"
    save_file({key: t for key, t in tensors.items() if key != name}, copied / "model.safetensors", {"format": "pt"})
    refused(copied, "lack", name)
    save_file(tensors | {name: torch.zeros(9, 32)}, copied / "model.safetensors", {"format": "pt"})
    refused(copied, name)


def test_code_of_a_model_is_not_run(copied, monkeypatch):
    (copied / "evil.py").write_text("raise SystemExit('was run')\n")
    config = json.loads((copied / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForObjectDetection": "evil.Model"}}
    (copied / "config.json").write_text(json.dumps(config))
    assert build_extractor("transformers", weights=copied).name == "transformers-detr"
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    refused(copied, "cannot be read")


def test_missing_transformers(copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    named = "needs the package transformers: pip install 'gm-mlic[transformers]'"
    refused(copied, named, error=ConfigError)


def test_missing_timm(copied, monkeypatch):
    """The config of facebook/detr-resnet-50 names a backbone of timm."""
    from transformers.utils import import_utils

    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: False, "requires the timm library"))
    config = {"model_type": "detr", "use_timm_backbone": True, "backbone": "resnet50"}
    (copied / "config.json").write_text(json.dumps(config))
    refused(copied, "needs the package timm: pip install 'gm-mlic[transformers]'", error=ConfigError)
