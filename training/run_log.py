"""Records what a run does: a JSON line for each iteration and, on request, TensorBoard curves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odise_rt.errors import CheckpointError, MissingPackageError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class StepReport:
    """What one iteration did."""

    step: int
    loss: float
    """Sum of the weighted losses, averaged over processes."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    seconds: float
    losses: dict[str, float]


class RunLog:
    """Appends to ``RUN/log.jsonl`` and ``RUN/tensorboard``."""

    def __init__(self, run: Path, tensorboard: bool = False) -> None:
        """Open.

        Args:
            run: folder of the run; made when the first line is written.
            tensorboard: write curves too.

        Raises:
            MissingPackageError: TensorBoard is asked for and not installed.
        """
        self.run = run
        self.board: SummaryWriter | None = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as exc:
                raise MissingPackageError("--tensorboard needs the package: pip install tensorboard") from exc
            self.board = SummaryWriter(str(run / "tensorboard"))

    def write(self, report: StepReport) -> None:
        """Record one iteration.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        line: dict[str, Any] = {
            "step": report.step,
            "loss": round(report.loss, 5),
            "lr": report.learning_rate,
            "gradient_norm": round(report.gradient_norm, 5),
            "seconds": round(report.seconds, 3),
            **{name: round(value, 5) for name, value in report.losses.items()},
        }
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            with (self.run / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as exc:
            raise CheckpointError(
                f"cannot write {self.run / 'log.jsonl'} ({exc}): free some space, then --resume"
            ) from exc
        if self.board is not None:
            for name, value in (("loss", report.loss), ("learning rate", report.learning_rate)):
                self.board.add_scalar(name, value, report.step)
            self.board.add_scalar("gradient norm", report.gradient_norm, report.step)
            for name, value in report.losses.items():
                self.board.add_scalar(f"losses/{name}", value, report.step)

    def close(self) -> None:
        """Flush TensorBoard's file."""
        if self.board is not None:
            self.board.close()
