"""The shipped odise-tiny, from nothing: ``python -m training.reproduce --runs runs``.

Draws Sticker World, trains everything frozen (:mod:`training.pretrain`), the heads, CLIP's regions once more, the heads
once more, and measures the result. What is finished is left alone and what was interrupted goes on: after a break, give
the same command again. Some six hours on two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from odise_rt.command_line import CommandParser, command
from training.chain import Stage, run_chain
from training.command_line import add_device_argument

PRESET = "odise-tiny"
PROCESSES = (1, 2, 4)
"""Numbers that share a batch of four scenes evenly."""


@dataclass(frozen=True)
class ModuleStage(Stage):
    """A stage whose command is a module, run by this interpreter."""

    processes: int = 1

    def words(self) -> tuple[str, ...]:
        """What follows the interpreter."""
        several = ("-m", "torch.distributed.run", "--nproc-per-node", str(self.processes)) if self.processes > 1 else ()
        return (*several, "-m", *super().words())

    def run(self) -> int:
        """Run it; returns its exit status."""
        status = subprocess.run([sys.executable, *self.words()], check=False).returncode
        if status:
            print(f"error: this stage ended with status {status}; the same command goes on from here", file=sys.stderr)
        return status


def plan(runs: Path, processes: int, device: str = "cpu", font: Path | None = None) -> list[ModuleStage]:
    """The stages in order, with the settings of the shipped model.

    Args:
        runs: folder of everything made.
        processes: of the heads' training; on a CPU one for each core, with one thread each.
        device: where the networks are trained.
        font: Noto Color Emoji; None: it is searched for.
    """
    named = () if font is None else ("--font", str(font))
    scenes, pieces = ("--scenes", str(runs / "frozen")), ("--tokenizer", str(runs / "tokenizer.json"))
    data = ("--data", str(runs / "sticker"))

    def convert(clip: str, out: str) -> ModuleStage:
        networks = ("--stable-diffusion", str(runs / "diffusion"), "--clip", str(runs / clip / "model.safetensors"))
        arguments = ("convert", "--config", PRESET, *networks, *pieces, "--out", str(runs / out))
        return ModuleStage(runs / out / "config.json", "training.checkpoints", arguments)

    def train(experiment: str, frozen: str, out: str, *more: str) -> ModuleStage:
        threads = ("--threads", "1", "--workers", "0") if device == "cpu" else ()
        places = (*data, "--frozen", str(runs / frozen), "--out", str(runs / out))
        arguments = (experiment, *places, "--device", device, *threads, "--resume", *more)
        return ModuleStage(runs / out / "checkpoint/config.json", "training.train", arguments, processes)

    refined_clip = (
        *("--start", str(runs / "frozen-tiny"), "--freeze-text", "--text-steps", "0", "--steps", "2800"),
        *("--rate", "1.5e-3", "--mosaics", "1", "--collages", "16", "--close-ups", "6", "--scene-batch", "6"),
    )
    return [
        ModuleStage(
            runs / "diffusion/samples.png", "training.pretrain", ("--runs", str(runs), "--device", device, *named)
        ),
        convert("clip", "frozen-tiny"),
        train("sticker_tiny_label", "frozen-tiny", "odise-tiny"),
        ModuleStage(
            runs / "clip-refined/metrics.json",
            "training.pretrain.clip",
            (*scenes, *pieces, "--out", str(runs / "clip-refined"), *refined_clip, "--device", device, *named),
        ),
        convert("clip-refined", "frozen-refined"),
        train(
            *("sticker_tiny_refine", "frozen-refined", "odise-tiny-refined"),
            *("--heads", str(runs / "odise-tiny/checkpoint")),
        ),
        ModuleStage(
            runs / "shipped/config.json",
            "training.checkpoints",
            ("compact", str(runs / "odise-tiny-refined/checkpoint"), "--out", str(runs / "shipped")),
        ),
        ModuleStage(
            runs / "evaluation/metrics.json",
            "training.evaluate",
            (str(runs / "shipped"), *data, "--out", str(runs / "evaluation")),
        ),
    ]


@command("the same command goes on where it was")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not finished; returns the exit status of the first stage that fails."""
    parser = CommandParser(prog="python -m training.reproduce", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Folder of everything made.")
    add_device_argument(parser, "cpu")
    parser.add_argument(
        "--processes",
        type=int,
        choices=PROCESSES,
        help="Processes that train the heads. Default: as many as cores on a CPU, 1 on a GPU.",
    )
    parser.add_argument(
        "--font", type=Path, help="Noto Color Emoji font file. Default: searched for in the usual places."
    )
    parser.add_argument("--dry-run", action="store_true", help="Print the commands only.")
    options = parser.parse_args(arguments)
    cores = os.cpu_count() or 1
    fitting = max(count for count in PROCESSES if count <= cores) if options.device == "cpu" else 1
    processes = options.processes or fitting
    stages = plan(options.runs, processes, options.device, options.font)
    return run_chain(stages, ModuleStage.run, options.dry_run)


if __name__ == "__main__":
    raise SystemExit(main())
