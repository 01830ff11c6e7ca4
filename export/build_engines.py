"""Turn a checkpoint into a bundle: five graphs, each compared with PyTorch, and the constants that they need.

    python -m export.build_engines --checkpoint training/pretrained/odise-tiny --out out/odise-tiny
    python -m export.build_engines --odise odise_label_coco_50e-b67d2efc.pth --stable-diffusion sd-v1-3.ckpt \\
        --clip ViT-L-14-336px.pt --out out/odise --precision fp16
    python -m export.build_engines --config odise-sd1 --init random --out out/odise-random

The bundle is written beside its place and appears there only when every stage, and the whole way from pixels to
segments, agrees with PyTorch within the bounds of export/tolerances.py. The same input gives the same files, but for
export_report.*, which holds seconds.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from export.bundle_writer import BundleWriter
from export.exporter import ExportOptions, build_bundle
from export.precision import Precision
from export.sources import Source, from_checkpoint, from_random, from_released
from odise_rt.errors import InputError, OdiseError
from odise_rt.preprocessing import load_image
from odise_rt.specs import STAGES
from training.config import PRESETS

_TABLE_WIDTH = 110
"""Columns of the table in a log file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_TABLE_WIDTH)
    # A terminated export cleans up as an interrupted one does.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        options = ExportOptions(
            precision=args.precision,
            stages=tuple(name for name in STAGES if name in args.stages),
            force=args.force,
            keep_going=args.keep_going,
            photo=load_image(args.image) if args.image else None,
            threads=args.threads,
        )
        BundleWriter(args.out, args.force)  # refuse a place before minutes of work
        build_bundle(_source(args), args.out, options, console)
    except OdiseError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: nothing was put in place", file=sys.stderr)
        return 130
    if options.stages == STAGES:
        console.print(f"bundle: {args.out}", highlight=False)
    else:
        console.print(f"only {', '.join(options.stages)} checked: no bundle was put in place", highlight=False)
    return 0


def _source(args: argparse.Namespace) -> Source:
    released = (args.odise, args.stable_diffusion, args.clip)
    given = [args.checkpoint is not None, any(released), args.init is not None]
    if sum(given) != 1:
        raise InputError(
            "expected one source: --checkpoint DIR, or --odise with --stable-diffusion and --clip, or --config NAME "
            "--init random"
        )
    if args.checkpoint is not None:
        return from_checkpoint(args.checkpoint)
    if args.init is not None:
        return from_random(args.config, args.seed)
    if not all(released):
        raise InputError("the released model is in three files: --odise, --stable-diffusion and --clip go together")
    return from_released(args.config, *released)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.build_engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_argument_group("source (one of three)")
    source.add_argument("--checkpoint", type=Path, help="Directory of a checkpoint of this project.")
    source.add_argument("--odise", type=Path, help="Released ODISE heads, odise_*.pth.")
    source.add_argument("--stable-diffusion", type=Path, help="CompVis sd-v1-*.ckpt or a diffusers directory.")
    source.add_argument("--clip", type=Path, help="OpenAI's ViT-L-14-336px.pt or an open_clip checkpoint.")
    source.add_argument(
        "--config",
        choices=sorted(PRESETS),
        default="odise-sd1",
        help="Size and variant of released or random weights (default: odise-sd1).",
    )
    source.add_argument("--init", choices=["random"], help="Export --config with random weights.")
    source.add_argument("--seed", type=int, default=0, help="Seed of the random weights (default: 0).")
    parser.add_argument(
        "--out", type=Path, required=True, help="The bundle's folder; made, and replaced only by --force."
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="Precision inside the graphs (default: fp32). fp16 is mixed: rules keep sensitive operations in float32.",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        metavar="STAGE",
        help=f"Export and check only these, without a bundle in the end: {', '.join(STAGES)}.",
    )
    parser.add_argument("--image", type=Path, help="Check on this picture instead of a drawn one.")
    parser.add_argument("--force", action="store_true", help="Replace a bundle at --out.")
    parser.add_argument(
        "--keep-going", action="store_true", help="Check the remaining stages, too, after one that does not agree."
    )
    parser.add_argument("--threads", type=int, help="Threads inside an operator when graphs are run (default: all).")
    return parser


if __name__ == "__main__":
    sys.exit(main())
