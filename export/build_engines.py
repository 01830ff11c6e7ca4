"""Turn a checkpoint into a bundle: five graphs, each compared with PyTorch, and the constants that they need; and build
engines for GPUs into it.

    python -m export.build_engines --checkpoint training/pretrained/odise-tiny --out out/odise-tiny
    python -m export.build_engines --odise odise_label_coco_50e-b67d2efc.pth --stable-diffusion sd-v1-3.ckpt \\
        --clip ViT-L-14-336px.pt --training-labels coco_panoptic_with_prompt_eng.txt --out out/odise --precision fp16
    python -m export.build_engines --config odise-sd1 --init random --out out/odise-random
    python -m export.build_engines --bundle out/odise --engine tensorrt --engine ort-cuda

The bundle is written beside its place and appears there only when every stage, and the whole way from pixels to
segments, agrees with PyTorch within the bounds of export/tolerances.py. The same input gives the same files, but for
export_report.*, which holds seconds. Engines (docs/engines.md) are added afterwards, each when it was compared.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from export.bundle_writer import BundleWriter
from export.engine_builds import EngineReport, add_engines
from export.engine_options import RTX_TARGETS, EngineOptions, check_engine_options
from export.engine_profiles import WINDOW_COUNTS, engine_shapes
from export.engine_reference import References
from export.exporter import ExportOptions, build_bundle, check_stages
from export.precision import EnginePrecision, Precision
from export.progress import export_console
from export.sources import Source, from_checkpoint, from_random, from_released
from export.verify import engine_references
from odise_rt.backends.machine import this_machine
from odise_rt.backends.ort import import_onnxruntime
from odise_rt.backends.select import MAX_THREADS
from odise_rt.bundle import Bundle
from odise_rt.command_line import MAX_SEED, CommandParser, check_system, whole_number
from odise_rt.engine_facts import ENGINE_KINDS
from odise_rt.engines import FOLDER as ENGINES_FOLDER
from odise_rt.errors import ExportError, InputError, OdiseError, first_line, is_out_of_memory
from odise_rt.preprocessing import load_image
from odise_rt.specs import STAGES
from training.config import PRESETS
from training.torch_stages import model_facts

_CONFIG = "odise-sd1"
_EXPORT_ONLY = (
    *("checkpoint", "odise", "stable_diffusion", "clip", "training_labels", "init", "config", "seed"),
    *("out", "precision", "image", "force", "keep_going"),
)
"""Arguments that mean nothing where only engines are built."""
_ENGINE_ONLY = ("engine_precision", "size", "windows", "target", "unverified", "rebuild")
"""Arguments that mean nothing without --engine."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names that are no text can be printed too
        sys.stdout.reconfigure(errors="backslashreplace")
    placed: list[str] = []
    try:
        check_system()
        _end_as_interrupted()
        with _memory_errors():
            _run(args, export_console(), placed)
    except OdiseError as exc:
        return _fail("; ".join([f"error: {exc}", *placed]), 1)
    except OSError as exc:
        name = f" {exc.filename or args.bundle or args.out or ''}".rstrip()
        reason = f"{exc.strerror or exc}: free space or choose another folder"
        return _fail(f"error: the file system refused{name}: {reason}; {_left(placed)}", 1)
    except KeyboardInterrupt:
        return _fail(f"stopped: {_left(placed)}", 130)
    return 0


def _run(args: argparse.Namespace, console: Console, placed: list[str]) -> None:
    """Do what was asked for, and list in ``placed`` what stays in place when an error follows."""
    _check_arguments(args)
    import_onnxruntime()  # every graph is compared in it: without it all work would be for nothing
    bundle = Bundle.open(args.bundle) if args.bundle is not None else None
    engines = _engine_options(args)
    if bundle is not None:
        assert engines is not None
        _add_engines(bundle, engines, console, placed)
        return
    options = ExportOptions(
        precision=args.precision or "fp32",
        stages=_stages(args),
        force=args.force,
        keep_going=args.keep_going,
        photo=load_image(args.image) if args.image else None,
        threads=args.threads,
    )
    if options.stages != STAGES:
        check_stages(_source(args), options, console).show(console)
        console.print(f"only {', '.join(options.stages)} checked: no bundle was put in place")
        return
    with BundleWriter(args.out, args.force):
        pass  # a place that cannot be written is refused before minutes of work
    source = _source(args)
    if engines is not None:
        engine_shapes(model_facts(source.loaded.model), engines.sizes, engines.windows)  # refuses what is out of range
    report = build_bundle(source, args.out, options, console)
    placed.append(f"the bundle is whole and in place: {args.out}")
    report.show(console)
    console.print(f"bundle: {args.out}")
    if engines is not None:
        references = engine_references(source.loaded, max(engines.windows))
        _add_engines(Bundle.open(args.out), engines, console, placed, references)


