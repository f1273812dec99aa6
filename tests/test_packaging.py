"""The wheel contains every module, config and weights file, and setup.cfg is consistent."""

from __future__ import annotations

import configparser
import re
import zipfile
from pathlib import Path

import pytest
from setuptools import build_meta

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "gm_mlic"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Wheel built from the source distribution of a copy of the tree (building writes into the source tree)."""
    import os
    import shutil
    import tarfile

    tree = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore, symlinks=True)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    before = Path.cwd()
    try:
        os.chdir(tree)
        with tarfile.open(build_meta.build_sdist(str(tree))) as sources:
            sources.extractall(tree / "sdist", filter="data")
        (unpacked,) = (tree / "sdist").iterdir()
        os.chdir(unpacked)
        return zipfile.ZipFile(unpacked / build_meta.build_wheel(str(unpacked)))
    finally:
        os.chdir(before)


def in_tree() -> set[str]:
    kinds = (".py", ".typed", ".json", ".safetensors", ".yaml", ".jinja", ".html", ".css", ".js", ".md")
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix in kinds and "conf" not in p.parts]
    names = {str(p.relative_to(ROOT / "src")) for p in files}
    confs = [p for p in (ROOT / "conf").rglob("*") if p.suffix in (".yaml", ".py")]
    return names | {str(Path("gm_mlic/conf") / p.relative_to(ROOT / "conf")) for p in confs}


def test_wheel_contains_all_files(wheel: zipfile.ZipFile):
    shipped = {name for name in wheel.namelist() if not re.match(r"[^/]+\.dist-info/", name)}
    assert shipped == in_tree()
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


def test_wheel_has_the_console_script(wheel: zipfile.ZipFile):
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    parsed = configparser.ConfigParser()
    parsed.read_string(wheel.read(entry).decode())
    assert dict(parsed["console_scripts"]) == {"gm-mlic": "gm_mlic.cli.main:main"}


def test_configs_are_found_in_the_editable_install():
    """The editable install has the same files as the wheel."""
    from importlib import resources

    assert (resources.files("gm_mlic.conf") / "experiment" / "scenes.yaml").is_file()
    assert (resources.files("gm_mlic.conf") / "hydra" / "job_logging" / "gm_mlic.yaml").is_file()


def test_tested_versions_are_within_the_stated_ranges():
    from packaging.requirements import Requirement

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].splitlines()
    for extra in setup["options.extras_require"].values():
        lines += [line for line in extra.splitlines() if not line.startswith("gm-mlic[")]  # one extra within another
    wanted = {r.name: r for r in (Requirement(line) for line in lines if line.strip() and not line.startswith("#"))}
    text = (ROOT / "constraints.txt").read_text()
    exact = {r.name: r for r in (Requirement(x) for x in text.splitlines() if x.strip() and not x.startswith("#"))}
    assert set(wanted) <= set(exact)
    for name, requirement in wanted.items():
        (pin,) = exact[name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), name


@pytest.mark.parametrize("name", ["torch==2.11.0", "torchvision==0.26.0", "torch-geometric==2.8.0", "lightning==2.6.4"])
def test_version_ranges_include_supported_versions(name: str):
    from packaging.requirements import Requirement

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    package, version = name.split("==")
    requirements = [
        Requirement(x) for x in setup["options"]["install_requires"].splitlines() if x.strip() and "#" not in x
    ]
    (found,) = [r for r in requirements if r.name == package]
    assert found.specifier.contains(version)


def test_compromised_lightning_releases_are_excluded():
    text = (ROOT / "setup.cfg").read_text()
    assert "lightning>=2.6.4" in text
