"""Artifacts of a run: example test photos with predictions, and the learned label states."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from gm_mlic.datasets.base import MultiLabelDataset, rgb_image
from gm_mlic.errors import DataError, UnreadableImage
from gm_mlic.graphs import AssignmentBatch
from gm_mlic.graphs.schema import INSTANCE
from gm_mlic.io import atomic_write, first_line, write_file
from gm_mlic.nn import ModelOutput
from gm_mlic.runs import EXAMPLES, LABEL_STATES
from gm_mlic.targets import positives_and_counted

log = logging.getLogger(__name__)

#: Number of example photos, and their longer side in pixels.
NUMBER, SIDE = 12, 640
_TOP = 3


@dataclass
class Examples:
    """Predictions for the first images of a test split, by image.

    They are its row in the dataset, scores (C,) in [0, 1], argmax boxes (C, 4), and label nodes after the last block
    (C, d), if the model has label nodes.
    """

    rows: list[int] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    boxes: list[Tensor] = field(default_factory=list)
    label_states: list[Tensor] = field(default_factory=list)

    def collect(self, batch: AssignmentBatch | HeteroData, output: ModelOutput) -> None:
        """Add images of a batch until there are :data:`NUMBER`."""
        count = min(NUMBER - len(self.rows), len(output.logits))
        if count <= 0:
            return
        self.rows += batch.row[:count].tolist()  # type: ignore[index]
        self.scores += torch.sigmoid(output.logits[:count].float()).cpu()
        for i, instances in enumerate(output.argmax_instance[:count]):
            dense = isinstance(batch, AssignmentBatch)
            boxes = batch.box[i] if dense else batch[INSTANCE].box[batch[INSTANCE].ptr[i] :]  # type: ignore[index]
            self.boxes.append(boxes[instances].cpu())
        if output.label_states is not None:
            self.label_states += output.label_states[:count].float().cpu()


def write_examples(
    run_dir: Path, dataset: MultiLabelDataset, examples: Examples, threshold: float | Sequence[float]
) -> None:
    """Write ``RUN/examples/``: photos as JPEG, and their predictions in ``examples.json``.

    Each image has its top three labels and all other labels that are predicted or present. A label is ``right`` or
    ``wrong`` if it is predicted (in the top three, or its score reaches the threshold), otherwise ``missed``. Images
    that cannot be read are left out with a warning.
    """
    folder = run_dir / EXAMPLES
    folder.mkdir(exist_ok=True)
    thresholds = np.broadcast_to(threshold, len(dataset.labels))
    content = []
    is_present, _ = positives_and_counted(np.asarray(dataset.targets) == 1, dataset.difficult, "positive")
    for n, (row, scores, boxes) in enumerate(zip(examples.rows, examples.scores, examples.boxes, strict=True)):
        try:
            image = rgb_image(dataset, row)
        except (UnreadableImage, DataError) as error:  # found late, because the instances were already in the store
            log.warning("left out of %s: %s", EXAMPLES, first_line(error))
            continue
        size = {"width": image.width, "height": image.height}
        image.thumbnail((SIDE, SIDE))
        image.save(folder / f"{n:02d}.jpg", quality=88)
        labels = []
        for rank, c in enumerate(scores.argsort(descending=True, stable=True).tolist()):
            present = bool(is_present[row, c])
            predicted = rank < _TOP or bool(scores[c] >= thresholds[c])
            if not (predicted or present):
                continue
            kind = "missed" if not predicted else "right" if present else "wrong"
            box = [round(float(v), 4) for v in boxes[c]]
            labels.append({"label": dataset.labels[c], "score": round(float(scores[c]), 4), "box": box, "kind": kind})
        names = [dataset.labels[c] for c in np.flatnonzero(dataset.targets[row] > 0)]
        content.append({"id": dataset.ids[row], "file": f"{n:02d}.jpg", **size, "targets": names, "top": labels})
    write_file(folder / "examples.json", json.dumps(content, indent=1) + "\n")


def write_label_states(run_dir: Path, labels: tuple[str, ...], examples: Examples, label_vectors: Tensor) -> None:
    """Write ``RUN/label_states.npz``, unless the model has no label nodes.

    The arrays are ``labels`` (C,), ``states`` (C, d), the mean over the examples, and ``input`` (C, D_l), the vectors.
    """
    if not examples.label_states:
        return
    states = torch.stack(examples.label_states).mean(dim=0).numpy()
    vectors = label_vectors.float().cpu().numpy()
    with atomic_write(run_dir / LABEL_STATES) as part, part.open("wb") as file:
        np.savez(file, labels=np.array(labels), states=states, input=vectors)
