"""Say where a checkpoint or a bundle loses quality on a COCO-format panoptic data set.

Example: python -m training.diagnose training/pretrained/odise-tiny --data runs/sticker --out out/diagnosis.json

For every annotated segment: is there a mask for it among the proposals, and does that mask get the right name from the
mask classifier, from CLIP, from both? Prints a table by seen and unseen, things and stuff, and size.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from odise_rt.command_line import CommandParser, command, whole_number
from odise_rt.files import check_writable
from odise_rt.options import SegmentOptions
from odise_rt.vocabulary import Vocabulary
from training.command_line import add_classes_argument, parse_model_arguments
from training.data.coco_panoptic import CocoPanoptic
from training.diagnosis import as_json, as_table, diagnose
from training.evaluate import open_segmenter, save_text
from training.evaluation_loop import progress_bar


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = CommandParser(prog="python -m training.diagnose", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Folder of a COCO-format panoptic data set.")
    parser.add_argument("--split", default="val", help="The part of the data set to look at.")
    parser.add_argument("--out", type=Path, help="JSON file with the averages and every segment. Default: none.")
    add_classes_argument(parser, "such as the prompt-engineered lists of the published figures")
    parser.add_argument("--limit", type=whole_number(1), help="Look at the first N pictures only. Default: all.")
    parser.add_argument(
        "--clip-weight-seen", type=float, help="CLIP's weight for classes seen in training. Default: the model's."
    )
    parser.add_argument(
        "--clip-weight-unseen", type=float, help="CLIP's weight for other classes. Default: the model's."
    )
    return parse_model_arguments(parser, argv)


@command("nothing was written")
def main(argv: Sequence[str]) -> int:
    """Run; returns the exit status."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = SegmentOptions(
        clip_weight_seen=arguments.clip_weight_seen, clip_weight_unseen=arguments.clip_weight_unseen
    )
    data = CocoPanoptic.from_root(arguments.data, arguments.split, with_captions=False)
    words = None if arguments.classes is None else Vocabulary.load(arguments.classes)
    indices = range(len(data))[: arguments.limit]
    if arguments.out is not None:
        check_writable(arguments.out)
    with open_segmenter(arguments.model, arguments.device, arguments.threads, arguments.cpu_engine) as segmenter:
        findings = diagnose(segmenter, data, indices, options, progress_bar("diagnose"), words)
    if arguments.out is not None:
        save_text(arguments.out, json.dumps(as_json(findings), indent=1))
    print(as_table(findings))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
