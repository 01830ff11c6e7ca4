"""Everything frozen, from nothing: ``python -m training.pretrain --runs runs``.

Draws the data sets, then trains tokenizer, CLIP, autoencoder and diffusion model in this order with the settings of the
shipped odise-tiny. What is already finished is left alone and what was interrupted is resumed, so after a break the
same command goes on.
"""

from __future__ import annotations

import os
from pathlib import Path

from odise_rt.command_line import CommandParser, command
from training.chain import Stage, run_chain
from training.command_line import add_device_argument
from training.data.sticker_world.__main__ import main as draw
from training.pretrain import clip, diffusion, tokenizer, vae

FROZEN_SCENES, FROZEN_SEED = 3000, 3
TRAIN_SCENES, TRAIN_SEED = 5000, 1
VAL_SCENES, VAL_SEED = 500, 2


def plan(runs: Path, device: str = "cpu", font: Path | None = None) -> list[Stage]:
    """The stages in order, with the settings of the shipped model."""
    frozen, sticker, pieces, models = runs / "frozen", runs / "sticker", runs / "tokenizer.json", runs / "diffusion"
    named = () if font is None else ("--font", str(font))
    drawing = ("--workers", str(os.cpu_count() or 1), *named)
    training = ("--device", device, *named)

    def scenes(root: Path, split: str, count: int, seed: int, classes: str) -> Stage:
        options = ("--images", str(count), "--seed", str(seed), "--split", split, "--classes", classes)
        return Stage(root / f"annotations/panoptic_{split}.json", "draw", (str(root), *options, *drawing))

    shared = ("--scenes", str(frozen), "--tokenizer", str(pieces))
    captions = ("--captions", str(frozen / "annotations/captions_train.json"), "--out", str(pieces))
    return [
        scenes(frozen, "train", FROZEN_SCENES, FROZEN_SEED, "all"),
        scenes(sticker, "val", VAL_SCENES, VAL_SEED, "all"),
        scenes(sticker, "train", TRAIN_SCENES, TRAIN_SEED, "seen"),
        Stage(pieces, "tokenizer", captions),
        Stage(runs / "clip/metrics.json", "clip", (*shared, "--out", str(runs / "clip"), *training)),
        Stage(
            models / "vae" / vae.RECONSTRUCTIONS,
            "vae",
            ("--scenes", str(frozen), "--out", str(models / "vae"), *training),
        ),
        Stage(models / "samples.png", "diffusion", (*shared, "--out", str(models), *training)),
    ]


@command("the same command goes on where it was")
def main(arguments: list[str] | None = None) -> int:
    """Run what is not finished; returns the exit status of the first stage that fails."""
    parser = CommandParser(prog="python -m training.pretrain", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Folder of everything made.")
    add_device_argument(parser, "cpu")
    parser.add_argument(
        "--font", type=Path, help="Noto Color Emoji font file. Default: searched for in the usual places."
    )
    parser.add_argument("--dry-run", action="store_true", help="Print the commands only.")
    options = parser.parse_args(arguments)
    commands = {
        "draw": draw,
        "tokenizer": tokenizer.main,
        "clip": clip.main,
        "vae": vae.main,
        "diffusion": diffusion.main,
    }
    stages = plan(options.runs, options.device, options.font)
    return run_chain(stages, lambda stage: commands[stage.command](list(stage.arguments)), options.dry_run)


if __name__ == "__main__":
    raise SystemExit(main())
