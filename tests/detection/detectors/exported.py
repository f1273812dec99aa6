"""Tiny torch detectors, exported to ONNX in the layouts of common exporters, and their outputs as computed by torch."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

LABELS = ["red", "green", "blue"]
CELLS = 4


class Colors(nn.Module):
    """Detector of a 4 x 4 grid of overlapping boxes, whose score for each of 3 classes depends on the mean colour.

    Outputs boxes (N, 4) as corners in pixels, scores (N, 3), and a feature map (1, 6, 4, 4); N = 16.
    """

    def __init__(self, size: tuple[int, int] = (64, 96)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.mix = nn.Parameter(torch.randn(6, 3, generator=generator))
        H, W = size
        boxes = []
        for row in range(CELLS):
            for column in range(CELLS):
                left, top = column * W / 8, row * H / 8
                width, height = W / 8 * (3 + 0.3 * row), H / 8 * (3 + 0.3 * column)
                boxes.append([left - 3, top - 2, left + width, top + height])
        self.register_buffer("anchors", torch.tensor(boxes))
        self.anchors: Tensor

    def parts(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cells = nn.functional.adaptive_avg_pool2d(image, CELLS)
        maps = torch.einsum("fc,bchw->bfhw", self.mix, cells)
        scores = torch.softmax(8 * cells[0].flatten(1).T, dim=1)
        # Exporters do not name an output that is constant.
        return self.anchors + 0 * image.mean(), scores, maps


class Separate(Colors):
    """Boxes and scores of each class, and the map."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, maps = self.parts(image)
        return boxes[None], scores[None], maps


class Best(Colors):
    """Boxes, score and class of the best class of each box, as after non-maximum suppression; features of boxes."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        boxes, scores, maps = self.parts(image)
        best, classes = scores.max(dim=1)
        return boxes, classes + 1, best, maps[0].flatten(1).T


class Yolo(Colors):
    """One output (1, 4 + C, N), center and size in pixels, as of Ultralytics."""

    def forward(self, image: Tensor) -> Tensor:
        boxes, scores, _ = self.parts(image)
        return torch.cat([centers(boxes), scores], dim=1).T[None]


class Unbatched(Best):
    """As Best, for an image (3, H, W), as of torchvision."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return super().forward(image[None])


class YoloObjectness(Colors):
    """One output (1, N, 5 + C), as of YOLOv5 and YOLOX."""

    def forward(self, image: Tensor) -> Tensor:
        scores = self.parts(image)[1]
        objectness = scores.max(dim=1, keepdim=True).values
        return torch.cat([centers(self.anchors), objectness, scores / objectness], dim=1)[None]


class Rows(Colors):
    """One output (1, N, 6): corners, score and class."""

    def forward(self, image: Tensor) -> Tensor:
        best, classes = self.parts(image)[1].max(dim=1, keepdim=True)
        return torch.cat([self.anchors, best, classes.to(best.dtype)], dim=1)[None]


class Suppressed(Colors):
    """Boxes (1, N, 5) with the score and classes (1, N), as of MMDeploy; N is 0 for a dark image."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores, _ = self.parts(image)
        best, classes = scores.max(dim=1)
        kept = (best * (image.mean() > 0.1)).nonzero().flatten()
        return torch.cat([boxes, best[:, None]], dim=1)[kept][None], classes[kept][None]


class Averages(Colors):
    """A box with the mean of each channel of the input as features, and a map of positions: x and y in [0, 1]."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, x = torch.meshgrid((torch.arange(8) + 0.5) / 8, (torch.arange(12) + 0.5) / 12, indexing="ij")
        boxes, scores, _ = self.parts(image)
        features = image.mean(dim=(2, 3)).expand(len(self.anchors), 3)
        return boxes, scores, features, torch.stack([x, y])[None] + 0 * image.mean()


class Broken(Colors):
    """NaN scores for bright images; scores far above 1 for green ones; no detections in black ones."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores, _ = self.parts(image)
        red, green = image[0, 0].mean(), image[0, 1].mean()
        scores = torch.where(red > 0.9, scores * float("nan"), scores)
        scores = torch.where(green - red > 0.9, scores * 7, scores)
        return boxes, torch.where(red + green == 0, scores * 0, scores)


class Logits(Colors):
    """Logits with a last class without a name, and boxes as fractions, as of DETR."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores, _ = self.parts(image)
        logits = torch.cat([scores.log(), torch.full_like(scores[:, :1], -2.0)], dim=1)
        size = torch.tensor([image.shape[3], image.shape[2]] * 2)
        return logits[None], (centers(boxes) / size)[None]


def centers(boxes: Tensor) -> Tensor:
    """Corners as center and size."""
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)


def export(module: nn.Module, path: Path, names: list[str], size: tuple[int, int] = (64, 96)) -> Path:
    """Export a module to an ONNX file for images of one size (height and width), with named outputs."""
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    image = image[0] if isinstance(module, Unbatched) else image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter, which is faster
        torch.onnx.export(module.eval(), (image,), str(path), input_names=["image"], output_names=names, dynamo=False)
    return path


def with_metadata(path: Path, **metadata: str) -> Path:
    """Add metadata to an ONNX file."""
    import onnx

    model = onnx.load(path)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    return path
