"""Fill the marked regions of README.md and docs/ with tables from committed results, or check that they agree.

    python -m benchmarks.readme
    python -m benchmarks.readme --check

A region names a table and a results file; what stands between the markers is generated::

    <!-- benchmark: peers benchmarks/results/odise-tiny-cpu.json -->
    <!-- /benchmark -->

Tables are those of benchmarks/report_tables.py (``TABLES``). ``--check`` exits with 1 if a region differs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import REPOSITORY
from benchmarks.report_tables import TABLES
from benchmarks.results import ResultsError, Run
from odise_rt.command_line import CommandParser, command
from odise_rt.files import atomic_writer

DOCUMENTS = ("README.md", "docs/benchmarks.md")
_OPENING = re.compile(r"^<!-- benchmark: (?P<table>\S+) (?P<file>\S+) -->[ \t]*$", re.M)
_CLOSING = "<!-- /benchmark -->"


@command("tables that are named above are written", failed=2)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="Change nothing; exit with 1 if something would change.")
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="The repository. Default: this one.")
    options = parser.parse_args(argv)
    stale = []
    for name in DOCUMENTS:
        path = options.root / name
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        filled, count = fill(text, options.root, name)
        if filled != text:
            stale.append(name)
            if not options.check:
                with atomic_writer(path) as file:
                    file.write(filled.encode())
        print(f"{name}: {count} tables")
    if options.check and stale:
        print(f"error: {', '.join(stale)} differ from the committed results: run python -m benchmarks.readme")
        return 1
    return 0


def fill(text: str, root: Path, name: str = "the document") -> tuple[str, int]:
    """The text with every region generated anew, and how many there are.

    Raises:
        ResultsError: a marker without its end, an unknown table, or a results file that is missing, broken or outside.
    """
    parts, position, count = [], 0, 0
    for opening in _OPENING.finditer(text):
        if opening.start() < position:
            raise ResultsError(f"{name}: a region opens inside another one: close the first with {_CLOSING}")
        closing = text.find(_CLOSING, opening.end())
        if closing < 0:
            raise ResultsError(f"{name}: the region {opening.group(0)!r} has no end: add {_CLOSING}")
        parts += [text[position : opening.end()], "\n", region(opening["table"], opening["file"], root, name)]
        position, count = closing, count + 1
    rest = text[position:]
    if rest.count(_CLOSING) > (1 if count else 0) or text.count("<!-- benchmark:") != count:
        raise ResultsError(
            f"{name}: a benchmark marker is malformed: expected <!-- benchmark: TABLE FILE --> and {_CLOSING}"
        )
    return "".join([*parts, rest]), count


def region(table: str, file: str, root: Path, name: str) -> str:
    """What stands between the markers of one region."""
    if table not in TABLES:
        raise ResultsError(f"{name} asks for the table {table!r}: expected one of {', '.join(TABLES)}")
    path = (root / file).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ResultsError(f"{name} refers to {file}, which lies outside of the repository")
    run = Run.load(path)
    if run.environment["dirty"] or run.environment["commit"] is None:
        raise ResultsError(
            f"{file} was measured with uncommitted or unknown changes of the code: commit them, and measure again"
        )
    made = TABLES[table](run)
    commit = run.environment["commit"][:10]
    source = f"[{path.stem}]({_link(name, file)}), commit {commit}"
    where = f"{run.environment['cpu']}, {run.environment['threads']} threads"
    return f"{made.markdown()}\n{made.caption + ' ' if made.caption else ''}*{where}; {source}*\n"


def _link(name: str, file: str) -> str:
    return "../" * name.count("/") + file


if __name__ == "__main__":
    raise SystemExit(main())
