"""Formulas as MathML, which browsers render without scripts or a network connection."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

log = logging.getLogger(__name__)

#: Sizes of brackets, which MathML computes.
_SIZES = re.compile(r"\\[bB]igg?[lrm]?(?![a-zA-Z])")


def _formula(node: nodes.Element, *, as_block: bool) -> str:
    formula = _SIZES.sub("", node.astext())
    try:
        return str(tex2mathml(formula, as_block=as_block))
    except (MathError, AttributeError) as error:  # AttributeError: an unexpected & in the formula
        log.warning("invalid formula (%s): %s", error, node.astext(), location=node)
        return f"<code>{node.astext()}</code>"


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(_formula(node, as_block=False))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{_formula(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer ``mathml``, for ``html_math_renderer``."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
