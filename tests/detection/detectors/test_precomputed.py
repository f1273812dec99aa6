"""Instances read from files in every layout, compared with the arrays that were written."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from gm_mlic.detection import InstanceExtractor, Instances, LookupExtractor, MultiViewExtractor, build_extractor
from gm_mlic.detection.detectors import precomputed
from gm_mlic.errors import ConfigError, DataError

LABELS = ["cat", "dog", "sofa"]
SIZES = {"a": (100, 50), "sub/b": (60, 80), "c": (40, 40)}
M = {"a": 5, "sub/b": 3, "c": 0}
D = 4
Photos = dict[str, dict[str, np.ndarray]]


@pytest.fixture
def photos() -> Photos:
    """Unsorted instances of three photos, boxes in pixels; the last photo has none."""
    rng = np.random.default_rng(0)
    found: Photos = {}
    for key, (width, height) in SIZES.items():
        low = rng.uniform(0, 0.5, (M[key], 2))
        high = low + rng.uniform(0.1, 0.5, (M[key], 2))
        found[key] = {
            "boxes": (np.concatenate([low, high], axis=1) * [width, height, width, height]).astype(np.float32),
            "scores": rng.uniform(0, 1, M[key]).astype(np.float32),
            "classes": rng.integers(-1, 3, M[key]),
            "features": rng.normal(size=(M[key], D)).astype(np.float32),
            "image_w": np.array(width),
            "image_h": np.array(height),
        }
    return found


def folder(photos: Photos, root: Path) -> Path:
    """A file for each photo."""
    path = root / "folder"
    for key, arrays in photos.items():
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        np.savez(path / f"{key}.npz", **arrays)
    (path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    return path


def groups(photos: Photos, root: Path) -> Path:
    path = root / "groups.h5"
    with h5py.File(path, "w") as file:
        for key, arrays in photos.items():
            group = file.create_group(key)
            for name, array in arrays.items():
                if array.ndim:
                    group[name] = array
                else:
                    group.attrs[name] = array
        file["labels"] = np.array(LABELS, dtype=object)
    return path


def padded(photos: Photos) -> dict[str, np.ndarray]:
    most = max(len(arrays["boxes"]) for arrays in photos.values())
    merged: dict[str, Any] = {"image_ids": np.array(list(photos)), "labels": np.array(LABELS)}
    for name in next(iter(photos.values())):
        rows = [arrays[name] for arrays in photos.values()]
        if rows[0].ndim:
            rows = [np.pad(row, [(0, most - len(row))] + [(0, 0)] * (row.ndim - 1), constant_values=0) for row in rows]
        merged[name] = np.stack(rows)
    merged["num_boxes"] = np.array([len(arrays["boxes"]) for arrays in photos.values()])
    return merged


def joined(photos: Photos) -> dict[str, np.ndarray]:
    """Concatenated arrays."""
    merged: dict[str, Any] = {"image_ids": np.array(list(photos)), "labels": np.array(LABELS)}
    for name, first in next(iter(photos.values())).items():
        rows = [arrays[name] for arrays in photos.values()]
        merged[name] = np.concatenate(rows) if first.ndim else np.stack(rows)
    return merged


def saved(arrays: dict[str, np.ndarray], path: Path) -> Path:
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
        return path
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array.astype(object) if array.dtype.kind == "U" else array
    return path


def with_counts(photos: Photos) -> dict[str, np.ndarray]:
    return joined(photos) | {"counts": np.array(list(M.values()))}


def with_offsets(photos: Photos) -> dict[str, np.ndarray]:
    return joined(photos) | {"offsets": np.cumsum([0, *M.values()])}


def bottom_up(photos: Photos) -> dict[str, np.ndarray]:
    """Arrays of published bottom-up features, with scores and classes added."""
    ends = np.cumsum(list(M.values()))
    arrays = joined(photos) | {"pos_boxes": np.stack([ends - list(M.values()), ends], axis=1)}
    names = {"boxes": "image_bb", "features": "image_features", "scores": "objects_conf", "classes": "objects_id"}
    names |= {"image_w": "img_w", "image_h": "img_h"}
    return {names.get(name, name): array for name, array in arrays.items()}


LAYOUTS: dict[str, Callable[[Photos, Path], Path]] = {
    "folder": folder,
    "groups": groups,
    "padded npz": lambda photos, root: saved(padded(photos), root / "all.npz"),
    "counts npz": lambda photos, root: saved(with_counts(photos), root / "all.npz"),
    "offsets h5": lambda photos, root: saved(with_offsets(photos), root / "all.hdf5"),
    "padded h5": lambda photos, root: saved(padded(photos), root / "all.h5"),
    "bottom-up h5": lambda photos, root: saved(bottom_up(photos), root / "all.h5"),
}


def wanted(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sorted arrays, boxes as fractions."""
    order = np.argsort(-arrays["scores"], kind="stable")
    size = np.array([arrays["image_w"], arrays["image_h"]] * 2)
    return {
        "boxes": (arrays["boxes"] / size)[order],
        "scores": arrays["scores"][order],
        "detected_labels": arrays["classes"][order],
        "features": arrays["features"][order],
    }


