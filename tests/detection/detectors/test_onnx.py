"""Detector of ONNX files, compared with the exported torch modules and a plain non-maximum suppression."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import (
    LABELS,
    Averages,
    Best,
    Broken,
    Colors,
    Logits,
    Rows,
    Separate,
    Suppressed,
    Unbatched,
    Yolo,
    YoloObjectness,
    export,
    with_metadata,
)
from torch import Tensor

from gm_mlic.detection import InstanceExtractor, Instances, LookupExtractor, build_extractor
from gm_mlic.detection.detectors import onnx as onnx_detector
from gm_mlic.errors import ArgumentError, ConfigError, GMMLICError, WeightsError
from gm_mlic.registry import DETECTORS

SIZE = (64, 96)
OUTPUTS = {
    "separate": (Separate, ["boxes", "scores", "map"]),
    "best": (Best, ["boxes", "labels", "scores", "rows"]),
    "unbatched": (Unbatched, ["boxes", "labels", "scores", "rows"]),
    "yolo": (Yolo, ["output0"]),
    "yolo_objectness": (YoloObjectness, ["output"]),
    "rows": (Rows, ["output0"]),
    "logits": (Logits, ["logits", "pred_boxes"]),
    "suppressed": (Suppressed, ["dets", "labels"]),
    "averages": (Averages, ["boxes", "scores", "averages", "positions"]),
    "broken": (Broken, ["boxes", "scores"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file for each layout."""
    root = tmp_path_factory.mktemp("onnx")
    for name, (module, names) in OUTPUTS.items():
        export(module(SIZE), root / f"{name}.onnx", names)
    with_metadata(root / "yolo.onnx", names=str(dict(enumerate(LABELS))))
    return root


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    """Images of the input's size: coarse random colors."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(4, 3, 4, 4, generator=generator)
    return list(torch.nn.functional.interpolate(coarse, SIZE, mode="nearest"))


def build(folder: Path, name: str, **settings: Any) -> Any:
    return build_extractor("onnx", weights=str(folder / f"{name}.onnx"), **{"labels": LABELS, **settings})


def union(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - max(width, 0) * max(height, 0)


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / union(a, b)


@torch.no_grad()
def expected(
    image: Tensor, threshold: float = 0.05, nms: float | None = 0.5, best_only: bool = False
) -> list[tuple[float, int, int, list[float]]]:
    """Score, class, row and clipped box (fractions) of the detections in an image of the input's size, by loops."""
    boxes, scores, _ = Colors(SIZE).parts(image[None])
    found: list[tuple[float, int, int]] = []
    for row, of_box in enumerate(scores.tolist()):
        classes = [max(range(3), key=of_box.__getitem__)] if best_only else range(3)
        found += [(of_box[c], c, row) for c in classes if of_box[c] > threshold]
    found.sort(key=lambda item: -item[0])
    kept: list[tuple[float, int, int]] = []
    for score, c, row in found:
        rivals = [boxes[other].tolist() for _, d, other in kept if d == c]
        if nms is None or all(iou(boxes[row].tolist(), rival) <= nms for rival in rivals):
            kept.append((score, c, row))
    H, W = SIZE
    clip = torch.tensor([W, H, W, H])
    return [(score, c, row, (boxes[row] / clip).clamp(0, 1).tolist()) for score, c, row in kept]


