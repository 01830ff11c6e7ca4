"""Turn a run into a page that one can read without knowing the code, or compare two runs.

    python -m benchmarks.report RUN.json --out out/bench/report
    python -m benchmarks.report RUN.json BASE.json --out out/bench/report
    python -m benchmarks.report --compare BASE.json RUN.json

The report is one self-contained ``report.html``, its twin ``report.md``, and the plots as files for the twin.
``--compare`` exits with 1 if a result of RUN is slower than in BASE beyond the noise bound (benchmarks/noise.py),
failed or is gone, with 2 if the files cannot be compared, and with 0 otherwise.
"""

from __future__ import annotations

import argparse
import base64
import html
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.noise import REGRESSIONS, Difference, compare, incomparable
from benchmarks.report_plots import Plot, comparison_plot, plots_of
from benchmarks.report_tables import (
    Table,
    all_variants_table,
    batches_table,
    cold_table,
    comparison_table,
    described_commit,
    kernels_table,
    machine_table,
    other_groups,
    peers_table,
    roofline_table,
    sizes_table,
    stages_table,
    steps_table,
    targets_table,
    vocabulary_table,
    words_table,
)
from benchmarks.results import ResultsError, Run
from odise_rt.command_line import CommandParser, command

METHOD = (
    "Every implementation runs in a process of its own. In each round each of them segments the same picture once, one "
    "after the other, so that a slow minute of the machine meets all; a ratio is the median of the ratios of one "
    "round.",
    "A time runs from pixels in memory to named segments, by perf_counter around the whole call. Words are embedded "
    "before, unless their change is what is measured.",
    "Peak memory is the process's largest resident size after loading. Cold starts find files in the system's cache.",
    "The roofline is the best matmul rate of any installed library and the copy bandwidth, measured at the start "
    "and at "
    "the end of the same run.",
    "What failed, ran out of memory or could not be prepared stays in the tables with its reason.",
)


@dataclass(frozen=True)
class Section:
    """Tables and plots under one heading."""

    title: str
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...] = ()


@command("the report is as it was", failed=2)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parse(argv)
    if options.compare:
        base_path, run_path = options.compare
        return compare_files(base_path, run_path, options.force)
    run = Run.load(options.run)
    base = Run.load(options.base) if options.base else None
    write_report(run, base, options.out)
    print(f"report: {options.out / 'report.html'}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = CommandParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="JSON file of python -m benchmarks.run.")
    parser.add_argument("base", type=Path, nargs="?", help="An earlier run to compare with, in the report.")
    parser.add_argument("--out", type=Path, help="Folder for the report; report.html and report.md are replaced.")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("BASE", "RUN"), help="Only compare two runs; the exit code tells."
    )
    parser.add_argument("--force", action="store_true", help="Compare although machine or model differ.")
    options = parser.parse_args(argv)
    if options.compare is None and (options.run is None or options.out is None):
        parser.error("expected RUN.json [BASE.json] --out FOLDER, or --compare BASE.json RUN.json")
    if options.compare is not None and (options.run or options.out):
        parser.error("--compare takes its two files and writes no report")
    return options


# ---- comparison ------------------------------------------------------------------------------------------------------


def compare_files(base_path: Path, run_path: Path, force: bool = False) -> int:
    """Print a comparison; 0: no regression, 1: some.

    Raises:
        ResultsError: a file is no run, the runs share no result, or they are of different machines or models.
    """
    base, run = Run.load(base_path), Run.load(run_path)
    reasons = incomparable(base, run)
    if reasons and not force:
        raise ResultsError(f"not comparable, {'; '.join(reasons)}: measure both on one machine, or pass --force")
    differences = compare(base, run)
    if not any(d.verdict in ("same", "slower", "faster", "broken") for d in differences):
        raise ResultsError("the runs share no result: compare runs of the same suite")
    table = comparison_table(differences, base, run)
    print(table.markdown())
    print(table.caption)
    found = regressions(differences, base, run)
    for d in found:
        print(f"REGRESSION: {d.key} {d.verdict}{f' by {100 * d.change:.1f} %' if d.change else ''} {d.note}".rstrip())
    print(f"{len(found)} regressions beyond the noise bound among {len(differences)} results")
    return 1 if found else 0


def regressions(differences: Sequence[Difference], base: Run, run: Run) -> list[Difference]:
    """Differences that should fail a build; a result may only be missing if less was asked for."""
    same_extent = base.suite == run.suite and base.quick == run.quick
    return [d for d in differences if d.verdict in REGRESSIONS and (same_extent or d.verdict != "gone")]


# ---- report ----------------------------------------------------------------------------------------------------------


def sections_of(run: Run, base: Run | None = None) -> list[Section]:
    """Everything that the run has, in the order of the page."""
    plots = {plot.name: plot for plot in plots_of(run)}

    def some(*names: str) -> tuple[Plot, ...]:
        return tuple(plots[name] for name in names if name in plots)

    sections = [Section("What was reached", (targets_table(run),))] if targets_table(run).rows else []
    if run.group("peers"):
        sections += [
            Section("Against what else one could run", (peers_table(run),), some("peers")),
            Section("What each step buys", (steps_table(run),), some("waterfall")),
            Section("Where the time goes", (stages_table(run),), some("stages")),
            Section("How close to the machine's limits", (roofline_table(run),), some("roofline")),
        ]
    for group, title, table, plot in (
        ("sizes", "Picture size", sizes_table, "sizes"),
        ("batches", "Batches of windows", batches_table, ""),
        ("words", "Vocabulary size", words_table, "words"),
    ):
        if run.group(group):
            sections.append(Section(title, (table(run),), some(plot)))
    if run.group("cold") or run.group("vocabulary"):
        sections.append(Section("What one waits for", (cold_table(run), vocabulary_table(run)), some("waiting")))
    if run.group("kernels"):
        sections.append(Section("Inner loops of the runtime", (kernels_table(run),)))
    sections += [Section(f"Other results: {t.title}", (t,)) for t in other_groups(run)]
    if base is not None:
        differences = compare(base, run)
        changes = comparison_plot(differences)
        sections.insert(
            0, Section("Compared with the base run", (comparison_table(differences, base, run),), _one(changes))
        )
    if run.group("peers"):
        sections.append(Section("Every implementation measured", (all_variants_table(run),)))
    return sections


