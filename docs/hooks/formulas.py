"""Turn the LaTeX of a page into MathML, which browsers draw themselves: no script, no font, no request to a server."""

import html
import re

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.S)
FUNCTION = re.compile(r"(<mi>(?:log|cos)</mi>)(?!<mrow><mo|<mo)")  # without parentheses after it


def on_page_content(content: str, **_: object) -> str:
    """Replace each formula of a rendered page."""
    content = BLOCK.sub(lambda found: _to_mathml(found[1], "block"), content)
    return INLINE.sub(lambda found: _to_mathml(found[1], "inline"), content)


def _to_mathml(latex: str, display: str) -> str:
    """Return the MathML of a formula, with LaTeX's space between a function's name and its argument."""
    return FUNCTION.sub(r'\1<mspace width="0.167em" />', convert(html.unescape(latex), display=display))
