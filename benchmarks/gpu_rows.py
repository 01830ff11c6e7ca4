"""Rows of the GPU check, the parts that make them, and the table and verdict made of them.

A part runs in a process of its own for a bounded time and writes a row a line. If it hangs, crashes or is slow, its
rows so far count, one more row says what happened, and the other parts still run. Nothing here needs a GPU.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Status = Literal["pass", "fail", "measured", "missing", "late", "error"]
"""``fail``: a result is wrong. ``missing``: something is not installed or built. ``late``: the time was up. ``error``:
the part broke."""
Kind = Literal["correctness", "time", "facts"]


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    part: str
    name: str
    status: Status
    kind: Kind = "facts"
    values: Mapping[str, float | int | str] = field(default_factory=dict)
    """What was measured; the unit is in the name, e.g. ``"median_us"``."""
    detail: str = ""
    """What is wrong or missing, and what to do, for people."""

    def __post_init__(self) -> None:
        if self.status not in get_args(Status) or self.kind not in get_args(Kind):
            raise ValueError(f"row {self.name!r} has status {self.status!r} and kind {self.kind!r}")

    def to_json(self) -> str:
        """One line; numbers that are not finite become text, which JSON can hold."""
        data = asdict(self)
        data["values"] = {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.values.items()
        }
        return json.dumps(data)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The inverse of :meth:`to_json`."""
        return cls(**json.loads(line))


Emit = Callable[[Row], None]


@dataclass(frozen=True)
class Part:
    """One process of the check."""

    name: str
    seconds: float
    """Its share of the time; what others leave is not added, so that the whole stays predictable."""
    title: str


class Clock:
    """Seconds of the whole check, given out to its parts."""

    def __init__(self, total: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = now() + total

    def left(self) -> float:
        """Seconds until the whole check must be over; never negative."""
        return max(0.0, self._end - self._now())

    def share(self, part: Part, later: Iterable[Part] = ()) -> float:
        """Seconds that a part may take now: its own, and what the parts after it do not need."""
        left = self.left()
        return min(left, max(part.seconds, left - sum(other.seconds for other in later)))


def run_part(part: Part, command: Sequence[str], rows_file: Path, seconds: float) -> list[Row]:
    """Run a part and collect its rows.

    Args:
        part: for the rows' names.
        command: writes one row a line to ``rows_file``; its output goes to this process's.
        rows_file: need not exist.
        seconds: after these the process is ended.

    Returns:
        The rows that were written, and one more if the process did not end well.
    """
    if seconds <= 0:
        return [Row(part.name, part.title, "late", detail="not started: the time of the whole check was up")]
    rows_file.unlink(missing_ok=True)
    process = subprocess.Popen(list(command), start_new_session=True)
    ending: Row | None = None
    try:
        code = process.wait(timeout=seconds)
        if code != 0:
            reason = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
            ending = Row(part.name, part.title, "error", detail=f"the part broke off ({reason}): see its output above")
    except subprocess.TimeoutExpired:
        ending = Row(part.name, part.title, "late", detail=f"stopped after {seconds:.0f} s; what is above it counts")
    finally:
        end_group(process)
    rows = list(read_rows(rows_file))
    if ending is None and not rows:
        ending = Row(part.name, part.title, "error", detail="the part ended without a result")
    return [*rows, ending] if ending else rows


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a group, and what it started: that would go on using the GPU beside the next part."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_rows(path: Path) -> Iterable[Row]:
    """Rows of a file; a line that was cut off when its process was ended is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield Row.from_json(line)


def row_writer(path: Path) -> Emit:
    """Appends rows to a file, each at once."""

    def emit(row: Row) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(row.to_json() + "\n")
        print(f"  {row.status:9}{row.name}  {describe(row)}", flush=True)

    return emit


def describe(row: Row) -> str:
    """Values and detail in one line."""
    parts = [f"{name} {number(value)}" for name, value in row.values.items()]
    return "; ".join([*parts, row.detail] if row.detail else parts)


def number(value: float | int | str) -> str:
    """Three significant digits, or the text itself."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and math.isfinite(value)):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def failed(rows: Iterable[Row]) -> bool:
    """Whether the check as a whole failed: a result is wrong, or a part broke before it could say."""
    return any(row.status in ("fail", "error") for row in rows)


def without_result(rows: Iterable[Row], parts: Iterable[str]) -> list[str]:
    """Those of the parts that neither compared nor measured anything."""
    spoke = {row.part for row in rows if row.status in ("pass", "fail", "measured")}
    return [part for part in parts if part not in spoke]


def markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The report as a Markdown page."""
    lines = ["# GPU check", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    counts = {status: sum(row.status == status for row in rows) for status in get_args(Status)}
    lines += ["- rows: " + ", ".join(f"{count} {status}" for status, count in counts.items() if count), ""]
    for part in dict.fromkeys(row.part for row in rows):
        lines += [f"## {part}", "", "| check | status | result |", "|---|---|---|"]
        for row in rows:
            if row.part == part:
                cells = (row.name, row.status, describe(row))
                lines.append("| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |")
        lines.append("")
    return "\n".join(lines)


@dataclass(frozen=True)
class Target:
    """What the project wants of a ratio of two measurements, or of one value."""

    name: str
    least: float
    numerator: tuple[str, str]
    """Name of a row and of its value."""
    denominator: tuple[str, str] | None = None


def judge_targets(targets: Iterable[Target], rows: Sequence[Row]) -> list[Row]:
    """A row for each target: met, missed, or not measured. A missed one is not an error: it is a result."""
    found = {(row.name, key): value for row in rows for key, value in row.values.items()}
    judged = []
    for target in targets:
        wanted = [key for key in (target.numerator, target.denominator) if key is not None]
        values = [found.get(key) for key in wanted]
        if not all(isinstance(v, int | float) and v > 0 for v in values):
            names = ", ".join(name for (name, _), v in zip(wanted, values, strict=True) if v is None)
            judged.append(Row("targets", target.name, "missing", "time", detail=f"not measured: {names or 'no value'}"))
            continue
        numbers = [float(v) for v in values if v is not None]
        ratio = numbers[0] / numbers[1] if len(numbers) == 2 else numbers[0]
        met = "met" if ratio >= target.least else "missed"
        judged.append(
            Row("targets", target.name, "measured", "time", {"value": ratio, "wanted": target.least}, detail=met)
        )
    return judged