def assert_equals(found: Instances, wanted: list[tuple[float, int, int, list[float]]], m: int) -> None:
    wanted = wanted[:m]
    assert found.detected_labels.tolist() == [c for _, c, _, _ in wanted]
    torch.testing.assert_close(found.scores, torch.tensor([score for score, *_ in wanted]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.boxes, torch.tensor([box for *_, box in wanted]), rtol=1e-4, atol=1e-5)
    assert (found.scores.dtype, found.boxes.dtype, found.detected_labels.dtype) == (
        torch.float32,
        torch.float32,
        torch.int64,
    )


RAW = {
    "separate": {},
    "yolo": {"labels": None},
    "yolo_objectness": {},
    "logits": {"activation": "softmax", "box_format": "cxcywh", "box_units": "fraction"},
}


@pytest.mark.parametrize("name", ["separate", "yolo", "yolo_objectness"])
def test_scores_of_each_class(folder: Path, images: list[Tensor], name: str) -> None:
    extractor = build(folder, name, **RAW[name])
    assert isinstance(extractor, InstanceExtractor)
    assert not isinstance(extractor, LookupExtractor)
    assert (extractor.name, extractor.labels, extractor.feature_dim) == ("onnx", tuple(LABELS), 3)
    suppressed = 0
    for image, found in zip(images, extractor(images, 12), strict=True):
        wanted = expected(image)
        suppressed += len(expected(image, nms=None)) - len(wanted)
        assert_equals(found, wanted, 12)
        rows = Colors(SIZE).parts(image[None])[1][[row for _, _, row, _ in wanted[:12]]]
        torch.testing.assert_close(found.features, rows.detach(), rtol=1e-4, atol=1e-5)
    assert suppressed > 0
    unsuppressed = build(folder, name, **RAW[name], nms_threshold=None, score_threshold=0.2)
    assert_equals(unsuppressed(images[:1], 48)[0], expected(images[0], 0.2, None), 48)


def test_logits_with_a_background(folder: Path, images: list[Tensor]) -> None:
    """Softmax over the classes and a last one without a name, whose logit is -2."""
    extractor = build(folder, "logits", **RAW["logits"], score_threshold=0.0)
    factor = 1 / (1 + torch.tensor(-2.0).exp().item())
    wanted = [(score * factor, *rest) for score, *rest in expected(images[0], 0.0)]
    assert_equals(extractor(images[:1], 10)[0], wanted, 10)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("best", {"first_class": 1}),
        ("best", {"labels": ["N/A", *LABELS]}),
        ("unbatched", {"first_class": 1}),
        ("suppressed", {}),
        ("rows", {}),
        ("rows", {"format": "rows"}),
    ],
)
def test_detections_after_suppression(folder: Path, images: list[Tensor], name: str, settings: dict[str, Any]) -> None:
    extractor = build(folder, name, **settings)
    assert extractor.labels == tuple(LABELS)
    for image, found in zip(images, extractor(images, 7), strict=True):
        wanted = expected(image, nms=None, best_only=True)
        assert_equals(found, wanted, 7)
        one_hot = torch.zeros(7, 3)
        one_hot[torch.arange(7), found.detected_labels] = found.scores
        assert torch.equal(found.features, one_hot)


def test_unused_classes_are_dropped(folder: Path, images: list[Tensor]) -> None:
    extractor = build(folder, "best", labels=["red", "N/A", "blue"], first_class=1)
    assert extractor.labels == ("red", "blue")
    wanted = [item for item in expected(images[0], nms=None, best_only=True) if item[1] != 1]
    found = extractor(images[:1], 16)[0]
    assert found.detected_labels.tolist() == [{0: 0, 2: 1}[c] for _, c, _, _ in wanted]


def test_protocol(folder: Path, images: list[Tensor]) -> None:
    """Prefixes, independence of the batch, determinism."""
    extractor = build(folder, "separate", features="map")
    assert extractor([], 3) == []
    mixed = [*images, torch.rand(3, 31, 77), torch.rand(3, 200, 90)]
    whole = extractor(mixed, 20)
    for image, found in zip(mixed, whole, strict=True):
        for m in (1, 4, 20):
            (alone,) = extractor([image], m)
            for name in ("boxes", "scores", "detected_labels", "features"):
                assert torch.equal(getattr(alone, name), getattr(found.top(m), name))
        assert (found.scores.diff() <= 0).all()
        assert bool(((found.boxes >= 0) & (found.boxes <= 1)).all())
        assert not found.features.requires_grad
    with pytest.raises(ConfigError, match="m must be 1 or more"):
        extractor(images, 0)


