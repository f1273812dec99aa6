from __future__ import annotations

import hashlib
import itertools
import re

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from gm_mlic.datasets import Scenes, label_ratio
from gm_mlic.datasets import scenes as module
from gm_mlic.errors import ConfigError

THEME_OF = {a: a // 4 for a in range(16)}
#: Label pairs that share a look, independent of the package.
PAIRS = [("lemon", "tennis ball"), ("cricket bat", "fence post"), ("marigold", "starfish"), ("life ring", "doughnut")]


@pytest.fixture(scope="module")
def test_split() -> Scenes:
    return Scenes("test")


@pytest.fixture(scope="module")
def many() -> Scenes:
    return Scenes("train", size=20_000, seed=11)


def kits(scenes: Scenes) -> dict[str, np.ndarray]:
    """Centers (kits, 4) of twin and anchor, as twin x, y, anchor x, y, by relation."""
    found: dict[str, list[list[float]]] = {"beside": [], "above or below": []}
    for i in range(len(scenes)):
        boxes = scenes.boxes(i)
        for family in (16, 19):
            labels = boxes.labels.tolist()
            for relation, twin in (("beside", family + 1), ("above or below", family + 2)):
                if twin in labels:
                    b = boxes.boxes.numpy()[[labels.index(twin), labels.index(family)]]
                    center = b[:, :2] + (b[:, 2:] - b[:, :2]) // 2
                    found[relation].append(center.ravel().tolist())
    return {relation: np.array(rows) for relation, rows in found.items()}


def layout(scenes: Scenes, i: int) -> dict[str, list]:
    """Labels, positions, sizes, kinds and colors of the objects of a scene."""
    slots = np.flatnonzero(scenes._layout.label[i] >= 0)
    return {name: value[i, slots].tolist() for name, value in vars(scenes._layout).items()}


# --- Upper bound ---


def brute_force(labels: list[int], shared: int) -> np.ndarray:
    """P(label present | looks of the singles) by enumeration of all themes and label assignments."""
    twin = {}
    for first, second in PAIRS[:shared]:
        a, b = module.LABELS.index(first), module.LABELS.index(second)
        twin[a], twin[b] = [a, b], [a, b]
    options = [twin.get(a, [a]) for a in labels]
    total, present = 0.0, np.zeros(16)
    for theme in range(4):
        for assignment in itertools.product(*options):
            weight = 0.25
            for a in assignment:
                weight *= 0.8 / 4 * (THEME_OF[a] == theme) + 0.2 / 16
            total += weight
            present[sorted(set(assignment))] += weight
    return present / total


@pytest.mark.parametrize("context_pairs", [0, 2, 4])
def test_limit_scores_equal_enumeration(context_pairs: int) -> None:
    scenes = Scenes("val", size=300, context_pairs=context_pairs)
    for i in range(len(scenes)):
        singles = [a for a in scenes.boxes(i).labels.tolist() if a < 16]
        np.testing.assert_allclose(scenes.limit_scores[i, :16], brute_force(singles, context_pairs), atol=1e-11)


def test_limit_scores_of_anchors_and_twins_are_the_targets(test_split: Scenes) -> None:
    np.testing.assert_array_equal(test_split.limit_scores[:, 16:] == 1, test_split.targets[:, 16:] == 1)
    assert set(np.unique(test_split.limit_scores[:, 16:])) == {0.0, 1.0}


def test_limit_scores_are_calibrated(many: Scenes) -> None:
    # Only context pairs are uncertain; in each bin the label frequency equals the posterior.
    p, y = many.limit_scores[:, :16].ravel(), (many.targets[:, :16] == 1).ravel()
    np.testing.assert_array_equal(y[p == 1], True)
    np.testing.assert_array_equal(y[p == 0], False)
    bins = np.digitize(p, np.linspace(0, 1, 11))
    checked = 0
    for b in np.unique(bins[(p > 0) & (p < 1)]):
        rows = (bins == b) & (p > 0) & (p < 1)
        if rows.sum() >= 200:
            deviation = np.sqrt((p[rows] * (1 - p[rows])).sum()) / rows.sum()
            assert abs(y[rows].mean() - p[rows].mean()) < 4 * deviation
            checked += 1
    assert checked >= 5


def test_best_map_is_rank_ap(test_split: Scenes) -> None:
    aps = []
    for c in range(len(test_split.labels)):
        ranked = sorted(range(len(test_split)), key=lambda i: -test_split.limit_scores[i, c])
        hits, precisions = 0, []
        for rank, i in enumerate(ranked, start=1):
            if test_split.targets[i, c] == 1:
                hits += 1
                precisions.append(hits / rank)
        aps.append(sum(precisions) / len(precisions))
    assert test_split.best_map() == pytest.approx(100 * sum(aps) / len(aps), abs=1e-9)


def test_context_pairs_lower_the_upper_bound() -> None:
    limits = [Scenes("test", context_pairs=pairs).best_map() for pairs in range(5)]
    assert limits[0] == 100.0
    assert all(a > b for a, b in itertools.pairwise(limits))
    assert 95 < limits[4] < 98


def test_spatial_pairs_and_hard_objects_do_not_change_the_upper_bound() -> None:
    # Geometry determines twins, and the upper bound assumes perfect perception.
    assert Scenes("test", spatial_pairs=0, hard_fraction=0.0).best_map() == Scenes("test").best_map()


def test_label_without_positives_has_no_ap() -> None:
    scenes = Scenes("val", size=2, context_pairs=0)
    assert (scenes.targets != 1).all(axis=0).any()
    assert scenes.best_map() == 100.0


# --- Twins: only the position relative to the anchor distinguishes them ---


def test_absolute_positions_do_not_predict_twins(many: Scenes) -> None:
    found = kits(many)
    beside, above = found["beside"], found["above or below"]
    assert min(len(beside), len(above)) > 4500
    for column in range(4):
        assert stats.ks_2samp(beside[:, column], above[:, column]).pvalue > 1e-3
        for sample in (beside, above):  # uniform over the 120 places of the usable square
            values, counts = np.unique(sample[:, column], return_counts=True)
            assert len(values) == 120
            assert stats.chisquare(counts).pvalue > 1e-3

    x, y = np.concatenate([beside, above]), np.repeat([0, 1], [len(beside), len(above)])
    # AUC, not accuracy: tx - ax is 0 for one relation and 60 or -60 for the other, so accuracy at one threshold can be
    # far from 0.5 by noise.
    chance = 4 * np.sqrt(1 / (12 * len(beside)) + 1 / (12 * len(above)))
    auc = cross_val_score(LogisticRegression(), x / 160, y, cv=5, scoring="roc_auc").mean()
    assert abs(auc - 0.5) < chance
    # The full position of one object does not predict the relation either: compare the cells of a 6 x 6 grid.
    for columns in ((0, 1), (2, 3)):
        tables = [np.histogram2d(*s[:, columns].T, bins=6, range=[[20, 140]] * 2)[0].ravel() for s in (beside, above)]
        assert stats.chi2_contingency(np.stack(tables)).pvalue > 1e-3


def test_relative_positions_determine_twins(many: Scenes) -> None:
    for relation, places in kits(many).items():
        along, across = np.abs(places[:, 2:] - places[:, :2]).T[:: 1 if relation == "beside" else -1]
        np.testing.assert_array_equal(along, 60)
        assert across.max() <= 4


# --- Layout ---


@pytest.mark.parametrize("image_size", [96, 160, 224])
def test_objects_are_inside_and_do_not_overlap(image_size: int) -> None:
    scenes = Scenes("train", size=1500, seed=3, image_size=image_size)
    gaps = []
    for i in range(len(scenes)):
        annotations = scenes.boxes(i)
        b, labels = annotations.boxes.numpy(), annotations.labels.tolist()
        assert b.min() >= 0
        assert b.max() <= image_size
        assert (b[:, 2:] > b[:, :2]).all()
        gap = np.maximum(b[:, None, :2] - b[None, :, 2:], b[None, :, :2] - b[:, None, 2:]).max(axis=-1)
        assert (gap[~np.eye(len(b), dtype=bool)] >= 2).all()
        for family in (16, 19):
            for twin in (family + 1, family + 2):
                if twin in labels:
                    gaps.append(gap[labels.index(family), labels.index(twin)])
    assert min(gaps) >= 22 * image_size // 160


def test_boxes_agree_with_targets(test_split: Scenes) -> None:
    for i in range(200):
        assert set(test_split.boxes(i).labels.tolist()) == set(np.flatnonzero(test_split.targets[i] == 1))


def test_sampling_frequencies(many: Scenes) -> None:
    kinds = many.targets == 1
    twins = kinds[:, [17, 18, 20, 21]]
    assert (twins.sum(axis=1) <= 1).all()
    assert twins.any(axis=1).mean() == pytest.approx(0.5, abs=0.015)
    assert (kinds[:, 16] & ~kinds[:, 17:19].any(axis=1)).mean() == pytest.approx(0.075, abs=0.01)
    layouts = [layout(many, i) for i in range(2000)]
    assert {sum(label < 16 for label in objects["label"]) for objects in layouts} == {2, 3, 4, 5}
    kind = np.concatenate([objects["kind"] for objects in layouts])
    assert (kind == module._IS_SMALL).mean() == pytest.approx(0.15, abs=0.02)
    assert (kind == module._IS_OCCLUDED).mean() == pytest.approx(0.15, abs=0.02)
    length = np.concatenate([objects["extent"] for objects in layouts]).max(axis=1)
    low, high = np.where(kind == module._IS_SMALL, [[10], [13]], [[18], [34]])
    assert ((low <= length) & (length <= high)).all()


# --- Images ---


def test_images_and_targets_are_unchanged() -> None:
    scenes = Scenes("test", size=8)
    pictures = hashlib.sha256(np.stack([np.asarray(scenes.image(i)) for i in range(8)]).tobytes()).hexdigest()
    targets = hashlib.sha256((2 * Scenes("test").targets - 1).tobytes()).hexdigest()
    assert pictures == "365b2efaa674bb72c86867ce2f6d1d79a593e7247b03045d3448d2c4b79900aa"
    assert targets == "9e6a02853c2e2b5368385f05816f2b3e90999c2ab377efc1dad240bc2bbbc24e"


def test_a_scene_depends_on_neither_size_nor_order() -> None:
    few, more = Scenes("val", size=7), Scenes("val", size=5000)
    for i in (6, 0, 3):
        np.testing.assert_array_equal(np.asarray(few.image(i)), np.asarray(more.image(i)))
    np.testing.assert_array_equal(few.targets, more.targets[:7])
    assert [layout(few, i) for i in range(7)] == [layout(more, i) for i in range(7)]
    past_a_block = Scenes("val", size=4100)
    assert layout(past_a_block, 4099) == layout(more, 4099)


def test_splits_and_seeds_are_independent() -> None:
    targets = [Scenes(s, size=400, seed=k).targets for s, k in (("train", 0), ("val", 0), ("test", 0), ("train", 1))]
    for a, b in itertools.combinations(targets, 2):
        assert (a == b).all(axis=1).mean() < 0.05  # a few label sets may be equal at random


def test_crowded_scenes_are_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Scenes("train", size=300)
    monkeypatch.setattr(module, "_CANDIDATES", 2)
    scenes = Scenes("train", size=300)
    np.testing.assert_array_equal(scenes.targets, before.targets)
    for relation, places in kits(scenes).items():  # the kit keeps its position
        np.testing.assert_array_equal(places, kits(before)[relation])
    for i in range(300):
        b = scenes.boxes(i).boxes.numpy()
        gap = np.maximum(b[:, None, :2] - b[None, :, 2:], b[None, :, :2] - b[:, None, 2:]).max(axis=-1)
        assert (gap[~np.eye(len(b), dtype=bool)] >= 2).all()


def test_glyphs_match_their_boxes() -> None:
    # The color in the middle band of each box is closest to the color of its look.
    scenes = Scenes("train", size=150, hard_fraction=0.0)
    looks = sorted(set(scenes._look_of.tolist()))
    assert len(looks) == 16
    right = []
    for i in range(150):
        picture = np.asarray(scenes.image(i)).astype(float)
        assert picture.shape == (160, 160, 3)
        boxes = scenes.boxes(i)
        for (x1, y1, x2, y2), label in zip(boxes.boxes.int().tolist(), boxes.labels.tolist(), strict=True):
            look = scenes._look_of[label]
            fill = module._stencil(look, x2 - x1, y2 - y1)[1] == 16
            color = picture[y1:y2, x1:x2][fill].mean(axis=0)
            right.append(min(looks, key=lambda k: np.abs(color - module._LOOKS[k].color).sum()) == look)
    assert np.mean(right) > 0.9


@pytest.mark.parametrize("look", range(len(module._LOOKS)), ids=lambda k: module._LOOKS[k].name)
def test_boxes_are_tight_and_patches_cover_about_half(look: int) -> None:
    for size in (10, 13, 18, 25, 34):
        w, h = (max(2, size * share // 100) for share in (module._LOOKS[look].width, module._LOOKS[look].height))
        covered, fill = module._stencil(look, w, h)
        assert (fill <= covered).all()
        rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
        assert rows[0] <= 1
        assert rows[-1] >= h - 2
        assert columns[0] <= 1
        assert columns[-1] >= w - 2
        if size >= 18:  # small objects are never occluded
            for side, share in itertools.product(range(4), (0, 8, 15)):
                canvas = np.full((3, 60, 60), 1000)
                module._occlude(canvas, (10, 12, w, h), covered, np.array([0, 0, 0, share, 0, side]))
                hidden = covered[(canvas[0] != 1000)[12 : 12 + h, 10 : 10 + w]].sum() / covered.sum()
                assert 0.40 <= hidden <= 0.66


def test_rows_out_of_range_are_refused(test_split: Scenes) -> None:
    with pytest.raises(IndexError):
        test_split.image(1000)
    assert test_split.image(-1).tobytes() == test_split.image(999).tobytes()


# --- Parameters, errors ---


@pytest.mark.parametrize("context_pairs", range(5))
@pytest.mark.parametrize("spatial_pairs", range(3))
def test_number_of_labels_that_share_a_look(context_pairs: int, spatial_pairs: int) -> None:
    scenes = Scenes("val", size=120, context_pairs=context_pairs, spatial_pairs=spatial_pairs)
    looks: dict[int, set[str]] = {}
    for i in range(len(scenes)):
        for label in scenes.boxes(i).labels.tolist():
            looks.setdefault(scenes._look_of[label], set()).add(scenes.labels[label])
    together = {frozenset(pair) for pair in PAIRS[:context_pairs]}
    together |= {frozenset(pair) for pair in [("gate", "hatch"), ("comet", "satellite")][:spatial_pairs]}
    assert {frozenset(s) for s in looks.values() if len(s) > 1} == together
    assert len(scenes.labels) == len(set(scenes.labels)) == 22
    assert set().union(*looks.values()) == set(scenes.labels)


def test_every_parameter_changes_the_fingerprint() -> None:
    changes = [
        {},
        {"seed": 1},
        {"context_pairs": 3},
        {"spatial_pairs": 1},
        {"hard_fraction": 0.0},
        {"image_size": 128},
        {"size": 9},
    ]
    prints = [Scenes("val", **{"size": 10, **change}).fingerprint for change in changes]
    assert len(set(prints)) == len(changes)
    assert Scenes("val", size=10).fingerprint == prints[0]
    assert Scenes("test", size=10).fingerprint not in prints


@pytest.mark.parametrize(
    "argument",
    [
        {"split": "trainval"},
        {"size": 0},
        {"size": 2.5},
        {"size": True},
        {"seed": -1},
        {"context_pairs": 5},
        {"spatial_pairs": -1},
        {"hard_fraction": 1.5},
        {"hard_fraction": float("nan")},
        {"hard_fraction": "much"},
        {"image_size": 64},
    ],
    ids=str,
)
def test_invalid_arguments(argument: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        Scenes(**argument)  # type: ignore[arg-type]
    (key, value), message = *argument.items(), str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{key} must be")
    assert f"got {value!r}" in message


@pytest.mark.parametrize("count", [0, 20_000_000])
def test_invalid_size_of_a_split(count: int) -> None:
    with pytest.raises(ConfigError, match=f"size must be 1 .*got {count}"):
        Scenes("train", sizes={"train": count})


def test_statistics_in_the_docstring() -> None:
    table = re.findall(
        r"^ +(train|val|test) +(\d+) +(\d+) +([\d.]+) +([\d.]+) to ([\d.]+) +([\d.]+)$", str(Scenes.__doc__), re.M
    )
    assert [row[0] for row in table] == ["train", "val", "test"]
    for split, *numbers in table:
        scenes = Scenes(split)
        ratio = label_ratio(scenes.targets)
        mean = (scenes.targets == 1).sum(axis=1).mean()
        made = [len(scenes), len(scenes.labels), mean, ratio.min(), ratio.max(), scenes.best_map()]
        assert [float(n) for n in numbers] == pytest.approx(made, abs=0.05)
        assert float(numbers[2]) == pytest.approx(mean, abs=0.005)
