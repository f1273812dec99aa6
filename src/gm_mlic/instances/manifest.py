"""Manifest of an instance store: what it was made from, and the tensors of its files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gm_mlic.datasets.base import MultiLabelDataset
from gm_mlic.detection.protocol import InstanceExtractor, checked_fingerprint
from gm_mlic.errors import StoreError
from gm_mlic.schema import Natural, Positive, settings_of

FORMAT = 3
MANIFEST, TARGETS = "manifest.json", "targets.safetensors"
AGAIN = "extract again with `overwrite=True`"

#: Limits of a block (:attr:`Manifest.block_size`); other limits are another format.
BLOCK_IMAGES, BLOCK_BYTES = 64, 64 << 20

#: Shape and dtype by tensor.
Specs = dict[str, tuple[tuple[int, ...], type]]


@dataclass(frozen=True)
class Manifest:
    """Metadata of a store. It has no times or host names: equal jobs write equal bytes.

    Attributes:
        dataset, split, dataset_fingerprint: of the :class:`~gm_mlic.datasets.MultiLabelDataset`.
        ids, labels: its N image ids and C label names, in the order of the tensors.
        difficult: whether it has a mask of difficult labels.
        detector, detector_fingerprint, detector_labels, feature_dim: of the extractor.
        m: instance slots per view.
        views: r, augmented views per image; the tensors have V = 1 + r views.
        view_size, view_seed: size in pixels and seed of the augmented views; None without them.
        batch_size: images per call of the extractor (padding within a batch can change the last bits).
        versions: of gm_mlic, torch, torchvision and numpy.
        skipped: reason by id, for unreadable images.
        files: SHA-256 by name of all other files; empty while the store is incomplete.
    """

    dataset: str
    split: str
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    dataset_fingerprint: str
    difficult: bool
    detector: str
    detector_fingerprint: str
    detector_labels: tuple[str, ...]
    feature_dim: Positive
    m: Positive
    views: Natural
    view_size: int | None
    view_seed: int | None
    batch_size: Positive
    versions: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def block_size(self) -> int:
        """B, the images per block: 64, or fewer if they exceed 64 MiB or half of all images (so that two processes can
        share a small store), but whole batches and at least one.
        """
        images = min(BLOCK_IMAGES, BLOCK_BYTES // _num_bytes(self.block_specs(1)), -(-len(self.ids) // 2))
        return self.batch_size * max(1, images // self.batch_size)

    def blocks(self) -> list[range]:
        """Rows of each block."""
        return [range(len(self.ids))[i : i + self.block_size] for i in range(0, len(self.ids), self.block_size)]

    def file_names(self) -> list[str]:
        """Names of all other files of a complete store."""
        return [TARGETS, *map(block_name, range(len(self.blocks())))]

    def block_specs(self, images: int) -> Specs:
        """Tensors of a block."""
        slots = (images, 1 + self.views, self.m)
        return {
            "features": ((*slots, self.feature_dim), np.float16),
            "boxes": ((*slots, 4), np.float32),
            "scores": (slots, np.float32),
            "detected_labels": (slots, np.int32),
            "counts": (slots[:2], np.int32),
        }

    def target_specs(self) -> Specs:
        """Tensors of the labels."""
        shape = (len(self.ids), len(self.labels))
        return {"targets": (shape, np.int8)} | ({"difficult": (shape, np.bool_)} if self.difficult else {})

    def num_bytes(self) -> int:
        """Size of all tensors."""
        return _num_bytes(self.block_specs(len(self.ids))) + _num_bytes(self.target_specs())

    def to_json(self) -> str:
        """Serialize to ``manifest.json``; equal manifests give equal text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """Read a manifest.

        Raises:
            StoreError: if it cannot be read, is not a manifest, or has another format version.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise StoreError(
                    f"The store {file.parent} has format {values['format']!r}, this version of gm-mlic reads format "
                    f"{FORMAT}: {AGAIN}, or use the version that wrote it."
                )
            for name, setting in settings_of(cls).items():  # type: ignore[arg-type]
                if not setting.accepts(values[name]):
                    raise ValueError(f"malformed field {name!r}")
            values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            return cls(**values)
        except OSError as error:
            raise StoreError(f"Cannot read the manifest {file}: {error.strerror}.") from error
        except (LookupError, ValueError, TypeError) as error:
            problem = f"field {error} is missing" if isinstance(error, LookupError) else error
            raise StoreError(f"The manifest {file} is damaged ({problem}): {AGAIN}.") from error

    def differences(self, requested: Manifest) -> Iterator[str]:
        """Differences from the job of another manifest, the most informative first."""
        for name, value in vars(requested).items():
            stored = getattr(self, name)
            if stored == value or name in ("skipped", "files"):
                continue
            what = {"ids": "images"}.get(name, name.replace("_", " "))
            if isinstance(stored, tuple):
                for i, (a, b) in enumerate(zip(stored, value, strict=False)):
                    if a != b:
                        yield f"its {what[:-1]} {i} is {a!r}, requested: {b!r}"
                        break
                else:
                    yield f"it has {len(stored)} {what}, requested: {len(value)}"
            elif name.endswith("fingerprint"):
                of = f"targets of {self.dataset}" if name == "dataset_fingerprint" else f"detector {self.detector}"
                yield f"it has {of} with sha {stored[:8]}, requested: sha {value[:8]} (other content or settings)"
            else:
                yield f"it has {name}={stored}, requested: {name}={value}"


def block_name(block: int) -> str:
    """File name of a block."""
    return f"block-{block:05d}.safetensors"


def job_fields(dataset: MultiLabelDataset | None, extractor: InstanceExtractor | None) -> dict[str, Any]:
    """Fields of :class:`Manifest` from a dataset and an extractor."""
    found: dict[str, Any] = {}
    if dataset is not None:
        found |= {name: getattr(dataset, name) for name in ("split", "ids", "labels")}
        found |= {"dataset": dataset.name, "dataset_fingerprint": dataset.fingerprint}
        found["difficult"] = dataset.difficult is not None
    if extractor is not None:
        found |= {"detector": extractor.name, "detector_fingerprint": checked_fingerprint(extractor)}
        found |= {"detector_labels": tuple(extractor.labels), "feature_dim": int(extractor.feature_dim)}
    return found


def _num_bytes(specs: Specs) -> int:
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in specs.values())
