"""Documentation: examples run, commands compose, pages build without warnings.

Python blocks of a page run in order in one namespace, in an empty folder. A block after a comment `<!-- file: NAME -->`
is written to that file instead, before any other runs. A shell block after a comment `<!-- run -->` runs too, with the
overrides in the comment (`<!-- run: seed=1 -->`); the commands of other shell blocks are composed.
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from gm_mlic.cli.compose import compose
from gm_mlic.cli.main import COMMANDS, run
from gm_mlic.config import SECTIONS, settings_of_section
from gm_mlic.registry import Registry

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NOTEBOOK = DOCS / "notebooks" / "tour.ipynb"

_BLOCK = re.compile(
    r"(?:^<!-- (run|file)(?:: (.*?))? -->\n)?^```(python|sh|yaml|toml)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """Code block: its language, the kind of its comment, if any, and the words of the comment."""

    language: str
    code: str
    kind: str
    words: tuple[str, ...]

    @property
    def runs(self) -> bool:
        return self.kind == "run" or (self.language == "python" and not self.kind)


def blocks(page: Path) -> list[Block]:
    found = _BLOCK.findall(page.read_text())
    return [Block(language, code, kind, tuple(shlex.split(words))) for kind, words, language, code in found]


def write_files(page: Path) -> None:
    for block in blocks(page):
        if block.kind == "file":
            (name,) = block.words
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(block.code)
    importlib.invalidate_caches()


def commands(code: str) -> Iterator[list[str]]:
    """Arguments of every gm-mlic command in a shell block, including commands of torchrun or srun."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for start in ("gm-mlic", "gm_mlic"):
            if start in words and words[0] != "pip":
                yield words[words.index(start) + 1 :]


@pytest.fixture
def in_temporary_folder(registries: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gm-mlic"])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.mark.usefixtures("in_temporary_folder")
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.runs for b in blocks(p))], ids=lambda p: p.stem)
def test_page_examples_run(page: Path):
    write_files(page)
    names: dict = {"__name__": page.stem}
    for block in blocks(page):
        if block.runs and block.language == "python":
            exec(compile(block.code, str(page), "exec"), names)
        elif block.runs:
            for command in commands(block.code):
                assert run([*command, *block.words]) == 0, command


def shown_commands() -> list[tuple[str, list[str]]]:
    return [(p.stem, c) for p in PAGES for b in blocks(p) if b.language == "sh" for c in commands(b.code)]


@pytest.mark.usefixtures("in_temporary_folder")
@pytest.mark.parametrize(("page", "command"), shown_commands(), ids=lambda value: " ".join(value)[:60])
def test_documented_commands_compose(page: str, command: list[str]):
    write_files(DOCS / f"{page}.md")
    name, *arguments = command
    assert name in COMMANDS
    settings = [argument for argument in arguments if "=" in argument or argument.startswith("~")]
    folders = [Path(folder) for flag, folder in itertools.pairwise(arguments) if flag == "--config-dir"]
    others = [a for a in arguments if a not in (*settings, "--help", "--config-dir") and Path(a) not in folders]
    assert all(other == "-m" or (name in ("runs", "report") and not other.startswith("-")) for other in others), others
    if "-m" in others:  # one of the jobs
        parsed = OverridesParser.create().parse_overrides(settings)
        settings = [
            f"{o.key_or_group}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else text
            for o, text in zip(parsed, settings, strict=True)
        ]
    compose(name, settings, folders)


def test_all_code_blocks_are_found():
    """Every fenced block is parsed by this module."""
    for page in PAGES:
        fences = re.findall(r"^ *```+ *(\S*)$", page.read_text(), flags=re.MULTILINE)
        opened = [fence for fence in fences if fence]
        known = re.compile(r"python|sh|yaml|toml|text|\{[\w-]+\}")
        assert [fence for fence in opened if not known.fullmatch(fence)] == [], page.name
        assert sum(fence in ("python", "sh", "yaml", "toml") for fence in opened) == len(blocks(page)), page.name
        comments = re.findall(r"<!-- .*? -->", page.read_text())
        assert len(comments) == sum(bool(b.kind) for b in blocks(page)), f"{page.name}: a comment without a block"
        assert all(b.kind == "file" for b in blocks(page) if b.language in ("yaml", "toml")), page.name


