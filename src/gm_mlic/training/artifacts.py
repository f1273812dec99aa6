"""What a run leaves for people to look at: some test photos with predictions, and the learnt label states."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from gm_mlic.datasets.base import MultiLabelDataset
from gm_mlic.graphs import AssignmentBatch
from gm_mlic.graphs.schema import INSTANCE
from gm_mlic.nn import ModelOutput
from gm_mlic.runs import EXAMPLES, LABEL_STATES, write_atomically

#: How many photos are kept, and how large (the longer side, in pixels).
NUMBER, SIDE = 12, 640
_TOP = 3


@dataclass
class Examples:
    """The first images of a test split, as the network saw them.

    Attributes:
        rows: of the images in their dataset.
        scores: (C,) of each image, in [0, 1].
        boxes: (C, 4) of each image: that of the instance that won each label.
        label_states: (C, d) of each image: the label nodes after the last block; none for models without.
    """

    rows: list[int] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    boxes: list[Tensor] = field(default_factory=list)
    label_states: list[Tensor] = field(default_factory=list)

    def collect(self, batch: AssignmentBatch | HeteroData, output: ModelOutput) -> None:
        """Take what is still wanted of a batch."""
        wanted = min(NUMBER - len(self.rows), len(output.logits))
        if wanted <= 0:
            return
        self.rows += batch.row[:wanted].tolist()  # type: ignore[index]
        self.scores += torch.sigmoid(output.logits[:wanted].float()).cpu()
        self.boxes += [_winning_boxes(batch, output, i).cpu() for i in range(wanted)]
        if output.label_states is not None:
            self.label_states += output.label_states[:wanted].float().cpu()


def _winning_boxes(batch: AssignmentBatch | HeteroData, output: ModelOutput, i: int) -> Tensor:
    """(C, 4): the boxes of the instances that won the labels of image ``i``."""
    if isinstance(batch, AssignmentBatch):
        return batch.box[i, output.argmax_instance[i]]
    first = batch[INSTANCE].ptr[i] if "ptr" in batch[INSTANCE] else 0
    box: Tensor = batch[INSTANCE].box[first + output.argmax_instance[i]]
    return box


def write_examples(
    run_dir: Path, dataset: MultiLabelDataset, examples: Examples, threshold: float | Sequence[float]
) -> None:
    """Write ``RUN/examples/``: the photos as JPEG, and what was predicted in ``examples.json``.

    Of each image: its three labels with the highest scores, then further ones that are predicted or present. Each is
    ``right`` or ``wrong`` if it is predicted (among the three, or its score reaches the threshold), else ``missed``.
    """
    folder = run_dir / EXAMPLES
    folder.mkdir(exist_ok=True)
    thresholds = np.broadcast_to(threshold, len(dataset.labels))
    described = []
    seen = np.asarray(dataset.targets) == 1
    if dataset.difficult is not None:
        seen = seen | dataset.difficult
    for n, (row, scores, boxes) in enumerate(zip(examples.rows, examples.scores, examples.boxes, strict=True)):
        image = dataset.image(row)
        size = {"width": image.width, "height": image.height}
        image.thumbnail((SIDE, SIDE))
        image.convert("RGB").save(folder / f"{n:02d}.jpg", quality=88)
        labels = []
        for place, c in enumerate(scores.argsort(descending=True, stable=True).tolist()):
            present = bool(seen[row, c])
            predicted = place < _TOP or bool(scores[c] >= thresholds[c])
            if not (predicted or present):
                continue
            kind = "missed" if not predicted else "right" if present else "wrong"
            box = [round(float(v), 4) for v in boxes[c]]
            labels.append({"label": dataset.labels[c], "score": round(float(scores[c]), 4), "box": box, "kind": kind})
        names = [dataset.labels[c] for c in np.flatnonzero(dataset.targets[row] > 0)]
        described.append({"id": dataset.ids[row], "file": f"{n:02d}.jpg", **size, "targets": names, "top": labels})
    write_atomically(folder / "examples.json", json.dumps(described, indent=1) + "\n")


def write_label_states(run_dir: Path, labels: tuple[str, ...], examples: Examples, label_vectors: Tensor) -> None:
    """Write ``RUN/label_states.npz``; nothing for a model without label nodes.

    It holds ``labels`` (C,), ``states`` (C, d), their mean over the examples, and ``input`` (C, D_l), the vectors.
    """
    if not examples.label_states:
        return
    states = torch.stack(examples.label_states).mean(dim=0).numpy()
    vectors = label_vectors.float().cpu().numpy()
    part = run_dir / f"{LABEL_STATES}.part"
    with part.open("wb") as file:
        np.savez(file, labels=np.array(labels), states=states, input=vectors)
    part.replace(run_dir / LABEL_STATES)
