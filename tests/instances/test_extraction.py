from __future__ import annotations

import dataclasses
import errno
import functools
import json
import logging
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_stages import Files, PixelExtractor
from PIL import Image

from gm_mlic.detection.protocol import Instances
from gm_mlic.errors import ConfigError, DataError, StoreError
from gm_mlic.instances import InstanceStore, extract, writer

SETTINGS = {"m": 5, "views": 1, "view_size": 24, "batch_size": 4, "progress": False}
BLOCKS = 6  # of 21 images, each with one batch


def with_unreadable(root: Path) -> Files:
    """21 images, two of them unreadable."""
    files = Files(root / "photos")
    files.file("0002").write_bytes(b"")
    files.file("0013").write_bytes(files.file("0013").read_bytes()[:200])
    return files


@pytest.fixture
def dataset(tmp_path):
    return with_unreadable(tmp_path)


def files_of(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.iterdir()}


def written(store: Path) -> list[int]:
    """Numbers of the blocks that a partial store has."""
    return sorted(int(file.stem[-5:]) for file in store.with_name("store.partial").glob("block-*.safetensors"))


def calls(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Files and extractor calls of an uninterrupted extraction."""
    root = tmp_path_factory.mktemp("undisturbed")
    store = extract(with_unreadable(root), PixelExtractor(root / "calls.txt"), root / "store", **SETTINGS)
    return files_of(store.path), calls(root / "calls.txt")


@pytest.fixture
def undisturbed(extracted, tmp_path):
    """The same, and a copy of the store as ``undisturbed``."""
    (tmp_path / "undisturbed").mkdir()
    for name, content in extracted[0].items():
        (tmp_path / "undisturbed" / name).write_bytes(content)
    return extracted


def start(work) -> int:
    """Start ``work`` in a forked process; returns its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except StoreError:
            code = 3
        finally:
            os._exit(code)
    return pid


def end(pid: int) -> int:
    """Wait for a forked process; returns its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(work) -> int:
    return end(start(work))


def test_unreadable_images_are_recorded_and_reported(dataset, tmp_path, caplog):
    store = extract(dataset, PixelExtractor(), tmp_path / "store", **SETTINGS)
    assert store.manifest.skipped == {
        "0002": "0002.jpg cannot be decoded (UnidentifiedImageError)",
        "0013": "0013.jpg cannot be decoded (OSError)",
    }
    assert store.rows.tolist() == [i for i in range(21) if i not in (2, 13)]
    assert not store.counts[[2, 13]].any()
    assert not store.features[[2, 13]].any()
    with pytest.raises(StoreError, match=r"'0002'.*cannot be decoded"):
        store.instances(2)
    assert "2 of 21 images are unreadable" in caplog.text
    assert "0002.jpg" in caplog.text


def test_further_fields_of_instances_are_not_stored(dataset, tmp_path, undisturbed):
    @dataclasses.dataclass(frozen=True)
    class Masked(Instances):
        masks: torch.Tensor

    class Extractor(PixelExtractor):
        def __call__(self, images, m):
            return [Masked(*vars(found).values(), torch.ones(len(found))) for found in super().__call__(images, m)]

    extract(dataset, Extractor(), tmp_path / "store", **SETTINGS)
    assert files_of(tmp_path / "store") == undisturbed[0]


def test_no_readable_image_is_a_data_error(dataset, tmp_path):
    for image_id in dataset.ids:
        dataset.file(image_id).unlink()
    with pytest.raises(DataError, match=r"None of the 21 images.*dataset folder.*0000.jpg"):
        extract(dataset, PixelExtractor(), tmp_path / "store", **SETTINGS)
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "store.partial").exists()


def test_finished_store_is_opened_without_extraction(dataset, tmp_path, undisturbed):
    log = tmp_path / "calls.txt"
    store = extract(dataset, PixelExtractor(log), tmp_path / "undisturbed", **SETTINGS)
    assert calls(log) == []
    assert files_of(store.path) == undisturbed[0]
    # a store with more instances and views is sliced
    extract(dataset, PixelExtractor(log), tmp_path / "undisturbed", **SETTINGS | {"m": 2, "views": 0, "batch_size": 3})
    assert calls(log) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_store_is_deterministic(dataset, tmp_path, undisturbed, num_workers):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    store = extract(dataset, PixelExtractor(), tmp_path / "again", num_workers=num_workers, **SETTINGS)
    assert files_of(store.path) == undisturbed[0]
    blocks = {f"block-0000{block}.safetensors" for block in range(BLOCKS)}
    assert set(undisturbed[0]) == {"manifest.json", "targets.safetensors", *blocks}
    assert not (tmp_path / "again.partial").exists()
    assert torch.equal(torch.get_rng_state(), before)
    store.verify()


@pytest.mark.parametrize("seed", range(8))
def test_killed_during_any_write(dataset, tmp_path, undisturbed, seed, monkeypatch):
    """SIGKILL after half of the k-th write, repeatedly: bytes and calls equal an uninterrupted extraction."""
    rng = np.random.default_rng(seed)
    path, log = tmp_path / "store", tmp_path / "calls.txt"
    write_bytes = Path.write_bytes

    def work():
        left = moment

        def dying(file, data):
            nonlocal left
            left -= 1
            if left == 0:
                write_bytes(file, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write_bytes(file, data)

        monkeypatch.setattr(Path, "write_bytes", dying)
        extract(dataset, PixelExtractor(log), path, **SETTINGS)

    killed, moment = 0, int(rng.integers(1, 5))
    while (status := in_child(work)) != 0:
        assert status == -signal.SIGKILL
        killed, moment = killed + 1, int(rng.integers(1, 5))
        with pytest.raises(StoreError, match=r"incomplete.*gm-mlic extract"):
            InstanceStore.open(path)
        if killed > 30:
            pytest.fail("no progress")
    assert killed > 0
    assert files_of(path) == undisturbed[0]
    made = Counter(calls(log))
    assert set(made) == set(undisturbed[1])
    assert sum(made.values()) <= len(undisturbed[1]) + 2 * killed  # one block, original and view, per kill


class Crashing(Files):
    """Dataset whose image 9 crashes the decoder process."""

    def image(self, i: int) -> Image.Image:
        if i == 9:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().image(i)


@pytest.mark.parametrize("workers", [0, 2])
def test_image_that_crashes_the_decoder_is_skipped(tmp_path, workers):
    files, path = Crashing(tmp_path / "photos"), tmp_path / "store"
    settings = SETTINGS | {"num_workers": workers}
    if workers == 0:
        assert in_child(lambda: extract(files, PixelExtractor(), path, **settings)) == -signal.SIGSEGV
    store = extract(files, PixelExtractor(), path, **settings)
    assert store.manifest.skipped == {
        "0009": "Image 0009 crashes the decoder process (exit code -11): save it again or remove it."
    }
    assert store.rows.tolist() == [i for i in range(21) if i != 9]
    whole = extract(Files(tmp_path / "photos"), PixelExtractor(), tmp_path / "whole", **SETTINGS)
    assert np.array_equal(store.features[store.rows], whole.features[store.rows])


def test_killed_decoder_process_skips_no_image(tmp_path):
    """The system kills a decoder process for lack of memory; the image is decoded again."""

    class Killed(Files):
        def image(self, i: int) -> Image.Image:
            if i in (9, 14) and not (tmp_path / f"killed-{i}").exists():
                (tmp_path / f"killed-{i}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().image(i)

    files = Killed(tmp_path / "photos")
    store = extract(files, PixelExtractor(), tmp_path / "store", num_workers=2, **SETTINGS)
    whole = extract(Files(tmp_path / "photos"), PixelExtractor(), tmp_path / "whole", **SETTINGS)
    assert (tmp_path / "killed-14").exists()
    assert files_of(store.path) == files_of(whole.path)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_a_dataset_are_raised(dataset, tmp_path, workers, monkeypatch):
    """A bug of a dataset stops the extraction; no image is skipped."""

    def image(i):
        raise KeyError("no such column")

    monkeypatch.setattr(dataset, "image", image)
    with pytest.raises(KeyError, match="no such column"):
        extract(dataset, PixelExtractor(), tmp_path / "store", num_workers=workers, **SETTINGS)


def test_partial_store_with_a_crashing_image_is_resumed(tmp_path):
    """Images that crash the decoder are not retried in this process."""
    files, path = Crashing(tmp_path / "photos"), tmp_path / "store"
    dead = PixelExtractor(tmp_path / "calls.txt")
    assert in_child(lambda: extract(files, dead, path, **SETTINGS)) == -signal.SIGSEGV

    def stop_after_two_batches() -> None:
        made = 0

        class Stopping(PixelExtractor):
            def __call__(self, images, m):
                nonlocal made
                made += 1
                if made > 4:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__call__(images, m)

        extract(files, Stopping(), path, **SETTINGS)

    assert in_child(stop_after_two_batches) == -signal.SIGKILL
    assert in_child(lambda: extract(files, PixelExtractor(), path, **SETTINGS)) == 0
    assert list(InstanceStore.open(path).manifest.skipped) == ["0009"]


@pytest.mark.parametrize("name", ["write_file", "sha256"])
@pytest.mark.parametrize("after", [False, True])
def test_killed_while_creating_or_completing(dataset, tmp_path, undisturbed, monkeypatch, name, after):
    path, log = tmp_path / "store", tmp_path / "calls.txt"
    done = getattr(writer, name)
    for nth in (1, 2):

        def work(left=nth):
            def dying(*args):
                nonlocal left
                left -= 1
                result = done(*args) if after or left else None
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            monkeypatch.setattr(writer, name, dying)
            extract(dataset, PixelExtractor(log), path, **SETTINGS)

        in_child(work)
    extract(dataset, PixelExtractor(log), path, **SETTINGS)
    assert files_of(path) == undisturbed[0]
    assert calls(log) == undisturbed[1]


@pytest.mark.parametrize("step", ["unlink", "replace"])
def test_killed_while_replacing_a_store(dataset, tmp_path, undisturbed, monkeypatch, step):
    """Killed while temporary files are removed, and between the renames that replace an old store."""
    path, log = tmp_path / "store", tmp_path / "calls.txt"
    extract(dataset, PixelExtractor(scale=3.0), path, **SETTINGS)

    class Leaves(PixelExtractor):
        def __call__(self, images, m):
            (tmp_path / "store.partial" / "old.lock").touch()  # as processes that were killed
            return super().__call__(images, m)

    def work():
        method = getattr(Path, step)

        def dying(self, *args, **kwargs):
            result = method(self, *args, **kwargs)
            if (self.name == "old.lock") if step == "unlink" else (self == path):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        monkeypatch.setattr(Path, step, dying)
        extract(dataset, Leaves(log), path, overwrite=True, **SETTINGS)

    assert in_child(work) == -signal.SIGKILL
    extract(dataset, PixelExtractor(log), path, overwrite=True, **SETTINGS)
    assert files_of(path) == undisturbed[0]
    assert calls(log) == undisturbed[1]
    assert not (tmp_path / "store.old").exists()


def wait_until(condition) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("timeout")


def test_killed_process_is_resumed_by_two_others(dataset, tmp_path, undisturbed):
    """A process with workers is killed. Of two processes that resume, both extract, and one waits for the other."""
    path, log, gate = tmp_path / "store", tmp_path / "calls.txt", tmp_path / "gate"

    def begin(name: str, free_calls: int) -> tuple[int, Path]:
        """Start a process that pauses after ``free_calls`` extractor calls until the gate file exists."""
        messages = tmp_path / f"{name}.txt"
        messages.touch()

        class Held(PixelExtractor):
            left = free_calls

            def __call__(self, images, m):
                self.left -= 1
                if self.left < 0:
                    wait_until(gate.exists)
                return super().__call__(images, m)

        def work() -> None:
            logging.basicConfig(filename=messages, level=logging.INFO, format="%(message)s", force=True)
            # overwrite=True also resumes, and does not extract again after waiting
            extract(dataset, Held(log), path, num_workers=2, overwrite=True, **SETTINGS)

        return start(work), messages

    first, _ = begin("first", 5)
    wait_until(lambda: len(calls(log)) == 5)
    os.kill(first, signal.SIGKILL)
    end(first)
    assert written(path) == [0, 1]  # the third block has only its original view
    second, second_log = begin("second", 3)
    wait_until(lambda: len(calls(log)) == 8)
    third, third_log = begin("third", 100)
    wait_until(lambda: "Waiting for" in third_log.read_text())
    gate.touch()
    assert end(second) == end(third) == 0
    assert "8 of 21 images are done" in second_log.read_text()
    assert files_of(path) == undisturbed[0]
    assert sorted(calls(log)) == sorted(undisturbed[1] + undisturbed[1][4:5])


@pytest.mark.parametrize("shards", [2, 5, 9])
def test_sequential_shards_give_the_same_store(dataset, tmp_path, undisturbed, shards, caplog):
    caplog.set_level(logging.INFO)
    log, path = tmp_path / "calls.txt", tmp_path / "store"
    order = np.random.default_rng(shards).permutation(shards).tolist()
    for index in order[:-1]:
        pending = extract(dataset, PixelExtractor(log), path, shard=(index, shards), **SETTINGS)
        if pending is not None:  # None unless the last shard has no batches
            assert shards > BLOCKS
    store = extract(dataset, PixelExtractor(log), path, shard=(order[-1], shards), **SETTINGS)
    assert files_of(store.path) == undisturbed[0]
    assert sorted(calls(log)) == sorted(undisturbed[1])
    if shards < BLOCKS:
        assert "pending in other shards" in caplog.text


def test_parallel_shards_give_the_same_store(dataset, tmp_path, undisturbed):
    log, path = tmp_path / "calls.txt", tmp_path / "store"
    children = [
        start(lambda: extract(dataset, PixelExtractor(log), path, shard=(index, 3), **SETTINGS))  # noqa: B023 - forked
        for index in range(3)
    ]
    assert [end(pid) for pid in children] == [0, 0, 0]
    assert files_of(path) == undisturbed[0]
    assert sorted(calls(log)) == sorted(undisturbed[1])


class SlowExtractor(PixelExtractor):
    """Takes long enough that several processes extract at the same time."""

    def __call__(self, images, m):
        time.sleep(0.2)
        return super().__call__(images, m)


@pytest.mark.parametrize("late", [0.0, 1.5], ids=["together", "one late"])
def test_together_returns_the_complete_store(dataset, tmp_path, undisturbed, late):
    """Each of three processes gets the complete store; every image is processed once."""
    log, path = tmp_path / "calls.txt", tmp_path / "store"

    def work(index: int) -> None:
        time.sleep(late * (index == 2))
        assert len(extract(dataset, SlowExtractor(log), path, shard=(index, 3), together=True, **SETTINGS)) == 21

    assert [end(pid) for pid in [start(functools.partial(work, index)) for index in range(3)]] == [0, 0, 0]
    assert files_of(path) == undisturbed[0]
    assert sorted(calls(log)) == sorted(undisturbed[1])


def test_blocks_of_a_dead_process_are_taken_over(dataset, tmp_path, undisturbed):
    path, begun, over = tmp_path / "store", tmp_path / "begun", tmp_path / "over"

    class Dies(PixelExtractor):
        def __call__(self, images, m):
            begun.touch()
            wait_until(over.exists)
            os.kill(os.getpid(), signal.SIGKILL)

    class Notes(PixelExtractor):
        def __call__(self, images, m):
            over.touch()
            return super().__call__(images, m)

    pid = start(lambda: extract(dataset, Dies(), path, shard=(1, 2), together=True, **SETTINGS))
    wait_until(begun.exists)
    store = extract(dataset, Notes(), path, shard=(0, 2), together=True, **SETTINGS)
    assert end(pid) == -signal.SIGKILL
    assert files_of(store.path) == undisturbed[0]


def test_child_processes_exit_with_a_killed_process(dataset, tmp_path):
    """Including the isolated decoder process, which is sending more than the pipe buffer."""

    class Kills(Files):
        def image(self, i: int) -> Image.Image:
            if os.getppid() != pytest_process:
                os.kill(os.getppid(), signal.SIGKILL)
            return Image.new("RGB", (600, 600))

    pytest_process = os.getpid()
    living, alive = os.pipe()
    path = tmp_path / "store"
    interrupted(dataset, path)
    (tmp_path / "store.partial" / "block-00003.lock").touch()  # an earlier process crashed here
    pid = start(lambda: extract(Kills(tmp_path / "photos"), PixelExtractor(), path, **SETTINGS))
    os.close(alive)
    assert end(pid) == -signal.SIGKILL
    readable, _, _ = select.select([living], [], [], 60)
    assert readable, "a process still has the pipe open"
    assert os.read(living, 1) == b""
    os.close(living)


def test_a_store_in_use_is_not_discarded(dataset, tmp_path):
    path, flag = tmp_path / "store", tmp_path / "flag"

    class Endless(PixelExtractor):
        def __call__(self, images, m):
            flag.touch()
            time.sleep(1000)

    pid = start(lambda: extract(dataset, Endless(), path, shard=(0, 2), **SETTINGS))
    try:
        wait_until(flag.exists)
        with pytest.raises(StoreError, match=r"incomplete store .* is of another job"):
            extract(dataset, PixelExtractor(scale=2.0), path, shard=(1, 2), overwrite=True, **SETTINGS)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert extract(dataset, PixelExtractor(), path, **SETTINGS) is not None


@pytest.mark.parametrize("other", [(0, 2), (1, 3), (0, 1)])
def test_equal_and_overlapping_shards_share_the_blocks(dataset, tmp_path, undisturbed, other):
    """Every image is processed once, and one of the processes completes the store."""
    log, path = tmp_path / "calls.txt", tmp_path / "store"

    shards = [(0, 2), other, (1, 2)]
    pids = [
        start(functools.partial(extract, dataset, SlowExtractor(log), path, shard=shard, **SETTINGS))
        for shard in shards
    ]
    assert [end(pid) for pid in pids] == [0, 0, 0]
    assert files_of(path) == undisturbed[0]
    assert sorted(calls(log)) == sorted(undisturbed[1])


def test_a_process_whose_store_was_replaced_stops(dataset, tmp_path):
    """A process that holds no block is replaced by another job; it writes nothing into the new store."""
    path = tmp_path / "store"

    class Replaced(PixelExtractor):
        def __call__(self, images, m):
            if not (tmp_path / "new").exists():
                (tmp_path / "new").touch()
                shutil.rmtree(tmp_path / "store.partial")
                interrupted(dataset, path, m=3)
            return super().__call__(images, m)

    with pytest.raises(StoreError, match=r"Another process has replaced .*store.partial: it has m=3, requested: m=5"):
        extract(dataset, Replaced(), path, **SETTINGS)


def test_damaged_block_is_extracted_again(dataset, tmp_path, undisturbed):
    path, log = tmp_path / "store", tmp_path / "calls.txt"
    interrupted(dataset, path, after=9)
    assert written(path) == [0, 1, 2, 3]
    partial = tmp_path / "store.partial"
    (partial / "block-00000.safetensors").write_bytes(b"")
    (partial / "block-00002.safetensors").write_bytes((partial / "block-00002.safetensors").read_bytes()[:-1])
    extract(dataset, PixelExtractor(log), path, **SETTINGS)
    assert files_of(path) == undisturbed[0]
    assert len(calls(log)) == len(undisturbed[1]) - 4


def test_damaged_manifest_of_a_partial_store(dataset, tmp_path, undisturbed):
    path = tmp_path / "store"
    interrupted(dataset, path)
    (tmp_path / "store.partial" / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"incomplete store .*manifest.* is damaged"):
        extract(dataset, PixelExtractor(), path, **SETTINGS)
    extract(dataset, PixelExtractor(), path, overwrite=True, **SETTINGS)
    assert files_of(path) == undisturbed[0]


def interrupted(dataset, path, after: int = 3, **changes) -> None:
    """Interrupt an extraction after ``after`` extractor calls."""

    class Interrupted(PixelExtractor):
        left = after

        def __call__(self, images, m):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().__call__(images, m)

    with pytest.raises(KeyboardInterrupt):
        extract(dataset, Interrupted(), path, **SETTINGS | changes)


def test_interrupted_extraction_is_resumed(dataset, tmp_path, undisturbed, caplog):
    path, log = tmp_path / "store", tmp_path / "calls.txt"
    interrupted(dataset, path)
    assert "Run the same command again to resume" in caplog.text
    extract(dataset, PixelExtractor(log), path, **SETTINGS)
    assert files_of(path) == undisturbed[0]
    assert calls(log) == undisturbed[1][2:]  # the first batch is not repeated


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 6}, "m=5, requested: m=6"),
        ({"views": 0}, "views=1, requested: views=0"),
        ({"view_seed": 7}, "view_seed=0, requested: view_seed=7"),
        ({"batch_size": 5}, "batch_size=4, requested: batch_size=5"),
        ({"extractor": PixelExtractor(scale=2.0)}, PixelExtractor(scale=2.0).fingerprint[:8]),
        ({"labels": ("cat", "cow", "sofa")}, "label 1 is 'dog', requested: 'cow'"),
    ],
)
def test_resuming_another_job_is_refused(dataset, tmp_path, change, message):
    path = tmp_path / "store"
    interrupted(dataset, path)
    before = files_of(tmp_path / "store.partial")
    settings = SETTINGS | change
    extractor = settings.pop("extractor", PixelExtractor())
    if "labels" in settings:
        dataset = Files(dataset.root, labels=settings.pop("labels"))
    with pytest.raises(StoreError, match=re.escape(message)) as caught:
        extract(dataset, extractor, path, **settings)
    assert "`overwrite=True`" in str(caught.value)
    assert files_of(tmp_path / "store.partial") == before
    assert extract(dataset, extractor, path, overwrite=True, **settings).manifest.m == settings["m"]


def test_partial_store_without_results_is_replaced(dataset, tmp_path):
    interrupted(dataset, tmp_path / "store", after=0)
    assert extract(dataset, PixelExtractor(), tmp_path / "store", **SETTINGS | {"m": 3}).manifest.m == 3


def test_finished_store_of_another_job_is_refused_and_kept(dataset, tmp_path, undisturbed):
    path = tmp_path / "undisturbed"
    with pytest.raises(StoreError, match="detector pixels"):
        extract(dataset, PixelExtractor(scale=2.0), path, **SETTINGS)
    with pytest.raises(StoreError, match=r"m=5.*m=9"):
        extract(dataset, PixelExtractor(), path, **SETTINGS | {"m": 9})
    assert files_of(path) == undisturbed[0]


def test_overwrite_keeps_the_old_store_until_completion(dataset, tmp_path, undisturbed):
    path = tmp_path / "undisturbed"
    interrupted(dataset, path, m=9, overwrite=True)
    assert files_of(path) == undisturbed[0]
    store = extract(dataset, PixelExtractor(), path, overwrite=True, **SETTINGS | {"m": 9})
    assert store.manifest.m == 9
    assert not (tmp_path / "undisturbed.old").exists()


def test_replaced_images_are_read_on_resume(dataset, tmp_path):
    path = tmp_path / "store"
    interrupted(dataset, path)
    assert written(path) == [0]
    Image.new("RGB", (30, 30), "white").save(dataset.file("0002"))
    store = extract(dataset, PixelExtractor(), path, **SETTINGS)
    assert list(store.manifest.skipped) == ["0013"]
    assert store.counts[2, 0] > 0


class Wrong(PixelExtractor):
    """Extractor that modifies its output for one image."""

    def __init__(self, dataset, image_id, corrupt):
        super().__init__()
        self.target, self.corrupt = np.asarray(dataset.image(dataset.ids.index(image_id))), corrupt

    def __call__(self, images, m):
        found = super().__call__(images, m)
        for i, image in enumerate(images):
            pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
            if np.array_equal(pixels, self.target):
                found[i] = self.corrupt(found[i])
        return found


def _corrupted(name, value):
    def corrupt(instances: Instances) -> Instances:
        parts = {n: getattr(instances, n).clone() for n in ("boxes", "scores", "detected_labels", "features")}
        parts[name] = value(parts[name])
        return Instances(**parts)

    return corrupt


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (_corrupted("features", lambda f: f * float("nan")), "features that are NaN"),
        (_corrupted("features", lambda f: f + 70000), "too large for float16"),
        (_corrupted("boxes", lambda b: b / 0), "boxes that are NaN"),
        (_corrupted("scores", lambda s: s.flip(0)), "not sorted by descending score"),
        (_corrupted("features", lambda f: f.double()), "features of type torch.float64, expected torch.float32"),
        (_corrupted("features", lambda f: f[:, :3]), "features of shape"),
        (_corrupted("scores", lambda s: s[:-1]), "scores of shape"),
        (lambda i: i.top(0), "0 instances, expected 1 to 5"),
    ],
)
def test_invalid_extractor_output_is_refused(dataset, tmp_path, corrupt, message):
    path = tmp_path / "store"
    with pytest.raises(StoreError, match=message) as caught:
        extract(dataset, Wrong(dataset, "0006", corrupt), path, **SETTINGS)
    assert "'0006'" in str(caught.value)
    assert "pixels" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert written(path) == [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_dataset_errors_are_raised_unchanged(dataset, tmp_path, workers, monkeypatch):
    def image(i):
        raise DataError("the archive is gone")

    monkeypatch.setattr(dataset, "image", image)
    with pytest.raises(DataError) as caught:
        extract(dataset, PixelExtractor(), tmp_path / "store", num_workers=workers, **SETTINGS)
    assert str(caught.value) == "the archive is gone"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 0}, "m must be an integer of at least 1; got 0"),
        ({"m": -1}, "m must be an integer of at least 1; got -1"),
        ({"views": -1}, "views must be an integer of at least 0; got -1"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1; got 0"),
        ({"num_workers": -1}, "num_workers must be an integer of at least 0; got -1"),
        ({"shard": (2, 2)}, r"shard is \(2, 2\)"),
        ({"shard": (0, 0)}, r"shard is \(0, 0\)"),
    ],
)
def test_invalid_arguments(dataset, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        extract(dataset, PixelExtractor(), tmp_path / "store", **SETTINGS | change)
    assert not (tmp_path / "store.partial").exists()


def test_empty_dataset_is_a_data_error(dataset, tmp_path):
    dataset.ids, dataset.targets = (), dataset.targets[:0]
    with pytest.raises(DataError, match="no images"):
        extract(dataset, PixelExtractor(), tmp_path / "store", **SETTINGS)


@pytest.mark.parametrize("nth", [1, 4, 9])
def test_disk_full_later_keeps_finished_blocks(dataset, tmp_path, undisturbed, monkeypatch, nth):
    """The nth write fails: the targets, a block, the manifest."""
    path, log, left = tmp_path / "store", tmp_path / "calls.txt", nth
    write_bytes = Path.write_bytes

    def full(file, data):
        nonlocal left
        left -= 1
        if left <= 0:
            write_bytes(file, data[: len(data) // 3])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(StoreError, match=r"Not enough disk space.*needs 7.\d+e-06 GB.*GB are free.*same command"):
            extract(dataset, PixelExtractor(log), path, **SETTINGS)
    assert not list(tmp_path.rglob("*.part"))
    extract(dataset, PixelExtractor(log), path, **SETTINGS)
    assert files_of(path) == undisturbed[0]
    assert len(calls(log)) == len(undisturbed[1]) + 2 * (nth == 4)
    assert files_of(tmp_path / "undisturbed") == undisturbed[0]


def test_file_size_limit_of_the_system(dataset, tmp_path, undisturbed):
    """The kernel refuses to write a block."""
    path = tmp_path / "store"
    message = tmp_path / "message.txt"

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        try:
            extract(dataset, PixelExtractor(), path, **SETTINGS)
        except StoreError as error:
            descriptor = os.open(message, os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, str(error).encode())
            raise

    assert in_child(work) == 3
    assert "Not enough disk space for the instance store" in message.read_text()
    extract(dataset, PixelExtractor(), path, **SETTINGS)
    assert files_of(path) == undisturbed[0]


def _mount(folder: Path, options: str) -> bool:
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """File system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.name != "posix" or os.geteuid() != 0 or not _mount(folder, "size=64k"):
        pytest.skip("requires permission to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("filling", [50_000, 63_000])
def test_full_file_system(dataset, tmp_path, undisturbed, small_disk, filling):
    """Full after a few blocks; too small for the store, which is reported before the first block."""
    path, log = small_disk / "store", tmp_path / "calls.txt"
    (small_disk / "filling").write_bytes(b"x" * filling)
    with pytest.raises(StoreError, match=r"Not enough disk space.*needs 7.\d+e-06 GB.*GB are free.*same command"):
        extract(dataset, PixelExtractor(log), path, **SETTINGS)
    assert (len(calls(log)) == 0) == (filling > 60_000)
    (small_disk / "filling").unlink()
    extract(dataset, PixelExtractor(), path, **SETTINGS)
    assert files_of(path) == undisturbed[0]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_read_only_folder(dataset, undisturbed, tmp_path):
    """Writing fails with one line; a finished store can be opened."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "store").mkdir()
        for file, data in undisturbed[0].items():
            (folder / "store" / file).write_bytes(data)
            (folder / "store" / file).chmod(0o444)
        (folder / "store").chmod(0o555)
        folder.chmod(0o555)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)  # root can write everywhere
            store = InstanceStore.open(folder / "store")
            assert len(store.instances(0)) > 0
            with pytest.raises(ConfigError, match=r"Cannot write .*ermission denied.*`path`"):
                extract(dataset, PixelExtractor(), folder / "other", **SETTINGS)
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)
            (folder / "store").chmod(0o755)


def test_existing_file_or_other_folder_is_refused(dataset, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="Cannot write"):
        extract(dataset, PixelExtractor(), tmp_path / "file" / "store", **SETTINGS)
    with pytest.raises(StoreError, match="not an instance store"):
        extract(dataset, PixelExtractor(), tmp_path / "file", overwrite=True, **SETTINGS)
    with pytest.raises(StoreError, match="not an instance store"):
        extract(dataset, PixelExtractor(), dataset.root, overwrite=True, **SETTINGS)
    assert len(list(dataset.root.iterdir())) == 21


def test_progress_without_terminal_is_logged(dataset, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO)
    interrupted(dataset, tmp_path / "store")
    extract(dataset, PixelExtractor(), tmp_path / "store", **SETTINGS | {"progress": True})
    assert "4 of 21 images are done" in caplog.text
    assert re.search(r"files/train: 21 of 21 images, [\d.]+ images/s, 0 s left", caplog.text)
    assert capsys.readouterr().out == ""


def test_progress_on_a_terminal_is_a_bar(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    interrupted(dataset, tmp_path / "store")
    extract(dataset, PixelExtractor(), tmp_path / "store", **SETTINGS | {"progress": True})
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "files/train" in shown
    assert "21 of 21" in shown


def test_partial_store_has_the_documented_files(dataset, tmp_path):
    interrupted(dataset, tmp_path / "store")
    partial = tmp_path / "store.partial"
    files = {file.name for file in partial.iterdir()}
    assert files == {"manifest.json", "targets.safetensors", "block-00000.safetensors"}
    job = json.loads((partial / "manifest.json").read_text())
    assert (job["m"], job["batch_size"], job["skipped"], job["files"]) == (5, 4, {}, {})
