"""The result of an ablation as a picture: PQ of every row, a dot for each seed.

``python -m training.ablation.plot OUT/ablation.json PICTURE.png`` draws a table that is there already; the ablation
itself draws it at its end where matplotlib is installed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from odise_rt.command_line import command
from odise_rt.errors import CheckpointError, MissingPackageError
from odise_rt.files import atomic_writer
from training.ablation.rows import GROUPS

_SERIES = {
    "pq": ("all classes", "#1f4e79", 46),
    "pq_seen": ("seen", "#7aa6c2", 22),
    "pq_unseen": ("unseen", "#d98032", 22),
}
"""Metric that is drawn to its text in the legend, its colour, and the area of a dot."""
_ROW, _GAP = 0.27, 0.5
"""Inches of a row, and of a group's title."""


def draw(table: dict[str, Any], path: Path) -> None:
    """Draw what :func:`training.ablation.table.collect` gives.

    Args:
        table: with at least one measured row.
        path: of the picture; its ending decides the format.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OSError: the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise MissingPackageError("the picture needs matplotlib: pip install 'odise_rt[bench]'") from exc
    groups = {
        title: [row for row in table["rows"] if row["id"].startswith(f"{group}/") and row["results"]]
        for group, title in GROUPS.items()
    }
    groups = {title: rows for title, rows in groups.items() if rows}
    heights = [len(rows) * _ROW + _GAP for rows in groups.values()]
    figure = Figure(figsize=(7.2, sum(heights) + 0.7), layout="constrained")
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows) in zip(panels, groups.items(), strict=True):
        axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
        axes.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=9)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        for spine in ("top", "right", "left"):
            axes.spines[spine].set_visible(False)
        axes.tick_params(axis="y", length=0)
        for position, row in enumerate(rows):
            for metric, (label, colour, area) in _SERIES.items():
                values = [result[metric] for result in row["results"] if result[metric] is not None]
                first = axes is panels[0] and position == 0
                axes.scatter(
                    values, [position] * len(values), s=area, color=colour, label=label if first else None, zorder=3
                )
                if metric == "pq" and len(values) > 1:
                    axes.plot([min(values), max(values)], [position] * 2, color=colour, linewidth=1.5, zorder=2)
    panels[-1].set_xlim(left=0)
    setup = table["setup"]
    panels[-1].set_xlabel(
        f"PQ in percent, a dot for each seed; {setup['iterations']} iterations, {setup['scenes']} scenes", fontsize=9
    )
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    with atomic_writer(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png", dpi=150)


@command("nothing was written")
def main(argv: Sequence[str]) -> int:
    """Draw a table; returns the exit status."""
    if len(argv) != 2:
        print("usage: python -m training.ablation.plot OUT/ablation.json PICTURE.png", file=sys.stderr)
        return 2
    source, target = map(Path, argv)
    try:
        table = json.loads(source.read_text("utf-8"))
        measured = any(row["results"] for row in table["rows"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise CheckpointError(f"{source} is no table of an ablation ({exc!r}): run training.ablation") from exc
    if not measured:
        raise CheckpointError(f"{source} has no measured row yet: let training.ablation go on")
    draw(table, target)
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