def _add_engines(
    bundle: Bundle,
    options: EngineOptions,
    console: Console,
    placed: list[str],
    references: References | None = None,
) -> None:
    report = EngineReport()
    try:
        add_engines(bundle, options, console, references, report=report)
    except BaseException:
        placed += [f"the engine {engine.folder.name} is in place" for engine in report.built]
        raise
    folder = bundle.root / ENGINES_FOLDER
    console.print(f"{len(report.built)} engines built, {len(report.kept)} were there already: {folder}")


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Turns an error of memory that ran out, or one that was raised from such an error, into one that says so."""
    try:
        yield
    except Exception as exc:
        chain: list[BaseException] = [exc]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        told = [error for error in chain if is_out_of_memory(error)]
        if not told:
            raise
        raise ExportError(
            f"memory ran out ({first_line(told[-1])}): free some, or export on a machine with more"
        ) from exc


def _left(placed: Sequence[str]) -> str:
    return "; ".join(placed) or "nothing was put in place"


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # the terminal may be what ended us
        print(message, file=sys.stderr)
    return code


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse what would be ignored, and what is missing.

    Raises:
        InputError: naming the arguments that do not go together.
    """
    checks = _stages(args) != STAGES and args.bundle is None
    rules = [
        (args.bundle is not None, _EXPORT_ONLY, "--bundle adds engines to a bundle that is there"),
        (checks, ("out", "force", "engine"), "--stages checks some stages and puts no bundle in place"),
        (args.checkpoint is not None, ("config",), "a checkpoint has a config of its own"),
        (args.init is None, ("seed",), "only random weights (--init random) have a seed"),
        (args.odise is None, ("training_labels",), "only released heads (--odise) must be told their training's words"),
        (not args.engine, _ENGINE_ONLY, "what says how to build engines needs --engine"),
        (args.engine and "tensorrt-rtx" not in args.engine, ("target",), "only TensorRT-RTX builds for targets"),
        (set(args.engine) == {"ort-cuda"}, ("size", "windows"), "ONNX Runtime's engines take any size"),
    ]
    if args.bundle is not None and not args.engine:
        raise InputError(f"--bundle needs --engine: which of {', '.join(ENGINE_KINDS)} to build into it")
    for applies, names, reason in rules:
        given = [name for name in names if _is_given(getattr(args, name))]
        if applies and given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            hint = "; the precision of engines is --engine-precision" if "precision" in given else ""
            raise InputError(f"{reason}: it cannot go with {flags}{hint}")
    if args.bundle is not None:
        return
    if not checks:
        _check_place(args)
    _check_source(args)


def _check_place(args: argparse.Namespace) -> None:
    if args.out is None:
        raise InputError("an export needs --out: the folder of the new bundle")
    for source in (args.checkpoint, args.stable_diffusion):
        if source is not None and Path(os.path.realpath(args.out)).is_relative_to(os.path.realpath(source)):
            raise InputError(f"--out {args.out} lies inside {source}, which stays as it is: choose another place")


def _is_given(value: object) -> bool:
    return value is not None and value is not False and value != []


