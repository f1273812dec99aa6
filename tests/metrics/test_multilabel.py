from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from gm_mlic.errors import ArgumentError, ConfigError, DataError
from gm_mlic.metrics import (
    CONVENTIONS,
    Convention,
    MultiLabelMetrics,
    average_precision,
    bootstrap_map,
    fit_thresholds,
    functional,
    get_convention,
    precision_recall,
    predicted,
)

# ---- Reference implementation: loops over one label or image, independent of the package ----


def loop_ap(scores: list[float], targets: list[int], ap: str, difficult: str) -> float:
    """AP of one label by definition."""
    rows = [(s, t) for s, t in zip(scores, targets, strict=True) if not (t == 0 and difficult == "ignore")]
    rows = [(s, t == 1 or (t == 0 and difficult == "positive")) for s, t in rows]
    total = sum(t for _, t in rows)
    if total == 0:
        return math.nan
    rows = sorted(rows, key=lambda row: -row[0])  # Python's sort is stable
    points = []  # (hits, precision) after each rank
    hits = 0
    for rank, (_, positive) in enumerate(rows, start=1):
        hits += positive
        points.append((hits, hits / rank))
    if ap == "rank":
        return sum(p for (_, p), (_, positive) in zip(points, rows, strict=True) if positive) / total
    if ap == "sklearn":
        area, before = 0.0, 0
        for threshold in sorted({s for s, _ in rows}, reverse=True):
            chosen = [t for s, t in rows if s >= threshold]
            area += (sum(chosen) - before) / total * sum(chosen) / len(chosen)
            before = sum(chosen)
        return area
    if ap == "voc11":
        return sum(max(p for h, p in points if 10 * h >= k * total) for k in range(11)) / 11
    area, before = 0.0, 0  # envelope: maximum precision at each recall level or beyond
    for hits in range(1, total + 1):
        area += (hits - before) / total * max(p for h, p in points if h >= hits)
        before = hits
    return area


def loop_predicted(row: list[float], rule: Convention, top: int | None) -> list[bool]:
    passed = [s >= rule.threshold if rule.compare == "ge" else s > rule.threshold for s in row]
    if top is None:
        return passed
    best = sorted(range(len(row)), key=lambda c: -row[c])[:top]
    if rule.topk_ties == "all":
        best = [c for c in range(len(row)) if row[c] >= row[best[-1]]]
    return [c in best and (rule.topk == "no_threshold" or passed[c]) for c in range(len(row))]


def loop_precision_recall(
    scores: np.ndarray, targets: np.ndarray, rule: Convention, top: int | None
) -> dict[str, float]:
    C = scores.shape[1]
    correct, picked, true = [0] * C, [0] * C, [0] * C
    for row, target in zip(scores.tolist(), targets.tolist(), strict=True):
        for c, chosen in enumerate(loop_predicted(row, rule, top)):
            if target[c] == 0 and rule.difficult_f1 == "ignore":
                continue
            positive = target[c] == 1 or (target[c] == 0 and rule.difficult_f1 == "positive")
            correct[c] += chosen and positive
            picked[c] += chosen
            true[c] += positive

    def f1(p: float, r: float) -> float:
        return 2 * p * r / (p + r) if p + r else 0.0

    each = [(correct[c] / picked[c] if picked[c] else 0.0, correct[c] / true[c]) for c in range(C) if true[c]]
    CP, CR, CF1 = math.nan, math.nan, math.nan
    if each:
        CP, CR = (sum(column) / len(each) for column in zip(*each, strict=True))
        CF1 = f1(CP, CR) if rule.f1 == "f1_of_means" else sum(f1(p, r) for p, r in each) / len(each)
    OP = sum(correct) / sum(picked) if sum(picked) else 0.0
    OR = sum(correct) / sum(true) if sum(true) else 0.0
    return {"CP": CP, "CR": CR, "CF1": CF1, "OP": OP, "OR": OR, "OF1": f1(OP, OR)}


