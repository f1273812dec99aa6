from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_stages import Files, PixelExtractor
from PIL import Image
from safetensors.numpy import load_file, save_file

from gm_mlic.datasets.images import to_tensor
from gm_mlic.errors import ConfigError, StoreError
from gm_mlic.instances import InstanceStore, extract
from gm_mlic.instances import store as stores

verify = InstanceStore.verify


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Finished store with one black image, its dataset and extractor."""
    root = tmp_path_factory.mktemp("made")
    dataset, extractor = Files(root / "photos"), PixelExtractor()
    Image.new("RGB", (30, 20)).save(dataset.file("0003"))
    store = extract(dataset, extractor, root / "store", m=8, views=2, view_size=32, batch_size=4, progress=False)
    return dataset, extractor, store


def copy(store: InstanceStore, to: Path) -> Path:
    """Copy of a store that a test can damage."""
    to.mkdir()
    for file in store.path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_rows_equal_the_extractor_output(made):
    dataset, extractor, store = made
    assert store.rows.tolist() == list(range(21))
    ragged = set()
    for i in range(len(dataset)):
        expected = extractor([to_tensor(dataset.image(i))], 8)[0]
        found = store.instances(i)
        ragged.add(len(found))
        assert torch.equal(found.boxes, expected.boxes)
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.detected_labels, expected.detected_labels)
        assert torch.equal(found.features, expected.features.half().float())
        beyond = int(store.counts[i, 0])
        assert not store.features[i, 0, beyond:].any()
        assert not store.boxes[i, 0, beyond:].any()
        assert not store.scores[i, 0, beyond:].any()
        assert (store.detected_labels[i, 0, beyond:] == -1).all()
    assert len(ragged) > 2
    assert np.array_equal(store.targets, dataset.targets)
    assert np.array_equal(store.difficult, dataset.difficult)


def test_image_without_detections_has_the_whole_image(made):
    store = made[2]
    for m in (None, 1, 8):
        found = store.instances(3, m=m)
        assert found.boxes.tolist() == [[0, 0, 1, 1]]
        assert found.scores.tolist() == [0]
        assert found.detected_labels.tolist() == [-1]


@pytest.mark.parametrize("m", [1, 3, 7])
def test_slicing_equals_extraction_with_smaller_m(made, tmp_path, m):
    dataset, extractor, store = made
    small = extract(dataset, extractor, tmp_path / "s", m=m, views=2, view_size=32, batch_size=4, progress=False)
    for name in ("features", "boxes", "scores", "detected_labels"):
        assert np.array_equal(getattr(small, name), getattr(store, name)[:, :, :m]), name
    assert np.array_equal(small.counts, np.minimum(store.counts, m))
    for i in range(len(dataset)):
        for view in range(3):
            ours, theirs = small.instances(i, view), store.instances(i, view, m=m)
            assert len(ours) == len(theirs)
            assert torch.equal(ours.features, theirs.features)


def test_arrays_are_read_only(made):
    store = made[2]
    for name in ("features", "boxes", "scores", "detected_labels", "counts", "targets", "difficult"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(store, name)[0][...] = 0
    before = store.features[0, 0, 0].copy()
    store.instances(0).features.zero_()
    assert np.array_equal(store.features[0, 0, 0], before)


def test_blocks_are_memory_mapped_without_open_files(made):
    """A store of many blocks stays below the limit of open files."""
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else pytest.skip("no /proc")
    stores = [InstanceStore.open(made[2].path) for _ in range(50)]
    assert sum(store.scores[20, 0, 0] > 0 for store in stores) == 50
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert str(made[2].path / "block-00005.safetensors") in Path("/proc/self/maps").read_text()


ROWS = np.array([20, 3, 3, 0, 7])


@pytest.mark.parametrize(
    "key",
    [
        0,
        -1,
        np.int64(7),
        (20, 2),
        (5, 1, slice(None, 3)),
        slice(None),
        slice(3, 18, 4),
        (slice(None), 0),
        (slice(None), slice(None, 2)),
        ROWS,
        ROWS.tolist(),
        ROWS[:0],
        (ROWS, 0),
        (ROWS, slice(None, 1)),
        (ROWS, 1, slice(None, 4)),
        (ROWS, np.array([0, 2, 1, 0, 2]), slice(None, 4)),
        (ROWS, 0, np.array([0, 1, 2, 3, 4])),
        (ROWS[:0], ROWS[:0], slice(None, 4)),
        np.arange(21) % 5 == 0,
        (np.zeros(21, bool), 0),
    ],
    ids=str,
)
def test_blocks_are_indexed_as_one_array(made, key):
    store = made[2]
    assert len(store.manifest.blocks()) == 6
    for array in (store.features, store.boxes, store.scores, store.detected_labels):
        whole = np.asarray(array)
        assert isinstance(whole, np.ndarray)
        assert (array.shape, array.dtype, len(array)) == (whole.shape, whole.dtype, 21)
        found = array[key]
        assert found.dtype == whole.dtype
        assert np.array_equal(found, whole[key])


@pytest.mark.parametrize(
    ("key", "error"), [(21, IndexError), ((ROWS, np.array([0, 1])), ValueError), ([0, 30], IndexError)]
)
def test_wrong_indices_raise(made, key, error):
    with pytest.raises(error):
        made[2].features[key]


def test_pickles_by_path(made):
    store = made[2]
    data = pickle.dumps(store)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.manifest == store.manifest
    assert np.array_equal(again.features, store.features)


def test_manifest_content(made):
    dataset, extractor, store = made
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert manifest["dataset"] == "files"
    assert manifest["split"] == "train"
    assert manifest["ids"] == list(dataset.ids)
    assert manifest["labels"] == ["cat", "dog", "sofa"]
    assert manifest["detector_fingerprint"] == extractor.fingerprint
    assert (manifest["m"], manifest["views"], manifest["view_size"], manifest["feature_dim"]) == (8, 2, 32, 6)
    assert set(manifest["versions"]) == {"gm_mlic", "torch", "torchvision", "numpy"}
    files = [f"block-0000{i}.safetensors" for i in range(6)]
    assert list(manifest["files"]) == ["targets.safetensors", *files]
    assert sorted(file.name for file in store.path.iterdir()) == [*files, "manifest.json", "targets.safetensors"]
    for name, checksum in manifest["files"].items():
        assert hashlib.sha256((store.path / name).read_bytes()).hexdigest() == checksum
    block = load_file(store.path / files[-1])
    assert {name: (tensor.shape, str(tensor.dtype)) for name, tensor in block.items()} == {
        "features": ((1, 3, 8, 6), "float16"),
        "boxes": ((1, 3, 8, 4), "float32"),
        "scores": ((1, 3, 8), "float32"),
        "detected_labels": ((1, 3, 8), "int32"),
        "counts": ((1, 3), "int32"),
    }
    assert str(store.path.parent) not in json.dumps(manifest)


def test_check_accepts_matching_arguments(made):
    dataset, extractor, store = made
    store.check()
    store.check(dataset, extractor, m=8, views=2, view_size=32, view_seed=0)
    store.check(m=1, views=0)


def test_check_reports_stored_and_requested_values(made, tmp_path):
    dataset, extractor, store = made

    def refusal(**asked):
        with pytest.raises(StoreError) as caught:
            store.check(**asked)
        message = str(caught.value)
        assert "\n" not in message
        assert str(store.path) in message
        assert "`overwrite=True`" in message
        return message

    other = PixelExtractor(scale=2.0)
    message = refusal(extractor=other)
    assert extractor.fingerprint[:8] in message
    assert other.fingerprint[:8] in message
    assert "label 1 is 'dog', requested: 'cow'" in refusal(dataset=Files(dataset.root, labels=("cat", "cow", "sofa")))
    assert "3 labels, requested: 4" in refusal(dataset=Files(dataset.root, labels=("cat", "dog", "sofa", "x")))
    assert "21 images, requested: 20" in refusal(dataset=Files(dataset.root, n=20))
    assert "targets" in refusal(dataset=Files(dataset.root, seed=1))
    renamed = Files(dataset.root)
    renamed.split = "val"
    assert "split=train, requested: split=val" in refusal(dataset=renamed)
    message = refusal(m=35)
    assert "m=8" in message
    assert "`m=35`" in message
    message = refusal(views=5)
    assert "views=2" in message
    assert "`views=5`" in message
    assert "view_seed=0, requested: view_seed=9" in refusal(views=1, view_seed=9)


@pytest.mark.parametrize("m", [0, -3])
def test_m_below_one_is_a_config_error(made, m):
    with pytest.raises(ConfigError, match=f"m must be 1 or more, got {m}"):
        made[2].instances(0, m=m)
    with pytest.raises(ConfigError):
        made[2].check(m=m)


def test_unavailable_views_and_slots(made):
    with pytest.raises(StoreError, match="m=8"):
        made[2].instances(0, m=9)
    with pytest.raises(StoreError, match="views 0 to 2"):
        made[2].instances(0, view=3)


def test_missing_store_names_the_command(tmp_path):
    with pytest.raises(StoreError, match=r"does not exist.*gm-mlic extract"):
        InstanceStore.open(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"not an instance store.*gm-mlic extract"):
        InstanceStore.open(tmp_path / "empty")


FILES = ["block-00000.safetensors", "block-00005.safetensors", "targets.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["shorter", "empty", "longer", "missing", "header", "shape", "dtype", "another"])
def test_damaged_file_is_named(made, tmp_path, name, damage):
    path = copy(made[2], tmp_path / "damaged")
    file = path / name
    data, tensors = file.read_bytes(), load_file(file)
    if damage == "missing":
        file.unlink()
    elif damage == "shape":
        save_file({key: tensor[:-1] for key, tensor in tensors.items()}, file)
    elif damage == "dtype":
        save_file({key: tensor.astype(np.float64) for key, tensor in tensors.items()}, file)
    elif damage == "another":
        save_file({"weight": np.zeros(3, np.float32)}, file)
    else:
        file.write_bytes(
            {"shorter": data[:-1], "empty": b"", "longer": data + b"x", "header": b"junk" + data[4:]}[damage]
        )
    with pytest.raises(StoreError, match=rf"{name}.*`overwrite=True`") as caught:
        InstanceStore.open(path)
    assert "\n" not in str(caught.value)


def test_pickled_objects_are_never_loaded(made, tmp_path):
    path = copy(made[2], tmp_path / "evil")
    torch.save({"counts": torch.zeros(4, 3)}, path / FILES[0])
    with pytest.raises(StoreError, match=FILES[0]):
        InstanceStore.open(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("at", [0.3, 0.6, 1.0])
def test_verify_detects_a_changed_byte(made, tmp_path, name, at):
    path = copy(made[2], tmp_path / "flipped")
    InstanceStore.open(path).verify()
    data = bytearray((path / name).read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(StoreError, match=name):
        InstanceStore.open(path).verify()


def test_large_store_is_verified_again_after_a_change(made, tmp_path, monkeypatch):
    """The stamp beside it may be damaged."""
    dataset, extractor, store = made
    path, stamp = copy(store, tmp_path / "large"), tmp_path / ".large.verified"
    monkeypatch.setattr(stores, "_SMALL_BYTES", 0)
    verified = []
    monkeypatch.setattr(InstanceStore, "verify", lambda self: verified.append(verify(self)))
    for damage in (None, None, b"\xff\xfe"):
        if damage is not None:
            stamp.write_bytes(damage)
        extract(dataset, extractor, path, m=8, views=2, view_size=32, batch_size=4, progress=False)
    assert len(verified) == 2
    file = path / FILES[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match=FILES[0]):
        extract(dataset, extractor, path, m=8, views=2, view_size=32, batch_size=4, progress=False)


def _without(values, name):
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [
        lambda v: "{",
        lambda v: "[]",
        lambda v: "",
        lambda v: "\udcff".encode("utf-8", "surrogateescape").decode("latin1"),
        lambda v: json.dumps(v | {"format": 99}),
        lambda v: json.dumps(_without(v, "m")),
        lambda v: json.dumps(_without(v, "skipped")),
        lambda v: json.dumps(v | {"ids": "abc"}),
        lambda v: json.dumps(v | {"ids": v["ids"][:-1]}),
        lambda v: json.dumps(v | {"m": "8"}),
        lambda v: json.dumps(v | {"m": 7}),
        lambda v: json.dumps(v | {"views": None}),
        lambda v: json.dumps(v | {"files": {}}),
        lambda v: json.dumps(v | {"files": v["files"] | {"block-00006.safetensors": "0"}}),
        lambda v: json.dumps(v | {"labels": [1, 2, 3]}),
        lambda v: json.dumps(v | {"batch_size": 0}),
        lambda v: json.dumps(v | {"extra": 1}),
    ],
)
def test_damaged_manifest_is_one_line(made, tmp_path, change):
    path = copy(made[2], tmp_path / "damaged")
    file = path / "manifest.json"
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(StoreError) as caught:
        InstanceStore.open(path)
    assert "\n" not in str(caught.value)
    assert "overwrite" in str(caught.value)