def _one(plot: Plot | None) -> tuple[Plot, ...]:
    return () if plot is None else (plot,)


def write_report(run: Run, base: Run | None, out: Path) -> None:
    """Write the page, its twin and the plots; they are put in place when all are made."""
    sections = sections_of(run, base)
    if not sections:
        raise ResultsError("the run has no results: nothing to report")
    notes = [*run.notes, *(f"Caution: {reason}." for reason in (incomparable(base, run) if base else []))]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=out) as folder:
        partial = Path(folder)
        (partial / "plots").mkdir()
        for section in sections:
            for plot in section.plots:
                (partial / "plots" / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
        (partial / "report.html").write_text(page(run, sections, notes), encoding="utf-8")
        (partial / "report.md").write_text(twin(run, sections, notes), encoding="utf-8")
        shutil.rmtree(out / "plots", ignore_errors=True)
        for path in partial.iterdir():
            path.replace(out / path.name)


def headline(run: Run) -> str:
    """One sentence on what was measured on what."""
    env, picture = run.environment, run.model.get("size")
    what = f"{run.model['config']} at {picture[0]} × {picture[1]}" if picture else "the runtime's inner loops"
    where = env["gpus"][0].get("name") if run.suite == "gpu" and env["gpus"] else env["cpu"]
    return f"{what} on {where}, {env['threads']} threads{', quick run' if run.quick else ''}"


def twin(run: Run, sections: Sequence[Section], notes: Sequence[str]) -> str:
    """The report as Markdown."""
    parts = [f"# Benchmark report: {headline(run)}\n"]
    for section in sections:
        parts.append(f"## {section.title}\n")
        for plot in section.plots:
            parts.append(f"![{plot.title}](plots/{plot.name}.svg)\n\n{plot.reading}\n")
        for table in section.tables:
            if table.rows:
                parts.append(table.markdown() + (f"\n{table.caption}\n" if table.caption else ""))
    parts += ["## How it was measured\n", "\n".join(f"- {line}" for line in METHOD) + "\n"]
    if notes:
        parts.append("Notes of this run:\n\n" + "\n".join(f"- {note}" for note in notes) + "\n")
    parts.append(machine_table(run).markdown())
    return "\n".join(parts)


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; margin: 0 auto; max-width: 60rem;
  padding: 1rem clamp(0.8rem, 3vw, 2rem) 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1rem 0 0.2rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 0.6rem; border-top: 1px solid #e3e7eb; padding-top: 1.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.4rem; }
.lead, .caption, figcaption { color: #56616c; }
.caption, figcaption { font-size: 0.88rem; max-width: 46rem; margin: 0.4rem 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; min-width: 60%; }
th { text-align: right; font-weight: 600; color: #56616c; vertical-align: bottom; }
td { text-align: right; }
th, td { padding: 0.32rem 0.7rem; border-bottom: 1px solid #e3e7eb; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 11rem; }
.machine td { text-align: left; white-space: normal; } .machine td:first-child { color: #56616c; }
tr.bad td { color: #a3271b; } td.reason { white-space: normal; text-align: left; }
figure { margin: 1rem 0 1.4rem; } figure img { width: 100%; min-width: 34rem; display: block; }
figure .scroll { overflow-x: auto; }
ul { padding-left: 1.2rem; } li { margin: 0.25rem 0; max-width: 46rem; }
"""


def page(run: Run, sections: Sequence[Section], notes: Sequence[str]) -> str:
    """The report as one HTML file that loads nothing else."""
    title = f"Benchmark report: {headline(run)}"
    parts = [
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Benchmark report</h1><p class=lead>{html.escape(headline(run))}; commit {described_commit(run)}</p>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        for plot in section.plots:
            data = base64.b64encode(plot.svg.encode()).decode()
            alt = html.escape(f"{plot.title}. The numbers are in the table below.", quote=True)
            image = f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">'
            text = html.escape(plot.reading)
            parts.append(f"<figure><div class=scroll>{image}</div><figcaption>{text}</figcaption></figure>")
        for table in section.tables:
            if not table.rows:
                continue
            heading = f"<h3>{html.escape(table.title)}</h3>" if len(section.tables) > 1 else ""
            caption = f"<p class=caption>{html.escape(table.caption)}</p>" if table.caption else ""
            parts.append(heading + table.html() + caption)
    method = "".join(f"<li>{html.escape(line)}</li>" for line in METHOD)
    parts.append(f"<h2>How it was measured</h2><ul>{method}</ul>")
    if notes:
        listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        parts.append(f"<h3>Notes of this run</h3><ul>{listed}</ul>")
    parts.append(f'<h3>Machine and settings</h3><div class="machine">{machine_table(run).html()}</div>')
    parts.append("</body></html>\n")
    return "\n".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
