"""Imports comply with docs/architecture.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

import gm_mlic
import gm_mlic.detection
import gm_mlic.metrics

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "gm_mlic"
#: Modules outside the stages; they may be imported from anywhere.
COMMON = {
    "_lazy", "_version", "device", "distributed", "errors", "io", "optim", "registry", "safe_load", "schema", "targets",
}  # fmt: skip
#: Packages that every stage may import.
EVERYWHERE = {"numpy", "torch", "annotated_types"}
FRAMEWORKS = {"hydra", "omegaconf", "lightning", "pytorch_lightning", "wandb"}


@dataclass(frozen=True)
class Stage:
    """Row of the table in docs/architecture.md: stage number, allowed stages and packages."""

    number: int
    stages: frozenset[str]
    packages: frozenset[str]


def stages() -> dict[str, Stage]:
    """Stage by folder (or module)."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \w+ \| `(\w+)(?:/|\.py)` \| .*? \| ([^|]*) \|$", page, flags=re.MULTILINE)
    found = {}
    for number, folder, column in rows:
        column = re.sub(r"\(.*?\)", "", column)
        packages = frozenset(re.findall(r"`(\w+)`", column))
        found[folder] = Stage(int(number), frozenset(re.findall(r"\w+", column)) - packages, packages)
    return found


