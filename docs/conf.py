"""Configuration of Sphinx: `make docs`, or `python -m sphinx -W --keep-going -n docs docs/_build/html`."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

from generate import write_pages  # noqa: E402 - docs/ is not a package

from gm_mlic import __version__  # noqa: E402

project = "gm-mlic"
author = "the gm-mlic authors"
release = version = __version__

extensions = [
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "notebooks"]

#: Pages of index.md that are listed only if they exist.
OPTIONAL_PAGES = ("open_labels", "generated/model_zoo")

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"gm-mlic {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"source_edit_link": "", "source_view_link": ""}
html_copy_source = False
html_show_copyright = False

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
#: Parts of annotations that state bounds; annotated_types has no inventory.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(.*\.)?(Annotated|Doc|DocInfo|Ge|Gt|Le|Lt|Interval|Len|Predicate|SupportsGe|Natural|Positive|Fraction)",
    ),
    ("py:.*", r"typing\..*|//.*"),
    ("py:.*", r"(ge|gt|le|lt|min_length|max_length|documentation)=.*|None\)|[\d.]+\)?"),
]
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape", "Shapes", ("Shapes and units", "params_style"), ("Attributes", "params_style")]


def _parse(docstring: GoogleDocstring) -> None:
    """Parse attributes and properties as methods: Napoleon reads the text before a colon as a type."""
    if docstring._what in ("attribute", "data", "property"):
        docstring._what = "method"
    _parse_as_napoleon(docstring)


def _consume_returns(docstring: GoogleDocstring, preprocess_types: bool = False) -> list[tuple[str, str, list[str]]]:
    """Parse Returns as text only: the type is in the annotation."""
    lines = docstring._dedent(docstring._consume_to_next_section())
    return [("", "", lines)] if lines else []


_parse_as_napoleon = GoogleDocstring._parse
GoogleDocstring._parse = _parse
GoogleDocstring._consume_returns_section = _consume_returns


def resolve(app: Sphinx, env: Any, node: Any, contnode: nodes.Node) -> nodes.Node | None:
    """Resolve a reference to the documentation of its object; names of other packages get no link.

    A name may be re-exported by a package (``gm_mlic.nn.GMMLIC``), imported in the module of the docstring, or the
    unique suffix of a documented name. Sphinx warns about other names.
    """
    if node.get("refdomain") != "py":
        return None
    target, domain = node["reftarget"], env.get_domain("py")
    name = _home(target, node.get("py:module"), node.get("py:class"))
    if name is None:
        ends = [known for known in domain.objects if known.endswith(f".{target}")]
        if len(ends) != 1:
            return None
        (name,) = ends
    if name not in domain.objects and name not in domain.modules:
        return contnode  # of another package, or without a docstring
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)


def _home(target: str, module: str | None, cls: str | None) -> str | None:
    """The fully qualified name of ``target``, as seen from ``module`` (and its class ``cls``)."""
    for owner, names in _readings(target.split("."), module, cls):
        thing = owner
        for name in names:
            owner, thing = thing, getattr(thing, name, _MISSING)
            if thing is _MISSING:
                break
        if thing is _MISSING:
            is_field = isinstance(owner, type) and names[-1] in getattr(owner, "__annotations__", {})
            if is_field:
                return f"{owner.__module__}.{owner.__qualname__}.{names[-1]}"
            continue
        if isinstance(thing, ModuleType):
            return thing.__name__
        if isinstance(getattr(thing, "__module__", None), str) and hasattr(thing, "__qualname__"):
            return f"{thing.__module__}.{thing.__qualname__}"
        where = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
        return f"{where}.{names[-1]}"
    return None


_MISSING = object()


def _readings(names: list[str], module: str | None, cls: str | None) -> Iterator[tuple[Any, list[str]]]:
    """Candidate objects for the first names, and the remaining names."""
    if module:
        here = importlib.import_module(module)
        yield here, names
        if hasattr(here, cls or ""):
            yield getattr(here, cls or ""), names
    yield builtins, names
    yield typing, names
    for cut in range(len(names), 0, -1):
        if all(name.isidentifier() for name in names[:cut]):
            with contextlib.suppress(ImportError):
                yield importlib.import_module(".".join(names[:cut])), names[cut:]


def skip(app: Sphinx, what: str, name: str, thing: Any, is_skipped: bool, options: Any) -> bool | None:
    """Skip fields of named tuples, and methods of an object that are members of a module (``register_model``)."""
    is_field = str(getattr(thing, "__doc__", "")).startswith("Alias for field number")
    return True if is_field or (what == "module" and isinstance(thing, MethodType)) else None


def parsable(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Replace ``<factory>``, a default of dataclass fields that Sphinx cannot parse, by ``...``."""
    return (signature.replace("<factory>", "..."), returns) if signature else None


def leave_out(app: Sphinx, page: str, source: list[str]) -> None:
    """Remove missing optional pages from the index."""
    for name in () if page != "index" else OPTIONAL_PAGES:
        if not (DOCS / f"{name}.md").exists():
            source[0] = source[0].replace(f"\n{name}\n", "\n")


def setup(app: Sphinx) -> None:
    """Generate pages before Sphinx collects them, and resolve references."""
    write_pages(ROOT, DOCS / "generated")
    app.connect("source-read", leave_out)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", parsable)
    app.connect("missing-reference", resolve)
