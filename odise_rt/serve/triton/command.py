"""``odise-rt export-triton``: its options."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from odise_rt.model_arguments import add_bundle_argument, named_bundle
from odise_rt.options import DEFAULT_MAX_PIXELS
from odise_rt.serve.limits import DEFAULT_MAX_WORDS


def add_parser(commands: Any, common: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the command to the parser of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export-triton", parents=[common], help="Write a model repository for Triton Inference Server."
    )
    add_bundle_argument(parser, positional=True)
    parser.add_argument("--out", type=Path, required=True, help="The repository's folder; made.")
    parser.add_argument("--force", action="store_true", help="Replace a repository at --out.")
    parser.add_argument("--name", default="odise", help="Of the model that clients call.")
    parser.add_argument(
        "--stages",
        choices=["triton", "python", "inside"],
        default="triton",
        help="Who runs the graphs: Triton's ONNX Runtime and TensorRT backends, Python-backend models, or the "
        "orchestrator itself.",
    )
    parser.add_argument(
        "--variant",
        metavar="KEY",
        help="Graphs or engines of this key where the bundle has them. Default: the portable graphs.",
    )
    parser.add_argument(
        "--plans",
        metavar="GPU",
        help="Take the TensorRT plans for this GPU where the bundle has them; any: the only ones. Default: none.",
    )
    parser.add_argument("--kind", choices=["cpu", "gpu"], default="cpu", help="Device of the stages.")
    parser.add_argument("--instances", type=int, default=1, help="Copies of each stage on each device.")
    parser.add_argument("--orchestrators", type=int, default=1, help="Images in work at a time.")
    parser.add_argument("--batch-delay-us", type=int, default=500, help="Microseconds a request may wait for others.")
    parser.add_argument("--max-pixels", type=int, default=DEFAULT_MAX_PIXELS, help="Refuse images of more pixels.")
    parser.add_argument(
        "--max-words", type=int, default=DEFAULT_MAX_WORDS, help="Words of a request, synonyms counted."
    )
    parser.add_argument(
        "--environment",
        metavar="PATH",
        help="Archive with a Python environment for the Python backend (conda-pack). Default: none.",
    )
    return parser


def run(args: argparse.Namespace, write: Callable[[str], object]) -> int:
    """Run the command with parsed arguments."""
    from odise_rt.bundle import Bundle
    from odise_rt.serve.triton.repository import RepositoryOptions, export_repository

    options = RepositoryOptions(
        name=args.name,
        stages=args.stages,
        variant=args.variant,
        plans=args.plans,
        kind=args.kind,
        instances=args.instances,
        orchestrators=args.orchestrators,
        batch_delay=args.batch_delay_us,
        max_pixels=args.max_pixels,
        max_words=args.max_words,
        environment=args.environment,
    )
    models = export_repository(Bundle.open(named_bundle(args, "BUNDLE")), args.out, options, args.force)
    if args.json:
        write(json.dumps({"repository": str(args.out), "models": models}))
    else:
        write(f"{args.out}: {', '.join(models)}")
        write(f"tritonserver --model-repository={args.out}")
    return 0
