# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown."""

import re
from collections.abc import Iterable, Sequence


class Markdown(str):
    """Text that is Markdown already, and is not escaped again."""


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False
) -> str:
    """Returns a table, one line a row.

    Args: numbers: align every column but the first to the right.
    """
    rule = ["---", *["---:" if numbers else "---"] * (len(heads) - 1)]
    lines = [[escape(cell) for cell in row] for row in (heads, *rows)]
    lines.insert(1, rule)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escape(text: str) -> str:
    """Returns text that Markdown shows as it is, on one line."""
    if isinstance(text, Markdown):
        return text
    text = re.sub(r"([\\`*|<>&#~\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", str(text))
    return " ".join(text.split())
