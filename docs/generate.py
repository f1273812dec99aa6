"""Pages made from the code itself, so that they cannot fall behind it: docs/generated, before each build.

`generated/commands.md` holds what every command says of itself, `generated/configuration.md` the files of conf/,
`generated/api/` a page for each stage of docs/architecture.md with all its modules, `generated/experiments/` the
studies, `generated/tour.md` the notebook, `generated/model_zoo.md` and `generated/models/` the models that there are
and the cards of those with weights.
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
    """Write all generated pages into ``out``; a page that is as it was is not touched."""
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
    """What ``gm-mlic --help`` and ``gm-mlic COMMAND --help`` print."""
    from gm_mlic.cli.main import COMMANDS

    parts = [
        "# Command line",
        "What each command prints with `--help`. The settings stand there with their defaults; [the files of "
        "conf/](configuration.md) say what each one decides.",
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
    """The files of ``conf/``, whose comments say what each setting decides."""
    conf = root / "conf"
    groups = sorted(p for p in conf.iterdir() if p.is_dir() and p.name not in ("hydra", "__pycache__"))
    parts = [
        "# Configuration",
        "Every setting of a command is a key that can be changed on the command line: `gm-mlic train graph.m=8`. Keys "
        "stand in groups, one for each stage; `gm-mlic train model=mil_max` takes another file of a group, and "
        "`experiment=`, `ablation=` and `sweep=` take a file that overrides keys of several groups. A folder of your "
        "own with more files is given as `--config-dir DIR`. The files follow as they are shipped.",
        "## Commands\n\nThe groups that a command reads, and the settings that are its own.",
    ]
    for file in sorted(conf.glob("*.yaml")):
        parts += [f"### gm-mlic {file.stem.replace('_', '-')}", _include(conf, file)]
    for group in groups:
        files = sorted(group.glob("*.yaml"))
        parts.append(f"## {group.name}\n\nOne of {', '.join(f'`{group.name}={f.stem}`' for f in files)}.")
        for file in files:
            parts += [f"### {group.name}={file.stem}", _include(conf, file)]
    return "\n\n".join(parts) + "\n"


def _include(conf: Path, file: Path) -> str:
    return f"```{{literalinclude}} ../../conf/{file.relative_to(conf).as_posix()}\n:language: yaml\n```"


# The interface of every module


def stages(root: Path) -> list[tuple[int, str, str, str]]:
    """Number, name, folder (or module) and outcome of each stage, from the table in docs/architecture.md."""
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
            _module_page(f"{number} {name}", f"What comes out: {what}.", found),
        )
    common = [module for name in COMMON for module in modules(package, name)]
    yield "99_common.md", _module_page("common", "What every stage may use.", common)


def modules(package: Path, name: str) -> list[str]:
    """The dotted names of the modules of a stage; a package's own only where it defines something itself."""
    if (package / f"{name}.py").is_file():
        return [f"{package.name}.{name}"]
    files = sorted((package / name).rglob("*.py"))
    return [_dotted(package, file) for file in files if file.name != "__init__.py" or _defines(file)]


def _defines(file: Path) -> bool:
    defined = [n.name for n in ast.parse(file.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return any(not name.startswith("__") for name in defined)


def _dotted(package: Path, file: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_page(title: str, text: str, found: list[str]) -> str:
    parts = [f"# {title}", text]
    for module in found:
        parts.append(f"## {module.removeprefix('gm_mlic.')}\n\n```{{eval-rst}}\n.. automodule:: {module}\n```")
    return "\n\n".join(parts) + "\n"


# The studies, and other pages that stand elsewhere


def experiments(root: Path) -> Iterator[tuple[str, str]]:
    """The README of each study."""
    for file in sorted((root / "experiments").glob("*/README.md")):
        yield f"{file.parent.name}.md", moved(file, root, "../../..")


def moved(file: Path, root: Path, up: str) -> str:
    """A page of the repository, with links as they are from a generated page; ``up`` leads from there to ``root``."""

    def lead(match: re.Match[str]) -> str:
        target, hash_sign, place = match[1].partition("#")
        if target.startswith(("http:", "https:")) or not target:
            return match[0]
        path = (file.parent / target).resolve()
        if (path / "README.md").exists():
            path /= "README.md"
        for folder in ("experiments", "models"):  # these are pages here
            if path.name == "README.md" and path.parent.parent.name == folder:
                path = root / "docs" / "generated" / folder / f"{path.parent.name}.md"
        return f"]({up}/{path.relative_to(root).as_posix()}{hash_sign}{place})"

    return re.sub(r"\]\(([^)\s]+)\)", lead, file.read_text())


# The notebook


def tour(notebook: Path) -> Iterator[tuple[Path, str | bytes]]:
    """The notebook as a page, with the outputs that it was committed with."""
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
                parts.append(f"![What the cell above draws]({picture})")
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
