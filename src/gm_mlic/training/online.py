"""On-line detection: from the images of a training step to assignment graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch_geometric.data import Batch, HeteroData

from gm_mlic.detection.protocol import InstanceExtractor, detect
from gm_mlic.graphs import AssignmentBatch, AssignmentGraph, collate_instances, to_hetero_data
from gm_mlic.instances import OnlineBatch


class OnlineGraphs(nn.Module):
    """Detector and assignment-graph transform for batches of images.

    It makes an :class:`~gm_mlic.graphs.AssignmentBatch` if ``dense``, otherwise a batch of ``HeteroData``. Only a
    ``trained`` detector is a sub-module, which is saved in checkpoints.
    """

    def __init__(self, extractor: InstanceExtractor, graph: AssignmentGraph, *, dense: bool, trained: bool) -> None:
        super().__init__()
        self._frozen = None if trained else [extractor]  # a list, so that torch does not register it
        self.detector = extractor if trained else None
        self.graph = graph
        self.dense = dense

    @property
    def extractor(self) -> Any:
        return self.detector if self._frozen is None else self._frozen[0]

    def forward(self, batch: OnlineBatch, device: torch.device) -> AssignmentBatch | HeteroData:
        """Assignment graphs of the batch, on ``device``."""
        with torch.autocast(device.type, enabled=False):  # full precision, as in extraction
            assert self.graph.m is not None
            found = detect(self.extractor, batch.images, self.graph.m)
        targets, rows = batch.targets.to(device, torch.int64), batch.rows.to(device)
        difficult = None if batch.difficult is None else batch.difficult.to(device)
        if self.dense:
            return collate_instances(found, self.graph, device, y=targets, row=rows, difficult=difficult)
        graphs = [self.graph(to_hetero_data(instances).to("cpu")) for instances in found]
        collated: HeteroData = Batch.from_data_list(graphs).to(device)
        collated.y, collated.row, collated.difficult = targets, rows, difficult
        return collated
