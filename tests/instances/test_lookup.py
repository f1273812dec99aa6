"""Stores of instances that are looked up in files, compared with stores of the detector that wrote the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_stages import Files, PixelExtractor

from gm_mlic.datasets.images import to_tensor
from gm_mlic.detection import build_extractor
from gm_mlic.errors import ConfigError, DataError, UnreadableImage
from gm_mlic.instances import InstanceStore, extract

SETTINGS = {"m": 5, "batch_size": 4, "progress": False}
ARRAYS = ("features", "boxes", "scores", "detected_labels", "counts", "targets")


@pytest.fixture
def dataset(tmp_path: Path) -> Files:
    """21 images; the decoder cannot read 0002 and 0013."""
    files = Files(tmp_path / "photos")
    write_instances(files, tmp_path / "files", scale=False)
    write_instances(files, tmp_path / "pixels", scale=True)
    files.file("0002").write_bytes(b"")
    files.file("0013").write_bytes(files.file("0013").read_bytes()[:200])
    return files


def write_instances(dataset: Files, folder: Path, *, scale: bool) -> None:
    """Write the instances of the pixel extractor, in reverse order; boxes as fractions, or in pixels."""
    folder.mkdir()
    for i, image_id in enumerate(dataset.ids):
        image = dataset.image(i)
        (found,) = PixelExtractor()([to_tensor(image)], 12)
        size = np.array([image.width, image.height] * 2) if scale else 1
        empty = found.scores[0] == 0
        arrays = {
            "boxes": found.boxes.double().numpy() * size, "scores": found.scores.numpy(),
            "classes": found.detected_labels.numpy(), "features": found.features.numpy(),
        }  # fmt: skip
        np.savez(
            folder / f"{image_id}.npz", **{key: array[:0] if empty else array[::-1] for key, array in arrays.items()}
        )


def looked_up(folder: Path, **settings: str):
    return build_extractor("precomputed", path=str(folder), labels=list(PixelExtractor.labels), **settings)


def assert_same(store: InstanceStore, detected: InstanceStore, rows: list[int]) -> None:
    for name in ARRAYS:
        a, b = getattr(store, name)[rows], getattr(detected, name)[rows]
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(("name", "units"), [("files", "fraction"), ("pixels", "pixels")])
def test_store_equals_that_of_the_detector(dataset: Files, tmp_path: Path, name: str, units: str) -> None:
    detected = extract(dataset, PixelExtractor(), tmp_path / "detected", **SETTINGS)
    extractor = looked_up(tmp_path / name, box_units=units)
    assert extractor.needs_sizes == (units == "pixels")
    store = extract(dataset, extractor, tmp_path / "store", **SETTINGS)
    assert_same(store, detected, detected.rows.tolist())
    # photos are decoded only for their size
    unreadable = ["0002", "0013"] if extractor.needs_sizes else []
    assert list(store.manifest.skipped) == unreadable
    assert store.manifest.detector_fingerprint == extractor.fingerprint
    parts = [extract(dataset, extractor, tmp_path / "parts", shard=(i, 3), **SETTINGS) for i in range(3)]
    assert parts[:2] == [None, None]
    for name in ARRAYS:
        assert np.array_equal(getattr(parts[2], name), getattr(store, name))


def test_missing_photos(dataset: Files, tmp_path: Path) -> None:
    for image_id in ("0004", "0005", "0011"):
        (tmp_path / "files" / f"{image_id}.npz").unlink()
    with pytest.raises(DataError, match=r"3 of 21 photos have no instances in .*files: 0004, 0005, 0011: add them"):
        extract(dataset, looked_up(tmp_path / "files", box_units="fraction"), tmp_path / "store", **SETTINGS)
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "store.partial").exists()
    extractor = looked_up(tmp_path / "files", box_units="fraction", missing="skip")
    store = extract(dataset, extractor, tmp_path / "store", **SETTINGS)
    assert store.manifest.skipped == {
        image_id: f"{image_id} has no instances in {tmp_path / 'files'}" for image_id in ("0004", "0005", "0011")
    }
    assert store.rows.tolist() == [i for i in range(21) if i not in (4, 5, 11)]


def test_invalid_entry_stops_the_extraction_which_can_be_resumed(dataset: Files, tmp_path: Path) -> None:
    file = tmp_path / "files" / "0010.npz"
    with np.load(file) as content:
        arrays = dict(content)
    np.savez(file, **{**arrays, "scores": arrays["scores"] * np.nan})
    with pytest.raises(DataError, match=r"0010\.npz: scores\[0\] is NaN or infinite"):
        extract(dataset, looked_up(tmp_path / "files", box_units="fraction"), tmp_path / "store", **SETTINGS)
    np.savez(file, **arrays)
    # the files have changed: the partial store is of another job
    extractor = looked_up(tmp_path / "files", box_units="fraction")
    store = extract(dataset, extractor, tmp_path / "store", overwrite=True, **SETTINGS)
    assert len(store.rows) == 21


def test_augmented_views_are_refused(dataset: Files, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"views is 2: instances of augmented views cannot be looked up in files"):
        extract(dataset, looked_up(tmp_path / "files"), tmp_path / "store", views=2, **SETTINGS)


class Unreadable(Files):
    """Dataset whose images cannot be read."""

    def image(self, i: int):
        raise UnreadableImage(f"{self.ids[i]} is not there")


def test_photos_are_not_read(dataset: Files, tmp_path: Path) -> None:
    absent = Unreadable(tmp_path / "photos")
    store = extract(absent, looked_up(tmp_path / "files", box_units="fraction"), tmp_path / "store", **SETTINGS)
    assert len(store.rows) == 21
