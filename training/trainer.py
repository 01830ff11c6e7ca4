"""The training loop: deterministic, resumable at any iteration, on one process or many."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from odise_rt.errors import ConfigError, first_line
from training.batches import BatchSource
from training.distributed import mean_over_processes, rank, world_size
from training.experiment import Experiment
from training.losses import NonFiniteLossError
from training.optimizer import build_optimizer
from training.run_log import RunLog, StepReport
from training.run_state import load_state, save_state, saved_states, trainer_state
from training.sharding import Parallel, gradients_stay_local, shard, usable, whole
from training.training_step import StepInput, TrainingStep

logger = logging.getLogger(__name__)

PictureWriter = Callable[[int], object]
LEAST_LOSS_SCALE = 1.0
"""Least factor on the loss in fp16, which is halved after each gradient that overflows: below it the loss would be
scaled down, and small gradients would vanish."""


class Trainer:
    """Runs an experiment in a run folder."""

    def __init__(
        self,
        experiment: Experiment,
        step: TrainingStep,
        *,
        sources: Sequence[Callable[[], BatchSource]],
        run: Path,
        pictures: PictureWriter | None = None,
        tensorboard: bool = False,
        parallel: Parallel = "ddp",
        origin: Mapping[str, str] | None = None,
        micro_batches: int = 1,
    ) -> None:
        """Prepare.

        Args:
            experiment: what to run.
            step: model and losses, on its device.
            sources: one for each phase, made when the phase starts.
            run: folder for states, log and pictures.
            pictures: called with the iteration every ``picture_every`` iterations; under FSDP by all processes. What it
                raises is logged, but for errors of networks that processes share.
            tensorboard: write curves to ``RUN/tensorboard`` too.
            parallel: how several processes share the work; of no meaning to a single one.
            origin: what else a run is made of, see :func:`training.run_state.run_origin`; checked when it is resumed.
            micro_batches: parts that a process's share of a batch goes through the networks in, one after the other,
                for gradients as of the whole; less memory, not another result.

        Raises:
            ConfigError: the batches cannot be divided, or the experiment cannot be trained in this way.
            MissingPackageError: TensorBoard is asked for and not installed.
        """
        self.sharded = world_size() > 1 and parallel == "fsdp"
        _check_division(experiment, step, self.sharded, micro_batches)
        self.origin = dict(origin or {})
        self.iteration = 0
        """The iteration that comes next, counted from 0; also how many are done."""
        self.stop = experiment.iterations
        self.experiment = experiment
        self.step = step
        self.sources: Sequence[Callable[[], BatchSource]] = sources
        self.run_folder = run
        self.pictures = pictures
        self.micro_batches = micro_batches
        self.log = RunLog(run, tensorboard and rank() == 0)
        self.device = step.model.noise.device
        self.wrapped: nn.Module = step
        self.shapes = {name: parameter.shape for name, parameter in step.model.trained_parameters().items()}
        if self.sharded:
            # Features are cached by one process alone, which needs whole networks.
            made = [source() for source in sources]
            self.sources = [functools.partial(made.__getitem__, index) for index in range(len(made))]
            shard(step)
        self.optimizer = build_optimizer(step.model, experiment.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type) if experiment.precision == "fp16" else None
        if world_size() > 1 and not self.sharded:
            devices = [self.device] if self.device.type == "cuda" else None
            # Buffers are constants, and logging is done on averages: neither needs to travel every step.
            self.wrapped = DistributedDataParallel(step, device_ids=devices, broadcast_buffers=False)

    def resume(self) -> int:
        """Go on from the latest saved state, or from the start where there is none; returns the iteration."""
        states = saved_states(self.run_folder)
        if states:
            self.iteration = load_state(
                states[-1], self.step.model, self.optimizer, self.scaler, self.experiment, self.origin
            )
            logger.info("resumed %s", states[-1])
        return self.iteration

    def train(self, until: int | None = None) -> None:
        """Run from the current iteration to ``until`` (default: the end).

        Raises:
            NonFiniteLossError: a loss or gradient is NaN or infinite, in fp16 with a loss that is no longer scaled up;
                names the images.
        """
        self.stop = self.experiment.iterations if until is None else min(until, self.experiment.iterations)
        if rank() == 0:
            self.log.begin(self.iteration)
        self.wrapped.train()
        with tqdm(total=self.experiment.iterations, initial=self.iteration, disable=rank() != 0, mininterval=5) as bar:
            while self.iteration < self.stop:
                index, inner = self.experiment.phase_at(self.iteration)
                phase = self.experiment.phases[index]
                steps = min(phase.iterations - inner, self.stop - self.iteration)
                source = self.sources[index]()
                draws = [self.draws_of(phase.batch, inner + offset) for offset in range(steps)]
                waiting = time.perf_counter()
                for batch in source.batches(draws):
                    report = self.one_step(batch, time.perf_counter() - waiting)
                    self.after_step(report)
                    bar.set_postfix(loss=f"{report.loss:.3f}", refresh=False)
                    bar.update()
                    waiting = time.perf_counter()
        self.log.close()

    def draws_of(self, batch: int, inner: int) -> list[int]:
        """Draw numbers of this process: its contiguous part of the global batch, so that gathering keeps the order."""
        local = batch // world_size()
        first = inner * batch + rank() * local
        return list(range(first, first + local))

    def one_step(self, batch: StepInput, data_seconds: float) -> StepReport:
        """Forward, backward, clip, update; ``data_seconds`` were waited for the batch."""
        began = time.perf_counter()
        rate = self.experiment.learning_rate(self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        loss_scale, skipped = None if self.scaler is None else self.scaler.get_scale(), False
        losses = self.accumulate(batch)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
            norm = whole(nn.utils.clip_grad_norm_(parameters, self.experiment.optimizer.clip_norm))
            self.scaler.step(self.optimizer)  # skips the update where a gradient overflowed
            self.scaler.update()
            skipped = self.scaler.get_scale() < loss_scale
            if self.scaler.get_scale() < LEAST_LOSS_SCALE:
                raise NonFiniteLossError(
                    f"at iteration {self.iteration} a gradient overflows fp16 although the loss is not scaled up "
                    f"({loss_scale:g}); image ids {list(batch.targets.image_ids)}: look at these images and --resume, "
                    "or start a new run of the experiment with precision bf16 or fp32"
                )
        else:
            norm = whole(nn.utils.clip_grad_norm_(parameters, self.experiment.optimizer.clip_norm))
            if not bool(norm.isfinite()):
                raise NonFiniteLossError(
                    f"the gradient of iteration {self.iteration} is NaN or infinite; image ids "
                    f"{list(batch.targets.image_ids)}: look at these images and go on with --resume, or start a new "
                    "run with a lower learning rate"
                )
            self.optimizer.step()
        averaged = mean_over_processes(torch.stack(list(losses.values())))
        report = StepReport(
            self.iteration,
            float(averaged.sum()),
            rate,
            float(norm) if bool(norm.isfinite()) else None,
            data_seconds,
            time.perf_counter() - began,
            dict(zip(losses, averaged.tolist(), strict=True)),
            loss_scale,
            skipped,
        )
        self.iteration += 1
        return report

    def accumulate(self, batch: StepInput) -> dict[str, Tensor]:
        """Leave a batch's gradients, averaged over processes, with the parameters; returns this process's losses."""
        sums: dict[str, Tensor] = {}
        parts = batch.split(self.micro_batches)
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last else gradients_stay_local(self.wrapped):
                losses: dict[str, Tensor] = self.wrapped(part)
                total = torch.stack(list(losses.values())).sum()
                (total if self.scaler is None else self.scaler.scale(total)).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach()
        return sums

    def after_step(self, report: StepReport) -> None:
        """Log, and save and draw where it is time."""
        finished = self.iteration
        last = finished == self.experiment.iterations
        if rank() == 0:
            self.log.write(report)
            if report.skipped:
                logger.warning(
                    "iteration %d: a gradient overflowed fp16 with the loss scaled by %g; the weights were not updated",
                    report.step,
                    report.loss_scale,
                )
        elif not self.sharded:
            return
        if finished == self.stop or finished % self.experiment.save_every == 0:
            state = trainer_state(self.step.model, self.optimizer, self.scaler, self.shapes)
            if rank() == 0:
                save_state(self.run_folder, finished, state, self.experiment, self.origin)
        if self.pictures is not None and (last or finished % self.experiment.picture_every == 0):
            try:
                with usable(self.step):
                    self.pictures(finished)
            except Exception as exc:  # nothing that is only looked at ends a training
                # Of sharded processes the others wait for this one inside the networks; only writing is its own.
                if self.sharded and not isinstance(exc, OSError):
                    raise
                logger.warning("iteration %d: no example predictions were drawn: %s", finished, first_line(exc))
            self.wrapped.train()


def _check_division(experiment: Experiment, step: TrainingStep, sharded: bool, micro_batches: int) -> None:
    """Refuse batches that the processes or micro-batches cannot share, and what does not bear to be divided."""
    uneven = [phase.batch for phase in experiment.phases if phase.batch % world_size()]
    if uneven:
        raise ConfigError(
            f"experiment {experiment.name!r} has batches of {uneven[0]}, which {world_size()} processes cannot "
            "share evenly: start another number of them"
        )
    shares = [phase.batch // world_size() for phase in experiment.phases]
    undivided = [share for share in shares if share % micro_batches]
    if undivided:
        raise ConfigError(
            f"experiment {experiment.name!r} gives each process {undivided[0]} pictures a step, which cannot be "
            f"divided into {micro_batches} equal micro-batches: choose a divisor of {math.gcd(*shares)}"
        )
    if micro_batches > 1 and step.class_text is None:
        raise ConfigError(
            f"experiment {experiment.name!r} learns from captions, each of which is compared with all pictures of "
            "the batch: no micro-batches; start more processes, or train with fewer pictures"
        )
    if sharded and experiment.optimizer.matrix_rate is not None:
        raise ConfigError(
            f"experiment {experiment.name!r} has a matrix_rate: Muon needs whole matrices, which fsdp divides; use "
            "--parallel ddp"
        )
