from __future__ import annotations

import numpy as np
import torch
from fake_stages import Files
from torch.utils.data import DataLoader

from gm_mlic.instances import OnlineImages


def epoch(images: OnlineImages, loader: DataLoader, number: int) -> dict[int, torch.Tensor]:
    images.set_epoch(number)
    return {row: image for batch in loader for row, image in zip(batch.rows.tolist(), batch.images, strict=True)}


def test_evaluation_images_are_not_augmented(tmp_path):
    dataset = Files(tmp_path / "photos", n=5)
    images = OnlineImages(dataset, train=False)
    batch = next(iter(DataLoader(images, batch_size=5, collate_fn=images.collate)))
    assert batch.rows.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(batch.targets.numpy(), dataset.targets)
    assert np.array_equal(batch.difficult.numpy(), dataset.difficult)
    for i, image in enumerate(batch.images):
        assert image.dtype == torch.float32
        assert np.allclose(image.permute(1, 2, 0).numpy() * 255, np.asarray(dataset.image(i)), atol=1e-3)


def test_views_depend_on_epoch_and_image_only(tmp_path):
    images = OnlineImages(Files(tmp_path / "photos", n=6), train=True, size=20, seed=1)
    here = DataLoader(images, batch_size=4, collate_fn=images.collate)
    # persistent workers must see the next epoch
    there = DataLoader(
        images, batch_size=3, shuffle=True, num_workers=2, persistent_workers=True, collate_fn=images.collate
    )
    seen = [(epoch(images, here, n), epoch(images, there, n)) for n in (0, 1)]
    for ours, theirs in seen:
        assert sorted(ours) == sorted(theirs) == list(range(6))
        assert all(torch.equal(ours[row], theirs[row]) for row in ours)
        assert all(image.shape == (3, 20, 20) for image in ours.values())
    assert not any(torch.equal(seen[0][0][row], seen[1][0][row]) for row in range(6))
    images.passes = 2  # two of these epochs are one
    images.set_epoch(0)
    assert len(images) == 12
    for i in range(12):
        assert images[i][0] == i % 6
        assert torch.equal(images[i][1], seen[i // 6][0][i % 6])
    images.passes = 1
    other = OnlineImages(images.dataset, train=True, size=20, seed=2)
    assert not torch.equal(other[0][1], images[0][1])


def test_unreadable_images_are_dropped_and_logged_once(tmp_path, caplog):
    dataset = Files(tmp_path / "photos", n=6)
    for image_id in ("0001", "0004", "0005"):
        dataset.file(image_id).write_bytes(b"")
    images = OnlineImages(dataset, train=True, size=20)
    loader = DataLoader(images, batch_size=2, collate_fn=images.collate)
    for number in range(2):
        images.set_epoch(number)
        batches = list(loader)
        assert [batch.rows.tolist() for batch in batches] == [[0], [2, 3], []]
        assert [len(batch) for batch in batches] == [1, 2, 0]
        assert batches[2].targets.shape == (0, 3)
    assert images.unreadable == ("0001", "0004", "0005")
    assert caplog.text.count("0004.jpg") == 1
