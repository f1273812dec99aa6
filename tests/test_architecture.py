"""docs/architecture.md says which stage may import which; here the code is held to it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "gm_mlic"
#: Imported from everywhere.
COMMON = {"errors", "targets", "tensor_files", "_version"}
FRAMEWORKS = {"hydra", "omegaconf", "lightning", "pytorch_lightning", "wandb"}
MAY_IMPORT_FRAMEWORKS = {"training", "cli"}


def stages() -> dict[str, int]:
    """Folder (or module) to the number of its stage, from the table in docs/architecture.md."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \w+ \| `(\w+)(?:/|\.py)` \|", page, flags=re.MULTILINE)
    return {folder: int(number) for number, folder in rows}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem in stages())


def stage_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(module: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found.add(str(node.module))
            if node.module == "gm_mlic":
                found.update(f"gm_mlic.{alias.name}" for alias in node.names)
    return found


def test_the_page_names_every_folder():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert folders | {"losses", "runs"} == set(stages())


@pytest.mark.parametrize("module", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_stage_imports_only_from_stages_before_it(module: Path):
    number = stages()
    mine = stage_of(module)
    for name in imported(module):
        if name.startswith("gm_mlic."):
            other = name.split(".")[1]
            if other in number and other != mine:
                assert number[other] < number[mine], f"{mine} imports {name}"
            else:
                assert other in COMMON | {mine} | set(number), f"{mine} imports {name}"


@pytest.mark.parametrize("module", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_training_and_cli_know_of_frameworks(module: Path):
    tops = {name.split(".")[0] for name in imported(module)} & FRAMEWORKS
    allowed = FRAMEWORKS if stage_of(module) in MAY_IMPORT_FRAMEWORKS else set()
    assert tops <= allowed
    if stage_of(module) != "cli":
        assert "hydra" not in tops


def test_building_blocks_load_without_frameworks():
    """Not even by way of another package."""
    code = (
        "import sys, gm_mlic, gm_mlic.graphs, gm_mlic.nn, gm_mlic.losses, gm_mlic.metrics\n"
        f"print(sorted({FRAMEWORKS!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_starts_without_heavy_imports():
    code = (
        "import sys, gm_mlic.cli.main\nprint(sorted({'torch', 'hydra', 'lightning', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


#: Calls that would run what a file says, or start a shell.
_FORBIDDEN = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec", "pickle.load",
    "pickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "shutil.unpack_archive",
    "torch.hub.load", "torch.hub.load_state_dict_from_url", "load_state_dict_from_url",
}  # fmt: skip
#: Calls that need an argument to be harmless.
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
        assert not name.endswith(".get_state_dict"), where  # torchvision's, which unpickles what it fetched
        assert given.get("shell") in (None, False), where
        if name in _GUARDED:
            argument, value = _GUARDED[name]
            assert given.get(argument) is value, f"{where} without {argument}={value}"