def look_up(extractor: Any, ids: list[str], m: int = 10, sizes: Any = None) -> list[Instances]:
    return extractor.look_up(ids, sizes or [None] * len(ids), m)


def test_keys_are_unique() -> None:
    names = [name for names in precomputed.KEYS.values() for name in names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(photos: Photos, tmp_path: Path, layout: str) -> None:
    path = LAYOUTS[layout](photos, tmp_path)
    extractor = build_extractor("precomputed", path=str(path))
    assert isinstance(extractor, InstanceExtractor)
    assert isinstance(extractor, LookupExtractor)
    assert (extractor.name, extractor.labels, extractor.feature_dim) == ("precomputed", tuple(LABELS), D)
    assert not extractor.needs_sizes
    ids = ["sub/b", "a", "c"]
    extractor.check_ids(ids)
    found = look_up(extractor, ids)
    for key, instances in zip(ids[:2], found, strict=False):
        for name, array in wanted(photos[key]).items():
            np.testing.assert_allclose(getattr(instances, name).numpy(), array, rtol=1e-5, atol=1e-6)
        assert (instances.boxes.dtype, instances.detected_labels.dtype) == (torch.float32, torch.int64)
    empty = found[2]
    assert (empty.boxes.tolist(), empty.scores.tolist()) == ([[0, 0, 1, 1]], [0])
    assert (empty.detected_labels.tolist(), empty.features.tolist()) == ([-1], [[0] * D])
    # prefixes, and independence of the other photos and of their order
    for key, instances in zip(ids, found, strict=True):
        for m in (1, 2, 10):
            (alone,) = look_up(extractor, [key], m)
            for name in ("boxes", "scores", "detected_labels", "features"):
                assert torch.equal(getattr(alone, name), getattr(instances.top(m), name))


def test_ties_keep_the_order_of_the_file(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", boxes=np.tile([0, 0, 0.5, 0.5], (4, 1)), scores=np.array([0.5, 0.9, 0.5, 0.9]),
        features=np.arange(4)[:, None],
    )  # fmt: skip
    extractor = build_extractor("precomputed", path=str(tmp_path), box_units="fraction")
    assert look_up(extractor, ["a"])[0].features.flatten().tolist() == [1, 3, 0, 2]
    assert look_up(extractor, ["a"])[0].detected_labels.tolist() == [-1] * 4


def test_classes_in_one_column(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", boxes=np.tile([0, 0, 1, 1], (2, 1)), scores=np.array([0.9, 0.5]),
        classes=np.array([[1], [0]]), features=np.ones((2, 1)),
    )  # fmt: skip
    extractor = build_extractor("precomputed", path=str(tmp_path), box_units="fraction", labels=["cat", "dog"])
    assert look_up(extractor, ["a"])[0].detected_labels.tolist() == [1, 0]


def test_scores_beyond_one_by_rounding(tmp_path: Path) -> None:
    scores = np.array([1 + 2e-7, 0.5, -1e-7])
    np.savez(tmp_path / "a.npz", boxes=np.tile([0, 0, 1, 1], (3, 1)), scores=scores, features=np.ones((3, 1)))
    (found,) = look_up(build_extractor("precomputed", path=str(tmp_path), box_units="fraction"), ["a"])
    assert found.scores.tolist() == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("keys", "name", "found"),
    [
        (["a"], "a", "a"), (["a"], "a.jpg", "a"), (["a.jpg"], "a", "a.jpg"), (["a"], "photos/a.JPG", "a"),
        (["a.jpg", "a.png"], "x/a.png", "a.png"), (["x/a", "y/a"], "y/a.jpg", "y/a"),
        (["x/a", "y/a"], "/p/x/a.jpg", "x/a"),
        (["a"], "a.heic", "a"), (["a"], "a.AVIF", "a"),
        (["x/a"], "a.jpg", "x/a"), (["x/a"], "y/a.jpg", None), (["a"], "b", None), (["a.v1"], "a.v2", None),
        (["000000000042"], "42", "000000000042"), (["COCO_val2014_000000000042"], "42", "COCO_val2014_000000000042"),
        (["42"], "val2014/COCO_val2014_000000000042.jpg", "42"), (["2007_000042"], "42", None),
    ],
)  # fmt: skip
def test_names(tmp_path: Path, keys: list[str], name: str, found: str | None) -> None:
    for i, key in enumerate(keys):
        (tmp_path / key).parent.mkdir(exist_ok=True)
        np.savez(tmp_path / f"{key}.npz", boxes=np.array([[0, 0, 1, 1]]), features=np.array([[i]]))
    extractor = build_extractor("precomputed", path=str(tmp_path), box_units="fraction")
    if found is None:
        with pytest.raises(DataError, match="1 of 1 photo has no instances"):
            extractor.check_ids([name])
    else:
        extractor.check_ids([name])
        assert look_up(extractor, [name])[0].features.tolist() == [[keys.index(found)]]


