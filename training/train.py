"""Train ODISE: python -m training.train CONFIG --data ROOT --frozen CHECKPOINT --out FOLDER [--resume]

Several processes: torchrun --nproc-per-node N -m training.train ... (the config's batch is that of all together).
A run can be killed at any time; the same command with --resume goes on from the last saved state.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from odise_rt.command_line import CommandParser, command, whole_number
from odise_rt.errors import CheckpointError, DatasetError
from odise_rt.vocabulary import Vocabulary
from training.checkpoints.own_format import save_checkpoint
from training.command_line import add_classes_argument, parse_arguments
from training.data.coco_panoptic import HELD_OUT, CocoPanoptic, PanopticExample, held_out_part
from training.distributed import everywhere, leave, start_processes
from training.example_pictures import PICTURES, ExamplePictures
from training.experiment import Experiment, changed, experiment
from training.run_setup import RunParts, prepare_run
from training.run_state import load_state, run_origin, saved_states
from training.sharding import whole_model
from training.trainer import Trainer

logger = logging.getLogger("training.train")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = CommandParser(prog="python -m training.train", description=__doc__)
    parser.add_argument(
        "config",
        help="Name of an experiment in training/configs, e.g. sticker_tiny_label, or a file NAME.py, which is run.",
    )
    parser.add_argument("--data", type=Path, required=True, help="Folder of a COCO-format panoptic data set.")
    parser.add_argument("--split", default="train", help="The part of the data set to train on.")
    add_classes_argument(parser, "to train with and to keep as the training vocabulary")
    parser.add_argument(
        "--frozen", type=Path, required=True, help="Checkpoint folder whose frozen networks and tokenizer are used."
    )
    parser.add_argument(
        "--heads",
        type=Path,
        help="Checkpoint folder whose trained heads are the start (fine-tuning); may be --frozen. Default: fresh ones.",
    )
    parser.add_argument(
        "--out", dest="run", type=Path, required=True, help="Folder for states, log, pictures and the result."
    )
    parser.add_argument(
        "--cache", type=Path, help="Folder for features of frozen networks. Default: OUT/../feature_cache."
    )
    parser.add_argument("--resume", action="store_true", help="Go on from the last saved state of the run folder.")
    parser.add_argument("--iterations", type=whole_number(1), help="Length of the training. Default: the experiment's.")
    parser.add_argument("--batch", type=whole_number(1), help="Pictures of all processes a step. Default: as above.")
    parser.add_argument("--learning-rate", type=float, help="Peak learning rate. Default: as above.")
    parser.add_argument("--workers", type=whole_number(0), default=2, help="Processes that read and augment pictures.")
    parser.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        default="ddp",
        help="With several processes: each holds the whole model (ddp), or a part of every tensor (fsdp).",
    )
    parser.add_argument(
        "--micro-batches",
        type=whole_number(1),
        default=1,
        help="Parts that each process divides its share of a batch into to save memory; gradients are those of the "
        "whole. Not for caption supervision.",
    )
    parser.add_argument(
        "--examples",
        help="The part of the data set to draw example predictions of. Default: the first that is there of "
        f"{', '.join(HELD_OUT)}.",
    )
    parser.add_argument("--tensorboard", action="store_true", help="Write curves to OUT/tensorboard too.")
    parser.add_argument(
        "--until",
        type=whole_number(1),
        help="Stop after this many iterations in all, leaving the rest for later. Default: all.",
    )
    parser.add_argument(
        "--finish",
        action="store_true",
        help="Train no further: write the checkpoint from the last saved state to OUT/checkpoint.",
    )
    return parse_arguments(parser, argv)


def open_examples(root: Path, split: str | None) -> tuple[CocoPanoptic, list[PanopticExample]] | None:
    """The part of a data set to draw example predictions of, and its first pictures, which are read now: what is
    missing is to be known before the training, not hours into it.

    None, with a line in the log, where no name is given and no held-out part is there and whole.

    Raises:
        DatasetError: the part that is named is missing or broken.
    """
    if split is None:
        there = held_out_part(root)
        if there is None:
            names = ", ".join(HELD_OUT)
            logger.info("no example predictions will be drawn: %s has no part %s; name one by --examples", root, names)
            return None
        try:
            return open_examples(root, there)
        except DatasetError as exc:
            logger.warning("no example predictions will be drawn: %s; name another part by --examples", exc)
            return None
    data = CocoPanoptic.from_root(root, split, with_captions=False)
    return data, [data[index] for index in range(min(PICTURES, len(data)))]


def write_checkpoint(parts: RunParts, config: Experiment, run: Path, steps: int) -> Path | None:
    """The result of a run: a whole checkpoint with frozen networks and trained heads.

    All processes must call this together; the first one writes and gets the path.
    """
    model = whole_model(parts.step.model)
    if model is None:
        return None
    card = (
        f"# {config.model.name} ({config.model.variant} supervision)\n\n"
        f"Trained by `python -m training.train {config.name}`: {steps} of {config.iterations} iterations, seed "
        f"{config.seed}.\n"
    )
    return save_checkpoint(
        run / "checkpoint",
        model,
        tokenizer_json=parts.tokenizer_json,
        training_vocabulary=parts.training_vocabulary,
        card=card,
    )


def report_checkpoint(written: Path | None) -> None:
    """Say where the result is; other processes than the first have none."""
    if written is not None:
        logger.info("wrote %s", written)


@command("the same command with --resume goes on from the last saved state, if there is one")
def main(argv: Sequence[str]) -> int:
    """Run; returns the exit status."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        config = changed(experiment(arguments.config), arguments.iterations, arguments.batch, arguments.learning_rate)
        device = start_processes(arguments.device)
        states = saved_states(arguments.run)
        if states and not (arguments.resume or arguments.finish):
            raise CheckpointError(
                f"{arguments.run} already holds a run (state {states[-1].name}): add --resume, or name a new --out"
            )
        classes = None if arguments.classes is None else Vocabulary.load(arguments.classes)
        examples = None
        if not arguments.finish and config.model.conditioning != "caption":
            examples = open_examples(arguments.data, arguments.examples)
            if not everywhere(examples is not None):  # sharded processes draw together
                examples = None
        cache = arguments.cache or arguments.run.parent / "feature_cache"
        parts = prepare_run(
            config,
            arguments.data,
            split=arguments.split,
            frozen=arguments.frozen,
            cache=cache,
            device=device,
            workers=arguments.workers,
            heads=arguments.heads,
            classes=classes,
        )
        files = {} if arguments.finish else parts.annotation_files  # which do not matter any more to what is trained
        origin = run_origin(parts.step.model, parts.classes, arguments.split, files)
        if arguments.finish:
            if not states:
                raise CheckpointError(f"{arguments.run} holds no saved state to finish: train first")
            steps = load_state(states[-1], parts.step.model, None, None, config, origin)
            report_checkpoint(write_checkpoint(parts, config, arguments.run, steps))
            return 0
        pictures = None
        if examples is not None:
            pictures = ExamplePictures(
                parts.step.model,
                parts.tokenizer_json,
                parts.training_vocabulary,
                *examples,
                arguments.run / "pictures",
                classes,
            )
        trainer = Trainer(
            config,
            parts.step,
            sources=parts.sources,
            run=arguments.run,
            pictures=pictures,
            tensorboard=arguments.tensorboard,
            parallel=arguments.parallel,
            origin=origin,
            micro_batches=arguments.micro_batches,
        )
        if arguments.resume:
            trainer.resume()
        trainer.train(arguments.until)
        if trainer.iteration == config.iterations:
            report_checkpoint(write_checkpoint(parts, config, arguments.run, trainer.iteration))
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
