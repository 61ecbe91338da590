# SPDX-License-Identifier: Apache-2.0
"""The results of an evaluation as a Markdown table."""

from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """Returns the table: metric, value, what higher means, and its provenance.

    Args: results: as results.json holds them.
    """
    origin = f"by {results['model']}"
    if not results["model"]:
        origin = f"in {results['images_folder']}"
    lines = [f"{results['images']} images {origin}", ""]
    lines += ["| metric | value | higher means | measured with |"]
    lines += ["| --- | --- | --- | --- |"]
    for row in results["metrics"]:
        provenance = row["provenance"].items()
        origin = ", ".join(f"{name} {value}" for name, value in provenance)
        cells = row["metric"], f"{row['value']:.4f}", row["higher_means"], origin
        lines.append("| " + " | ".join(cells) + " |")
    for name, reason in results["skipped"].items():
        lines += ["", f"Skipped {name}: {reason}"]
    return "\n".join(lines) + "\n"