def test_ambiguous_names(tmp_path: Path) -> None:
    for key in ("x/a", "y/a"):
        (tmp_path / key).parent.mkdir()
        np.savez(tmp_path / f"{key}.npz", boxes=np.array([[0, 0, 1, 1]]), features=np.ones((1, 1)))
    extractor = build_extractor("precomputed", path=str(tmp_path), box_units="fraction")
    with pytest.raises(DataError, match=r"The photo a\.jpg matches several precomputed entries: x/a, y/a"):
        extractor.check_ids(["a.jpg"])


def test_missing_photos(photos: Photos, tmp_path: Path) -> None:
    path = folder(photos, tmp_path)
    ids = [*photos, "d.jpg", "e.jpg", "f.jpg", "g.jpg"]
    extractor = build_extractor("precomputed", path=str(path))
    message = r"4 of 7 photos have no instances in .*folder: d\.jpg, e\.jpg, f\.jpg, \.\.\.: add .* `missing='skip'`"
    with pytest.raises(DataError, match=message):
        extractor.check_ids(ids)
    with pytest.raises(DataError, match="1 of 2 photos"):
        look_up(extractor, ["a", "d.jpg"])
    skipping = build_extractor("precomputed", path=str(path), missing="skip")
    skipping.check_ids(ids)
    first, second = look_up(skipping, ["d.jpg", "a"])
    assert first == f"d.jpg has no instances in {path}"
    assert len(second) == M["a"]
    with pytest.raises(DataError, match=r"1 of 1 photo has no instances in .*: d\.jpg; it has a, c, sub/b: check"):
        skipping.check_ids(["d.jpg"])
    assert skipping.fingerprint == extractor.fingerprint


def test_alternative_arrays(tmp_path: Path) -> None:
    """Arrays of published files: one column for each box, probabilities with the background first, and a pickle."""
    probabilities = np.array([[0.1, 0.2, 0.7, 0.0], [0.6, 0.3, 0.05, 0.05]])
    np.savez(
        tmp_path / "a.npz", bbox=np.array([[0, 0, 10, 10], [10, 10, 20, 20]]), num_bbox=2, x=np.arange(6).reshape(3, 2),
        cls_prob=probabilities, image_w=20, image_h=40, info={"unread": object},
    )  # fmt: skip
    for names, labels, scores in (
        (LABELS, [1, 0], [0.7, 0.3]),  # the first column is the background
        (["red", *LABELS], [2, 0], [0.7, 0.6]),
        (["N/A", *LABELS], [1, 0], [0.7, 0.3]),
    ):
        extractor = build_extractor("precomputed", path=str(tmp_path), labels=names)
        (found,) = look_up(extractor, ["a"])
        assert found.detected_labels.tolist() == labels
        torch.testing.assert_close(found.scores, torch.tensor(scores))
        assert found.features.tolist() == [[0, 2, 4], [1, 3, 5]]
        assert found.boxes.tolist() == [[0, 0, 0.5, 0.25], [0.5, 0.25, 1, 0.5]]


