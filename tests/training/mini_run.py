"""Trains the mini experiment in a process of its own: ``mini_run.py KIND KILL_AFTER ARGUMENTS...``.

Run by the trainer's tests to be killed, or as one of several processes. KILL_AFTER is the iteration after which the
process kills itself with SIGKILL, 0 for never. KIND is that of ``conftest.mini_experiment``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import sys
from pathlib import Path

import torch

import training.frozen_features
import training.train
from training.distributed import leave
from training.run_log import StepReport
from training.trainer import Trainer


def run(kind: str, kill_after: int, arguments: list[str]) -> int:
    """``training.train`` with the mini experiment in place of a named one."""
    spec = importlib.util.spec_from_file_location("mini_conftest", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    training.train.experiment = lambda name: conftest.mini_experiment(kind)  # type: ignore[assignment]
    training.frozen_features.PIXELS_AT_ONCE = conftest.SIDE**2  # so that recomputation goes window by window
    torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=conftest.FP16_SCALE)  # type: ignore[misc]
    after_step = Trainer.after_step

    def step_and_die(self: Trainer, report: StepReport) -> None:
        after_step(self, report)
        if report.step + 1 == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.after_step = step_and_die  # type: ignore[method-assign]
    return training.train.main(arguments)


if __name__ == "__main__":
    leave(run(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