def test_documented_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([\w-]+)`", page.read_text())) <= targets, page.name


def test_literal_includes_exist_in_the_source():
    """Sphinx warns about missing objects; start and end lines of excerpts are checked here."""
    page = (DOCS / "concepts.md").read_text()
    shown = re.findall(r"^```\{literalinclude\} \.\./(\S+)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(shown) >= 10
    for file, options in shown:
        source = (ROOT / file).read_text()
        for marker in re.findall(r"^:(?:start|end)-at: (.*)$", options, flags=re.MULTILINE):
            assert marker in source, marker
    for number in (1, 2, 3, 4, 13, 14, 15):
        assert f"## Eq. {number}: " in page


@pytest.mark.usefixtures("in_temporary_folder")
def test_concepts_figure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import figures

    figures.main(Path("graph.png"))
    assert Path("graph.png").stat().st_size > 10_000


def test_generated_pages_match_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import generate

    assert generate.help_of("runs").startswith("gm-mlic runs: ")
    monkeypatch.setattr(generate, "help_of", lambda *command: f"help of {command}")  # all of them would take seconds
    generate.write_pages(ROOT, tmp_path)
    commands_page = (tmp_path / "commands.md").read_text()
    assert all(f"## gm-mlic {command}\n" in commands_page for command in COMMANDS)
    configuration = (tmp_path / "configuration.md").read_text()
    for key, kind in SECTIONS.items():
        for option in kind.names() if isinstance(kind, Registry) else [None]:
            for setting in settings_of_section(key, option):
                assert f"`{key}.{setting}` | " in configuration or f"`{setting}" in configuration, (key, option)
    for file in (ROOT / "conf").rglob("*.yaml"):
        if "hydra" not in file.parts:
            assert f"../../conf/{file.relative_to(ROOT / 'conf')}\n" in configuration
    interface = "".join(page.read_text() for page in (tmp_path / "api").glob("*.md"))
    listed = set(re.findall(r"automodule:: (\S+)", interface))
    package = ROOT / "src" / "gm_mlic"
    modules = {
        ".".join(file.relative_to(ROOT / "src").with_suffix("").parts)
        for file in package.rglob("*.py")
        if file.stem not in ("__init__", "__main__", "_version") and "conf" not in file.parts
    }
    assert modules <= listed
    assert all(
        (tmp_path / "experiments" / f"{p.parent.name}.md").exists() for p in ROOT.glob("experiments/*/README.md")
    )


def test_public_names_are_listed():
    import gm_mlic

    page = (DOCS / "api.md").read_text()
    assert set(re.findall(r"^   (\w+)$", page, flags=re.MULTILINE)) == set(gm_mlic.__all__) - {"__version__"}


def test_notebook_is_small_and_has_no_local_paths():
    import nbformat

    assert NOTEBOOK.stat().st_size < 300_000
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    text = NOTEBOOK.read_text()
    assert "/home/" not in text
    assert str(ROOT) not in text


@pytest.mark.slow
@pytest.mark.usefixtures("in_temporary_folder")
def test_plugin_of_the_page_installs(tmp_path: Path):
    write_files(DOCS / "plugins.md")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", "site", "."], check=True)
    (tmp_path / "elsewhere").mkdir()
    code = "from gm_mlic.registry import DETECTORS; print('cells' in DETECTORS.names())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd="elsewhere", capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path: Path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-E", "-d", tmp_path / "trees", DOCS]
    done = subprocess.run([*command, tmp_path / "html"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, textwrap.shorten(done.stderr, 5000)
    concepts = (tmp_path / "html" / "concepts.html").read_text()
    source = (DOCS / "concepts.md").read_text()
    assert len(re.findall(r"^## Eq", source, flags=re.MULTILINE)) == 10
    assert concepts.count('<div class="formula"><math') == source.count("$$") // 2 >= 10
    assert not re.search(r"<script[^>]*mathjax", concepts, flags=re.IGNORECASE)  # no external resources
