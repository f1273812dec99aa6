"""Static-shape detector for export: exporters do not support data-dependent shapes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, nms, roi_align

from gm_mlic.detection.faster_rcnn import FasterRCNNExtractor

#: Score of dropped candidates; valid scores are 0 or more.
_NONE = -1.0


class FixedDetector(nn.Module):
    """Static-shape version of :class:`~gm_mlic.detection.FasterRCNNExtractor` for one image; equal up to ties.

    Dropped candidates are kept with a score of -1. Only non-maximum suppression returns a data-dependent number of
    boxes; its result is converted to a mask at once.

    Args:
        extractor: the detector.
        size: height and width of the images, in pixels.
        m: number of instances; missing ones are masked.

    Shapes:
        - **image:** (3, H, W) in [0, 1]
        - **features:** (m, D), **boxes:** (m, 4) relative to width and height, **mask:** (m,) bool, **scores:** (m,),
          **detected_labels:** (m,) int64, -1 for none
    """

    def __init__(self, extractor: FasterRCNNExtractor, size: tuple[int, int], m: int) -> None:
        super().__init__()
        self.extractor = extractor
        self.m = m
        with torch.no_grad():
            pixels, self.size = extractor._prepare(torch.zeros(3, *size))
            maps = extractor._maps(pixels)
            batch = ImageList(pixels, [self.size])
            anchors = extractor.detector.rpn.anchor_generator(batch, list(maps.values()))[0]
            heads = extractor.detector.roi_heads
            heads.box_roi_pool(maps, [anchors[:1]], [self.size])  # infers the scales of the maps
            objectness, _ = extractor.detector.rpn.head(list(maps.values()))
        self.register_buffer("anchors", anchors)
        self.anchors: Tensor
        #: Class indices that are labels.
        self.classes = (extractor._label_of_class >= 0).nonzero().flatten().tolist()
        self.levels = [level[0].numel() for level in objectness]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Compute features, boxes, mask, scores and detected labels."""
        heads = self.extractor.detector.roi_heads
        pixels, _ = self.extractor._prepare(image)
        maps = self.extractor._maps(pixels)
        proposals, valid = self._propose(maps)
        features = heads.box_head(self._pool(maps, proposals))
        logits, deltas = heads.box_predictor(features)
        boxes, scores, detected_labels = self._candidates(logits, deltas, proposals, valid)
        scores, best = scores.topk(min(self.m, len(scores)))
        boxes, detected_labels = boxes[best], torch.where(scores < 0, -1, detected_labels[best])
        # no detections: the whole image, with score 0
        height, width = self.size
        empty = scores[:1] < 0
        boxes = torch.cat([torch.where(empty, boxes.new_tensor([[0, 0, width, height]]), boxes[:1]), boxes[1:]])
        scores = torch.cat([scores[:1].clamp(min=0), scores[1:]])
        mask = scores >= 0
        features = heads.box_head(self._pool(maps, boxes)).float() * mask[:, None]
        boxes = (boxes / boxes.new_tensor([width, height] * 2)).clamp(0, 1) * mask[:, None]
        return features, boxes, mask, scores.clamp(min=0), detected_labels

    def _propose(self, maps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Proposals (P, 4) by descending score, and the mask of valid ones."""
        rpn = self.extractor.detector.rpn
        objectness, deltas = rpn.head(list(maps.values()))
        flat_objectness, flat_deltas = concat_box_prediction_layers(objectness, deltas)
        decoded = rpn.box_coder.decode(flat_deltas, [self.anchors]).view(-1, 4)
        boxes, scores = [], []
        level_scores = flat_objectness.flatten().split(self.levels)
        for of_level, level_boxes in zip(level_scores, decoded.split(self.levels), strict=True):
            logits, top = of_level.topk(min(rpn.pre_nms_top_n(), len(of_level)))
            level = clip_boxes_to_image(level_boxes[top], self.size)
            boxes.append(level)
            scores.append(_kept(level, logits.sigmoid(), rpn.score_thresh, rpn.nms_thresh, rpn.min_size))
        together, all_scores = torch.cat(boxes), torch.cat(scores)
        all_scores, best = all_scores.topk(min(rpn.post_nms_top_n(), len(all_scores)))
        return together[best], all_scores >= 0

    def _candidates(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and labels of each proposal for each class that is a label."""
        heads = self.extractor.detector.roi_heads
        probabilities = torch.softmax(logits, -1).masked_fill(~valid[:, None], _NONE)
        decoded = clip_boxes_to_image(heads.box_coder.decode(deltas, [proposals]), self.size)
        boxes, scores, labels = [], [], []
        for number in self.classes:
            of_class, threshold = decoded[:, number], heads.score_thresh
            # exclusive threshold, as in the extractor
            above = torch.where(probabilities[:, number] > threshold, probabilities[:, number], _NONE)
            boxes.append(of_class)
            scores.append(_kept(of_class, above, 0.0, heads.nms_thresh, 1e-2))
            labels.append(self.extractor._label_of_class[number].expand(len(of_class)))
        return torch.cat(boxes), torch.cat(scores), torch.cat(labels)

    def _pool(self, maps: dict[str, Tensor], boxes: Tensor) -> Tensor:
        """RoIAlign of each box on the map for its size; the result for empty boxes is undefined."""
        pool = self.extractor.detector.roi_heads.box_roi_pool
        chosen = [maps[name] for name in pool.featmap_names if name in maps]
        rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
        pooled: list[Tensor] = [
            roi_align(level, rois, pool.output_size, scale, pool.sampling_ratio)
            for level, scale in zip(chosen, pool.scales, strict=True)
        ]
        if len(pooled) == 1:
            return pooled[0]
        levels = pool.map_levels([boxes])
        return torch.stack(pooled, dim=1)[torch.arange(len(boxes)), levels]


def _kept(boxes: Tensor, scores: Tensor, lowest: float, overlap: float, side: float) -> Tensor:
    """Scores, with -1 for boxes that are too small, below the threshold, or suppressed."""
    sides = boxes[:, 2:] - boxes[:, :2]
    scores = torch.where((sides >= side).all(dim=1) & (scores >= lowest), scores, _NONE)
    # dropped boxes are last in NMS and suppress only each other
    kept = torch.zeros_like(scores).scatter(0, nms(boxes, scores, overlap), 1.0)
    return torch.where(kept > 0, scores, _NONE)
