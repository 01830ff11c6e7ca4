"""Segment images by words, and look into bundles.

    odise-rt segment photo.jpg --bundle out/odise-tiny --vocab "black pickup truck, pickup truck; blue sky, sky"
    odise-rt segment photos/ --bundle out/odise-tiny --vocab coco --out results
    odise-rt inspect out/odise-tiny
    odise-rt doctor
    odise-rt labels ade20k
    odise-rt serve out/odise-tiny --vocabulary coco
    odise-rt export-triton out/odise-tiny --out models

Exit codes: 0 all done, 1 an error, 2 some images could not be read (the others are done) or wrong usage, 130 stopped
by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from odise_rt.errors import OdiseError, OptionsError
from odise_rt.version import __version__

BUNDLE_VARIABLE = "ODISE_RT_BUNDLE"


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; ``None``: those of the process.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(argv)
    level = logging.ERROR if args.quiet else logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True)
    try:
        code = int(args.command(args))
        sys.stdout.flush()
        return code
    except OdiseError as exc:
        return _fail(str(exc))
    except KeyboardInterrupt:
        print("odise-rt: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (`odise-rt labels lvis | head`); keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as exc:
        name = f" {exc.filename}" if exc.filename else ""
        return _fail(f"the file system refused{name}: {exc.strerror or exc}; free space or choose another folder")


def _fail(message: str) -> int:
    print(f"odise-rt: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="odise-rt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"odise-rt {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="Print JSON on standard output instead of text.")
    common.add_argument("-v", "--verbose", action="store_true", help="Say on standard error what runs on what.")
    common.add_argument("-q", "--quiet", action="store_true", help="Show no progress and no warnings.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_segment(commands, common)

    inspect = commands.add_parser("inspect", parents=[common], help="Show what a bundle holds and check it.")
    inspect.add_argument("bundle", type=Path, metavar="BUNDLE", help="The bundle's folder.")
    inspect.add_argument("--no-verify", action="store_true", help="Skip the SHA-256 of the files.")
    inspect.set_defaults(command=_inspect)

    doctor = commands.add_parser(
        "doctor", parents=[common], help="Show what is installed, which devices really work, and which bundles fit."
    )
    doctor.add_argument("bundles", nargs="*", type=Path, metavar="BUNDLE", help="Bundles to check as well.")
    doctor.set_defaults(command=_doctor)

    labels = commands.add_parser("labels", parents=[common], help="Show a vocabulary as the runtime reads it.")
    labels.add_argument(
        "vocabulary", nargs="?", help="A built-in name, a .json or .txt file, or words. Without it: the built-in names."
    )
    labels.set_defaults(command=_labels)

    from odise_rt.serve import command as serve_command
    from odise_rt.serve.triton import command as triton_command

    serve_command.add_parser(commands, common, BUNDLE_VARIABLE).set_defaults(command=_serve)
    triton_command.add_parser(commands, common).set_defaults(command=_export_triton)
    return parser


def _add_segment(commands: Any, common: argparse.ArgumentParser) -> None:
    from odise_rt.segment_command import FORMATS

    parser = commands.add_parser("segment", parents=[common], help="Segment images, or the images of folders.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="Image files, folders, or quoted patterns.")
    bundle = os.environ.get(BUNDLE_VARIABLE)
    parser.add_argument(
        "--bundle",
        type=Path,
        default=Path(bundle) if bundle else None,
        help=f"The bundle's folder. Default: the environment variable {BUNDLE_VARIABLE}.",
    )
    parser.add_argument(
        "--vocab",
        action="append",
        required=True,
        metavar="WORDS",
        help="Words ('truck, pickup; stuff: sky': ';' ends a class, ',' separates synonyms), a built-in name (coco, "
        "ade20k, lvis), or a .json or .txt file. Several of them add up.",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="Folder for the results. Default: out.")
    parser.add_argument(
        "--format",
        default="overlay,json",
        metavar="LIST",
        help=f"What to write, separated by commas, of {', '.join(FORMATS)}. Default: overlay,json.",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu or cuda. auto takes a GPU if one really works. Default: auto."
    )
    parser.add_argument("--threads", type=int, help="CPU threads inside an operator. Default: all usable cores.")
    parser.add_argument("--low-memory", action="store_true", help="Hold one graph in memory at a time; slower.")
    parser.add_argument("--no-verify", action="store_true", help="Skip the SHA-256 of the bundle's files.")
    group = parser.add_argument_group("options of the model; the default is the bundle's")
    group.add_argument("--object-mask-threshold", type=float, metavar="P", help="Least score of a mask.")
    group.add_argument("--overlap-threshold", type=float, metavar="P", help="Least share of its mask a segment keeps.")
    group.add_argument(
        "--clip-weight-seen", type=float, metavar="W", help="CLIP's weight for classes seen in training."
    )
    group.add_argument("--clip-weight-unseen", type=float, metavar="W", help="CLIP's weight for other classes.")
    group.add_argument("--short-edge", type=int, metavar="PIXELS", help="Shorter image edge inside the network.")
    group.add_argument("--long-edge", type=int, metavar="PIXELS", help="Bound on the longer edge.")
    group.add_argument("--max-pixels", type=int, metavar="N", help="Refuse larger images. Default: 64 megapixels.")
    parser.set_defaults(command=_segment)


def _segment(args: argparse.Namespace) -> int:
    from odise_rt.segment_command import segment_images

    if args.bundle is None:
        raise OptionsError(f"no bundle was named: pass --bundle FOLDER or set {BUNDLE_VARIABLE}")
    outcome = segment_images(args)
    total = len(outcome.done) + len(outcome.failed)
    if args.json:
        broken = [{"image": str(path), "error": message} for path, message in outcome.failed]
        print(json.dumps({"images": outcome.done, "failed": broken}, indent=1, ensure_ascii=False))
    elif total > 1:
        print(f"{len(outcome.done)} of {total} images segmented; results in {args.out}")
    elif outcome.done:
        _print_image(outcome.done[0])
    if outcome.failed:
        print(f"odise-rt: {len(outcome.failed)} of {total} images could not be segmented:", file=sys.stderr)
        for _, message in outcome.failed:
            print(f"  {' '.join(message.split())}", file=sys.stderr)
    return 2 if outcome.failed else 0


def _serve(args: argparse.Namespace) -> int:
    from odise_rt.serve.command import run

    bundle = os.environ.get(BUNDLE_VARIABLE)
    return run(args, args.bundle or (Path(bundle) if bundle else None), lambda line: print(line, flush=True))


def _export_triton(args: argparse.Namespace) -> int:
    from odise_rt.serve.triton.command import run

    return run(args, print)


def _print_image(done: dict[str, Any]) -> None:
    facts, segments = done["facts"], done["segments"]
    print(f"{len(segments)} segments in {facts['seconds']['total']:.2f} s on {facts['engine']}")
    for segment in sorted(segments, key=lambda s: -s["area"]):
        share = 100 * segment["area"] / (done["height"] * done["width"])
        kind = "thing" if segment["isthing"] else "stuff"
        print(f"  {segment['id']:>4}  {kind}  {segment['score']:.2f}  {share:5.1f} %  {segment['label']}")
    for path in done["files"]:
        print(path)


def _inspect(args: argparse.Namespace) -> int:
    from odise_rt.bundle import Bundle

    bundle = Bundle.open(args.bundle, verify=not args.no_verify)
    if args.json:
        print(json.dumps(bundle.manifest | {"verified": bundle.verified, "digest": bundle.digest}, indent=1))
        return 0
    facts = bundle.facts
    print(f"{bundle.name}: {facts.variant} variant, {bundle.precision}, {bundle.root}")
    print(f"  files      {'match their SHA-256' if bundle.verified else 'present, hashes not compared'}")
    print(f"  digest     {bundle.digest}")
    print(f"  masks      {facts.queries} for an image; windows of {facts.window} pixels")
    print(f"  test size  short edge {facts.test_short_edge}, long edge at most {facts.test_long_edge}")
    print(f"  ensemble   CLIP's weight {facts.clip_weight_seen} seen, {facts.clip_weight_unseen} unseen")
    print(f"  words      {len(bundle.training_vocabulary)} seen in training, prompts {facts.mask_prompt!r} (masks) and")
    print(f"             {facts.clip_prompt!r} (CLIP)")
    print(f"  {'stage':<14}{'parameters':>14}{'MiB':>9}  inputs -> outputs")
    for name, entry in bundle.stages.items():
        paths = [entry.file.path, *(bundle.root / extra for extra in entry.file.extra_files)]
        size = sum(p.stat().st_size for p in paths) / 2**20
        count = f"{entry.parameters:,}" if entry.parameters is not None else "?"
        sides = (", ".join(t.name for t in side) for side in (entry.spec.inputs, entry.spec.outputs))
        print(f"  {name:<14}{count:>14}{size:>9.1f}  {' -> '.join(sides)}")
        for variant in entry.variants:
            print(f"  {'':<14}{'':>14}{'':>9}  also for {variant}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from odise_rt.doctor import examine, report

    findings = examine(args.bundles)
    print(json.dumps(findings, indent=1) if args.json else report(findings))
    return 0 if findings["ready"] else 1


def _labels(args: argparse.Namespace) -> int:
    from odise_rt.vocabulary import BUILTIN, Vocabulary

    if args.vocabulary is None:
        if args.json:
            print(json.dumps(BUILTIN, indent=1))
        else:
            for name, title in BUILTIN.items():
                print(f"{name:<10}{title}")
        return 0
    vocabulary = Vocabulary.load(args.vocabulary)
    if args.json:
        print(json.dumps(vocabulary.to_dict(), indent=1, ensure_ascii=False))
        return 0
    for index, entry in enumerate(vocabulary):
        print(f"{index:>6}  {'thing' if entry.isthing else 'stuff'}  {', '.join(entry.words)}")
    return 0
