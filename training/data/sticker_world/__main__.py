"""Command: ``python -m training.data.sticker_world OUT --images N --seed S``."""

from __future__ import annotations

import os
from pathlib import Path

from odise_rt.command_line import CommandParser, command, whole_number
from training.data.sticker_world.nouns import ClassSelection
from training.data.sticker_world.writer import Recipe, write_dataset


@command("nothing was written")
def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and draw the data set; returns the exit status."""
    parser = CommandParser(
        prog="python -m training.data.sticker_world",
        description="Draw Sticker World: scenes of emoji on textures as a COCO panoptic data set with captions.",
    )
    parser.add_argument("out", type=Path, help="Folder of the data set; made if absent.")
    parser.add_argument("--images", type=whole_number(1), required=True, help="Number of scenes.")
    parser.add_argument("--seed", type=whole_number(0), required=True, help="The same seed draws the same scenes.")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="The part of the data set to draw.")
    parser.add_argument("--size", type=whole_number(64), default=256, help="Pixels of a side.")
    parser.add_argument(
        "--classes",
        choices=("seen", "all"),
        help="seen: only nouns that masks may name; all: every noun. Default: seen for train, all for val.",
    )
    parser.add_argument(
        "--font", type=Path, help="Noto Color Emoji font file. Default: searched for in the usual places."
    )
    parser.add_argument("--workers", type=whole_number(1), default=os.cpu_count() or 1, help="Processes that draw.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the split if it exists.")
    options = parser.parse_args(arguments)
    classes: ClassSelection = options.classes or ("seen" if options.split == "train" else "all")
    recipe = Recipe(options.seed, options.split, options.size, classes, options.font)
    write_dataset(options.out, options.images, recipe, options.workers, options.overwrite)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
