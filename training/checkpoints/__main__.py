"""Converts published checkpoints to this project's format, and says what is in a file.

    python -m training.checkpoints convert --config odise-sd1 --odise odise_label_coco_50e-b67d2efc.pth \
        --stable-diffusion sd-v1-3.ckpt --clip ViT-L-14-336px.pt --out checkpoints/odise-label
    python -m training.checkpoints compact runs/odise-tiny/checkpoint --out checkpoints/odise-tiny
    python -m training.checkpoints inspect checkpoints/odise-label
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from odise_rt.command_line import CommandParser, command
from odise_rt.errors import OptionsError
from odise_rt.vocabulary import Vocabulary
from training.checkpoints.own_format import (
    WEIGHTS_NAME,
    LoadedCheckpoint,
    load_checkpoint,
    read_description,
    read_tokenizer,
    save_checkpoint,
)
from training.checkpoints.released import load_released
from training.checkpoints.tensor_files import TensorFile, read_tensors
from training.config import PRESETS, preset


@command("nothing was written")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandParser(prog="python -m training.checkpoints", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    convert = commands.add_parser("convert", help="Write a checkpoint directory from the published files.")
    convert.add_argument("--config", required=True, choices=list(PRESETS), help="Preset that the files belong to.")
    convert.add_argument("--odise", type=Path, help="Released ODISE heads. Default: untrained ones.")
    convert.add_argument(
        "--stable-diffusion", type=Path, required=True, help="CompVis sd-v1-*.ckpt, or a diffusers directory."
    )
    convert.add_argument("--clip", type=Path, required=True, help="OpenAI or open_clip checkpoint of CLIP.")
    convert.add_argument("--out", type=Path, required=True, help="Directory to write.")
    convert.add_argument(
        "--training-labels",
        type=Path,
        help="Label file (id:name,synonym,... a line) of the data the heads were trained on. Default: COCO's names.",
    )
    convert.add_argument(
        "--tokenizer", type=Path, help="`tokenizers` file of CLIP's text tower. Default: that of OpenAI's CLIP."
    )
    convert.add_argument("--storage", choices=("fp16", "fp32"), default="fp32", help="Precision in the file.")
    convert.add_argument(
        "--without-sd-text", action="store_true", help="Leave the diffusion text encoder out: inference needs it not."
    )

    compact = commands.add_parser("compact", help="Write a smaller copy of a checkpoint directory, for inference.")
    compact.add_argument("path", type=Path, help="Checkpoint directory, e.g. RUN/checkpoint.")
    compact.add_argument("--out", type=Path, required=True, help="Directory to write.")
    compact.add_argument("--storage", choices=("fp16", "fp32"), default="fp16", help="Precision in the file.")
    compact.add_argument("--with-sd-text", action="store_true", help="Keep the diffusion text encoder.")

    inspect = commands.add_parser("inspect", help="Say what a checkpoint directory or a file of tensors holds.")
    inspect.add_argument("path", type=Path, help="Directory or file.")
    inspect.add_argument("--tensors", action="store_true", help="List every tensor with its shape and type.")

    args = parser.parse_args(argv)
    return {"convert": _convert, "compact": _compact, "inspect": _inspect}[args.command](args)


def _convert(args: argparse.Namespace) -> int:
    words = None if args.training_labels is None else Vocabulary.from_openseg(args.training_labels).words
    loaded = load_released(
        preset(args.config),
        odise=args.odise,
        stable_diffusion=args.stable_diffusion,
        clip=args.clip,
        training_vocabulary=words,
        tokenizer_json=None if args.tokenizer is None else read_tokenizer(args.tokenizer),
    )
    print(loaded.report)
    return _save(loaded, args, include_sd_text=not args.without_sd_text)


def _compact(args: argparse.Namespace) -> int:
    if args.out.resolve() == args.path.resolve():
        raise OptionsError(f"--out {args.out} is the checkpoint itself: name another directory")
    return _save(load_checkpoint(args.path), args, include_sd_text=args.with_sd_text)


def _save(loaded: LoadedCheckpoint, args: argparse.Namespace, include_sd_text: bool) -> int:
    save_checkpoint(
        args.out,
        loaded.model,
        tokenizer_json=loaded.tokenizer_json,
        training_vocabulary=loaded.training_vocabulary,
        storage=args.storage,
        include_sd_text=include_sd_text,
    )
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"wrote {args.out}, {size / 2**20:.1f} MiB")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    if args.path.is_dir():
        description = read_description(args.path)
        config = description["config"]
        print(f"{args.path}: checkpoint of this project, format {description['format_version']}")
        print(f"config {config['name']}, {config['variant']} supervision, window {config['window']}")
        print(f"training vocabulary of {len(description['training_vocabulary'])} names")
        print(f"diffusion text encoder {'included' if description['sd_text'] else 'left out'}")
        file = read_tensors(args.path / WEIGHTS_NAME)
    else:
        file = read_tensors(args.path)
        print(f"{args.path}: {file.kind} ({file.container} file)")
    _print_tensors(file, args.tensors)
    return 0


def _print_tensors(file: TensorFile, every: bool) -> None:
    numbers: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for key, tensor in file.tensors.items():
        top = key.partition(".")[0]
        numbers[top] += tensor.numel()
        tensors[top] += 1
        if every:
            print(f"{key}\t{'x'.join(map(str, tensor.shape)) or 'scalar'}\t{str(tensor.dtype).removeprefix('torch.')}")
    for top, count in tensors.items():
        print(f"{top:24} {count:6} tensors {numbers[top]:15,} numbers")
    print(f"{'together':24} {len(file.tensors):6} tensors {numbers.total():15,} numbers")


if __name__ == "__main__":
    sys.exit(main())