def _stages(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(name for name in STAGES if name in (args.stages or STAGES))


def _engine_options(args: argparse.Namespace) -> EngineOptions | None:
    """The engines to build, or ``None`` without --engine; what cannot be built is refused before minutes of work."""
    if not args.engine:
        return None
    options = EngineOptions(
        kinds=tuple(kind for kind in ENGINE_KINDS if kind in args.engine),
        precision=args.engine_precision,
        stages=_stages(args),
        sizes=tuple(args.size),
        windows=args.windows or WINDOW_COUNTS,
        targets=tuple(dict.fromkeys(args.target)),
        unverified=args.unverified,
        rebuild=args.rebuild,
        threads=args.threads,
    )
    check_engine_options(options, this_machine(), args.precision or "fp32")
    return options


def _check_source(args: argparse.Namespace) -> None:
    """Refuse no source, several, or one whose files are missing, before anything is read."""
    released = (args.odise, args.stable_diffusion, args.clip)
    given = [args.checkpoint is not None, any(released), args.init is not None]
    if sum(given) != 1:
        raise InputError(
            "expected one source: --checkpoint DIR, or --odise with --stable-diffusion and --clip, or --config NAME "
            "--init random, or --bundle DIR with --engine"
        )
    if any(released) and not all(released):
        raise InputError("the released model is in three files: --odise, --stable-diffusion and --clip go together")
    for path in (args.checkpoint, *released, args.training_labels, args.image):
        if path is not None and not path.exists():
            raise InputError(f"{path} does not exist: check the path")


def _source(args: argparse.Namespace) -> Source:
    if args.checkpoint is not None:
        return from_checkpoint(args.checkpoint)
    config = args.config or _CONFIG
    if args.init is not None:
        return from_random(config, args.seed or 0)
    return from_released(config, args.odise, args.stable_diffusion, args.clip, args.training_labels)


def _end_as_interrupted() -> None:
    """Let SIGTERM, and SIGHUP of a terminal that closes, clean up as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)


def _interrupt(number: int, _frame: object) -> None:
    if number == signal.SIGHUP:  # a shell and the system may each send one: the second would interrupt the cleaning
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m export.build_engines", description=__doc__)
    source = parser.add_argument_group("source (one of four)")
    source.add_argument("--bundle", type=Path, help="A bundle that is there already: --engine is added to it.")
    source.add_argument("--checkpoint", type=Path, help="Directory of a checkpoint of this project.")
    source.add_argument("--odise", type=Path, help="Released ODISE heads, odise_*.pth.")
    source.add_argument("--stable-diffusion", type=Path, help="CompVis sd-v1-*.ckpt or a diffusers directory.")
    source.add_argument("--clip", type=Path, help="OpenAI's ViT-L-14-336px.pt or an open_clip checkpoint.")
    source.add_argument(
        "--training-labels",
        type=Path,
        help="With --odise: label file (id:name,synonym,... a line) of the data the heads were trained on; its words "
        "count as seen. Default: COCO's names.",
    )
    source.add_argument(
        "--config",
        choices=sorted(PRESETS),
        help=f"Size and variant of released or random weights. Default: {_CONFIG}.",
    )
    source.add_argument("--init", choices=["random"], help="Export --config with random weights.")
    source.add_argument("--seed", type=whole_number(0, MAX_SEED), help="Seed of the random weights. Default: 0.")
    parser.add_argument("--out", type=Path, help="The new bundle's folder; made, and replaced only by --force.")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="Precision inside the graphs. fp16 is mixed: rules keep sensitive operations in float32. Default: fp32.",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        metavar="STAGE",
        help=f"Only these: with --bundle build their engines, else export and check them without a bundle in the end "
        f"(of {', '.join(STAGES)}). Default: all.",
    )
    parser.add_argument("--image", type=Path, help="Check on this picture. Default: a drawn one.")
    parser.add_argument("--force", action="store_true", help="Replace a bundle at --out.")
    parser.add_argument(
        "--keep-going", action="store_true", help="Check the remaining stages, too, after one that does not agree."
    )
    parser.add_argument(
        "--threads",
        type=whole_number(1, MAX_THREADS),
        help="Threads inside an operator when graphs are run. Default: all usable cores.",
    )
    _add_engine_arguments(parser)
    return parser


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engines for GPUs")
    group.add_argument(
        "--engine",
        action="append",
        choices=ENGINE_KINDS,
        default=[],
        help="Build engines of this kind into the bundle. Can be given several times.",
    )
    group.add_argument(
        "--engine-precision",
        choices=get_args(EnginePrecision),
        help="Precision inside the engines. fp16 engines can be built from an fp32 bundle, and "
        "for TensorRT bf16 ones, too. Default: the bundle's.",
    )
    group.add_argument(
        "--size",
        action="append",
        type=_size,
        default=[],
        metavar="HEIGHTxWIDTH",
        help="Tune the engines for images of this size inside the network, too. Can be given several times.",
    )
    group.add_argument(
        "--windows",
        type=_counts,
        metavar="N,N,...",
        help=f"Windows of a batch that engines are tuned for. Default: {','.join(map(str, WINDOW_COUNTS))}.",
    )
    group.add_argument(
        "--target",
        action="append",
        type=_target,
        default=[],
        metavar="X.Y",
        help="Compute capability that TensorRT-RTX builds for, e.g. 8.9. Can be given several times. Default: that of "
        f"the GPU here; without one {', '.join(RTX_TARGETS)}.",
    )
    group.add_argument(
        "--unverified",
        action="store_true",
        help="Build also what cannot be compared here, for want of its GPU; the runtime compares it at the first load.",
    )
    group.add_argument("--rebuild", action="store_true", help="Build engines that are up to date, too.")


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected HEIGHTxWIDTH in pixels, e.g. 1024x1408")
    return int(height), int(width)


def _target(text: str) -> str:
    if not re.fullmatch(r"\d+\.\d", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no compute capability: expected X.Y, e.g. 8.9")
    return text


def _counts(text: str) -> tuple[int, ...]:
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise argparse.ArgumentTypeError(f"{text!r} are no counts: expected numbers with commas, e.g. 1,4,6")
    return tuple(int(count) for count in counts)


if __name__ == "__main__":
    sys.exit(main())
