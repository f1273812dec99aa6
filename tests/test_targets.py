"""Target formats: {0, 1} of any dtype with a difficult mask (default), and VOC's {1, 0, -1}."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor

from gm_mlic.datasets import MultiLabelDataset, label_ratio
from gm_mlic.datasets.base import check_targets
from gm_mlic.datasets.splits import stratified
from gm_mlic.errors import ArgumentError, DataError
from gm_mlic.instances import OnlineImages, extract
from gm_mlic.losses import WeightedBCE
from gm_mlic.metrics import (
    CONVENTIONS,
    MultiLabelMetrics,
    average_precision,
    bootstrap_map,
    fit_thresholds,
    get_convention,
    precision_recall,
    predicted,
    write_scored_images,
)
from gm_mlic.targets import DifficultRule, normalize_targets

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64,
]  # fmt: skip
DIFFICULT_RULES = get_args(DifficultRule)
N, C = 40, 5


def binary(seed: int = 0, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Random logits and binary targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, C, generator=generator, dtype=torch.float64)
    return logits, (torch.rand(N, C, generator=generator) < 0.3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_equals_torch(dtype: torch.dtype) -> None:
    logits, targets = binary(dtype=dtype)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.double())
    for checked in (True, False):
        loss = WeightedBCE(torch.rand(C), validate_args=checked)
        torch.testing.assert_close(loss(logits, targets), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_map_equals_scikit_learn(dtype: torch.dtype) -> None:
    logits, targets = binary(dtype=dtype)
    expected = average_precision_score(targets.double().numpy(), logits.numpy(), average=None)
    np.testing.assert_allclose(average_precision(logits.sigmoid(), targets), expected, rtol=1e-12)
    for convention in ("mlgcn", "ctran"):
        metrics = MultiLabelMetrics(C, convention)
        metrics.update(logits.sigmoid(), targets)
        np.testing.assert_allclose(metrics.compute()["mAP"], 100 * expected.mean(), rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_label_ratio_equals_the_mean(dtype: torch.dtype) -> None:
    targets = binary(dtype=dtype)[1]
    if dtype != torch.bfloat16:
        np.testing.assert_allclose(label_ratio(targets.numpy()), targets.double().mean(0))


@st.composite
def voc_targets(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    values = draw(st.lists(st.sampled_from([1, 0, -1]), min_size=rows * columns, max_size=rows * columns))
    dtype = draw(st.sampled_from([torch.int8, torch.int64, torch.float16, torch.float32]))
    return torch.tensor(values).view(rows, columns).to(dtype)


def masked(voc: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Convert to binary with random values for difficult pairs."""
    anything = torch.randint(0, 2, voc.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(voc == 0, anything, (voc == 1).long()), voc == 0


@settings(max_examples=60, deadline=None)
@given(
    voc=voc_targets(),
    policy=st.sampled_from(DIFFICULT_RULES),
    beta=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 99),
)
def test_mask_equals_voc_format_in_the_loss(voc: Tensor, policy: str, beta: float, seed: int) -> None:
    logits = torch.randn(voc.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ratio = torch.full(voc.shape[1:], 0.3)
    expected = WeightedBCE(ratio, beta, policy, "voc", allow_all_present=True)(logits, voc)
    assert torch.equal(WeightedBCE(ratio, beta, policy)(logits, *masked(voc, seed)), expected)


@settings(max_examples=60, deadline=None)
@given(
    voc=voc_targets(),
    convention=st.sampled_from(list(CONVENTIONS)),
    in_ap=st.sampled_from(DIFFICULT_RULES),
    in_f1=st.sampled_from(DIFFICULT_RULES),
    seed=st.integers(0, 99),
)
def test_mask_equals_voc_format_in_metrics(voc: Tensor, convention: str, in_ap: str, in_f1: str, seed: int) -> None:
    scores = torch.rand(voc.shape, generator=torch.Generator().manual_seed(seed))
    targets, difficult = masked(voc, seed)
    as_voc = {"target_format": "voc", "allow_all_present": True}
    options = {"difficult_ap": in_ap, "difficult_f1": in_f1}
    rules = get_convention(convention, **options)

    def same(ours: object, theirs: object) -> None:
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))

    both = [
        MultiLabelMetrics(voc.shape[1], convention, **options),
        MultiLabelMetrics(voc.shape[1], convention, **options, **as_voc),
    ]
    both[0].update(scores, targets, difficult)
    both[1].update(scores, voc)
    values = [metrics.compute() for metrics in both]
    for name in values[0]:
        same(values[0][name], values[1][name])
    same(
        average_precision(scores, targets, rules.ap, in_ap, difficult=difficult),
        average_precision(scores, voc, rules.ap, in_ap, **as_voc),
    )
    ours, theirs = (
        precision_recall(scores, targets, rules, difficult=difficult),
        precision_recall(scores, voc, rules, **as_voc),
    )
    same(list(vars(ours).values()), list(vars(theirs).values()))
    same(fit_thresholds(scores, targets, rules, difficult=difficult), fit_thresholds(scores, voc, rules, **as_voc))
    same(
        bootstrap_map([scores], targets, [rules], 3, difficult=difficult),
        bootstrap_map([scores], voc, [rules], 3, **as_voc),
    )


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_normalize_targets(kind: str) -> None:
    voc = np.array([[1, 0, -1], [1, 1, 0]])
    targets, mask = np.array([[1, 1, 0], [1, 1, 0]]), voc == 0
    if kind == "tensor":
        voc, targets, mask = (torch.from_numpy(table) for table in (voc, targets, mask))  # type: ignore[assignment]
    for present, difficult in (normalize_targets(voc, target_format="voc"), normalize_targets(targets, mask)):
        assert present.tolist() == [[True, False, False], [True, True, False]]
        assert difficult is not None
        assert difficult.tolist() == [[False, True, False], [False, False, True]]
        assert isinstance(present, type(voc))
    assert normalize_targets(targets)[1] is None


