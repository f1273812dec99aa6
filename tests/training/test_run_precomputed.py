"""A run with precomputed instances equals the run with the detector that wrote them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_detector import GridExtractor
from PIL import Image

from gm_mlic import Predictor, Scenes
from gm_mlic.cli.compose import compose
from gm_mlic.datasets.images import to_tensor
from gm_mlic.detection import build_extractor
from gm_mlic.errors import ConfigError, DataError, WeightsError
from gm_mlic.metrics import read_scored_images
from gm_mlic.training.run import evaluate, train

SIZES = {"train": 24, "val": 8, "test": 8}


def write(folder: Path, scenes: Scenes, rows: range) -> None:
    """Write the grid's instances of scenes, and the photos."""
    folder.mkdir(exist_ok=True)
    for i in rows:
        image = scenes.image(i)
        image.save(folder / f"{scenes.ids[i]}.png")
        (found,) = GridExtractor()([to_tensor(image)], 9)
        np.savez(
            folder / f"{scenes.ids[i]}.npz", boxes=found.boxes, scores=found.scores, classes=found.detected_labels,
            features=found.features,
        )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all splits, and two runs: with the detector, and with its files."""
    root = tmp_path_factory.mktemp("precomputed")
    for split, size in SIZES.items():
        write(root / "files", Scenes(split, size=size, image_size=96), range(size))
    train(config(root, "detected"), extractor=GridExtractor())
    train(config(root, "looked_up"), extractor=looked_up(root / "files"))
    return root


def config(root: Path, name: str, *overrides: str):
    small = [
        "experiment=scenes_smoke", "dataset.sizes={train: 24, val: 8, test: 8}", "dataset.image_size=96",
        "trainer.batch_size=8", "trainer.max_epochs=1", "trainer.accelerator=cpu", "model.widths=[8,8]",
        f"instances.root={root}/instances", f"run_dir={root}/{name}",
    ]  # fmt: skip
    return compose("train", [*small, *overrides])


def looked_up(folder: Path, **settings: str):
    return build_extractor("precomputed", path=str(folder), labels=["cell"], box_units="fraction", **settings)


def test_run_equals_that_of_the_detector(folder: Path) -> None:
    found, expected = (
        read_scored_images([folder / name / "test.npz"], folder / name / "test.npz").scores[0].numpy()
        for name in ("looked_up", "detected")
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_evaluate_and_predict(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "looked_up" / "checkpoints" / "best.ckpt"
    result = evaluate(checkpoint, extractor=looked_up(folder / "files"), bootstrap=0)
    assert result["dataset"]["sizes"] == {"test": 8}
    expected = read_scored_images([folder / "looked_up" / "test.npz"], folder / "looked_up" / "test.npz").scores[0]
    predictor = Predictor.from_checkpoint(checkpoint, extractor=looked_up(folder / "files"))
    photos = [folder / "files" / f"test-{i:05d}.png" for i in range(8)]
    found = np.stack([prediction.probabilities for prediction in predictor(photos)])
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-3)  # stores hold 16-bit features
    assert predictor.assignment_graph(str(photos[0])).num_nodes > 0
    # a photo opened from a file has a name
    with Image.open(photos[0]) as image:
        (prediction,) = predictor([image])
    np.testing.assert_allclose(prediction.probabilities, found[0], atol=1e-6)
    with pytest.raises(
        ConfigError, match="looks instances up by the name of a photo, which an open image does not have"
    ):
        list(predictor([Image.new("RGB", (8, 8))]))
    # photos that were not there in training, in a folder of their own
    new = Scenes("test", size=12, image_size=96)
    write(tmp_path / "new", new, range(8, 12))
    other = Predictor.from_checkpoint(checkpoint, extractor=looked_up(tmp_path / "new"))
    assert len(list(other(sorted((tmp_path / "new").glob("*.png"))))) == 4
    with pytest.raises(DataError, match=r"1 of 1 photo has no instances in .*new: .*test-00000\.png"):
        list(other(photos[:1]))
    skipped: dict[str, str] = {}
    skipping = Predictor.from_checkpoint(checkpoint, extractor=looked_up(tmp_path / "new", missing="skip"))
    assert [p.photo for p in skipping([photos[0], tmp_path / "new" / "test-00009.png"], 2, skipped)] == [
        tmp_path / "new" / "test-00009.png"
    ]
    assert list(skipped) == [str(photos[0])]
    with pytest.raises(DataError, match=r"has no instances in .*new: add it there, or leave the photo out"):
        list(skipping(photos[:1]))


def test_errors_of_files_name_settings_of_the_detector(folder: Path, tmp_path: Path) -> None:
    for file in (folder / "files").glob("*.npz"):
        with np.load(file) as arrays:
            np.savez(tmp_path / file.name, **{**arrays, "classes": np.full(len(arrays["scores"]), 7)})
    with pytest.raises(DataError, match=r"check detector\.labels and detector\.first_class"):
        train(config(tmp_path, "run"), extractor=looked_up(tmp_path))


def test_files_of_another_detector(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", boxes=np.ones((1, 4)), features=np.ones((1, 3)), classes=np.zeros(1))
    with pytest.raises(WeightsError, match="trained on features of length 9, the precomputed ones have length 3"):
        Predictor.from_checkpoint(folder / "looked_up" / "checkpoints" / "best.ckpt", extractor=looked_up(tmp_path))
    with pytest.raises(WeightsError, match="trained with detector grid"):
        Predictor.from_checkpoint(
            folder / "detected" / "checkpoints" / "best.ckpt", extractor=looked_up(folder / "files")
        )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "instances.online=true",
            r"instances\.online=true with the detector precomputed: .* Set instances\.online=false",
        ),
        ("instances.num_augmentations=2", r"instances\.num_augmentations=2 .* Set instances\.num_augmentations=0"),
        ("graph.views=2", r"graph\.views=2 .* Set graph\.views=1"),
    ],
)
def test_settings_that_need_pixels(folder: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path, "run", override), extractor=looked_up(folder / "files"))


def test_missing_photos_are_found_before_extraction(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"16 of 24 photos .* test-00008, test-00009, test-00010, .* detector\.missing=skip"
    ):
        train(
            config(tmp_path, "run", "dataset.sizes={train: 24, val: 8, test: 24}"),
            extractor=looked_up(folder / "files"),
        )
    assert not (tmp_path / "instances").exists()
