"""The table that ends every export, for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from export.flops import StageFlops
from export.verify import Comparison, ResultComparison


@dataclass(frozen=True)
class StageRow:
    """What is known of one exported stage."""

    stage: str
    parameters: int
    nodes: dict[str, int]
    """Form ("portable" or a variant's key) to number of nodes."""
    flops: StageFlops
    seconds: float
    """Time to trace, translate, write and verify it."""
    file_bytes: int
    """Bytes of its graphs and weights; a weight file of two stages counts for both."""
    notes: dict[str, Any]
    """What the passes did, e.g. fusions and precision."""
    comparisons: tuple[Comparison, ...]

    def worst(self, form: str) -> tuple[float, float]:
        """Largest relative max and mean error of a form over outputs and examples."""
        chosen = [c for c in self.comparisons if c.form == form]
        return max(c.check.relative_max for c in chosen), max(c.check.relative_mean for c in chosen)


@dataclass(frozen=True)
class ExportReport:
    """A whole export."""

    name: str
    precision: str
    image: tuple[int, int]
    """Height and width for which operations are counted."""
    rows: tuple[StageRow, ...]
    results: tuple[ResultComparison, ...]
    """One for each picture; none where only some of the stages were exported."""
    seconds: float
    peak_bytes: int
    """Peak resident memory of the process."""
    bundle_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    def header(self) -> list[str]:
        """Column titles."""
        return ["stage", "form", "max", "mean", "nodes", "params M", "GFLOP official → here", "s", "MB"]

    def lines(self) -> list[list[str]]:
        """Cells of the table; errors are relative to the scale of the worst output."""
        lines = []
        for row in self.rows:
            for number, (form, nodes) in enumerate(row.nodes.items()):
                largest, mean = row.worst(form)
                cells = [row.stage, form, f"{largest:.1e}", f"{mean:.1e}", f"{nodes:,}", "", "", "", ""]
                if number == 0:
                    cells[5:] = [
                        f"{row.parameters / 1e6:,.2f}",
                        f"{row.flops.official / 1e9:,.2f} → {row.flops.pruned / 1e9:,.2f}",
                        f"{row.seconds:.1f}",
                        f"{row.file_bytes / 1e6:,.1f}",
                    ]
                lines.append(cells)
        return lines

    def totals(self) -> list[str]:
        """Sentences below the table."""
        image_rows = [row for row in self.rows if row.stage != "clip_text"]
        official = sum(row.flops.official for row in image_rows) / 1e9
        pruned = sum(row.flops.pruned for row in image_rows) / 1e9
        height, width = self.image
        sentences = [
            "max, mean: errors over the largest value of the worst output, on two pictures, ONNX Runtime on CPU "
            f"against PyTorch ({self.precision} inside the graphs).",
            f"Operations are for one {height} x {width} image, clip_text's for one prompt; without it "
            f"{official:,.1f} GFLOP in the official structure, {pruned:,.1f} here.",
        ]
        if self.results:
            panoptic = min(found.panoptic for found in self.results)
            semantic = min(found.semantic for found in self.results)
            theirs, ours = (sum(numbers) for numbers in zip(*(found.segments for found in self.results), strict=True))
            sentences.append(
                f"End to end, the worse of two pictures: {panoptic:.4%} of pixels in the same segment, {semantic:.4%} "
                f"in the same class; {theirs} segments in PyTorch, {ours} from the bundle."
                if theirs or ours
                else f"End to end: {semantic:.4%} of pixels in the same class. No segment was found in either picture, "
                "so segments were not compared: give one in which the model finds some with --image."
            )
        sentences.append(
            f"{self.bundle_bytes / 1e6:,.1f} MB on disk, {self.seconds:.0f} s, peak memory "
            f"{self.peak_bytes / 2**30:.1f} GiB."
        )
        return sentences

    def show(self, console: Console) -> None:
        """Print the table and the sentences below it."""
        console.print(self.table(), soft_wrap=False)
        for sentence in self.totals():
            console.print(sentence)

    def table(self) -> Table:
        """The table for a terminal."""
        table = Table(title=f"{self.name}, {self.precision}", box=SIMPLE_HEAD, pad_edge=False)
        for index, title in enumerate(self.header()):
            table.add_column(title, justify="left" if index < 2 else "right", no_wrap=True)
        for line in self.lines():
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        """The whole report as Markdown, for people who open the bundle's folder."""
        return "\n".join(
            [
                f"# Export of {self.name} ({self.precision})",
                "",
                *markdown_table(self.header(), self.lines()),
                "",
                *(f"- {sentence}" for sentence in self.totals()),
                "",
            ]
        )


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose columns from the third on are numbers."""
    rule = ["---" if index < 2 else "---:" for index in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)]
