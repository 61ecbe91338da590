# SPDX-License-Identifier: Apache-2.0
"""The results of an evaluation as a Markdown table."""

from collections.abc import Sequence
from typing import Any


def markdown(results: dict[str, Any], *, with_provenance: bool = True) -> str:
    """Returns the table: metric, value, what higher means, what it was measured with.

    Args: results: as results.json holds them.
    """
    origin = f"by {results['model']}"
    if not results["model"]:
        origin = f"in {results['images_folder']}"
    lines = [f"{results['images']} images {origin}", ""]
    columns = ["metric", "value", "higher means", "measured with"]
    count = len(columns) if with_provenance else 3
    lines += [_row(columns[:count]), _row(["---"] * count)]
    for row in results["metrics"]:
        provenance = row["provenance"].items()
        origin = ", ".join(f"{name} {value}" for name, value in provenance)
        cells = row["metric"], f"{row['value']:.4f}", row["higher_means"], origin
        lines.append(_row(cells[:count]))
    for name, reason in results["skipped"].items():
        lines += ["", f"Skipped {name}: {reason}"]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
