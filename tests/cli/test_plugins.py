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
REGISTER = "from gm_mlic import register_detector"
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
    """Restore registries, modules and the search path afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))


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
        (
            "import nowhere_to_be_found",
            "plugins=my_plugin: No module named 'nowhere_to_be_found' (my_plugin.py, line 1)",
        ),
        ("raise ValueError('broken\\nmodule')", "plugins=my_plugin: broken (my_plugin.py, line 1); correct it."),
        ("def f(:", "plugins=my_plugin: invalid syntax (my_plugin.py, line 1); correct it."),
        ("import sys\nsys.exit(3)", "plugins=my_plugin: 3 (my_plugin.py, line 2)"),
        (
            f"{REGISTER}\nregister_detector('onnx')(dict)",
            "plugins=my_plugin: the detector 'onnx' is already registered",
        ),
        (
            f"{REGISTER}\nregister_detector('a/b')(dict)",
            "plugins=my_plugin: the name 'a/b' of a detector may have only",
        ),
        (f"{REGISTER}\nregister_detector(dict)", "plugins=my_plugin: register_detector needs a name: @register_d"),
        (f"{REGISTER}\nregister_detector('mine')(3)", "plugins=my_plugin: register_detector('mine') needs a class"),
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


@pytest.mark.parametrize("place", ["import", "constructor"])
@pytest.mark.usefixtures("registered")
def test_a_signal_within_a_plugin_is_no_error_of_it(place: str, folder: Path):
    stop = "from gm_mlic.errors import Terminated\nraise Terminated\n"
    built = MODULE.replace("self.side = side", "from gm_mlic.errors import Terminated; raise Terminated")
    (folder / "my_plugin.py").write_text(stop if place == "import" else built)
    assert run(["train", *SMALL, "plugins=[my_plugin]"]) == 143


CALL, IMAGE = "return [self.one(image).top(m) for image in images]", "return image\n"
WRONG = {
    # what is replaced, by what, and the error
    "no_fingerprint": (
        "self.fingerprint = ",
        "self.other = ",
        "The detector cells, Cells, has no attribute fingerprint",
    ),
    "empty_fingerprint": (
        'hashlib.sha256(f"cells {side}".encode()).hexdigest()',
        "''",
        "The detector cells has the fingerprint '', expected a string",
    ),
    "exit": ("self.side = side", "raise SystemExit(7)", "The detector cells, Cells, called exit(7): correct it."),
    "no_features": ('"cells", (), 3', '"cells", (), 0', "has the feature_dim 0, expected an integer"),
    "folderfolder": (
        'name, labels, feature_dim = "cells"',
        'name, labels, feature_dim = "../cells"',
        "has the name '../cells'",
    ),
    "constructor": ("self.side = side", "{}['x']", "the plugin my_plugin failed: KeyError: 'x' (my_plugin.py, line "),
    "abstract": ("def image(", "def picture(", "Stripes has no image: correct it."),
    "labels": ("labels = tuple(COLORS)", "names = tuple(COLORS)", "The dataset Stripes has no attribute labels"),
    "labels_list": ("labels = tuple(COLORS)", "labels = list(COLORS)", "has labels of type list, expected a tuple."),
    "ids": (
        'tuple(f"{split}-{i}" for i in range(number))',
        "tuple(range(number))",
        "has ids of type int, expected strings.",
    ),
    "targets": (".astype(np.int8)", ".astype(np.int8).T", "targets have shape (3, 12), expected (12, 3)."),
    "no_images": ("for i in range(number))", "for i in range(0))", "The dataset has no images: check its folder"),
    "splits": (
        "self.split = split",
        "self.split, self.labels = split, (split, 'b', 'c')",
        "The labels of val and train",
    ),
    "default": (
        "side: Annotated[int, Ge(1)] = 2",
        "side=torch.device('cpu')",
        "the default of side is a device, expected",
    ),
}
RUNNING = {
    "raises": (
        CALL,
        "raise ValueError('no\\nlight')",
        "the plugin my_plugin failed: ValueError: no light (my_plugin.py",
    ),
    "none": (CALL, "return [None for image in images]", "an object of type NoneType, expected Instances."),
    "generator": (CALL, "return (self.one(image).top(m) for image in images)", "returned a generator, expected a list"),
    "double": (" pooled)", " pooled.double())", "features of type torch.float64, expected torch.float32."),
    "arrays": (" pooled)", " pooled.numpy())", "features of type ndarray, expected a tensor."),
    "nan": (" pooled)", " pooled / 0)", "features that are NaN or infinite"),
    "pixels": ("Instances(boxes,", "Instances(64 * boxes,", "boxes outside of 0 to 1: divide them by"),
    "corners": ("Instances(boxes,", "Instances(boxes.flip(1),", "boxes that are not (x1, y1, x2, y2)"),
    "scores": ("torch.linspace(1, 0.5", "torch.linspace(2, 0.5", "scores outside of 0 to 1."),
    "classes": ("(n * n,), -1)", "(n * n,), 4)", "detected labels that are neither -1 nor an index of its 0 classes."),
    "gray": (
        IMAGE,
        "return image.convert('L')\n",
        "Stripes.image returned an image of mode L for 'train-0'",
    ),
    "array": (IMAGE, "return np.asarray(image)\n", "Stripes.image returned a ndarray for 'train-0'"),
    "camera": (
        IMAGE,
        "raise OSError('off')\n",
        "the plugin my_plugin failed: OSError: off (my_plugin.py, line",
    ),
}


@pytest.mark.parametrize("case", [*WRONG, *RUNNING])
@pytest.mark.usefixtures("registered")
def test_errors_of_a_plugin(case: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    """One line that names what is wrong, exit code 2, and no run folder if the run did not begin."""
    old, new, message = {**WRONG, **RUNNING}[case]
    assert MODULE.count(old) == 1
    (folder / "my_plugin.py").write_text(MODULE.replace(old, new))
    assert run(["train", *SMALL, "plugins=[my_plugin]"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("gm-mlic: error: ")
    assert message in error
    assert (folder / "runs/stripes").exists() == (case in RUNNING)


@pytest.mark.parametrize("command", [["plan"], ["train", "instances.online=true"], ["train", "graph.views=2"]])
@pytest.mark.usefixtures("registered")
def test_results_of_a_detector_are_checked_without_a_store(command, folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "my_plugin.py").write_text(MODULE.replace(CALL, "return [None for image in images]"))
    settings = [setting for setting in SMALL if command[0] == "train" or not setting.startswith("run_dir")]
    assert run([*command, *settings, "plugins=[my_plugin]"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "gm-mlic: error: The detector cells returned, for image " in error
    assert "an object of type NoneType, expected Instances." in error


PARTS = textwrap.dedent("""
    import torch
    from gm_mlic import AssignmentBatch, register_embedding, register_model
    from gm_mlic.embeddings import LabelEmbedding

    @register_model("wrong")
    class Wrong(torch.nn.Module):
        def __init__(self, trained: bool = True):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=trained)

        def forward(self, data):
            return self.weight.sum()

    register_model("function")(lambda: 3)

    @register_embedding("backwards")
    def backwards(labels):
        names = tuple(labels)[::-1]
        return LabelEmbedding(names, torch.eye(len(names)), "", dict.fromkeys(names, ()))

    register_embedding("vectors")(lambda labels: torch.eye(len(labels)))