def test_image_without_detections(folder: Path) -> None:
    (found,) = build(folder, "suppressed")([torch.zeros(3, *SIZE)], 5)
    assert (found.boxes.tolist(), found.scores.tolist()) == ([[0, 0, 1, 1]], [0])
    extractor = build(folder, "broken")
    (found,) = extractor([torch.zeros(3, *SIZE)], 5)
    assert found.boxes.tolist() == [[0, 0, 1, 1]]
    assert (found.scores.tolist(), found.detected_labels.tolist()) == ([0], [-1])
    assert found.features.tolist() == [[0, 0, 0]]
    high = {"score_threshold": 1.0, "features": "map"}
    image = torch.rand(3, *SIZE)
    (found,) = build(folder, "separate", **high)([image], 5)
    maps = Colors(SIZE).parts(image[None])[2].detach()
    # samples lie between the centers of cells; at the border the map is constant
    assert found.features.shape == (1, 6)
    assert bool((found.features >= maps.amin((2, 3)) - 1e-5).all() & (found.features <= maps.amax((2, 3)) + 1e-5).all())
    rows = {"score_threshold": 1.0, "features": "rows", "first_class": 1}
    (found,) = build(folder, "best", **rows)([image], 5)
    torch.testing.assert_close(found.features, maps.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_features_of_boxes(folder: Path, images: list[Tensor]) -> None:
    extractor = build(folder, "best", features="rows", first_class=1)
    assert extractor.feature_dim == 6
    for image, found in zip(images, extractor(images, 5), strict=True):
        rows = [row for _, _, row, _ in expected(image, nms=None, best_only=True)[:5]]
        maps = Colors(SIZE).parts(image[None])[2][0].detach()
        torch.testing.assert_close(found.features, maps.flatten(1).T[rows], rtol=1e-4, atol=1e-5)


def test_features_of_a_map_are_means_in_the_box(folder: Path, images: list[Tensor]) -> None:
    """A map of positions: the mean in a box is its center, for boxes away from the border."""
    extractor = build(folder, "averages", features="positions", nms_threshold=None)
    (found,) = extractor(images[:1], 48)
    inner = (found.boxes[:, :2] > 0.07).all(1) & (found.boxes[:, 2:] < 0.93).all(1)
    assert inner.sum() > 3
    centers = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    torch.testing.assert_close(found.features[inner], centers[inner], rtol=1e-4, atol=1e-4)


def test_resizing(folder: Path) -> None:
    """Boxes are fractions of the image, with or without the letterbox's borders."""
    H, W = SIZE
    image = torch.rand(3, 50, 50)
    boxes = Colors(SIZE).anchors
    settings = {"nms_threshold": None, "score_threshold": 0.0, "features": "averages"}
    (stretched,) = build(folder, "averages", resize="stretch", **settings)([image], 48)
    wanted = (boxes / torch.tensor([W, H, W, H])).clamp(0, 1)
    assert_same_boxes(stretched.boxes, wanted)
    (boxed,) = build(folder, "averages", **settings)([image], 48)
    wanted = ((boxes - torch.tensor([16, 0, 16, 0])) / 64).clamp(0, 1)  # 64 x 64, between borders of 16 pixels
    assert_same_boxes(boxed.boxes, wanted[(wanted[:, 2:] > wanted[:, :2]).all(1)])
    gray = 114 / 255 / 3
    torch.testing.assert_close(boxed.features[0], stretched.features[0] * 2 / 3 + gray, rtol=0.02, atol=0.01)


def assert_same_boxes(found: Tensor, wanted: Tensor) -> None:
    rows = {tuple(round(v, 4) for v in box) for box in found.tolist()}
    assert rows == {tuple(round(v, 4) for v in box) for box in wanted.tolist()}


def test_normalization(folder: Path) -> None:
    image = torch.tensor([0.2, 0.4, 0.8])[:, None, None].expand(3, *SIZE).contiguous()

    def averages(**settings: Any) -> list[float]:
        (found,) = build(folder, "averages", features="averages", **settings)([image], 1)
        return [round(value, 3) for value in found.features[0].tolist()]

    assert averages() == [0.2, 0.4, 0.8]
    assert averages(value_range=255) == [51, 102, 204]
    assert averages(channels="bgr") == [0.8, 0.4, 0.2]
    assert averages(mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.1]) == [0.2, 0.8, 5.0]
    assert averages(channels="bgr", value_range=255, mean=[4, 2, 1]) == [200, 100, 50]


