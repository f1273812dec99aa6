"""CNN-RNN: an LSTM that predicts one label after the other, from the image and the labels so far."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch_geometric.data import HeteroData

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import (
    LeCunLinear,
    WholeImageModel,
    location_output,
    mean_pool,
    present_and_difficult,
)  # fmt: skip
from gm_mlic.nn.baselines._sequence import label_paths, log_odds, path_loss, present_labels
from gm_mlic.nn.output import ModelOutput
from gm_mlic.registry import register_model
from gm_mlic.schema import Positive, checked

#: State of the LSTM: output and cell, each (rows, d).
State = tuple[Tensor, Tensor]


@register_model("cnn_rnn")
class CNNRNN(WholeImageModel):
    r"""CNN-RNN, from "CNN-RNN: A Unified Framework for Multi-label Image Classification" (Wang et al., CVPR 2016).

    .. math::
        w_k &= U_l e_k \text{ (label embedding, eq. 2)} \\
        o(t), r(t) &= \mathrm{LSTM}(w_{l_{t-1}}, r(t - 1)) \text{ (eq. 3)} \\
        x_t &= \mathrm{ReLU}(U_o o(t) + U_I I) \text{ (joint space, eq. 4)}, \qquad I = \frac{1}{M} \sum_i f_i \\
        s(t) &= U_l^\top x_t \text{ (eq. 5)}, \qquad
            P(l_t | I, l_1, \ldots, l_{t-1}) = \mathrm{softmax}(s(t))

    *Training* (section 3.4): cross-entropy of the next label given the true ones before it. The labels of an image are
    sorted by their frequency in the training images, the most frequent first, and END follows. :meth:`fit` counts; the
    order is a buffer, and part of checkpoints. This loss replaces the configured one: in training, the logits have no
    gradient.

    *Inference* (section 3.3): beam search for the most probable path of labels up to END. At each step, the N most
    probable unfinished paths are kept. It stops when none of them is as probable as the best finished one.

    Section 3 of the paper was available; sizes are from memory. Decided here: eq. 1, an LSTM with unclear gates, is
    replaced by ``torch.nn.LSTMCell``; END is also the input of the first step; a path has no label twice. The paper's
    scores for mAP are not in section 3: here, a label's logit is the log-odds of its largest probability at any step of
    the most probable path, which orders also the labels that are not on it. The match logits are :math:`w_c^\top U_I
    f_i`, the part of a location in the score of a label.

    Args:
        instance_dim: D, size of a location's feature.
        num_labels: C.
        width: size of label embeddings and joint space (default: 64, the paper's).
        hidden: size of the LSTM's state (default: 512, the paper's).
        steps: largest number of labels of a path (default: 20); of training images with more labels, the most frequent
            ones are used.
        beams: N (default: 4).

    Shapes:
        - **input:** an assignment graph or a batch of them; its instances are used, and in training its targets
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; ``loss`` is the cross-entropy, None without targets
    """

    rank: Tensor

    @checked
    def __init__(
        self,
        instance_dim: Positive,
        num_labels: Positive,
        width: Positive = 64,
        hidden: Positive = 512,
        steps: Positive = 20,
        beams: Positive = 4,
    ) -> None:
        super().__init__(instance_dim, num_labels, width=width, hidden=hidden, beams=beams)
        self.steps, self.beams = min(steps, num_labels), beams
        self.labels = LeCunLinear(width, num_labels + 1, bias=False)  # U_l, with END
        self.lstm = nn.LSTMCell(width, hidden)
        self.output = LeCunLinear(hidden, width, bias=False)
        self.image = LeCunLinear(instance_dim, width, bias=False)
        self.register_buffer("rank", torch.arange(num_labels))

    def fit(self, targets: Tensor, difficult: Tensor | None = None) -> None:
        """Sort the labels by frequency in targets (N, C) in {0, 1} of training images; difficult ones do not count."""
        count = present_and_difficult(targets, self.num_labels, difficult)[0].sum(dim=0)
        self.rank.copy_(count.argsort(descending=True, stable=True).argsort())

    def step(self, label: Tensor, state: State, image: Tensor) -> tuple[Tensor, State]:
        """Scores (R, C + 1) of the next label and the new state, from labels (R,), state and images (R, width)."""
        h, c = self.lstm(self.labels.weight[label], state)
        return self.labels(torch.relu(self.output(h) + image)), (h, c)

    def start(self, image: Tensor) -> tuple[Tensor, State]:
        """END and the state before the first step, for images (R, width)."""
        zeros = image.new_zeros(image.shape[0], self.lstm.hidden_size)
        return torch.full_like(image[:, 0], self.num_labels, dtype=torch.int64), (zeros, zeros)

    def path_scores(self, image: Tensor, paths: Tensor) -> Tensor:
        """Scores (B, T + 1, C + 1) of the next label at each step of paths (B, T + 1), given those before it."""
        label, state = self.start(image)
        scores = []
        for following in paths.clamp(min=0).unbind(dim=1):
            score, state = self.step(label, state, image)
            scores.append(score)
            label = following
        return torch.stack(scores, dim=1)

    def search(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Beam search, for images (B, width).

        Returns:
            log-probability (B,) of the best path, and (B, C) log-odds of each label at its best step of this path.
        """
        B, N, C = image.shape[0], self.beams, self.num_labels
        image = image.repeat_interleave(N, dim=0)
        label, state = self.start(image)
        log_p = torch.where(torch.arange(N, device=image.device) > 0, float("-inf"), image.new_zeros(B, N))
        used = torch.zeros(B, N, C, dtype=torch.bool, device=image.device)
        odds = image.new_full((B, N, C), float("-inf"))
        best, best_odds = odds[:, 0, 0], image.new_zeros(B, C)
        for _ in range(self.steps + 1):
            scores, state = self.step(label, state, image)
            scores = scores.view(B, N, C + 1)
            odds = odds.maximum(log_odds(scores)[..., :C])
            following = log_p[..., None] + scores.log_softmax(dim=-1)
            ended, beam = following[..., C].max(dim=1)
            ended_odds = odds.gather(1, beam[:, None, None].expand(-1, -1, C))[:, 0]
            best_odds = torch.where((ended > best)[:, None], ended_odds, best_odds)
            best = best.maximum(ended)
            log_p, index = following[..., :C].masked_fill(used, float("-inf")).flatten(1).topk(N, dim=1)
            if not torch.compiler.is_compiling() and bool((log_p[:, 0] <= best).all()):
                break  # later paths are less probable
            parent, label = index // C, index % C
            used = used.gather(1, parent[..., None].expand(-1, -1, C)) | (one_hot(label, C) > 0)
            odds = odds.gather(1, parent[..., None].expand(-1, -1, C))
            rows = (parent + N * torch.arange(B, device=image.device)[:, None]).flatten()
            label, state = label.flatten(), (state[0][rows], state[1][rows])
        return best, best_odds

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        with torch.autocast(batch.x.device.type, enabled=False):  # rounded probabilities would change paths
            locations = self.image(batch.x)
            image = mean_pool(locations, batch.mask)
            values = self.labels(locations)[..., :-1]
            with torch.no_grad() if self.training else contextlib.nullcontext():
                _, logits = self.search(image)
            loss = None
            if self.training and batch.y is not None:
                paths = label_paths(present_labels(batch), self.rank, self.steps)
                loss = path_loss(self.path_scores(image, paths), paths, batch)
        return location_output(logits, values, batch, loss=loss)
