# SPDX-License-Identifier: Apache-2.0
"""Figures as SVG inside a page, in the colors and the font of its stylesheet."""

import io
import re
import zlib
from xml.sax.saxutils import quoteattr

from matplotlib.backends.backend_svg import FigureCanvasSVG

# Each color is a variable of page.css, which has others for dark screens.
COLORS = ("#0065a8", "#c8500a", "#00805c", "#a8448a", "#8a6800", "#2b8cc4", "#6b5b95")
INK, SOFT, RULE, PAPER = "#1c1d21", "#595c66", "#e4e4e0", "#fefefe"
_VARIABLES = {color: f"var(--c{i})" for i, color in enumerate(COLORS)}
_VARIABLES |= {INK: "var(--ink)", SOFT: "var(--soft)", RULE: "var(--rule)"}
_VARIABLES |= {PAPER: "var(--card)"}
_UNUSED = re.compile(  # parts of a figure that the page does without
    r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->"
    r"|(?<=px)[^;\"]*; font-family: [^;\"]*|(?<=font: )(?=[\d.]+px)"
    r'| transform="rotate\(-0 [^"]*"',
    re.DOTALL,
)


def inline_svg(figure, label: str) -> str:
    """Returns a figure as an <svg> element for the page.

    Lines of method i get data-method="i"; other ids go, as the page has many figures,
    but for those that the figure itself refers to, which become its own. Colors become
    the page's variables, fonts its font, and numbers short.
    """
    FigureCanvasSVG(figure)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = _UNUSED.sub("", text[text.index("<svg") :])
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", text))
    own = f"f{zlib.crc32((label + text).encode()):08x}"

    def attribute(match):
        name = match.group(1)
        if name.startswith("method"):
            return f' data-method="{name[6:]}"'
        return f' id="{own}{name}"' if name in used else ""

    text = re.sub(r' id="([^"]*)"', attribute, text)
    text = re.sub(r"(url\(|href=\")#", rf"\1#{own}", text)
    text = re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m.group()):.5g}", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()
    role = (
        f'role="img" aria-label={quoteattr(label)}' if label else 'aria-hidden="true"'
    )
    head = f'<svg viewBox="0 0 {width} {height}" {role}>'
    return head + re.sub(r"\s*\n\s*", " ", text[text.index(">") + 1 :]).strip()
