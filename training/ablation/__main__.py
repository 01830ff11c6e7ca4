"""Measure the paper's claims: python -m training.ablation --data ROOT --frozen CHECKPOINT --out FOLDER

Trains every variant with the same budget and two seeds, evaluates them, and writes OUT/ablation.json and
OUT/ablation.md. Several processes: torchrun --nproc-per-node N -m training.ablation ...
It can be killed at any time: the same command goes on, and finished rows are not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from odise_rt.bundle import file_sha256
from odise_rt.command_line import CommandParser, command, whole_number
from odise_rt.errors import CheckpointError, MissingPackageError, OdiseError, OptionsError
from odise_rt.files import locked_file, write_json
from training.ablation.measure import Places, RunTask, carry_out, prepare, read_evaluation
from training.ablation.plot import draw
from training.ablation.rows import Row, chosen_rows, with_budget
from training.ablation.table import collect, markdown, write_table
from training.checkpoints.own_format import WEIGHTS_NAME, read_description
from training.command_line import parse_arguments
from training.data.coco_panoptic import CocoPanoptic
from training.distributed import leave, rank, start_processes, world_size
from training.experiment import Experiment
from training.experiment import experiment as named_experiment
from training.run_setup import annotation_fingerprint

logger = logging.getLogger("training.ablation")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = CommandParser(prog="python -m training.ablation", description=__doc__)
    parser.add_argument("--config", default="sticker_tiny_ablation", help="The experiment that is varied.")
    parser.add_argument("--data", type=Path, required=True, help="Folder of a COCO-format panoptic data set.")
    parser.add_argument("--split", default="train", help="The part of the data set to train on.")
    parser.add_argument("--held-out", default="val", help="The part of the data set to evaluate on.")
    parser.add_argument(
        "--frozen",
        type=Path,
        required=True,
        help="Checkpoint folder whose frozen networks are used; the row of the true caption needs one that still has "
        "the diffusion model's text encoder.",
    )
    parser.add_argument("--out", type=Path, required=True, help="Folder for runs and table.")
    parser.add_argument(
        "--cache", type=Path, help="Folder for features of frozen networks. Default: OUT/../feature_cache."
    )
    parser.add_argument(
        "--iterations",
        type=whole_number(1),
        help="Training budget of each run; phases keep their shares. Default: the experiment's own.",
    )
    parser.add_argument(
        "--seeds", type=whole_number(1), default=2, help="How many seeds, from the experiment's own upwards."
    )
    parser.add_argument("--only", help="Comma-separated groups or rows, e.g. timestep,features/clip. Default: all.")
    parser.add_argument("--scenes", type=whole_number(1), default=100, help="Held-out scenes to evaluate on.")
    parser.add_argument("--workers", type=whole_number(0), default=2, help="Processes that read and augment pictures.")
    arguments = parse_arguments(parser, argv)
    arguments.given = list(argv)
    return arguments


def setup_of(base: Experiment, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that must be equal for rows to be compared, as JSON types.

    Raises:
        OdiseError: the checkpoint or data set is not there.
    """
    read_description(arguments.frozen)
    held_out = CocoPanoptic.from_root(arguments.data, arguments.held_out, with_captions=False)
    return {
        "experiment": json.loads(json.dumps(base.to_dict())),
        "iterations": base.iterations,
        "scenes": min(arguments.scenes, len(held_out)),
        "train": annotation_fingerprint(arguments.data, arguments.split),
        "held_out": annotation_fingerprint(arguments.data, arguments.held_out),
        "frozen": file_sha256(arguments.frozen / WEIGHTS_NAME),
    }


def keep_setup(out: Path, setup: dict[str, Any]) -> None:
    """Note the setup at the first call and hold later ones to it.

    Raises:
        OptionsError: the folder holds rows of another setup.
    """
    path = out / "setup.json"
    if not path.exists():
        if rank() == 0:
            write_json(path, setup)
        return
    try:
        known = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as exc:
        raise CheckpointError(f"{path} cannot be read ({exc}): name a new --out") from exc
    differing = [key for key in setup if known.get(key) != setup[key]]
    if differing:
        raise OptionsError(
            f"{out} holds an ablation with other {', '.join(differing)}: rows can only be compared with equal budget, "
            "data and frozen networks; give the same values, or name a new --out"
        )


