"""Commands that build on each other: what is finished is left alone, and the first failure ends the chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar


@dataclass(frozen=True)
class Stage:
    """A command and the file that shows that it has finished."""

    done: Path
    command: str
    arguments: tuple[str, ...]

    def words(self) -> tuple[str, ...]:
        """The command as it is shown."""
        return self.command, *self.arguments


S = TypeVar("S", bound=Stage)


def run_chain(stages: Sequence[S], run: Callable[[S], int], dry_run: bool) -> int:
    """Show every stage and run those that are not finished; returns the exit status of the first that fails."""
    for stage in stages:
        state = "done" if stage.done.exists() else "to do"
        print(f"[{state}] {' '.join(stage.words())}", flush=True)
        if state == "to do" and not dry_run:
            status = run(stage)
            if status:
                return status
    return 0