def bad(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    targets = torch.zeros(2, 3, dtype=dtype)
    targets[0, 0], targets[1, 2] = 1, value
    return targets


USES = {
    "loss": lambda targets, difficult=None, **options: WeightedBCE(torch.rand(3), **options)(
        torch.zeros(2, 3), targets, difficult
    ),
    "metrics": lambda targets, difficult=None, **options: MultiLabelMetrics(3, **options).update(
        torch.zeros(2, 3), targets, difficult
    ),
    "ap": lambda targets, **options: average_precision(torch.zeros(2, 3), targets, **options),
    "f1": lambda targets, **options: precision_recall(torch.zeros(2, 3), targets, get_convention(), **options),
    "bootstrap": lambda targets, **options: bootstrap_map(
        [torch.zeros(2, 3)], targets, [get_convention()], 2, **options
    ),
    "thresholds": lambda targets, **options: fit_thresholds(torch.zeros(2, 3), targets, **options),
}


@pytest.mark.parametrize("use", USES)
def test_invalid_targets_are_refused(use: str) -> None:
    run = USES[use]
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for targets, options, error, message in (
        (bad(-1), {}, DataError, "^targets contain -1: pass target_format='voc'"),
        (bad(-1, torch.int8), {}, DataError, "^targets contain -1: pass target_format='voc'"),
        (bad(0.5), {}, DataError, "^targets contain 0.5: use 1"),
        (bad(float("nan")), {}, DataError, "^targets contain nan: use 1"),
        (bad(2, torch.uint8), {}, DataError, "^targets contain 2: use 1"),
        (bad(-1), {"difficult": mask}, DataError, "^targets contain -1"),
        (bad(0.5), {"target_format": "voc"}, DataError, "^targets contain 0.5: use 1"),
        (bad(float("nan")), {"target_format": "voc"}, DataError, "^targets contain nan: use 1"),
        (
            bad(1),
            {"target_format": "voc"},
            DataError,
            "^targets contain no -1.*target_format='binary'.*allow_all_present=True",
        ),
        (bad(1).bool(), {"target_format": "voc"}, DataError, "^targets contain no -1"),
        (bad(-1), {"target_format": "voc", "difficult": mask}, ArgumentError, "^difficult requires target_format"),
        (
            bad(1),
            {"difficult": mask.int()},
            ArgumentError,
            r"^difficult must be a bool mask \(2, 3\), got torch.int32",
        ),
        (bad(1), {"difficult": mask[:1]}, ArgumentError, "^difficult must be a bool mask"),
        (bad(1), {"difficult": [0, 1]}, ArgumentError, r"^difficult must be a bool mask \(2, 3\), got torch.int64"),
        (bad(1), {"target_format": "pm1"}, ArgumentError, "^target_format .*binary.*voc"),
    ):
        with pytest.raises(error, match=message) as caught:
            run(targets, **options)
        assert "\n" not in str(caught.value)
    run(bad(1), target_format="voc", allow_all_present=True)
    run(bad(1), difficult=mask)


def test_shapes_of_the_loss() -> None:
    loss = WeightedBCE(torch.rand(3))
    with pytest.raises(ArgumentError, match=r"^targets have shape \(3,\), logits \(2, 3\)"):
        loss(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ArgumentError, match=r"^logits have shape \(2, 4\), label_ratio has 3 labels\."):
        loss(torch.zeros(2, 4), torch.zeros(2, 4))


@pytest.mark.parametrize("policy", DIFFICULT_RULES)
def test_loss_compiles_to_one_graph(policy: str) -> None:
    logits, targets = binary()
    difficult = torch.rand(N, C, generator=torch.Generator().manual_seed(1)) < 0.2
    voc = targets.where(targets == 1, -1).masked_fill(difficult, 0)
    for target_format, tables in (("binary", (targets, difficult)), ("voc", (voc,))):
        loss = WeightedBCE(torch.rand(C), 0.4, policy, target_format)  # type: ignore[arg-type]
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        assert torch.equal(compiled(logits, *tables), loss(logits, *tables))
        compiled(logits, 7 * targets, *tables[1:])  # values are not checked


class Reader(torch.utils._python_dispatch.TorchDispatchMode):
    """Dispatch mode that fails if a tensor is converted to a number, which synchronizes with a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert "_local_scalar_dense" not in str(func), "a tensor was read"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", DIFFICULT_RULES)
def test_loss_without_validation_does_not_synchronize(policy: str) -> None:
    """Training steps do not wait for the GPU."""
    logits, targets = binary()
    mask = torch.zeros(N, C, dtype=torch.bool)
    unchecked, loss = (WeightedBCE(torch.rand(C), 0.4, policy, validate_args=checked) for checked in (False, True))
    with Reader():
        unchecked(logits, targets, mask)
    with Reader(), pytest.raises(AssertionError, match="was read"):
        loss(logits, targets, mask)


class UserDataset(MultiLabelDataset):
    """Minimal user-defined dataset."""

    name, split, labels, ids = "written", "train", ("cat", "dog"), ("a", "b")

    def __init__(self, targets: object, difficult: object = None) -> None:
        self.targets = np.asarray(targets)
        self.difficult = None if difficult is None else np.asarray(difficult)

    def image(self, i: int) -> Image.Image:
        return Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    ("targets", "difficult", "message"),
    [
        ([[1, -1], [-1, 1]], None, "targets contain -1: use 1 \\(present\\) and 0 \\(absent\\)"),
        ([[1, 0.5], [0, 1]], None, "targets contain 0.5"),
        ([[1, float("nan")], [0, 1]], None, "targets contain nan"),
        ([[1, 0], [0, 1]], [[0, 1], [0, 0]], "difficult is int64 .*expected bool"),
        ([[1, 0], [0, 1]], [[False, True]], "difficult is bool \\(1, 2\\), expected bool \\(2, 2\\)"),
        ([[1, 0], [0, 1]], [[False, True], [False, True]], "Image 'b': the label 'dog' is both present and difficult"),
    ],
)
def test_dataset_targets_are_checked(targets: object, difficult: object, message: str, tmp_path: Path) -> None:
    dataset = UserDataset(targets, difficult)
    for use in (
        lambda: check_targets(dataset.ids, dataset.labels, dataset.targets, dataset.difficult),
        lambda: extract(dataset, None, tmp_path / "store", m=1),  # type: ignore[arg-type]
        lambda: OnlineImages(dataset, train=True),
    ):
        with pytest.raises(DataError, match=message):
            use()


def test_writers_refuse_minus_one(tmp_path: Path) -> None:
    voc = np.array([[1, -1], [-1, 1]])
    for use in (
        lambda: label_ratio(voc),
        lambda: stratified(voc, 0.5, 0),
        lambda: write_scored_images(tmp_path / "x.npz", torch.rand(2, 2), torch.from_numpy(voc), "ab", "cd"),
    ):
        with pytest.raises(DataError, match="targets contain -1"):
            use()


def test_fingerprint_depends_on_difficult_labels() -> None:
    plain, mask = UserDataset([[1, 0], [0, 1]]), UserDataset([[1, 0], [0, 1]], [[False, False], [False, False]])
    other = UserDataset([[1, 0], [0, 1]], [[False, True], [False, False]])
    assert len({plain.fingerprint, mask.fingerprint, other.fingerprint}) == 3
    assert UserDataset([[True, False], [False, True]]).fingerprint == plain.fingerprint


def test_label_ratio_ignores_difficult_labels() -> None:
    targets, difficult = np.array([[1, 0], [1, 1], [0, 0], [0, 1]]), np.zeros((4, 2), dtype=bool)
    difficult[1, 0] = True
    np.testing.assert_array_equal(label_ratio(targets, difficult), [0.25, 0.5])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_unsigned_voc_targets_have_no_absent_labels(dtype: torch.dtype) -> None:
    """-1 that was stored as an unsigned integer is not read as -1."""
    largest = bad(torch.iinfo(dtype).max, torch.int64).to(dtype)
    for targets in (largest, largest.numpy()):
        with pytest.raises(DataError, match=rf"^targets contain {torch.iinfo(dtype).max}: use 1 .*int.* has no -1"):
            normalize_targets(targets, target_format="voc")
        with pytest.raises(DataError, match=r"^targets contain .*: use 1 \(present\) and 0 \(absent\)\.$"):
            normalize_targets(targets)
    with pytest.raises(DataError, match=r"^targets contain no -1"):
        normalize_targets(bad(1, torch.int64).to(dtype), target_format="voc")
    present, difficult = normalize_targets(bad(1).to(dtype), target_format="voc", allow_all_present=True)
    assert difficult is not None
    assert int(present.sum()) == 2
    assert int(difficult.sum()) == 4


def as_lists(table: Tensor) -> object:
    return table.tolist()


@pytest.mark.parametrize("convert", [Tensor.numpy, as_lists], ids=["array", "list"])
def test_arrays_and_lists_equal_tensors(convert: Callable[[Tensor], Any]) -> None:
    logits, targets = binary()
    logits, mask = logits.float(), torch.rand(N, C) < 0.1
    scores, rules = logits.sigmoid(), get_convention("mmpretrain")

    def results(of: Callable[[Tensor], Any]) -> dict[str, Any]:
        s, t, d = of(scores), of(targets), of(mask)
        metrics = MultiLabelMetrics(C, rules)
        metrics.update(s, t, d)
        return {
            "loss": WeightedBCE(of(torch.full((C,), 0.3)), 0.4, "ignore")(of(logits), t, d),
            "ap": average_precision(s, t, difficult=d),
            "f1": precision_recall(s, t, rules, difficult=d).CF1,
            "thresholds": fit_thresholds(s, t, rules, difficult=d),
            "bootstrap": bootstrap_map([s], t, [rules], 2, difficult=d),
            "predicted": predicted(s, rules, top=2),
            "map": metrics.compute()["mAP"],
        }

    expected, found = results(lambda table: table), results(convert)
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value), err_msg=name)


@pytest.mark.parametrize("use", USES)
def test_ragged_lists_are_refused_in_one_line(use: str) -> None:
    with pytest.raises(DataError, match=r"^targets must be a tensor, an array or a list .*got list") as caught:
        USES[use]([[1, 0, 1], [1]])
    assert "\n" not in str(caught.value)
