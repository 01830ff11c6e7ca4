"""Records what a run does: a JSON line for each iteration and, on request, TensorBoard curves."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odise_rt.errors import CheckpointError, MissingPackageError
from odise_rt.files import atomic_writer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG_NAME = "log.jsonl"


@dataclass(frozen=True)
class StepReport:
    """What one iteration did."""

    step: int
    loss: float
    """Sum of the weighted losses, averaged over processes."""
    learning_rate: float
    gradient_norm: float | None
    """Norm before clipping; None where it overflowed."""
    data_seconds: float
    """Seconds of waiting for the batch before the iteration could begin."""
    seconds: float
    """Seconds of the iteration itself."""
    losses: dict[str, float]
    loss_scale: float | None = None
    """What the loss was multiplied by for fp16; None in other precisions."""
    skipped: bool = False
    """Whether weights were left as they are because a gradient overflowed fp16."""


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``FOLDER/log.jsonl``, if there is one; a line that a kill or a full disk cut off is left out."""
    try:
        text = (folder / LOG_NAME).read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def cut_log(folder: Path, step: int) -> None:
    """Drop the lines of ``step`` and later ones, which a run that goes on from an older state is about to do again."""
    lines = read_log(folder)
    if lines:
        with atomic_writer(folder / LOG_NAME) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines if line["step"] < step)


class RunLog:
    """Writes ``RUN/log.jsonl`` and ``RUN/tensorboard``, each with every iteration once."""

    def __init__(self, run: Path, tensorboard: bool = False) -> None:
        """Prepare.

        Args:
            run: folder of the run.
            tensorboard: write curves too.

        Raises:
            MissingPackageError: TensorBoard is asked for and not installed.
        """
        self.run = run
        self.board: SummaryWriter | None = None
        self.open_board: Callable[..., SummaryWriter] | None = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as exc:
                raise MissingPackageError("--tensorboard needs the package: pip install tensorboard") from exc
            self.open_board = functools.partial(SummaryWriter, str(run / "tensorboard"))

    def begin(self, step: int) -> None:
        """Make the folder, and drop what is there of ``step`` and later iterations.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        with self._writing():
            self.run.mkdir(parents=True, exist_ok=True)
            (self.run / LOG_NAME).touch()
            cut_log(self.run, step)
            if self.open_board is not None:
                self.board = self.open_board(purge_step=step)

    def write(self, report: StepReport) -> None:
        """Record one iteration.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        line: dict[str, Any] = {
            "step": report.step,
            "loss": round(report.loss, 5),
            "lr": report.learning_rate,
            "gradient_norm": None if report.gradient_norm is None else round(report.gradient_norm, 5),
            "data_seconds": round(report.data_seconds, 3),
            "seconds": round(report.seconds, 3),
            **{name: round(value, 5) for name, value in report.losses.items()},
        }
        if report.loss_scale is not None:
            line |= {"loss_scale": report.loss_scale, "skipped": report.skipped}
        with self._writing(), (self.run / LOG_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.board is not None:
            curves = {
                "loss": report.loss,
                "learning rate": report.learning_rate,
                "gradient norm": report.gradient_norm,
                "loss scale": report.loss_scale,
                **{f"losses/{name}": value for name, value in report.losses.items()},
            }
            for name, value in curves.items():
                if value is not None:
                    self.board.add_scalar(name, value, report.step)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise CheckpointError(
                f"cannot write {self.run / LOG_NAME} ({exc}): free some space or name another --out"
            ) from exc

    def close(self) -> None:
        """Flush TensorBoard's file."""
        if self.board is not None:
            self.board.close()
