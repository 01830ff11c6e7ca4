"""Segment images by words, and look into bundles.

    odise-rt segment photo.jpg --bundle out/odise-tiny --vocab "black pickup truck, pickup truck; blue sky, sky"
    odise-rt segment photos/ --bundle out/odise-tiny --vocab coco --out results
    odise-rt segment clip.mp4 --bundle out/odise-tiny --vocab auto --unknown 0.3
    odise-rt demo --bundle out/odise-tiny
    odise-rt inspect out/odise-tiny
    odise-rt doctor
    odise-rt labels ade20k
    odise-rt serve out/odise-tiny --vocabulary coco
    odise-rt export-triton out/odise-tiny --out models
    odise-rt completion bash

With --json every command prints one JSON document on standard output; an error is {"error": {"type", "message"}}.

Exit codes: 0 all done, 1 an error, 2 some files could not be read (the others are done) or wrong usage, 130 stopped
by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from odise_rt import segment_command
from odise_rt.command_line import CommandParser
from odise_rt.completion import SHELLS
from odise_rt.demo import command as demo_command
from odise_rt.errors import OdiseError
from odise_rt.model_arguments import add_bundle_argument, named_bundle
from odise_rt.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; ``None``: those of the process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    _take_all_characters("--json" in arguments)
    try:
        args = make_parser().parse_args(arguments)
    except _UsageError as exc:
        exc.parser.print_usage(sys.stderr)
        _fail(str(exc), "UsageError", "--json" in arguments)
        raise SystemExit(2) from None
    except SystemExit:  # --help, --version
        _say("", sys.stdout)
        raise
    _take_all_characters(args.json)  # abbreviated, too
    level = logging.ERROR if args.quiet else logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True)
    try:
        code = int(args.command(args))
        if sys.stdout is not None:  # closed by who started us
            sys.stdout.flush()
        return code
    except OdiseError as exc:
        return _fail(str(exc), type(exc).__name__, args.json)
    except BrokenPipeError:
        _say("", sys.stdout)  # its reader is gone (`odise-rt labels lvis | head`), and what is left is dropped
        return 1
    except OSError as exc:
        place = exc.filename2 or exc.filename  # of two the one that something was to be renamed to
        name = f" {place}" if place else ""
        message = f"the file system refused{name}: {exc.strerror or exc}; free space or choose another folder"
        return _fail(message, type(exc).__name__, args.json)
    except RuntimeError as exc:
        if "can't start new thread" not in str(exc):
            raise
        message = "the system starts no more threads: raise its limit for this user or container (ulimit -u, pids)"
        return _fail(message, type(exc).__name__, args.json)


def _fail(message: str, kind: str, as_json: bool) -> int:
    message = " ".join(message.split())
    _say(f"odise-rt: error: {message}\n", sys.stderr)
    document = json.dumps({"error": {"type": kind, "message": message}}, ensure_ascii=False) + "\n"
    _say(document if as_json else "", sys.stdout)
    return 1


def _say(text: str, stream: TextIO | None) -> None:
    """Write and flush; what the stream does not take is lost."""
    if stream is None:  # closed by who started us
        return
    try:
        stream.write(text)
        stream.flush()
    except OSError:  # keep Python from complaining at exit of what is still to be written
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _take_all_characters(as_json: bool) -> None:
    """Let standard output take characters beyond its encoding, and file names that are no text; JSON is UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace", encoding="utf-8" if as_json else None)


class _UsageError(Exception):
    def __init__(self, message: str, parser: argparse.ArgumentParser) -> None:
        super().__init__(message)
        self.parser = parser


class _Parser(CommandParser):
    """A parser that raises on wrong usage, so that :func:`main` can report it, as JSON where that was asked for."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(message, self)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(prog="odise-rt", description=__doc__)
    parser.add_argument("--version", action="version", version=f"odise-rt {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="Print JSON on standard output instead of text.")
    common.add_argument("-v", "--verbose", action="store_true", help="Say on standard error what runs on what.")
    common.add_argument("-q", "--quiet", action="store_true", help="Show no progress and no warnings.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    segment_command.add_parser(commands, common)
    demo_command.add_parser(commands, common)

    inspect = commands.add_parser("inspect", parents=[common], help="Show what a bundle holds and check it.")
    add_bundle_argument(inspect, positional=True)
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

    serve_command.add_parser(commands, common).set_defaults(command=_serve)
    triton_command.add_parser(commands, common).set_defaults(command=_export_triton)

    completion = commands.add_parser("completion", parents=[common], help="Print a script that completes commands.")
    completion.add_argument("shell", choices=SHELLS, help="The shell that will read the script.")
    completion.set_defaults(command=_completion)
    return parser


def _serve(args: argparse.Namespace) -> int:
    from odise_rt.serve.command import run

    return run(args, lambda line: print(line, flush=True))


def _export_triton(args: argparse.Namespace) -> int:
    from odise_rt.serve.triton.command import run

    return run(args, print)


def _inspect(args: argparse.Namespace) -> int:
    from odise_rt.bundle import Bundle
    from odise_rt.engine_listing import engine_lines, list_engines

    bundle = Bundle.open(named_bundle(args, "BUNDLE"), verify=not args.no_verify)
    engines = list_engines(bundle)
    if args.json:
        extra = {"verified": bundle.verified, "digest": bundle.digest, "engines": engines}
        print(json.dumps(bundle.manifest | extra, indent=1))
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
    if engines:
        print(f"  {len(engines)} engines for GPUs")
    for line in engine_lines(engines):
        print(f"    {line}")
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


def _completion(args: argparse.Namespace) -> int:
    from odise_rt.completion import completion_script

    script = completion_script(make_parser(), args.shell)
    print(json.dumps({"shell": args.shell, "script": script}) if args.json else script)
    return 0