def test_classes_from_one_and_unused_ones(tmp_path: Path) -> None:
    arrays = {
        "boxes": np.tile([0, 0, 1, 1], (3, 1)),
        "scores": np.array([0.9, 0.8, 0.7]),
        "classes": np.array([3, 0, 2]),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    extractor = build_extractor(
        "precomputed", path=str(tmp_path), labels=["cat", "N/A", "sofa"], first_class=1, box_units="fraction"
    )
    (found,) = look_up(extractor, ["a"])
    assert extractor.labels == ("cat", "sofa")
    assert found.detected_labels.tolist() == [1, -1, -1]
    # without features, the score at the class
    torch.testing.assert_close(found.features, torch.tensor([[0, 0.9], [0, 0], [0, 0]]))


@pytest.mark.parametrize(
    ("form", "box"), [("xyxy", [10, 20, 40, 30]), ("xywh", [10, 20, 30, 10]), ("cxcywh", [25, 25, 30, 10])]
)
def test_box_formats(tmp_path: Path, form: str, box: list[float]) -> None:
    np.savez(tmp_path / "a.npz", boxes=np.array([box]), features=np.ones((1, 2)))
    extractor = build_extractor("precomputed", path=str(tmp_path), box_format=form)
    assert extractor.needs_sizes
    (found,) = look_up(extractor, ["a"], sizes=[(100, 40)])
    torch.testing.assert_close(found.boxes, torch.tensor([[0.1, 0.5, 0.4, 0.75]]))


def test_boxes_outside_are_clipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    boxes = np.array([[-9, 0, 50, 50], [0, 0, 100.4, 50], [30, 20, 30, 40], [120, 0, 140, 50], [5, 5, 6, 6]])
    np.savez(tmp_path / "a.npz", boxes=boxes, features=np.arange(5)[:, None])
    extractor = build_extractor("precomputed", path=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        (found,) = look_up(extractor, ["a"], sizes=[(100, 50)])
        look_up(extractor, ["a"], sizes=[(100, 50)])
        assert caplog.messages == []
        extractor.log_corrections()
        extractor.log_corrections()
    assert found.features.flatten().tolist() == [0, 1, 4]
    torch.testing.assert_close(found.boxes[0], torch.tensor([0, 0, 0.5, 1]))
    assert len(caplog.messages) == 1
    assert "4 boxes reach out of the photo and are clipped and 4 boxes have no area in it" in caplog.messages[0]


def valid() -> dict[str, Any]:
    return {
        "boxes": np.tile([0, 0, 10, 10], (3, 1)).astype(float), "scores": np.array([0.9, 0.5, 0.2]),
        "classes": np.array([0, 1, 2]), "features": np.ones((3, 2)), "image_w": 20, "image_h": 20,
    }  # fmt: skip


NAN = np.array([[1, 1], [1, np.nan], [1, 1]])


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"features": NAN}, {}, r"b\.npz: features\[1\] is NaN or infinite"),
        ({"boxes": np.full((3, 4), np.inf)}, {}, r"b\.npz: boxes\[0\] is NaN or infinite"),
        ({"scores": np.array([0.1, 1.5, 0.2])}, {}, r"b\.npz: scores\[1\] is 1\.5, expected 0 to 1"),
        ({"scores": np.ones(4)}, {}, r"b\.npz: scores have shape \(4,\), expected \(M,\) or \(M, C\) with M = 3 boxes"),
        ({"scores": np.ones((3, 7)) / 7}, {}, r"scores have 7 columns, `labels` names 3 classes"),
        ({"classes": np.array([0, 5, 1])}, {}, r"b\.npz: classes\[1\] is 5, expected -1 to 2: check `labels`"),
        ({"classes": np.array([0, 0.5, 1])}, {}, r"classes\[1\] is 0\.5"),
        ({"classes": np.array(["cat"] * 3)}, {}, r"b\.npz: classes are <U3, expected numbers"),
        ({"boxes": np.ones((3, 5))}, {}, r"b\.npz: boxes have shape \(3, 5\), expected \(M, 4\)"),
        ({"boxes": None}, {}, r"b\.npz has no boxes: expected the array boxes or bbox"),
        ({"features": np.ones((3, 5))}, {}, r"b\.npz: features have 5 columns, expected 2"),
        ({"features": None}, {}, r"b\.npz has no features, unlike the first photo"),
        ({"num_boxes": 7}, {}, r"b\.npz: the number of boxes is 7, but there are 3"),
        ({"image_w": 0}, {}, r"b\.npz: the size of the photo is 0 x 20"),
        ({"image_w": None}, {}, r"b\.npz has no size of the photo \(image_w, image_h\), unlike the first photo"),
        ({}, {"box_units": "fraction"}, r"boxes reach 10, expected fractions from 0 to 1: set `box_units='pixels'`"),
        ({"boxes": np.full((3, 4), [0, 0, 0.5, 1])}, {}, r"boxes reach 1 pixels only: set `box_units='fraction'`"),
        ({}, {"labels": None}, r"has classes, but their names are unknown: set `labels`, or all classes to -1"),
    ],
)
def test_invalid_arrays(tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **valid())
    np.savez(tmp_path / "b.npz", **{key: v for key, v in (valid() | change).items() if v is not None})
    extractor = build_extractor("precomputed", path=str(tmp_path), **{"labels": LABELS, **settings})
    if not settings:
        assert len(look_up(extractor, ["a"])[0]) == 3
    with pytest.raises(DataError, match=message) as caught:
        look_up(extractor, ["b"])
    assert "\n" not in str(caught.value)


