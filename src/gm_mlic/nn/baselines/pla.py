"""PLA: an LSTM with attention over locations, trained with an order of the labels that follows its predictions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.nn.baselines._common import LeCunLinear, WholeImageModel, location_output, mean_pool
from gm_mlic.nn.baselines._sequence import label_paths, log_odds, path_loss, present_labels
from gm_mlic.nn.output import ModelOutput
from gm_mlic.registry import register_model
from gm_mlic.schema import Positive, checked


def assignment(cost: np.ndarray) -> list[int]:
    """The column of each row in the assignment of the least total cost (n, n), by the Hungarian algorithm."""
    n = len(cost)
    row_of = np.full(n + 1, -1)  # of each column; column n holds the row that is being assigned
    u, v = np.zeros(n), np.zeros(n + 1)  # potentials
    for row in range(n):
        row_of[n], column = row, n
        distance, previous, visited = np.full(n, np.inf), np.full(n, n), np.zeros(n + 1, dtype=bool)
        while row_of[column] >= 0:  # shortest augmenting path to a free column
            visited[column] = True
            reduced = cost[row_of[column]] - u[row_of[column]] - v[:n]
            shorter = ~visited[:n] & (reduced < distance)
            distance[shorter], previous[shorter] = reduced[shorter], column
            nearest = int(np.where(visited[:n], np.inf, distance).argmin())
            delta = distance[nearest]
            u[row_of[visited]] += delta
            v[visited] -= delta
            distance[~visited[:n]] -= delta
            column = nearest
        while column != n:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    return [int(column) for column in np.argsort(row_of[:n])]


@torch.compiler.disable
def align(scores: Tensor, paths: Tensor) -> Tensor:
    """The paths with their labels in the order of the predictions.

    Of n labels, each one that is predicted at one of the first n steps is the target of the first such step. The other
    labels are assigned to the other steps such that the cross-entropy is the least.

    Args:
        scores: (B, T + 1, C + 1) of labels and END at each step.
        paths: (B, T + 1), the labels of each image in any order, then END, then padding.

    Returns:
        (B, T + 1).
    """
    end = scores.shape[2] - 1
    # NaN of diverged weights would not end the search; the loss is NaN anyway.
    costs = np.nan_to_num((-scores.detach().log_softmax(dim=-1)).cpu().numpy())
    aligned = []
    for cost, predicted, path in zip(costs, scores.argmax(dim=-1).tolist(), paths.tolist(), strict=True):
        n = path.index(end)
        labels, order = path[:n], path[:]
        free = []
        for step in range(n):
            if predicted[step] in labels:
                labels.remove(predicted[step])
                order[step] = predicted[step]
            else:
                free.append(step)
        for step, column in zip(free, assignment(cost[np.ix_(free, labels)]), strict=True):
            order[step] = labels[column]
        aligned.append(order)
    return torch.tensor(aligned, device=paths.device)


@register_model("pla")
class PLA(WholeImageModel):
    r"""PLA, from "Orderless Recurrent Models for Multi-label Classification" (Yazici et al., CVPR 2020).

    .. math::
        h_0 &= \mathrm{Linear}(\bar f), \qquad c_0 = \mathrm{Linear}(\bar f), \qquad \bar f = \frac{1}{M} \sum_i f_i \\
        a_{ti} &= \underset{i}{\mathrm{softmax}} \; w_a^\top \mathrm{ReLU}(W_f f_i + W_h h_{t-1}) \\
        h_t, c_t &= \mathrm{LSTM}([e_{t-1}, \sigma(W_g h_{t-1}) \odot \sum_i a_{ti} f_i], (h_{t-1}, c_{t-1})),
            \qquad s(t) = W h_t

    :math:`e_{t-1}` is the embedding of the label that was predicted at the step before (the largest score), in
    training as well. The first step gets the embedding of END. All linear maps have a bias.

    *Training:* cross-entropy at each step, with the labels in the order of the predictions (predicted label alignment,
    ``align``), then END. This loss replaces the configured one: in training, the logits have no gradient.

    *Inference* is greedy and ends at END. The authors predict a set of labels. Decided here: a label's logit is the
    log-odds of its largest probability at any step up to END. The match logits are the attention at this step, which
    sums to 1 over the locations.

    The formulas, the alignment and the sizes were compared with the authors' code, not with the paper's text. Different
    from the code: in the code, a label that is predicted only after step n stays at any free step, and END has its own
    embedding for the first step, and in one version the attention has a dropout of 0.5. The code first trains the
    encoder by binary cross-entropy, and averages weights (SWA).

    Args:
        instance_dim: D, size of a location's feature.
        num_labels: C.
        width: size of label embeddings (default: 256, the authors').
        hidden: size of the LSTM's state and of the attention's hidden layer (default: 512, the authors').
        steps: largest number of predicted labels (default: 20, the authors'); of training images with more labels, the
            first ones are used.

    Shapes:
        - **input:** an assignment graph or a batch of them; its instances are used, and in training its targets
        - **output:** :class:`~gm_mlic.nn.ModelOutput`; ``loss`` is the cross-entropy, None without targets
    """

    @checked
    def __init__(
        self,
        instance_dim: Positive,
        num_labels: Positive,
        width: Positive = 256,
        hidden: Positive = 512,
        steps: Positive = 20,
    ) -> None:
        super().__init__(instance_dim, num_labels, width=width, hidden=hidden)
        self.steps = min(steps, num_labels)
        self.start_h = LeCunLinear(instance_dim, hidden)
        self.start_c = LeCunLinear(instance_dim, hidden)
        self.location = LeCunLinear(instance_dim, hidden)
        self.query = LeCunLinear(hidden, hidden)
        self.attention = LeCunLinear(hidden, 1, bias=False)  # a constant cancels in the softmax
        self.gate = LeCunLinear(hidden, instance_dim)
        self.labels = nn.Embedding(num_labels + 1, width)
        self.lstm = nn.LSTMCell(width + instance_dim, hidden)
        self.scores = LeCunLinear(hidden, num_labels + 1)

    def step(self, label: Tensor, h: Tensor, c: Tensor, x: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Scores (B, C + 1), attention (B, M) and the new state (B, hidden), from labels (B,) and the last state."""
        logits = self.attention(torch.relu(keys + self.query(h)[:, None])).squeeze(-1)
        attention = logits.masked_fill(~mask, float("-inf")).softmax(dim=1)
        seen = torch.sigmoid(self.gate(h)) * (attention[:, None] @ x).squeeze(1)
        h, c = self.lstm(torch.cat([self.labels(label), seen], dim=-1), (h, c))
        return self.scores(h), attention, h, c

    def decode(self, batch: AssignmentBatch, least: int) -> tuple[Tensor, Tensor]:
        """Scores (B, T, C + 1) and attention (B, T, M) of greedy steps, until all images ended, at least ``least``."""
        x, keys, mask = batch.x, self.location(batch.x), batch.mask
        mean = mean_pool(x, mask)
        h, c = self.start_h(mean), self.start_c(mean)
        label = torch.full_like(batch.mask[:, 0], self.num_labels, dtype=torch.int64)
        ended = torch.zeros_like(batch.mask[:, 0])
        scores, attentions = [], []
        for t in range(1, self.steps + 2):
            score, attention, h, c = self.step(label, h, c, x, keys, mask)
            scores.append(score)
            attentions.append(attention)
            label = score.argmax(dim=-1)
            ended = ended | (label == self.num_labels)
            if t >= least and not torch.compiler.is_compiling() and bool(ended.all()):
                break
        return torch.stack(scores, dim=1), torch.stack(attentions, dim=1)

    def forward(self, data: HeteroData | AssignmentBatch) -> ModelOutput:
        batch = self.as_batch(data)
        paths = None
        if self.training and batch.y is not None:
            # The order of the labels is free: any rank.
            paths = label_paths(present_labels(batch), torch.arange(self.num_labels, device=batch.x.device), self.steps)
        with torch.autocast(batch.x.device.type, enabled=False):  # rounded scores would change predictions
            scores, attention = self.decode(batch, 1 if paths is None else paths.shape[1])
            is_end = (scores.argmax(dim=-1) == self.num_labels).long()
            after = (is_end.cumsum(dim=1) - is_end) > 0
            odds = log_odds(scores)[..., :-1].masked_fill(after[..., None], float("-inf"))
            logits, step = odds.max(dim=1)
            loss = None
            if paths is not None:
                scores = scores[:, : paths.shape[1]]
                loss, logits = path_loss(scores, align(scores, paths), batch), logits.detach()
        values = attention.gather(1, step[..., None].expand(-1, -1, attention.shape[2])).transpose(1, 2)
        return location_output(logits, values, batch, loss=loss)
