"""Speed of gm-mlic's extraction, compared with the bare torchvision detector.

    python experiments/runtime/extraction.py COCO_ROOT [IMAGES]     # default 24 photos of the test split

Both process the same photos in the same batches of 4 with the same ResNet-50-FPN, alternating, three times. The bare
detector gets decoded tensors, and its results are discarded. Extraction reads JPEGs, pools features at the final boxes,
and writes the store.
"""

from __future__ import annotations

import copy
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from gm_mlic.bench import interleaved
from gm_mlic.cli.compose import compose
from gm_mlic.cli.environment import prepare_process
from gm_mlic.datasets.images import to_tensor
from gm_mlic.instances import extract
from gm_mlic.training import build

BATCH, ROUNDS, M = 4, 3, 35


def main(root: str, number: int) -> None:
    prepare_process()  # as on the command line, for both
    config = compose("train", ["dataset=coco2014", f"dataset.root={root}", "trainer.accelerator=cpu"])
    dataset = build.build_dataset(config, "test")
    dataset.ids, dataset.targets = dataset.ids[:number], dataset.targets[:number]
    extractor = build.build_detector(config)
    bare = copy.deepcopy(extractor.detector)  # torchvision's FasterRCNN, with the same weights and image size
    bare.roi_heads.detections_per_img = 100  # torchvision's default
    images = [to_tensor(dataset.image(row)) for row in range(number)]
    folder = Path(tempfile.mkdtemp())

    @torch.no_grad()
    def detector() -> None:
        for start in range(0, number, BATCH):
            bare(images[start : start + BATCH])

    def extraction() -> None:
        extract(dataset, extractor, folder / "store", m=M, batch_size=BATCH, overwrite=True, progress=False)

    try:
        detector()
        timings = interleaved({"bare detector": detector, "extraction": extraction}, ROUNDS)
    finally:
        shutil.rmtree(folder)
    for name, seconds in timings.items():
        print(f"{name:14s} {number / statistics.median(seconds):.3f} images/s")
    pairs = zip(*timings.values(), strict=True)
    ratios = [alone / extracting for alone, extracting in pairs]
    print(f"extraction / bare detector: median {statistics.median(ratios):.3f}, all {np.round(ratios, 3).tolist()}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else 24)
