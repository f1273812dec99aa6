"""Generate pages in docs/generated from the code, before each build.

`generated/commands.md` has the help of each command, `generated/configuration.md` the files of conf/, `generated/api/`
a page for each stage of docs/architecture.md with all its modules, `generated/experiments/` the studies,
`generated/tour.md` the notebook, `generated/model_zoo.md` the models, and `generated/models/` the model cards.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

#: Modules that all stages may use.
COMMON = ("errors", "targets", "safe_load", "registry", "device", "distributed", "optim", "_lazy")


def write_pages(root: Path, out: Path) -> None:
    """Write all generated pages into ``out``; unchanged pages are not touched."""
    pages: dict[Path, str | bytes] = {}
    pages |= {Path("commands.md"): commands(), Path("configuration.md"): configuration(root)}
    pages |= {Path("api") / name: text for name, text in api(root)}
    pages |= {Path("experiments") / name: text for name, text in experiments(root)}
    if (root / "MODEL_ZOO.md").exists():
        pages[Path("model_zoo.md")] = moved(root / "MODEL_ZOO.md", root, "../..")
    for card in root.glob("src/gm_mlic/zoo/models/*/README.md"):
        text = re.sub(r"\A---\n.*?^---$", "", moved(card, root, "../../.."), flags=re.MULTILINE | re.DOTALL)
        pages[Path("models") / f"{card.parent.name}.md"] = f"---\norphan: true\n---\n{text}"
    pages |= dict(tour(root / "docs" / "notebooks" / "tour.ipynb"))
    if out.exists():
        for old in [p for p in out.rglob("*") if p.is_file() and p.relative_to(out) not in pages]:
            old.unlink()
    for name, content in pages.items():
        file = out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        if not file.exists() or file.read_bytes() != data:
            file.write_bytes(data)


# The command line


def commands() -> str:
    """The output of ``gm-mlic --help`` and ``gm-mlic COMMAND --help``."""
    from gm_mlic.cli.main import COMMANDS

    parts = [
        "# Command line",
        "The output of each command with `--help`, including all settings and their defaults. [The files of "
        "conf/](configuration.md) explain each setting.",
        _block("text", help_of()),
    ]
    for command, what in COMMANDS.items():
        parts += [f"## gm-mlic {command}", f"{what[0].upper()}{what[1:]}.", _block("text", help_of(command))]
    return "\n\n".join(parts) + "\n"


def help_of(*command: str) -> str:
    """The help of a command, as printed."""
    from gm_mlic.cli.main import run

    shown, arguments, environment = io.StringIO(), sys.argv, dict(os.environ)
    try:
        with contextlib.redirect_stdout(shown):
            code = run([*command, "--help"])
    finally:
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)
    if code != 0:
        raise RuntimeError(f"gm-mlic {' '.join(command)} --help failed with code {code}")
    return "\n".join(line.rstrip() for line in shown.getvalue().splitlines())


# Configuration


def configuration(root: Path) -> str:
    """The files of ``conf/``, with a comment on each setting."""
    conf = root / "conf"
    groups = sorted(p for p in conf.iterdir() if p.is_dir() and p.name not in ("hydra", "__pycache__"))
    parts = [
        "# Configuration",
        "Settings are changed on the command line: `gm-mlic train graph.m=8`. They are organized in groups, one per "
        "stage. `gm-mlic train model=mil_max` selects another file of a group. `experiment=`, `ablation=` and `sweep=` "
        "select files that override keys of several groups. `--config-dir DIR` adds a folder of custom files. All "
        "files follow.",
        "## Commands\n\nThe groups and the other settings of each command.",
    ]
    for file in sorted(conf.glob("*.yaml")):
        parts += [f"### gm-mlic {file.stem.replace('_', '-')}", _include(conf, file)]
    for group in groups:
        files = sorted(group.glob("*.yaml"))
        parts.append(f"## {group.name}\n\nOptions: {', '.join(f'`{group.name}={f.stem}`' for f in files)}.")
        for file in files:
            parts += [f"### {group.name}={file.stem}", _include(conf, file)]
    return "\n\n".join(parts) + "\n"


def _include(conf: Path, file: Path) -> str:
    return f"```{{literalinclude}} ../../conf/{file.relative_to(conf).as_posix()}\n:language: yaml\n```"


# The API of all modules


def stages(root: Path) -> list[tuple[int, str, str, str]]:
    """Number, name, folder (or module) and output of each stage, from the table in docs/architecture.md."""
    page = (root / "docs" / "architecture.md").read_text()
    row = re.compile(r"^\| (\d+) (\w+) \| `(\w+)(?:/|\.py)` \| (.*?) \|", flags=re.MULTILINE)
    return [(int(number), name, folder, what) for number, name, folder, what in row.findall(page)]


def api(root: Path) -> Iterator[tuple[str, str]]:
    """A page for each stage, with the docstrings of all its modules."""
    package = root / "src" / "gm_mlic"
    for number, name, folder, what in stages(root):
        found = modules(package, folder)
        yield (
            f"{number:02d}_{folder}.md",
            _module_page(f"{number} {name}", f"Output: {what}.", found),
        )
    common = [module for name in COMMON for module in modules(package, name)]
    yield "99_common.md", _module_page("common", "Modules that every stage may import.", common)


def modules(package: Path, name: str) -> list[str]:
    """The dotted names of the modules of a stage; that of a package only if it defines classes or public functions."""
    if (package / f"{name}.py").is_file():
        return [f"{package.name}.{name}"]
    files = sorted((package / name).rglob("*.py"))
    return [_dotted(package, file) for file in files if file.name != "__init__.py" or _defines(file)]


def _defines(file: Path) -> bool:
    return any(
        isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("__")
        for node in ast.parse(file.read_text()).body
    )


def _dotted(package: Path, file: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_page(title: str, text: str, found: list[str]) -> str:
    parts = [f"# {title}", text]
    for module in found:
        parts.append(f"## {module.removeprefix('gm_mlic.')}\n\n```{{eval-rst}}\n.. automodule:: {module}\n```")
    return "\n\n".join(parts) + "\n"


# The studies, and other pages from outside docs/


def experiments(root: Path) -> Iterator[tuple[str, str]]:
    """The README of each study."""
    for file in sorted((root / "experiments").glob("*/README.md")):
        yield f"{file.parent.name}.md", moved(file, root, "../../..")


def moved(file: Path, root: Path, up: str) -> str:
    """A page of the repository with links for a generated page; ``up`` is the path from there to ``root``."""

    def lead(match: re.Match[str]) -> str:
        target, hash_sign, place = match[1].partition("#")
        if target.startswith(("http:", "https:")) or not target:
            return match[0]
        path = (file.parent / target).resolve()
        if (path / "README.md").exists():
            path /= "README.md"
        for folder in ("experiments", "models"):  # generated pages
            if path.name == "README.md" and path.parent.parent.name == folder:
                path = root / "docs" / "generated" / folder / f"{path.parent.name}.md"
        return f"]({up}/{path.relative_to(root).as_posix()}{hash_sign}{place})"

    return re.sub(r"\]\(([^)\s]+)\)", lead, file.read_text())


# The notebook


def tour(notebook: Path) -> Iterator[tuple[Path, str | bytes]]:
    """The notebook as a page, with its stored outputs."""
    if not notebook.exists():
        return
    parts: list[str] = []
    pictures = 0
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _block("python", source))
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            kinds = [kind for kind in ("jpeg", "png") if f"image/{kind}" in data]
            if kinds:
                pictures += 1
                picture = Path(f"tour_{pictures}.{kinds[0]}")
                yield picture, base64.b64decode("".join(data[f"image/{kinds[0]}"]))
                parts.append(f"![Figure of the cell above]({picture})")
            elif "text" in output or "text/plain" in data:
                parts.append(_block("text", "".join(output.get("text") or data["text/plain"]).rstrip()))
    yield Path("tour.md"), "\n\n".join(parts) + "\n"


def _block(language: str, text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    shutil.rmtree(here / "generated", ignore_errors=True)
    write_pages(here.parent, here / "generated")
