"""Generate pages in docs/generated from the code, before each build.

`generated/commands.md` has the help of each command, `generated/configuration.md` the settings and the presets of
conf/, `generated/api/` a page for each stage of docs/architecture.md with all its modules, `generated/experiments/` the
studies, `generated/tour.md` the notebook, `generated/model_zoo.md` the models, and `generated/models/` the model cards.
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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gm_mlic.registry import Registry

#: Modules that all stages may use.
COMMON = ("errors", "targets", "io", "safe_load", "schema", "registry", "device", "distributed", "optim", "_lazy")


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
    from gm_mlic.cli.settings import COMMANDS, summary

    parts = [
        "# Command line",
        "The output of each command with `--help`, including its settings. [Configuration](configuration.md) lists the "
        "settings of all options.",
        _block("text", help_of()),
    ]
    for command in COMMANDS:
        what = summary(command)
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
    """The settings of all sections, from the code, and the presets of ``conf/``."""
    from gm_mlic.config import SECTIONS
    from gm_mlic.registry import Registry

    conf = root / "conf"
    parts = [
        "# Configuration",
        "Settings are changed on the command line: `gm-mlic train graph.m=8`. They are organized in sections, one per "
        "stage. `dataset=`, `detector=`, `embedding=`, `model=`, `loss=`, `optimizer=`, `scheduler=` and `logger=` "
        "select one of several options, each with its own settings. `gm-mlic COMMAND --help` prints the settings of a "
        "command with their values; those outside of sections, such as `seed`, are in [the help of each command]"
        "(commands.md).",
        "Presets are YAML files with some values of an option. They are in `conf/` and, for your own, in a folder that "
        "is given by `--config-dir DIR` ([plugins](../plugins.md#presets)). The groups `experiment`, `ablation` and "
        "`sweep` have presets of several sections.",
    ]
    for key, kind in SECTIONS.items():
        parts.append(f"## {key}")
        if not isinstance(kind, Registry):
            parts.append(_summary(kind.__doc__))
            parts.append(_table(key, None))
        elif key in ("optimizer", "scheduler"):
            parts.append(_torch_table(key, kind))
        else:
            parts += _options(key, kind)
        parts += _presets(conf, key)
    for group in sorted(p.name for p in conf.iterdir() if p.is_dir()):
        if group not in (*SECTIONS, "hydra", "__pycache__"):
            parts += [f"## {group}", *_presets(conf, group)]
    return "\n\n".join(parts) + "\n"


def _options(key: str, kind: Registry) -> Iterator[str]:
    """A table for each option of a section; options of the same class share one."""
    from gm_mlic.config import settings_of_section
    from gm_mlic.schema import as_typed

    shown: dict[tuple[str, ...], str] = {}
    for name in kind.names():
        settings = settings_of_section(key, name)
        same = shown.setdefault(tuple(settings[n].text for n in settings) or (name,), name)
        yield f"### {key}={name}\n\n{_escaped(kind.entry(name).summary)}."
        if same == name:
            yield _table(key, name) if settings else "No settings."
            continue
        before = settings_of_section(key, same)
        changed = [f"`{key}.{n}={as_typed(s.default)}`" for n, s in settings.items() if s.default != before[n].default]
        yield f"Settings as for `{key}={same}`" + (f"; defaults that differ: {', '.join(changed)}." if changed else ".")


def _table(key: str, name: str | None) -> str:
    from gm_mlic.config import settings_of_section
    from gm_mlic.schema import REQUIRED, as_typed

    lines = ["| setting | default | values | description |", "| --- | --- | --- | --- |"]
    for setting, s in settings_of_section(key, name).items():
        default = "required" if s.default == REQUIRED else f"`{as_typed(s.default) or chr(39) * 2}`"
        lines.append(f"| `{key}.{setting}` | {default} | {_escaped(s.expected)} | {_escaped(s.text)} |")
    return "\n".join(lines)


def _torch_table(key: str, kind: Registry) -> str:
    """One row for each optimizer or schedule of torch, whose documentation describes the arguments."""
    from gm_mlic.config import settings_of_section
    from gm_mlic.schema import REQUIRED, as_typed

    module = {"optimizer": "torch.optim", "scheduler": "torch.optim.lr_scheduler"}[key]
    page = "https://docs.pytorch.org/docs/stable/generated"
    lines = [f"| {key} | settings |", "| --- | --- |"]
    for name in kind.names():
        settings = settings_of_section(key, name).items()
        listed = [f"`{n}`" if s.default == REQUIRED else f"`{n}={as_typed(s.default)}`" for n, s in settings]
        lines.append(f"| [{name}]({page}/{module}.{name}.html) | {', '.join(listed)} |")
    return "\n".join(lines)


def _presets(conf: Path, group: str) -> Iterator[str]:
    for file in sorted((conf / group).glob("*.yaml")):
        yield f"### {group}={file.stem} (preset)"
        yield f"```{{literalinclude}} ../../conf/{group}/{file.name}\n:language: yaml\n```"


def _summary(docstring: str | None) -> str:
    return _escaped((docstring or "").partition("\n")[0])


def _escaped(text: str) -> str:
    """Plain text in a cell of a Markdown table."""
    return re.sub(r"([\\`*_<>\[\]|${}~^#])", r"\\\1", text)


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
