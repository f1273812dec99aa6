"""DetectorLabels baseline compared with loops and with the uncalibrated detector scores."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, HeteroData

from gm_mlic import create_model
from gm_mlic.cli.demo import detector_scores
from gm_mlic.errors import ConfigError
from gm_mlic.graphs import MATCHES, AssignmentBatch, AssignmentBatchDataset, AssignmentGraph
from gm_mlic.nn import DetectorLabels

LABELS, CLASSES = ["cat", "dog", "hope", "bus"], ["bus", "table", "dog", "cat"]
C, M = len(LABELS), 5


def model() -> DetectorLabels:
    return DetectorLabels(LABELS, CLASSES)


def store(seed: int = 0, images: int = 6) -> SimpleNamespace:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, M + 1, (images, 1))
    present = np.arange(M) < counts[..., None]
    corner, size = rng.random((2, images, 1, M, 2), dtype=np.float32) / 2
    return SimpleNamespace(
        features=rng.standard_normal((images, 1, M, 3), dtype=np.float32),
        boxes=np.concatenate([corner, corner + size], axis=-1),
        scores=np.where(present, rng.uniform(0.05, 0.99, present.shape), 0).astype(np.float32),
        detected_labels=np.where(present, rng.integers(-1, len(CLASSES), present.shape), -1).astype(np.int32),
        counts=counts,
        targets=rng.choice([0, 1], (images, C)).astype(np.int8),
        difficult=None,
        rows=np.arange(images),
        manifest=SimpleNamespace(labels=LABELS, detector_labels=CLASSES),
    )


def graph(num_labels: int = C) -> AssignmentGraph:
    return AssignmentGraph(torch.eye(num_labels), edge_types=[])


def batch(of: SimpleNamespace | None = None) -> AssignmentBatch:
    data = AssignmentBatchDataset(of or store(), graph())
    return data.__getitems__(range(len(data)))


def graphs(dense: AssignmentBatch) -> list[HeteroData]:
    assert dense.score is not None
    assert dense.detected_label is not None
    made = []
    for b, mask in enumerate(dense.mask):
        data = HeteroData()
        data["instance"].x, data["instance"].box = dense.x[b, mask], dense.box[b, mask]
        data["instance"].score, data["instance"].detected_label = dense.score[b, mask], dense.detected_label[b, mask]
        made.append(graph()(data))
    return made


def test_against_a_loop() -> None:
    net, data = model(), batch()
    with torch.no_grad():
        net.log_scale.copy_(torch.tensor([0.0, 0.5, -0.3, 0.1]))
        net.shift.copy_(torch.tensor([0.2, -0.4, 0.0, 1.0]))
    assert data.score is not None
    assert data.detected_label is not None
    scale, shift = net.log_scale.exp().tolist(), net.shift.tolist()
    with torch.no_grad():
        output = net(data)
    for b in range(data.num_graphs):
        for c, label in enumerate(LABELS):
            found = []
            for i in range(int(data.mask[b].sum())):
                number = int(data.detected_label[b, i])
                q = float(data.score[b, i]) if number >= 0 and CLASSES[number] == label else 0.001
                found.append(scale[c] * math.log(q / (1 - q)) + shift[c])
                assert float(output.match_logits[b, i, c]) == pytest.approx(found[-1], abs=1e-4)
            assert float(output.logits[b, c]) == pytest.approx(max(found), abs=1e-4)
            assert int(output.argmax_instance[b, c]) == int(np.argmax(found))


def test_initial_scores_equal_the_detector() -> None:
    of = store()
    ours, theirs = torch.sigmoid(model()(batch(of)).logits), torch.from_numpy(detector_scores(of))
    torch.testing.assert_close(ours, torch.where(theirs > 0, theirs, 0.001))
    assert bool((theirs[:, LABELS.index("hope")] == 0).all())  # no class with this name


def test_calibration_keeps_the_ranking() -> None:
    net, data = model(), batch(store(images=40))
    before = net(data).logits.argsort(dim=0, stable=True)
    with torch.no_grad():
        net.log_scale.normal_()
        net.shift.normal_()
    assert torch.equal(net(data).logits.argsort(dim=0, stable=True), before)


def test_all_batch_layouts() -> None:
    net, data = model(), batch()
    expected = net(data)
    made = graphs(data)
    together = net(Batch.from_data_list(made))
    torch.testing.assert_close(together.logits, expected.logits)
    assert torch.equal(together.argmax_instance, expected.argmax_instance)
    for b, alone in enumerate(made):
        torch.testing.assert_close(net(alone).logits[0], expected.logits[b])
    for part, logits in zip(data.split(4), expected.logits.split(4), strict=True):
        torch.testing.assert_close(net(part).logits, logits)
    for output in (expected, together):
        assert int(output.match_logits.isfinite().sum()) == int(data.mask.sum()) * C


def test_training_calibrates_every_parameter() -> None:
    """Training raises low confidences of a detector that is always correct."""
    of = store(images=30)
    of.scores = np.where(of.scores > 0, 0.3, 0).astype(np.float32)
    of.targets = (detector_scores(of) > 0).astype(np.int8)
    net, data = model(), batch(of)
    assert data.y is not None
    y = (data.y > 0).float()

    def loss() -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(net(data).logits, y)

    first = loss()
    first.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(p.grad.all()) for p in net.parameters())
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0)
    for _ in range(300):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(first) > 0.2
    assert float(loss()) < 0.02
    net.reset_parameters()
    assert float(loss()) == float(first)


def test_parameters_are_the_calibration_only() -> None:
    net = create_model("detector_labels", labels=LABELS, detector_labels=CLASSES)
    assert isinstance(net, DetectorLabels)
    assert {name: tuple(p.shape) for name, p in net.state_dict().items()} == {"log_scale": (C,), "shift": (C,)}
    assert repr(net) == "DetectorLabels(4, 3 of them classes of the detector)"


def test_invalid_inputs() -> None:
    with pytest.raises(ConfigError, match=r"None of the 4 labels .* \(car, tree\)"):
        DetectorLabels(LABELS, ["car", "tree"])
    with pytest.raises(ConfigError, match=r"it has none.*instead of a grid"):
        DetectorLabels(LABELS, [])
    net, data = model(), batch()
    with pytest.raises(ConfigError, match="needs graphs with score and detected_label"):
        net(replace(data, score=None))
    with pytest.raises(ConfigError, match="3 labels, the model 4"):
        net(replace(data, label_vectors=data.label_vectors[:3]))
    odd = graphs(data)[-1]
    odd[MATCHES].edge_index = odd[MATCHES].edge_index[:, 1:]
    with pytest.raises(ConfigError, match="have no matching edge"):
        net(odd)