@contextlib.contextmanager
def sole_user(out: Path) -> Iterator[None]:
    """Hold the folder against a second ablation; the system lets go of it however the process ends."""
    if rank() != 0:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = locked_file(out / ".lock")
    except BlockingIOError as exc:
        raise OptionsError(f"another ablation runs in {out}: wait for it, or name another --out") from exc
    except OSError as exc:
        raise CheckpointError(f"cannot write into {out} ({exc}): name another --out") from exc
    with lock:
        yield


def tasks_of(rows: Sequence[Row], seeds: Sequence[int], places: Places) -> tuple[list[RunTask], list[float]]:
    """What is left to do, seed by seed so that a whole table is there early, and the seconds of finished runs."""
    tasks, seconds = [], []
    for seed in seeds:
        for run in dict.fromkeys(row.run for row in rows):
            hows = dict.fromkeys(row.classification for row in rows if row.run == run)
            found = {how: read_evaluation(places.evaluation(run, seed, how)) for how in hows}
            left = tuple(how for how, evaluation in found.items() if evaluation is None)
            if left:
                tasks.append(RunTask(run, seed, left))
            else:
                done = [evaluation for evaluation in found.values() if evaluation is not None]
                seconds.append(done[0]["training_seconds"] + sum(one["evaluation_seconds"] for one in done))
    return tasks, seconds


def measure_all(
    rows: Sequence[Row],
    base: Experiment,
    seeds: Sequence[int],
    places: Places,
    setup: dict[str, Any],
    command: str,
) -> int:
    """Carry out what is left, and write the table after each run; returns how many runs failed."""
    tasks, seconds = tasks_of(rows, seeds, places)
    asked = {row.id for row in rows}
    logger.info("%d runs to do, %d done before", len(tasks), len(seconds))
    failures = 0
    for number, task in enumerate(tasks):
        left = ""
        if seconds:
            minutes = (len(tasks) - number) * sum(seconds) / len(seconds) / 60
            left = f"; about {minutes / 60:.1f} h left" if minutes > 90 else f"; about {minutes:.0f} min left"
        logger.info("run %d of %d: %s, seed %d%s", number + 1, len(tasks), task.run, task.seed, left)
        began = time.perf_counter()
        prepared = False
        try:
            experiment, parts = prepare(task, base, places)
            prepared = True
            carry_out(task, experiment, parts, setup["scenes"], places, command)
            seconds.append(time.perf_counter() - began)
        except OdiseError as exc:
            failures += 1
            logger.error("%s, seed %d: %s", task.run, task.seed, exc)
            if prepared and world_size() > 1:
                raise  # the other processes may not have failed: they cannot go on together
        finally:
            if rank() == 0:
                write_table(places.out, collect(places, setup, seeds, asked))
    if rank() == 0 and not tasks:
        write_table(places.out, collect(places, setup, seeds, asked))
    return failures


def draw_if_possible(table: dict[str, Any], path: Path) -> None:
    """The table as a picture; matplotlib, which that needs, is no requirement of training."""
    if not any(row["results"] for row in table["rows"]):
        return
    try:
        draw(table, path)
        logger.info("wrote %s", path)
    except (MissingPackageError, OSError) as exc:
        logger.warning("no picture of the table: %s", exc)


@command("the same command goes on from the last saved state, and finished rows are not done again")
def main(argv: Sequence[str]) -> int:
    """Run; returns the exit status."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        rows = chosen_rows(arguments.only)
        base = named_experiment(arguments.config)
        base = with_budget(base, arguments.iterations or base.iterations)
        device = start_processes(arguments.device)
        places = Places(
            arguments.data,
            arguments.split,
            arguments.held_out,
            arguments.frozen,
            arguments.out,
            arguments.cache or arguments.out.parent / "feature_cache",
            device,
            arguments.workers,
        )
        seeds = range(base.seed, base.seed + arguments.seeds)
        with sole_user(arguments.out):
            setup = setup_of(base, arguments)
            keep_setup(arguments.out, setup)
            given = "python -m training.ablation " + shlex.join(arguments.given)
            failures = measure_all(rows, base, seeds, places, setup, given)
        if rank() == 0:
            table = json.loads((arguments.out / "ablation.json").read_text("utf-8"))
            print(markdown(table))
            logger.info("wrote %s and ablation.md beside it", arguments.out / "ablation.json")
            draw_if_possible(table, arguments.out / "ablation.png")
        if failures:
            logger.error("failed: %d of the runs; the table says why, the same command tries again", failures)
            return 1
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
