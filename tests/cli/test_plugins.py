"""Detectors and datasets of other packages, from the shell."""

from __future__ import annotations

import json
import site
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest
from PIL import Image

from gm_mlic.cli.main import run

MODULE = textwrap.dedent('''
    """A detector and a dataset."""

    import hashlib
    from typing import Annotated

    import numpy as np
    import torch
    from annotated_types import Ge
    from PIL import Image

    from gm_mlic import Instances, MultiLabelDataset, register_dataset, register_detector

    COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


    @register_detector("cells")
    class Cells:
        """Cells of the image; the feature is their mean color.

        Args:
            side: cells along each side.
        """

        name, labels, feature_dim = "cells", (), 3

        def __init__(self, side: Annotated[int, Ge(1)] = 2) -> None:
            self.side = side
            self.fingerprint = hashlib.sha256(f"cells {side}".encode()).hexdigest()

        def __call__(self, images, m):
            return [self.one(image).top(m) for image in images]

        def one(self, image):
            n = self.side
            pooled = torch.nn.functional.adaptive_avg_pool2d(image, n).flatten(1).T
            y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
            corner = torch.stack([x, y], dim=-1).reshape(-1, 2) / n
            boxes = torch.cat([corner, corner + 1 / n], dim=1)
            return Instances(boxes, torch.linspace(1, 0.5, n * n), torch.full((n * n,), -1), pooled)


    @register_dataset("stripes")
    class Stripes(MultiLabelDataset):
        """Images of two colors out of three.

        Args:
            split: train, val or test.
            number: images of each split.
        """

        name, detector = "stripes", "cells"
        labels = tuple(COLORS)

        def __init__(self, split: str = "train", number: Annotated[int, Ge(3)] = 12) -> None:
            self.split = split
            self.left_out = np.arange(number) % 3
            self.ids = tuple(f"{split}-{i}" for i in range(number))
            self.targets = (np.arange(3) != self.left_out[:, None]).astype(np.int8)

        def image(self, i: int) -> Image.Image:
            image = Image.new("RGB", (32, 32))
            for k, label in enumerate(label for c, label in enumerate(COLORS) if c != self.left_out[i]):
                image.paste(COLORS[label], (16 * k, 0, 16 * k + 16, 32))
            return image
''')
SMALL = ["dataset=stripes", "graph.m=4", "trainer.max_epochs=1", "trainer.accelerator=cpu", "run_dir=runs/stripes"]
CHECKPOINT = "checkpoint=runs/stripes/checkpoints/best.ckpt"
CALLS = {
    "eval": [CHECKPOINT, "bootstrap=0"],
    "predict": [CHECKPOINT, "images=photo.png", "device=cpu"],
    "explain": [CHECKPOINT, "image=photo.png", "device=cpu"],
    "export": [CHECKPOINT, "out=exported"],
    "extract": ["dataset=stripes", "graph.m=4", "splits=[test]", "instances.root=elsewhere"],
    "dataset": ["dataset=stripes"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    image = Image.new("RGB", (40, 30), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 30))
    image.save("photo.png")
    return tmp_path


@pytest.fixture
def registered(registries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore registries and modules afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_plugin", raising=False)


@pytest.mark.usefixtures("registered")
def test_module_in_the_current_folder(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "my_plugin.py").write_text(MODULE)
    given = ["plugins=[my_plugin]"]
    assert run(["train", *SMALL, *given]) == 0, capsys.readouterr().err
    for command, arguments in CALLS.items():
        assert run([command, *arguments, *given]) == 0, (command, capsys.readouterr().err)
    assert run(["predict", "checkpoint=exported", "images=photo.png", "device=cpu", *given]) == 0
    lines = (folder / "runs/predictions/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["labels"][0]["label"] in ("red", "green", "blue") for line in lines] == [True]

    capsys.readouterr()
    assert run(["train", *SMALL, *given, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "detector.side=2" in shown
    assert "cells along each side. [an integer of at least 1]" in shown
    for wrong, message in {
        "detector.side=0": "detector.side=0: expected an integer of at least 1.",
        "detector.sid=3": "detector.sid: unknown setting; did you mean detector.side?",
        "dataset.number=two": "dataset.number=two: expected an integer of at least 3.",
        "dataset=stripe": "dataset=stripe: unknown option; choose from ",
    }.items():
        assert run(["train", *given, *SMALL[:1], "run_dir=runs/wrong", wrong]) == 2
        assert capsys.readouterr().err.startswith(f"gm-mlic: error: {message}")
    assert not (folder / "runs/wrong").exists()


@pytest.mark.usefixtures("registered")
def test_checkpoints_do_not_import_plugins(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    (folder / "my_plugin.py").write_text(MODULE)
    assert run(["train", *SMALL, "plugins=[my_plugin]"]) == 0
    assert "my_plugin" in (folder / "runs/stripes/config.yaml").read_text()
    from gm_mlic import registry

    for name, entry in (("DETECTORS", "cells"), ("DATASETS", "stripes")):
        monkeypatch.delitem(getattr(registry, name)._entries, entry)
    del sys.modules["my_plugin"]
    capsys.readouterr()
    for command in ("predict", "explain", "export", "eval"):
        assert run([command, *CALLS[command]]) == 2
        error = capsys.readouterr().err
        assert "plugins=[MODULE]" in error
        assert error.count("\n") == 1
    assert "my_plugin" not in sys.modules


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "plugins=my_plugin: no such module"),
        ("import nowhere_to_be_found", "plugins=my_plugin: No module named 'nowhere_to_be_found'."),
        ("raise ValueError('broken\\nmodule')", "plugins=my_plugin: broken."),
        ("def f(:", "plugins=my_plugin: "),
    ],
)
@pytest.mark.usefixtures("registered")
def test_plugin_that_cannot_be_imported(source, message, folder: Path, capsys: pytest.CaptureFixture[str]):
    if source is not None:
        (folder / "my_plugin.py").write_text(source)
    assert run(["train", *SMALL[2:], "plugins=[my_plugin]"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gm-mlic: error: {message}")
    assert error.count("\n") == 1
    assert not (folder / "runs").exists()


def test_custom_configs_may_not_name_plugins(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "configs/experiment").mkdir(parents=True)
    (folder / "configs/experiment/mine.yaml").write_text("# @package _global_\nplugins: [my_plugin]\n")
    (folder / "my_plugin.py").write_text("raise SystemExit('imported')")
    assert run(["train", "--config-dir", "configs", "experiment=mine"]) == 2
    assert "names plugins, which custom configs may not" in capsys.readouterr().err


@pytest.mark.slow
def test_installed_package(folder: Path):
    """Train from the shell of a fresh environment with a plugin package."""
    source = folder / "source"
    (source / "sample_plugin").mkdir(parents=True)
    (source / "sample_plugin/__init__.py").write_text(MODULE)
    (source / "pyproject.toml").write_text(
        textwrap.dedent("""
            [build-system]
            requires = ["setuptools"]
            build-backend = "setuptools.build_meta"
            [project]
            name = "sample-plugin"
            version = "1.0"
            [project.entry-points."gm_mlic.plugins"]
            sample = "sample_plugin"
            [tool.setuptools]
            packages = ["sample_plugin"]
        """)
    )
    venv.create(folder / "env", with_pip=False)
    python = folder / "env/bin/python"
    shown = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    # The packages of this environment, and nothing else of it.
    packages = [path for path in map(Path, site.getsitepackages()) if path.is_dir()]
    lines = [f"import site; site.addsitedir({str(path)!r})" for path in packages]
    (Path(shown.strip()) / "packages.pth").write_text("\n".join(lines) + "\n")

    def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", "gm_mlic", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)

    assert "dataset=stripes: unknown option" in shell("train", *SMALL).stderr
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--no-index", source], check=True, capture_output=True)
    done = shell("train", *SMALL, "detector.side=3", "graph.m=9")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "runs/stripes/metrics.json").read_text())
    assert result["dataset"]["name"] == "stripes"
    done = shell("predict", *CALLS["predict"])
    assert done.returncode == 0, done.stderr
