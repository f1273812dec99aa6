"""Baseline: the detector's predicted classes and confidences, calibrated per label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from gm_mlic.embeddings import labels_of
from gm_mlic.errors import ConfigError
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import as_batch
from gm_mlic.nn.output import ModelOutput, pool_instances
from gm_mlic.nn.prior import FLOOR
from gm_mlic.registry import register_model


@register_model("detector_labels")
class DetectorLabels(nn.Module):
    r"""The detector's own labels, calibrated.

    .. math::
        s_{ic} = \alpha_c \operatorname{logit}(q_{ic}) + \beta_c, \qquad p_c = \sigma(\max_i s_{ic})

    with :math:`q_{ic}` the confidence of instance i where the detector (Faster R-CNN, Ren et al., NeurIPS 2015)
    predicted c, and 0.001 elsewhere. :math:`\alpha_c > 0` and :math:`\beta_c` are Platt scaling (1999) of each label.
    They start at 1 and 0, the detector's own probabilities, and do not change the ranking within a label. Classes and
    labels are matched by name (:func:`~gm_mlic.embeddings.labels_of`); a label without a class is never predicted.

    Args:
        labels: the C names.
        detector_labels: names of the detector's classes, which ``detected_label`` indexes.

    Shapes:
        - **input:** an assignment graph or a batch of them, with ``score`` and ``detected_label``; nothing else is used
        - **output:** :class:`~gm_mlic.nn.ModelOutput`

    Raises:
        ConfigError: if no label has the name of a class, or, when called, for graphs without the two.
    """

    column: Tensor

    def __init__(self, labels: Sequence[str], detector_labels: Sequence[str]) -> None:
        super().__init__()
        columns = labels_of(detector_labels, labels)
        if not any(c >= 0 for c in columns):
            names = ", ".join(detector_labels[:3]) or "it has none"
            raise ConfigError(
                f"None of the {len(labels)} labels has the name of a class of the detector ({names}): this model needs "
                "a detector of these classes, and boxes instead of a grid."
            )
        self.num_labels = len(labels)
        self.log_scale = nn.Parameter(torch.zeros(len(labels)))
        self.shift = nn.Parameter(torch.zeros(len(labels)))
        self.register_buffer("column", torch.tensor([*columns, -1]), persistent=False)  # the last one is for -1

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.log_scale)
        nn.init.zeros_(self.shift)

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = as_batch(data, self.num_labels)
        if batch.score is None or batch.detected_label is None:
            raise ConfigError("DetectorLabels needs graphs with score and detected_label.")
        named = self.column[batch.detected_label][..., None] == torch.arange(self.num_labels, device=self.column.device)
        q = torch.where(named, batch.score.to(self.shift.dtype)[..., None], FLOOR).clamp(FLOOR, 1 - 1e-6)
        return pool_instances(self.log_scale.exp() * q.logit() + self.shift, batch)

    def __repr__(self) -> str:
        named = len(set(self.column.tolist()) - {-1})
        return f"{type(self).__name__}({self.num_labels}, {named} of them classes of the detector)"