def modules(stage: str) -> list[Path]:
    folder = PACKAGE / stage
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imported(module: Path) -> set[str]:
    """All modules that a file imports, including imports in functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            if node.module == "gm_mlic":
                found.update(f"gm_mlic.{alias.name}" for alias in node.names)
            else:
                found.add(str(node.module))
    return found


def imports_of(name: str) -> tuple[set[str], set[str]]:
    """Stages (or common modules) and third-party packages that a stage imports."""
    names = {imported_name for module in modules(name) for imported_name in imported(module)}
    ours = {imported_name.split(".")[1] for imported_name in names if imported_name.startswith("gm_mlic.")}
    tops = {imported_name.split(".")[0] for imported_name in names}
    return ours - {name}, tops - sys.stdlib_module_names - EVERYWHERE - {"gm_mlic"}


def loaded_by(code: str, *names: str) -> list[str]:
    """Those of ``names`` that are loaded after ``code`` ran in a new process."""
    code += f"\nimport sys\nprint('loaded:', *sorted(set({names!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()[1:]


def test_importing_prints_nothing():
    names = ", ".join(f"gm_mlic.{name}" for name in stages() if name != "cli")
    done = subprocess.run([sys.executable, "-c", f"import {names}"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_page_lists_every_folder():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()} - {"conf"}
    files = {p.stem for p in PACKAGE.glob("*.py")} - COMMON - {"__init__", "__main__"}
    assert folders | files == set(stages())


@pytest.mark.parametrize("name", stages())
def test_stage_imports_match_the_page(name: str):
    """No other stage or package is imported, and every listed one is."""
    row = stages()[name]
    ours, packages = imports_of(name)
    assert ours - COMMON == row.stages
    assert packages == row.packages
    assert all(stages()[other].number < row.number for other in row.stages)


@pytest.mark.parametrize("name", sorted(COMMON))
def test_common_modules_import_only_common_modules(name: str):
    ours, packages = imports_of(name)
    assert ours <= COMMON
    assert packages == ({"io": {"rich"}, "schema": {"pydantic"}}.get(name, set()))


def test_frameworks_are_imported_only_in_their_stages():
    users = {package: {name for name in stages() if package in stages()[name].packages} for package in FRAMEWORKS}
    assert users == {
        "hydra": {"cli"},
        "lightning": {"training"},
        "omegaconf": {"config", "training", "cli"},
        "pytorch_lightning": set(),
        "wandb": {"training", "cli"},
    }


def test_core_loads_neither_frameworks_nor_torchvision():
    """Including indirect imports. PyG itself imports transformers, if it is installed, and that imports PIL."""
    heavy = {"torchvision", "PIL", "matplotlib", "rich", "gm_mlic.datasets", "gm_mlic.detection.faster_rcnn"}
    by_pyg = {"PIL", "rich"}.intersection(loaded_by("import torch_geometric.nn", "PIL", "rich"))
    core = "import gm_mlic.nn, gm_mlic.graphs, gm_mlic.losses, gm_mlic.metrics"
    assert set(loaded_by(core, *FRAMEWORKS, *heavy)) <= by_pyg


def test_lazy_packages_provide_listed_names():
    for package in (gm_mlic, gm_mlic.detection, gm_mlic.metrics):
        assert all(hasattr(package, name) for name in package.__all__)
        assert set(dir(package)) == set(package.__all__)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = package.nothing


def test_command_line_starts_without_heavy_imports():
    assert loaded_by("import gm_mlic.cli.main", "torch", "hydra", "lightning", "matplotlib") == []


def run_all(commands: list[list[str]], code: str = "0") -> str:
    """Code that runs commands one after the other in one process, and checks their exit codes."""
    run = f"code = run(arguments)\n    assert code == {code}, (arguments, code)"
    return f"from gm_mlic.cli.main import run\nfor arguments in {commands!r}:\n    {run}"


def test_help_and_errors_of_commands_without_a_registry_load_no_torch():
    """Of commands that have no registered options."""
    commands = [
        ["predict", "--help"], ["explain", "--help"], ["serve", "--help"], ["export", "--help"], ["eval", "--help"],
        ["runs", "--help"], ["report", "--help"], ["dashboard", "--help"], ["predict"], ["explain", "imag=x"],
        ["export", "checkpoint=x", "out=y", "size=[1]"], ["eval", "split=tset"], ["runs", "nowhere"],
    ]  # fmt: skip
    code = run_all(commands, "0 if '--help' in arguments else 2")
    assert loaded_by(code, "torch", "lightning", "gm_mlic.training") == []


def test_commands_of_a_trained_model_load_no_lightning(tmp_path: Path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    commands = [
        [*arguments, "checkpoint=gm_mlic_scenes"]
        for arguments in (
            ["predict", "images=photo.png", "device=cpu"],
            ["explain", "image=photo.png", "device=cpu"],
            ["export", "out=model"],
        )
    ]
    code = f"import os\nos.chdir({str(tmp_path)!r})\n{run_all(commands)}"
    assert loaded_by(code, "torch", "lightning", "pytorch_lightning", "gm_mlic.training") == ["torch"]


def test_dataset_and_extract_load_no_lightning():
    """``gm-mlic extract`` imports only :mod:`gm_mlic.training.build`."""
    code = "import gm_mlic.cli.serve, gm_mlic.cli.bench, gm_mlic.cli.dataset, gm_mlic.training.build"
    assert loaded_by(code, "lightning", "pytorch_lightning") == []


#: Config key, not a call.
_CONFIG_KEY = re.compile(
    r"\b(dataset|detector|instances|embedding|graph|model|loss|metrics|optimizer|scheduler|trainer|logger)\.[a-z]\w*(?!\w*\()"
)
_ERRORS = ("ConfigError", "ArgumentError", "DataError", "StoreError", "WeightsError")


@pytest.mark.parametrize("name", [name for name in stages() if name not in {"config", "training", "cli"}])
def test_library_messages_name_arguments_not_config_keys(name: str):
    for module in modules(name):
        for node in ast.walk(ast.parse(module.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) in _ERRORS):
                continue
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    assert not _CONFIG_KEY.search(part.value), f"{module}:{node.lineno}: {part.value}"


#: Calls that execute file content or start a shell.
_FORBIDDEN = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec", "pickle.load",
    "pickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "shutil.unpack_archive",
    "torch.hub.load", "torch.hub.load_state_dict_from_url", "load_state_dict_from_url",
}  # fmt: skip
#: Calls that are safe only with an argument.
_GUARDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


@pytest.mark.parametrize("module", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_shell_and_no_pickle(module: Path):
    for call in ast.walk(ast.parse(module.read_text())):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func)
        given = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
        where = f"line {call.lineno}: {name}"
        assert name not in _FORBIDDEN, where
        assert not name.endswith(".get_state_dict"), where  # torchvision's, which unpickles downloads
        assert given.get("shell") in (None, False), where
        if name in _GUARDED:
            argument, value = _GUARDED[name]
            assert given.get(argument) is value, f"{where} without {argument}={value}"
