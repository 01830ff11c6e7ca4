"""What an export is doing: a live line on a terminal, one line for each finished step elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

_WIDTH = 110
"""Columns of a table in a log file."""


def export_console() -> Console:
    """Prints text as it is: a path or a model's name may hold what rich takes for markup, and stays in one line."""
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _WIDTH
    return console


class ExportProgress:
    """Counts steps and measures their seconds. Use it as a context manager around all of them."""

    def __init__(self, steps: int, console: Console) -> None:
        """Expect a number of steps and report to a console."""
        self.console = console
        self.seconds: dict[str, float] = {}
        """Name of each finished step to its wall-clock seconds."""
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("export", total=steps)

    def __enter__(self) -> ExportProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step: shown while it runs, reported with its seconds when it is done."""
        self._bar.update(self._task, description=name)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self._bar.advance(self._task)
        self.console.print(Text.assemble(("✓", "green"), f" {name} ", (f"{self.seconds[name]:.1f} s", "dim")))

    def note(self, text: str) -> None:
        """Print a line about the step that runs."""
        self.console.print(f"  {text}")