def test_invalid_files(photos: Photos, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "text.h5").write_text("no archive")
    (tmp_path / "text.tsv").write_text("a")
    np.savez(tmp_path / "pickled.npz", image_ids=np.array(["a"]), boxes=np.array([{}], dtype=object))
    np.savez(tmp_path / "no_ids.npz", boxes=np.ones((1, 4)))
    saved(with_counts(photos) | {"counts": np.array([1, 2])}, tmp_path / "counts.npz")
    saved(with_counts(photos) | {"counts": np.array([5, 3, 9])}, tmp_path / "beyond.npz")
    saved(joined(photos), tmp_path / "neither.npz")
    saved(padded(photos) | {"image_ids": np.array(["a", "b", "a"])}, tmp_path / "twice.npz")
    saved(padded(photos) | {"scores": np.ones((2, 5))}, tmp_path / "short.h5")
    for name, message in {
        "nothing": "does not exist: expected a folder",
        "empty": r"has no \.npz files: expected one for each photo",
        "text.npz": "cannot be read .*write it again with numpy.savez",
        "text.h5": "is not an HDF5 file, or damaged",
        "text.tsv": "is neither a folder, an .npz file, nor an HDF5 file",
        "pickled.npz": "cannot be read .*allow_pickle",
        "no_ids.npz": "has the arrays boxes: expected image_ids",
        "counts.npz": "there are 3 image_ids, but rows of 2 photos",
        "beyond.npz": r"photo 2 has the rows \[8, 17\] of 8",
        "neither.npz": r"boxes have shape \(8, 4\): expected \(N, M, 4\), or \(total, 4\) and counts \(N,\)",
        "twice.npz": r"twice\.npz has the photo 'a' more than once: make ids unique",
        "short.h5": r"scores have shape \(2, 5\), expected 3 rows",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            build_extractor("precomputed", path=str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_hdf5_files_do_not_reach_other_files(photos: Photos, tmp_path: Path) -> None:
    secret = groups(photos, tmp_path)
    for name in ("link.h5", "soft.h5", "external.h5", "virtual.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            if name == "link.h5":
                file["a"] = h5py.ExternalLink(str(secret), "/a")
                continue
            group = file.create_group("a")
            group["features"] = np.ones((5, 2))
            if name == "soft.h5":
                group["boxes"] = h5py.SoftLink("/elsewhere")
                file["elsewhere"] = np.ones((5, 4))
            elif name == "external.h5":
                group.create_dataset("boxes", (5, 4), "f4", external=[(str(secret), 0, 80)])
            else:
                layout = h5py.VirtualLayout((5, 4), "f4")
                layout[:] = h5py.VirtualSource(str(secret), "a/boxes", (5, 4))
                group.create_virtual_dataset("boxes", layout)
        with pytest.raises(DataError, match=r"is a link|is stored in another file"):
            build_extractor("precomputed", path=str(tmp_path / name))


def test_fingerprint(photos: Photos, tmp_path: Path) -> None:
    """It depends on contents and settings, not on place, time or compression."""
    path = folder(photos, tmp_path)
    first = build_extractor("precomputed", path=str(path)).fingerprint
    assert len(first) == 64
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    np.savez_compressed(copy / "a.npz", **photos["a"])
    os.utime(copy / "c.npz", (0, 0))
    assert build_extractor("precomputed", path=str(copy)).fingerprint == first
    changes: list[dict[str, Any]] = [
        {"labels": ["x", "y", "z"]}, {"first_class": 1}, {"box_format": "xywh"}, {"box_units": "fraction"},
    ]  # fmt: skip
    others = [build_extractor("precomputed", path=str(copy), **change).fingerprint for change in changes]
    photos["a"]["features"][0, 0] += 1e-3
    np.savez(copy / "a.npz", **photos["a"])
    others.append(build_extractor("precomputed", path=str(copy)).fingerprint)
    (copy / "c.npz").rename(copy / "d.npz")
    others.append(build_extractor("precomputed", path=str(copy)).fingerprint)
    assert len({first, *others}) == 1 + len(others)


def test_hash_of_a_large_file_is_kept(photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precomputed, "_SMALL_BYTES", 0)
    path = groups(photos, tmp_path)
    first = build_extractor("precomputed", path=str(path)).fingerprint
    stamp = tmp_path / ".groups.h5.sha256"
    assert stamp.is_file()
    assert build_extractor("precomputed", path=str(path)).fingerprint == first
    with h5py.File(path, "r+") as file:
        file["a/scores"][0] = 0.123
    changed = build_extractor("precomputed", path=str(path)).fingerprint
    assert changed != first
    stamp.write_text("damaged")
    assert build_extractor("precomputed", path=str(path)).fingerprint == changed


def test_images_are_refused(photos: Photos, tmp_path: Path) -> None:
    extractor = build_extractor("precomputed", path=str(folder(photos, tmp_path)))
    with pytest.raises(ConfigError, match="looked up by the name of a photo: they cannot be computed for an image"):
        extractor([torch.zeros(3, 8, 8)], 3)
    with pytest.raises(ConfigError, match=r"views is 2: instances of other views .* cannot be looked up"):
        MultiViewExtractor(extractor, 2)
    with pytest.raises(ConfigError, match="m must be 1 or more"):
        look_up(extractor, ["a"], 0)


def test_missing_library(photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = groups(photos, tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"needs h5py: pip install 'gm-mlic\[hdf5\]'\."):
        build_extractor("precomputed", path=str(path))
    build_extractor("precomputed", path=str(folder(photos, tmp_path)))


def test_folder_of_files_for_each_split(photos: Photos, tmp_path: Path) -> None:
    """They give the same instances as one file, in either container."""
    path = tmp_path / "splits"
    path.mkdir()
    first, second = ({key: photos[key] for key in keys} for keys in (["a"], ["sub/b", "c"]))
    saved(padded(first), path / "train.npz")
    saved(padded(second), path / "val.h5")
    whole = build_extractor("precomputed", path=str(saved(padded(photos), tmp_path / "all.npz")))
    extractor = build_extractor("precomputed", path=str(path))
    assert extractor.labels == tuple(LABELS)
    for found, wanted in zip(look_up(extractor, ["c", "a", "sub/b"]), look_up(whole, ["c", "a", "sub/b"]), strict=True):
        for name in ("boxes", "scores", "detected_labels", "features"):
            assert torch.equal(getattr(found, name), getattr(wanted, name))
    before = extractor.fingerprint
    second["c"]["image_w"] = np.array(41)
    saved(padded(second), path / "val.h5")
    assert build_extractor("precomputed", path=str(path)).fingerprint != before
    saved(padded(first), path / "test.npz")
    with pytest.raises(DataError, match=r"splits has the photo 'a' more than once: make ids unique"):
        build_extractor("precomputed", path=str(path))
