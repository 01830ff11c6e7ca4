"""Trains and evaluates one run of an ablation in a folder of its own; what is finished there is not done again.

::

    OUT/runs/<run>/seed-<n>/states/  log.jsonl          as of any training run
    OUT/runs/<run>/seed-<n>/evaluation-<how>.json       written whole, when that evaluation is done
    OUT/runs/<run>/seed-<n>/failure.json                why the last attempt failed; gone when one succeeds
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from odise_rt.errors import CheckpointError, OdiseError
from odise_rt.files import write_json
from odise_rt.options import SegmentOptions
from training.ablation.environment import environment
from training.ablation.rows import CLIP_WEIGHTS, Classification, variant
from training.caption_conditioning import CaptionContexts, CaptionedBackend
from training.data.coco_panoptic import CocoPanoptic
from training.distributed import rank, world_size
from training.evaluation import METRICS, EvaluationReport, evaluate
from training.evaluation_loop import progress_bar
from training.experiment import Experiment
from training.run_log import read_log
from training.run_setup import RunParts, prepare_run, threads_of_all_processes
from training.torch_stages import torch_segmenter
from training.trainer import Trainer

logger = logging.getLogger("training.ablation")

_FAILURE = "failure.json"


@dataclass(frozen=True)
class Places:
    """Where an ablation reads and writes, and how it runs."""

    data: Path
    split: str
    held_out: str
    """The part of the data set to evaluate on."""
    frozen: Path
    out: Path
    cache: Path
    device: str
    workers: int

    def folder(self, run: str, seed: int) -> Path:
        """Folder of one run."""
        return self.out / "runs" / run / f"seed-{seed}"

    def evaluation(self, run: str, seed: int, how: Classification) -> Path:
        """File of one evaluation."""
        return self.folder(run, seed) / f"evaluation-{how}.json"


@dataclass(frozen=True)
class RunTask:
    """A run to train, and the evaluations of it that are missing."""

    run: str
    seed: int
    evaluations: tuple[Classification, ...]


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """A finished evaluation; None where there is none.

    Raises:
        CheckpointError: the file is broken.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        found["metrics"]["pq"]["all"]["pq"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise CheckpointError(f"{path} is no finished evaluation ({exc!r}): delete it, it is made again") from exc
    return found


def read_failure(folder: Path) -> str | None:
    """Why a run failed last, if it did."""
    try:
        return str(json.loads((folder / _FAILURE).read_text("utf-8"))["error"])
    except (OSError, ValueError, KeyError):
        return None


def prepare(task: RunTask, base: Experiment, places: Places) -> tuple[Experiment, RunParts]:
    """The experiment of a run and its parts; what fails here fails on every process.

    Raises:
        OdiseError: the run is impossible; the reason is left in its folder too.
    """
    with _noted_failure(task, places):
        experiment = variant(base, task.run, task.seed)
        return experiment, prepare_run(
            experiment,
            places.data,
            split=places.split,
            frozen=places.frozen,
            cache=places.cache,
            device=places.device,
            workers=places.workers,
        )


def carry_out(
    task: RunTask, experiment: Experiment, parts: RunParts, scenes: int, places: Places, command: str
) -> None:
    """Train what is left of a run and make its missing evaluations, on all processes together.

    Raises:
        OdiseError: it failed, perhaps on this process only; the reason is left in its folder too.
    """
    folder = places.folder(task.run, task.seed)
    with _noted_failure(task, places):
        trainer = Trainer(experiment, parts.step, sources=parts.sources, run=folder)
        trainer.resume()
        trainer.train()
        if rank() == 0:
            with threads_of_all_processes(places.device):
                for how in task.evaluations:
                    _evaluate(task, how, parts, scenes, places, command)
            (folder / _FAILURE).unlink(missing_ok=True)
        if world_size() > 1:
            dist.barrier()


@contextlib.contextmanager
def _noted_failure(task: RunTask, places: Places) -> Iterator[None]:
    """Leave the reason of a failure in the run's folder, where the table finds it."""
    folder = places.folder(task.run, task.seed)
    try:
        yield
    except (OdiseError, OSError) as exc:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _FAILURE, {"error": str(exc)})
        except OSError:
            logger.warning("the reason could not be noted in %s", folder)
        if isinstance(exc, OdiseError):
            raise
        raise CheckpointError(f"{exc}: give the same command again to go on") from exc


def _evaluate(task: RunTask, how: Classification, parts: RunParts, scenes: int, places: Places, command: str) -> None:
    """Measure the trained model and write the result."""
    model = parts.step.model.eval()
    captioned = model.config.conditioning == "caption"
    data = CocoPanoptic.from_root(places.data, places.held_out, with_captions=captioned)
    weight = CLIP_WEIGHTS[how]
    options = SegmentOptions(clip_weight_seen=weight, clip_weight_unseen=weight)
    backend = None
    if captioned:
        backend = CaptionedBackend(model, CaptionContexts(model, parts.tokenizer_json, data.first_captions()))
    began = time.perf_counter()
    with torch_segmenter(model, parts.tokenizer_json, parts.training_vocabulary, backend) as segmenter:
        report: EvaluationReport = evaluate(
            segmenter,
            data,
            range(min(scenes, len(data))),
            METRICS,
            options,
            progress=progress_bar("evaluate"),
            tell=None if backend is None else backend.tell,
        )
    folder = places.folder(task.run, task.seed)
    content = {
        "run": task.run,
        "seed": task.seed,
        "classification": how,
        "command": command,
        "training_seconds": training_seconds(folder),
        "evaluation_seconds": round(time.perf_counter() - began, 1),
        "trained_parameters": sum(p.numel() for p in model.trained_parameters().values()),
        "environment": environment(places.device),
        "metrics": report.to_dict(),
    }
    write_json(places.evaluation(task.run, task.seed, how), content)


def training_seconds(folder: Path) -> float:
    """Seconds in the iterations of a run; those that a kill made it repeat count once."""
    return round(sum(float(line["seconds"]) for line in read_log(folder)), 1)