""")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model=wrong"], "The model wrong returned a Tensor, expected a ModelOutput."),
        (["model=wrong", "model.trained=false"], "The model wrong has no parameters to train: correct its class."),
        (["model=function"], "The model function is a int, expected a torch.nn.Module."),
        (["embedding=backwards"], "for the given labels in the same order: correct it."),
        (["embedding=vectors"], "The embedding vectors returned a Tensor, expected a LabelEmbedding."),
    ],
)
@pytest.mark.usefixtures("registered")
def test_errors_of_models_and_embeddings(settings, message, folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "my_plugin.py").write_text(MODULE + PARTS)
    assert run(["train", *SMALL, "plugins=[my_plugin]", *settings]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("registered")
def test_names_of_plugins(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "my_plugin.py").write_text(
        MODULE.replace('register_detector("cells")', 'register_detector("resnet50_fpn")')
    )
    (folder / "json.py").write_text("")
    (folder / "xml").mkdir()
    (folder / "xml" / "__init__.py").write_text("")
    for name, message in {
        "my_plugin": "The detector resnet50_fpn of a plugin has the name of a preset of gm-mlic: choose another name.",
        "my_plugin.py": "plugins=my_plugin.py: name the module without .py: plugins=[my_plugin].",
        "json": "plugins=json: there is an installed module of this name; rename json.py.",
        "xml": "plugins=xml: there is an installed module of this name; rename the folder xml.",
    }.items():
        assert run(["train", *SMALL, f"plugins=[{name}]"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("registered")
def test_statistics_check_what_a_dataset_returns(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "my_plugin.py").write_text(MODULE.replace("return image\n", "return image.convert('L')\n"))
    assert run(["dataset", "plugins=[my_plugin]", "dataset=stripes", "check=true"]) == 0
    assert "returned an image of mode L for 'train-0', expected an RGB image" in capsys.readouterr().out


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("command", ["dataset", "extract", "train"])
def test_splits_have_the_same_labels(command: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "my_plugin.py").write_text(
        MODULE.replace(
            "self.split = split\n",
            "self.split = split\n        self.labels = tuple(COLORS)[:: 1 - 2 * (split == 'val')]\n",
        )
    )
    assert run([command, "plugins=[my_plugin]", "dataset=stripes"]) == 2
    message = "The labels of val and train differ: all splits need the same labels in one order."
    assert message in capsys.readouterr().err
    assert not (folder / "data").exists()
    assert not list(folder.glob("runs/*"))


@pytest.mark.usefixtures("registered")
def test_the_number_of_images_may_be_called_size(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "my_plugin.py").write_text(MODULE.replace("number", "size"))
    assert run(["dataset", "plugins=[my_plugin]", "dataset=stripes", "dataset.size=6"]) == 0
    assert " 6 " in capsys.readouterr().out


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