def loop_metrics(scores: np.ndarray, targets: np.ndarray, rule: Convention) -> dict[str, float | list[float]]:
    AP = [loop_ap(s, t, rule.ap, rule.difficult_ap) for s, t in zip(scores.T.tolist(), targets.T.tolist(), strict=True)]
    known = [ap for ap in AP if not math.isnan(ap)]
    result: dict[str, float | list[float]] = {"mAP": sum(known) / len(known) if known else math.nan, "AP": AP}
    result |= loop_precision_recall(scores, targets, rule, None)
    result |= {"top3/" + k: v for k, v in loop_precision_recall(scores, targets, rule, 3).items()}
    return result


def assert_same(result: dict[str, torch.Tensor], expected: dict[str, float | list[float]]) -> None:
    assert set(result) == set(expected)
    for name, value in expected.items():
        assert result[name].dtype == torch.float64
        np.testing.assert_allclose(result[name].numpy(), 100 * np.array(value), rtol=0, atol=1e-9, err_msg=name)


@st.composite
def score_tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties and exact thresholds; targets with difficult labels and labels without positives."""
    N, C = draw(st.integers(1, 14)), draw(st.integers(1, 6))
    levels = draw(st.sampled_from([(0.0, 0.5, 1.0), (0.25, 0.5, 0.8, 0.9), tuple(np.linspace(0, 1, 41).tolist())]))
    scores = draw(st.lists(st.sampled_from(levels), min_size=N * C, max_size=N * C))
    values = draw(st.sampled_from([(-1, 1), (-1, 0, 1), (-1, -1, 0), (1, 1, 0)]))
    targets = draw(st.lists(st.sampled_from(values), min_size=N * C, max_size=N * C))
    return np.array(scores).reshape(N, C), np.array(targets).reshape(N, C)


def evaluate(scores: np.ndarray, targets: np.ndarray, *args, **options) -> dict[str, torch.Tensor]:
    """Metrics of targets in {1, 0, -1}."""
    metric = voc_metrics(scores.shape[1], *args, **options)
    metric.update(torch.from_numpy(scores), torch.from_numpy(targets))
    return metric.compute()


def voc_metrics(*args, **options) -> MultiLabelMetrics:
    return MultiLabelMetrics(*args, target_format="voc", allow_all_present=True, **options)


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(max_examples=60, deadline=None)
@given(table=score_tables())
def test_every_convention_equals_the_loops(convention: str, table: tuple[np.ndarray, np.ndarray]) -> None:
    assert_same(evaluate(*table, convention), loop_metrics(*table, CONVENTIONS[convention]))


@settings(max_examples=150, deadline=None)
@given(
    table=score_tables(),
    options=st.fixed_dictionaries({
        "ap": st.sampled_from(["rank", "envelope", "voc11", "sklearn"]),
        "difficult_ap": st.sampled_from(["ignore", "negative", "positive"]),
        "difficult_f1": st.sampled_from(["ignore", "negative", "positive"]),
        "f1": st.sampled_from(["f1_of_means", "mean_f1"]),
        "topk": st.sampled_from(["threshold", "no_threshold"]),
        "topk_ties": st.sampled_from(["stable", "all"]),
        "threshold": st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]),
        "compare": st.sampled_from(["ge", "gt"]),
    }),
)  # fmt: skip
def test_every_option_equals_the_loops(table: tuple[np.ndarray, np.ndarray], options: dict) -> None:
    assert_same(evaluate(*table, **options), loop_metrics(*table, Convention(**options)))


def test_conventions_of_the_literature() -> None:
    """Options of public code bases: AP, difficult in AP and F1, F1, threshold, top-3."""
    facts = {
        name: (p.ap, p.difficult_ap, p.difficult_f1, p.f1, p.threshold, p.compare, p.topk, p.topk_ties)
        for name, p in CONVENTIONS.items()
    }
    assert facts == {
        "mlgcn": ("rank", "ignore", "negative", "f1_of_means", 0.5, "ge", "threshold", "stable"),
        "ssgrl": ("envelope", "negative", "negative", "f1_of_means", 0.5, "ge", "threshold", "stable"),
        "ctran": ("sklearn", "negative", "negative", "f1_of_means", 0.5, "ge", "threshold", "all"),
        "asl": ("rank", "negative", "negative", "mean_f1", 0.8, "gt", "threshold", "stable"),
        "mmpretrain": ("rank", "ignore", "ignore", "mean_f1", 0.5, "ge", "no_threshold", "stable"),
        "voc11": ("voc11", "ignore", "ignore", "f1_of_means", 0.5, "ge", "threshold", "stable"),
    }


# ---- Comparison with scikit-learn ----


def random_table(N: int, C: int, seed: int = 0, share: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = np.where(rng.random((N, C)) < share, 1, -1)
    scores = 1 / (1 + np.exp(-(rng.normal(size=(N, C)) + targets)))
    return scores, targets


@pytest.mark.parametrize("decimals", [12, 1])
def test_average_precision_against_scikit_learn(decimals: int) -> None:
    scores, targets = random_table(400, 7)
    scores = scores.round(decimals)
    expected = average_precision_score(targets == 1, scores, average=None)
    result = evaluate(scores, targets, "ctran")
    np.testing.assert_allclose(result["AP"], 100 * expected, atol=1e-9)
    np.testing.assert_allclose(result["mAP"], 100 * expected.mean(), atol=1e-9)
    if decimals == 12:  # without ties, both rules are equal
        np.testing.assert_allclose(evaluate(scores, targets)["AP"], 100 * expected, atol=1e-9)


def test_precision_recall_f1_against_scikit_learn() -> None:
    scores, targets = random_table(300, 6, seed=1)
    truth, chosen = targets == 1, scores >= 0.5
    result = {k: v.numpy() / 100 for k, v in evaluate(scores, targets).items()}
    CP, CR, _, _ = precision_recall_fscore_support(truth, chosen, average="macro", zero_division=0)
    overall = precision_recall_fscore_support(truth, chosen, average="micro", zero_division=0)
    np.testing.assert_allclose([result["CP"], result["CR"]], [CP, CR])
    np.testing.assert_allclose(result["CF1"], 2 * CP * CR / (CP + CR))
    np.testing.assert_allclose([result["OP"], result["OR"], result["OF1"]], overall[:3])
    best = np.argsort(-scores, axis=1)[:, :3]
    highest = np.zeros_like(chosen)
    np.put_along_axis(highest, best, True, axis=1)
    for convention, top, macro in (("mlgcn", chosen & highest, False), ("mmpretrain", highest, True)):
        result = {k: v.numpy() / 100 for k, v in evaluate(scores, targets, convention).items()}
        P, R, F, _ = precision_recall_fscore_support(truth, top, average="macro", zero_division=0)
        micro = precision_recall_fscore_support(truth, top, average="micro", zero_division=0)
        np.testing.assert_allclose([result["top3/CP"], result["top3/CR"]], [P, R])
        np.testing.assert_allclose(result["top3/CF1"], F if macro else 2 * P * R / (P + R))
        np.testing.assert_allclose([result["top3/OP"], result["top3/OR"], result["top3/OF1"]], micro[:3])


# ---- Manually computed examples ----


def test_ap_rules_manually() -> None:
    """Ranks: +, -, +, +, -: precisions 1, 1/2, 2/3, 3/4, 3/5."""
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6], [0.5]])
    targets = torch.tensor([[1], [0], [1], [1], [0]])
    assert average_precision(scores, targets, "rank").item() == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert average_precision(scores, targets, "sklearn").item() == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert average_precision(scores, targets, "envelope").item() == pytest.approx((1 + 3 / 4 + 3 / 4) / 3)
    # Recalls 0, .1, .2, .3 have precision 1 (the first rank has recall 1/3), the other seven 3/4.
    assert average_precision(scores, targets, "voc11").item() == pytest.approx((4 + 7 * 0.75) / 11)


def test_eleven_point_recalls_are_exact() -> None:
    """3 of 10 positives reach recall 0.3, although 3 * 0.1 > 0.3 in floating point."""
    targets = torch.tensor([1, 1, 1] + [0] * 10 + [1] * 7)[:, None]
    scores = torch.linspace(1, 0, 20)[:, None]
    late = max(k / (k + 10) for k in range(4, 11))
    assert average_precision(scores, targets, "voc11").item() == pytest.approx((4 + 7 * late) / 11)


def test_ties_are_ranked_in_row_order() -> None:
    half = torch.full((4, 1), 0.5)
    first, last = torch.tensor([[1], [0], [0], [0]]), torch.tensor([[0], [0], [0], [1]])
    assert average_precision(half, first).item() == 1.0
    assert average_precision(half, last).item() == 0.25
    assert average_precision(half, first, "sklearn").item() == average_precision(half, last, "sklearn").item() == 0.25


def test_labels_without_positives_are_excluded() -> None:
    scores = np.array([[0.9, 0.9, 0.2], [0.1, 0.8, 0.9]])
    targets = np.array([[1, -1, 0], [-1, -1, 1]])
    metric = voc_metrics(3, labels=("cat", "unicorn", "dog"))
    metric.update(torch.from_numpy(scores), torch.from_numpy(targets))
    result = metric.compute()
    assert metric.excluded_labels == ("unicorn",)
    assert torch.isnan(result["AP"]).tolist() == [False, True, False]
    assert result["mAP"] == 100
    assert result["CP"] == 100
    assert result["OP"] == 50  # two false positives of the excluded label


def test_no_positives_give_nan_means_and_zero_overall() -> None:
    result = evaluate(np.full((3, 2), 0.9), np.full((3, 2), -1))
    assert all(math.isnan(result[name]) for name in ("mAP", "CP", "CR", "CF1"))
    assert [result[name].item() for name in ("OP", "OR", "OF1")] == [0, 0, 0]


@pytest.mark.parametrize(("ties", "expected"), [("stable", [1, 1, 1, 0, 0]), ("all", [1, 1, 1, 1, 0])])
def test_top3_ties(ties: str, expected: list[int]) -> None:
    scores = torch.tensor([[0.7, 0.9, 0.7, 0.7, 0.6]])
    assert predicted(scores, Convention(topk_ties=ties), top=3).int().tolist() == [expected]


def test_score_equal_to_the_threshold() -> None:
    """0.8 in float32 is above 0.8, but equals the rounded threshold."""
    scores = torch.tensor([[0.8]], dtype=torch.float32)
    assert predicted(scores, get_convention(threshold=0.8)).item()
    assert not predicted(scores, get_convention("asl")).item()


# ---- Metric object: batches, processes, copies ----


def test_batches_accumulate_and_reset() -> None:
    scores, targets = random_table(53, 5)
    metric = voc_metrics(5)
    for _ in range(2):
        for rows in np.array_split(np.arange(53), 7):
            metric.update(torch.from_numpy(scores[rows]), torch.from_numpy(targets[rows]))
        assert_same(metric.compute(), loop_metrics(scores, targets, CONVENTIONS["mlgcn"]))
        metric.reset()
    with pytest.raises(DataError, match="no scores to evaluate"):
        metric.compute()


def test_inputs_are_copied() -> None:
    scores, targets = (torch.from_numpy(array) for array in random_table(20, 4))
    targets[3] = 0
    before = scores.clone(), targets.clone()
    results = {}
    for convention in CONVENTIONS:
        metric = voc_metrics(4, convention)
        metric.update(scores, targets)
        results[convention] = metric.compute()
        assert torch.equal(scores, before[0])
        assert torch.equal(targets, before[1])
    metric.reset()
    metric.update(scores, targets)
    scores.zero_(), targets.fill_(1)
    torch.testing.assert_close(metric.compute(), results["voc11"], equal_nan=True)


def test_binary_targets() -> None:
    scores, targets = random_table(30, 3)
    metric = MultiLabelMetrics(3)
    metric.update(torch.from_numpy(scores), torch.from_numpy((targets == 1).astype(np.float32)))
    assert_same(metric.compute(), loop_metrics(scores, targets, CONVENTIONS["mlgcn"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_scores_are_exact(dtype: torch.dtype) -> None:
    scores, targets = random_table(60, 4)
    low = torch.from_numpy(scores).to(dtype)
    metric = voc_metrics(4)
    metric.update(low, torch.from_numpy(targets))
    assert_same(metric.compute(), loop_metrics(low.double().numpy(), targets, CONVENTIONS["mlgcn"]))


@pytest.mark.parametrize("N", [12, 13])
def test_padded_rows_count_once(N: int) -> None:
    """Three processes with ceil(N / 3) interleaved rows each, padded with the first, as in DistributedSampler."""
    scores, targets = random_table(N, 4)
    scores = scores.round(1)
    padded = (list(range(N)) * 2)[: -(-N // 3) * 3]
    metric = voc_metrics(4)
    for process in range(3):
        rows = padded[process::3]
        metric.update(torch.from_numpy(scores[rows]), torch.from_numpy(targets[rows]), ids=rows)
    assert_same(metric.compute(), loop_metrics(scores, targets, CONVENTIONS["mlgcn"]))


def _worker(process: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=3)
    scores, targets = random_table(7, 4)
    metric = voc_metrics(4)
    for row in ([0, 2, 4, 6], [1, 3, 5, 0], [])[process]:  # uneven, one duplicate row, one process without rows
        metric.update(torch.from_numpy(scores[[row]]).float(), torch.from_numpy(targets[[row]]), ids=[row])
    presets = {convention: voc_metrics(4, convention) for convention in CONVENTIONS}
    rows, targets[4, 2] = ([6, 0, 2, 4], [5, 3, 1, 0], [])[process], 0  # unsorted, and a difficult label
    for other in presets.values():
        for row in rows:
            other.update(torch.from_numpy(scores[[row]]).float(), torch.from_numpy(targets[[row]]), ids=[row])
    collected = [part.numpy() for part in presets["mlgcn"].collected() if part is not None]
    numbers = {name: {k: v.numpy() for k, v in other.compute().items()} for name, other in presets.items()}
    assert sum(map(len, presets["mlgcn"].scores)) == len(rows)  # local rows are restored after synchronization
    result = {name: value.numpy() for name, value in metric.compute().items()}
    Path(f"{folder}/{process}.pickle").write_bytes(pickle.dumps((result, numbers, collected)))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_three_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, args=(str(tmp_path),), nprocs=3)
    got = [pickle.loads((tmp_path / f"{process}.pickle").read_bytes()) for process in range(3)]
    scores, targets = random_table(7, 4)
    scores = scores.astype(np.float32).astype(np.float64)
    expected = loop_metrics(scores, targets, CONVENTIONS["mlgcn"])
    targets[4, 2] = 0
    for result, numbers, collected in got:
        assert_same({name: torch.from_numpy(np.asarray(value)) for name, value in result.items()}, expected)
        for convention, values in numbers.items():
            of_loops = loop_metrics(scores, targets, CONVENTIONS[convention])
            assert_same({name: torch.from_numpy(np.asarray(value)) for name, value in values.items()}, of_loops)
        for part, whole in zip(collected, (scores, targets == 1, targets == 0, np.arange(7)), strict=True):
            np.testing.assert_array_equal(part, whole)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(("labels", "images", "threads"), [(1, 1, 1), (3, 7, 2), (2, 64, 3), (100, 9, 2)])
def test_results_do_not_depend_on_blocks_and_threads(
    monkeypatch: pytest.MonkeyPatch, convention: str, labels: int, images: int, threads: int
) -> None:
    scores, targets = random_table(64, 7)
    scores = scores.round(1)
    targets[::5, ::2] = 0
    monkeypatch.setattr(functional, "_LABELS", labels)
    monkeypatch.setattr(functional, "_IMAGES", images)
    monkeypatch.setattr(functional, "_MIN_THREADED", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert_same(evaluate(scores, targets, convention), loop_metrics(scores, targets, CONVENTIONS[convention]))


# ---- Fast sorting of float32 scores ----


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(
        st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, 0.5, float(np.nextafter(np.float32(0.5), np.float32(1))), 1e-45]),
            st.floats(0, 1, width=32),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_float32_sort_is_stable(scores: list[float]) -> None:
    """Includes subnormal and adjacent numbers and both zeros; ties keep row order."""
    array = np.array(scores, dtype=np.float32)
    expected = sorted(range(len(scores)), key=lambda i: -float(array[i]))
    everything = np.ones(len(scores), dtype=bool)
    order, at = functional.ranking(array, everything, everything)
    assert order.tolist() == expected
    assert at.tolist() == list(range(len(scores)))
    assert functional.ranking(array.astype(np.float64), everything, everything)[0].tolist() == expected


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(max_examples=40, deadline=None)
@given(table=score_tables())
def test_float32_and_float64_agree(convention: str, table: tuple[np.ndarray, np.ndarray]) -> None:
    """Both sorting methods agree on values that are exact in both types."""
    scores, targets = (table[0] * 8).round() / 8, table[1]
    single, double = evaluate(scores.astype(np.float32), targets, convention), evaluate(scores, targets, convention)
    for name, value in double.items():
        assert torch.equal(single[name].nan_to_num(-1), value.nan_to_num(-1)), name


# ---- Per-label thresholds ----


def test_per_label_thresholds_equal_single_labels() -> None:
    scores, targets = random_table(40, 3)
    each = (0.3, 0.5, 0.9)
    result = evaluate(scores, targets, threshold=torch.tensor(each, dtype=torch.float64), f1="mean_f1")
    alone = [evaluate(scores[:, [c]], targets[:, [c]], threshold=each[c]) for c in range(3)]
    for name in ("CP", "CR", "CF1"):
        np.testing.assert_allclose(result[name], np.mean([one[name] for one in alone]))
    assert torch.equal(result["AP"], evaluate(scores, targets)["AP"])
    for wrong in ((0.5, 0.5), (0.5, 0.5, 1.5), (0.5, 0.5, "x"), ()):
        with pytest.raises(ConfigError, match="threshold"):
            evaluate(scores, targets, threshold=wrong)


# ---- Invalid input ----

GOOD = torch.full((2, 3), 0.5)
ABSENT = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (torch.tensor([[0.5, 0.5, 0.5], [0.5, math.nan, 0.5]]), ABSENT, "row 1, label 1"),
        (GOOD * 3, ABSENT, "sigmoid"),
        (GOOD - 1, ABSENT, "sigmoid"),
        (GOOD * math.inf, ABSENT, r"expected \[0, 1\]"),
        (GOOD[:, :2], ABSENT, "shape"),
        (GOOD, ABSENT[:1], "shape"),
        (GOOD[0], ABSENT[0], "shape"),
        (GOOD, ABSENT - 1, "targets contain -1: pass target_format='voc'"),
        (GOOD, ABSENT - 2, "targets contain -2: use 1"),
        (GOOD, ABSENT - 0.5, "targets contain -0.5"),
        (GOOD, ABSENT * math.nan, "targets contain nan"),
        ((GOOD > 0).int(), ABSENT, "floating"),
    ],
)
def test_invalid_batches_are_refused(scores: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    metric = MultiLabelMetrics(3)
    with pytest.raises(DataError, match=message) as caught:
        metric.update(scores, targets)
    assert "\n" not in str(caught.value)
    assert metric.scores == []  # refused batches are not accumulated


def test_invalid_ids_are_refused() -> None:
    for ids in ([0], [0.0, 1.0], [0, -1], [[0], [1]]):
        with pytest.raises(DataError, match="ids"):
            MultiLabelMetrics(3).update(GOOD, ABSENT, ids=ids)
    metric = MultiLabelMetrics(3)
    metric.update(GOOD, ABSENT, ids=[0, 1])
    metric.update(GOOD, 1 - ABSENT, ids=[2, 1])
    with pytest.raises(DataError, match="id 1 occurs twice"):
        metric.compute()
    metric = MultiLabelMetrics(3)
    metric.update(GOOD, ABSENT, ids=[0, 1])
    metric.update(GOOD, ABSENT)
    with pytest.raises(DataError, match="every update or to none"):
        metric.compute()


@pytest.mark.parametrize(
    "options",
    [
        {"convention": "coco"}, {"ap": "area"}, {"difficult_ap": 0}, {"threshold": 1.5}, {"threshold": "high"},
        {"thresh": 0.5}, {"target_format": "pm1"}, {"labels": ("a",)}, {"compare": ">="}, {"num_labels": 0},
    ],
)  # fmt: skip
def test_invalid_arguments(options: dict) -> None:
    with pytest.raises(ConfigError):
        MultiLabelMetrics(**({"num_labels": 3} | options))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: average_precision(GOOD, ABSENT, "11point"), "^ap is '11point': choose one of rank, envelope"),
        (lambda: average_precision(GOOD, ABSENT, difficult_ap="foo"), "^difficult_ap is 'foo': choose one of positive"),
        (lambda: precision_recall(GOOD, ABSENT, "coco"), "^convention is 'coco': choose one of mlgcn"),
        (lambda: precision_recall(GOOD, ABSENT, "mlgcn", top=0), "^top must be 1 or more, got 0"),
        (lambda: predicted(GOOD, "mlgcn", top=0), "^top must be 1 or more, got 0"),
        (lambda: predicted(GOOD, None), "^convention is None"),
        (lambda: fit_thresholds(GOOD, ABSENT, {}), "^convention is {}"),
        (lambda: bootstrap_map([GOOD], ABSENT, ["coco"]), "^convention is 'coco'"),
    ],
)
def test_invalid_arguments_of_functions(use: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        use()


def test_conventions_by_name() -> None:
    scores, targets = (torch.from_numpy(array) for array in random_table(40, 5))
    targets = (targets == 1).int()
    rules = get_convention("asl")
    assert vars(precision_recall(scores, targets, "asl")) == vars(precision_recall(scores, targets, rules))
    assert torch.equal(predicted(scores, "asl", top=3), predicted(scores, rules, top=3))
    assert torch.equal(fit_thresholds(scores, targets, "asl"), fit_thresholds(scores, targets, rules))
    assert np.array_equal(bootstrap_map([scores], targets, ["asl"], 3), bootstrap_map([scores], targets, [rules], 3))
    assert get_convention(rules, threshold=0.3) == get_convention("asl", threshold=0.3)


def test_metrics_do_not_depend_on_label_order() -> None:
    scores, targets = random_table(40, 5)
    reference = evaluate(scores, targets)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        result = evaluate(scores[:, order], targets[:, order])
        assert torch.equal(result["AP"], reference["AP"][order])
        assert result["CF1"] == pytest.approx(reference["CF1"].item())
        assert result["top3/OF1"] == pytest.approx(reference["top3/OF1"].item())
