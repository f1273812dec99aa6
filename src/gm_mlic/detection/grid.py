"""The cells of a detector's feature map as instances: what models have that read whole images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torchvision.models.detection import FasterRCNN

from gm_mlic.detection.faster_rcnn import FasterRCNNExtractor
from gm_mlic.detection.protocol import Instances
from gm_mlic.errors import ConfigError


class GridExtractor(FasterRCNNExtractor):
    r"""The last map of a detector's backbone in G x G cells, instead of boxes; same weights, no proposals.

    Images are scaled to squares of the detector's shorter side. A cell's feature is the average of the map over it, its
    box the cell itself, its score 1; cells go by rows. (The last map is that of the backbone proper, before a feature
    pyramid.)

    Args:
        detector, labels, name, class_index: as for :class:`~gm_mlic.detection.FasterRCNNExtractor`.
        grid: G.
        trainable: ``none``, or ``all``: the backbone.

    Shape:
        features have the map's channels: 2048 for the ResNets, 960 for MobileNet, 48 for ``scenes_tiny``.

    Raises:
        ConfigError: for ``trainable=box_head``: a grid has none.
    """

    def __init__(
        self,
        detector: FasterRCNN,
        labels: Sequence[str],
        name: str,
        class_index: Sequence[int] | None = None,
        trainable: str = "none",
        *,
        grid: int,
    ) -> None:
        if trainable == "box_head":
            raise ConfigError("detector.trainable=box_head: a grid has no boxes; set none or all.")
        super().__init__(detector, labels, name, class_index, trainable)
        self.grid = grid
        self.name = f"{self.name}-grid{grid}"
        self.requires_grad_(False)
        self.body = getattr(self.detector.backbone, "body", self.detector.backbone)
        self.body.requires_grad_(trainable == "all")
        with torch.no_grad():
            self.feature_dim = int(self._last_map(torch.zeros(1, 3, 64, 64)).shape[1])

    def forward(self, images: Sequence[Tensor], m: int) -> list[Instances]:
        """The cells of each image; arguments and result as for a detector.

        Raises:
            ConfigError: if ``m`` is less than the number of cells.
        """
        cells = self.grid**2
        if m < cells:
            raise ConfigError(
                f"detector.grid={self.grid} makes {cells} instances of an image, not {m}: set graph.m={cells} and "
                f"detector.max_instances={cells}."
            )
        device = self._label_of_class.device
        transform = self.detector.transform
        side = int(transform.min_size[-1])
        ready = []
        for image in images:
            pixels = transform.normalize(image.to(device))[None]
            if pixels.shape[-2:] != (side, side):
                pixels = interpolate(pixels, (side, side), mode="bilinear", align_corners=False, antialias=True)
            ready.append(pixels)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable == "all"):
            maps = self._last_map(torch.cat(ready))
            features = adaptive_avg_pool2d(maps, self.grid).flatten(2).transpose(1, 2).float()
        corner = torch.arange(self.grid, device=device) / self.grid
        y, x = torch.meshgrid(corner, corner, indexing="ij")
        boxes = torch.stack([x, y, x + 1 / self.grid, y + 1 / self.grid], dim=-1).view(cells, 4).clamp(max=1)
        scores, labels = boxes.new_ones(cells), torch.full((cells,), -1, device=device)
        return [Instances(boxes, scores, labels, of_image) for of_image in features]

    def _last_map(self, pixels: Tensor) -> Tensor:
        maps = self.body(pixels)
        last: Tensor = maps if isinstance(maps, Tensor) else list(maps.values())[-1]
        return last
