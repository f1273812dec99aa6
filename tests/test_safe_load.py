"""Safe loading of untrusted files."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gm_mlic.safe_load import load_arrays, load_tensors


def test_flipped_bits_of_tensors_are_detected(tmp_path: Path) -> None:
    """Flipped bits in padding and timestamps may pass, but no value may change."""
    good = {"a": torch.arange(2000.0), "b": ["x", 1.5]}
    torch.save(good, tmp_path / "good.pt")
    content = (tmp_path / "good.pt").read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(300):
        bad = bytearray(content)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (tmp_path / "bad.pt").write_bytes(bad)
        try:
            loaded = load_tensors(tmp_path / "bad.pt")
        except (ValueError, OSError):
            refused += 1
            continue
        assert torch.equal(loaded["a"], good["a"])
        assert loaded["b"] == good["b"]
    assert refused > 200


def test_other_objects_are_not_unpickled(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return eval, ("open('pwned', 'w')",)

    torch.save({"x": Hostile()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="contains more than tensors and plain values"):
        load_tensors(tmp_path / "x.pt")


def bomb(path: Path, name: str, size: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w", force_zip64=True) as out:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (size // 4,)})
        out.write(header.getvalue())
        block = bytes(1 << 22)
        for _ in range(size // len(block)):
            out.write(block)


def test_decompression_bombs_are_refused(tmp_path: Path) -> None:
    bomb(tmp_path / "x.npz", "scores.npy", 5 << 28)
    assert (tmp_path / "x.npz").stat().st_size < 2_000_000
    with pytest.raises(ValueError, match=r"would unpack to 1\.3 GB"):
        load_arrays(tmp_path / "x.npz")


def test_compressed_tensor_files_are_refused(tmp_path: Path) -> None:
    bomb(tmp_path / "x.pt", "archive/data.pkl", 1 << 22)
    with pytest.raises(ValueError, match="compressed"):
        load_tensors(tmp_path / "x.pt")


def test_valid_arrays_are_loaded(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(1_000_000))
    assert load_arrays(tmp_path / "x.npz")["a"].sum() == 0
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"numpy\.savez"):
        load_arrays(tmp_path / "x.npy")