def test_labels(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("rot\ngrün\nblau\n", encoding="utf-8")
    assert build(folder, "separate", labels=str(tmp_path / "names.txt")).labels == ("rot", "grün", "blau")
    assert build(folder, "yolo", labels=None).labels == tuple(LABELS)
    assert build(folder, "yolo", labels=["a", "b", "c"]).labels == ("a", "b", "c")


def test_fingerprint(folder: Path, tmp_path: Path) -> None:
    """It depends on the content and the settings, not on the place."""
    first = build(folder, "separate").fingerprint
    assert len(first) == 64
    copy = tmp_path / "copy.onnx"
    copy.write_bytes((folder / "separate.onnx").read_bytes())
    assert build_extractor("onnx", weights=str(copy), labels=LABELS).fingerprint == first
    others = [
        build(folder, "separate", **changed).fingerprint
        for changed in (
            {"labels": ["a", "b", "c"]}, {"score_threshold": 0.1}, {"nms_threshold": None}, {"resize": "stretch"},
            {"mean": [1.0, 1.0, 1.0]}, {"features": "map"}, {"channels": "bgr"}, {"box_units": "fraction"},
        )
    ]  # fmt: skip
    with_metadata(copy, changed="yes")
    others.append(build_extractor("onnx", weights=str(copy), labels=LABELS).fingerprint)
    assert len({first, *others}) == 1 + len(others)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for images of any size, with external data, by torch's newer exporter."""
    import onnx

    path = tmp_path_factory.mktemp("dynamic") / "any.onnx"
    axes = {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.onnx.export(
        Separate(SIZE).eval(), (torch.rand(1, 3, *SIZE),), output_names=["boxes", "scores", "map"],
        dynamic_shapes=(axes,), dynamo=True, verbose=False,
    )  # fmt: skip
    program.save(path)
    # torch keeps small tensors in the file; ONNX Runtime needs those of shapes there
    external = {"save_as_external_data": True, "location": "any.onnx.data", "size_threshold": 100}
    onnx.save(onnx.load(path), path, **external)
    return path


def test_dynamic_size_and_external_data(dynamic: Path, images: list[Tensor], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"size is missing, and .*any.onnx takes images of any size: give one number"):
        build_extractor("onnx", weights=str(dynamic), labels=LABELS)
    extractor = build_extractor("onnx", weights=str(dynamic), labels=LABELS, size=list(SIZE))
    for image, found in zip(images, extractor(images, 12), strict=True):
        assert_equals(found, expected(image), 12)
    (tmp_path / "any.onnx").write_bytes(dynamic.read_bytes())
    with pytest.raises(WeightsError, match=r"needs its external data, any\.onnx\.data, in the same folder"):
        build_extractor("onnx", weights=str(tmp_path / "any.onnx"), labels=LABELS, size=list(SIZE))
    data = bytearray(dynamic.with_name("any.onnx.data").read_bytes())
    data[3] ^= 1
    (tmp_path / "any.onnx.data").write_bytes(data)
    changed = build_extractor("onnx", weights=str(tmp_path / "any.onnx"), labels=LABELS, size=list(SIZE))
    assert changed.fingerprint != extractor.fingerprint


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("none", {}, r"none\.onnx do not exist: expected an \.onnx file"),
        ("separate", {"labels": None}, r"labels is missing, and .*separate\.onnx has no class names: give a list, or"),
        ("separate", {"labels": ["a", "b"]}, r"'scores' has shape \(1, 16, 3\), expected \(16, 2\): a column for each"),
        ("separate", {"labels": "nothing.txt"}, r"labels is nothing\.txt: cannot read it"),
        ("separate", {"labels": ["a", "a", "b"]}, r"labels has 'a' more than once"),
        ("separate", {"features": "maps"}, r"features is 'maps': .* no such output, but boxes .*, map \(1, 6, 4, 4\)"),
        ("separate", {"format": "detections"}, r"classes is missing: name one of the outputs .*: boxes, scores, map"),
        (
            "separate",
            {"boxes": "scores", "activation": "softmax"},
            r"'scores' has shape \(1, 16, 3\), expected \(N, 4\)",
        ),
        ("separate", {"boxes": "map", "scores": "scores"}, r"'map' has shape|'scores' has shape"),
        (
            "separate",
            {"format": "yolo"},
            r"'boxes' has shape \(1, 16, 4\), expected \(1, N, K\), or .* with K = 7 for yolo,",
        ),
        ("separate", {"size": 640}, r"size is 640, but .* takes images of 64 x 96: leave it out"),
        ("separate", {"size": [1, 2, 3]}, r"size must be an integer of at least 1, or a list of 2 integers"),
        ("separate", {"mean": [1.0]}, r"mean must be a list of 3 numbers, or None; got \[1\.0\]"),
        ("separate", {"std": [1.0, 0.0, 1.0]}, r"std must be a list of 3 numbers above 0, or None; got \[1\.0, 0\.0"),
        ("rows", {"labels": ["a", "b"]}, r"format is missing: the output 'output0' \(1, 16, 6\) can be yolo or rows"),
        ("best", {}, r"returned the class 3, `labels` names the classes up to 2: check `labels` and `first_class`"),
        ("yolo", {"labels": ["a", "b"]}, r"'output0' has shape \(1, 7, 16\), expected .* as there are 2 classes"),
    ],
)
def test_settings_that_do_not_fit(
    folder: Path, images: list[Tensor], name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(GMMLICError, match=message) as caught:
        build(folder, name, **settings)(images, 5)
    assert "\n" not in str(caught.value)


def test_invalid_files(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    def model(domain: str = "", shape: tuple[int, ...] = (1, 3, 8, 8), inputs: int = 1) -> onnx.ModelProto:
        names = [f"in{i}" for i in range(inputs)]
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]
        output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
        node = helper.make_node("Identity" if not domain else "Evil", names[:1], ["out"], domain=domain)
        graph = helper.make_graph([node], "g", values, [output])
        versions = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
        return helper.make_model(graph, opset_imports=versions, ir_version=9)

    (tmp_path / "text.onnx").write_text("not a model")
    onnx.save(model("evil.operators"), tmp_path / "custom.onnx")
    onnx.save(model(shape=(1, 8, 8, 3)), tmp_path / "last.onnx")
    onnx.save(model(shape=(4, 3, 8, 8)), tmp_path / "four.onnx")
    onnx.save(model(inputs=2), tmp_path / "two.onnx")
    escaping = model()
    tensor = escaping.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")
    onnx.save(escaping, tmp_path / "escaping.onnx")
    for name, message in {
        "text": "is not an ONNX file, or damaged",
        "custom": "cannot be run by ONNX Runtime",
        "last": r"has the inputs in0 tensor\(float\) \[1, 8, 8, 3\]: expected one image",
        "four": "takes batches of 4 images: export it for one image",
        "two": "has the inputs in0 .*, in1 .*: expected one image",
        "escaping": r"refers to '\.\./\.\./secret', which is outside its folder",
    }.items():
        with pytest.raises(WeightsError, match=message) as caught:
            build_extractor("onnx", weights=str(tmp_path / f"{name}.onnx"), labels=LABELS)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("imgsz", ["[0,-5]", "[1,2,3]", "[1e999,64]", "640.5", "{"])
def test_invalid_size_in_the_metadata(imgsz: str) -> None:
    with pytest.raises(ArgumentError, match=r"size is"):
        onnx_detector._input_size(Path("x.onnx"), ["height", "width"], None, {"imgsz": imgsz})


def test_invalid_results(folder: Path) -> None:
    extractor = build(folder, "broken")
    bright, green = torch.ones(3, 20, 30), torch.zeros(3, *SIZE)
    green[1] = 1
    with pytest.raises(WeightsError, match=r"'scores' has NaN or infinite scores for an image of 20 x 30 pixels"):
        build(folder, "broken", resize="stretch")([bright], 3)
    with pytest.raises(
        WeightsError, match=r"returned the score [67]\.?\d*, expected 0 to 1: set `activation='sigmoid'`"
    ):
        extractor([green], 3)


def test_missing_libraries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("onnxruntime", "onnx"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ConfigError, match=rf"needs {module}: pip install 'gm-mlic\[onnx\]'\."):
                build(folder, "separate")


def test_listing_detectors_loads_no_optional_library() -> None:
    code = (
        "import sys\nfrom gm_mlic.registry import DETECTORS\nassert 'onnx' in DETECTORS.names()\n"
        "print(*({'onnx', 'onnxruntime', 'h5py', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["onnx", "precomputed"])
def test_every_setting_is_described(name: str) -> None:
    for key, setting in DETECTORS.settings(name).items():
        assert setting.text, key
