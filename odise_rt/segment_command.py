"""``odise-rt segment``: images, folders and videos in, result files out; resumable, one at a time or on Ray."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import operator
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odise_rt.errors import OptionsError
from odise_rt.interruption import after_imports
from odise_rt.model_arguments import add_bundle_argument, add_engine_arguments, named_bundle
from odise_rt.result_files import FORMATS, parse_formats

if TYPE_CHECKING:
    from odise_rt.batch import Job, Record
    from odise_rt.bundle import Bundle
    from odise_rt.inputs import Input
    from odise_rt.run_log import RunLog
    from odise_rt.segmenter import Segmenter
    from odise_rt.vocabulary import Vocabulary

MODEL_OPTIONS = (
    "object_mask_threshold",
    "overlap_threshold",
    "clip_weight_seen",
    "clip_weight_unseen",
    "unknown",
    "short_edge",
    "long_edge",
    "max_pixels",
)
"""Arguments that go into :class:`odise_rt.SegmentOptions` under their own names."""
_PROMPTS_WORTH_A_BAR = 256


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the subparsers of ``odise-rt``."""
    parser = commands.add_parser("segment", parents=[common], help="Segment images, folders of images, or videos.")
    parser.add_argument("images", nargs="+", metavar="INPUT", help="Image or video files, folders, or quoted patterns.")
    add_bundle_argument(parser)
    parser.add_argument("--out", type=Path, default=Path("out"), help="Folder for the results.")
    parser.add_argument(
        "--format",
        default="overlay,json",
        metavar="LIST",
        help=f"What to write, separated by commas, of {', '.join(FORMATS)}.",
    )
    add_engine_arguments(parser, threads="all usable cores; with --ray, divided by the processes of a machine")
    parser.add_argument("--low-memory", action="store_true", help="Hold one graph in memory at a time; slower.")
    parser.add_argument("--no-verify", action="store_true", help="Skip the SHA-256 of the bundle's files.")
    _add_words(parser.add_argument_group("words"))
    _add_batch(parser.add_argument_group("many files"))
    group = parser.add_argument_group("options of the model")
    group.add_argument(
        "--object-mask-threshold", type=float, metavar="P", help="Least score of a mask. Default: the bundle's."
    )
    group.add_argument(
        "--overlap-threshold",
        type=float,
        metavar="P",
        help="Least share of its mask that a segment keeps. Default: the bundle's.",
    )
    group.add_argument(
        "--clip-weight-seen",
        type=float,
        metavar="W",
        help="CLIP's weight for classes seen in training. Default: the bundle's.",
    )
    group.add_argument(
        "--clip-weight-unseen", type=float, metavar="W", help="CLIP's weight for other classes. Default: the bundle's."
    )
    group.add_argument(
        "--short-edge", type=int, metavar="PIXELS", help="Shorter image edge inside the network. Default: the bundle's."
    )
    group.add_argument(
        "--long-edge", type=int, metavar="PIXELS", help="Bound on the longer edge. Default: the bundle's."
    )
    group.add_argument("--max-pixels", type=int, metavar="N", help="Refuse larger images. Default: 64 megapixels.")
    parser.set_defaults(command=segment)


def _add_words(group: Any) -> None:
    group.add_argument(
        "--vocab",
        action="append",
        default=[],
        metavar="WORDS",
        help="Words ('truck, pickup; stuff: sky': ';' ends a class, ',' separates synonyms), a built-in name (coco, "
        "ade20k, lvis; auto for all of them as one lexicon), or a .json or .txt file. Several of them add up.",
    )
    group.add_argument(
        "--lexicon",
        type=Path,
        metavar="FILE",
        help="A lexicon of up to 100,000 nouns in place of that of --vocab auto. Default: none.",
    )
    group.add_argument(
        "--unknown",
        type=float,
        metavar="P",
        help='Call a segment "unknown" where no word reaches this probability. Default: every segment gets a word.',
    )
    group.add_argument(
        "--explain",
        action="store_true",
        help="Add the five best names of every segment with both classifiers' scores to the JSON and the printed list.",
    )


def _add_batch(group: Any) -> None:
    group.add_argument("--recursive", action="store_true", help="Search the folders inside folders too.")
    group.add_argument("--overwrite", action="store_true", help="Do again what an earlier run has finished.")
    group.add_argument("--every", type=int, default=1, metavar="N", help="Of a video, each n-th frame.")
    group.add_argument(
        "--polygon-tolerance",
        type=float,
        default=1.0,
        metavar="PIXELS",
        help="How far polygons (labelme, cvat) may leave the mask's outline; 0 is exact.",
    )
    group.add_argument(
        "--ray",
        action="store_true",
        help="Run on Ray, on this machine unless --ray-address says otherwise.",
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="Run on this Ray cluster: 'auto' for the one that this machine belongs to, HOST:PORT, or ray://HOST:PORT. "
        "--out must be on a file system that all nodes share. Default: this machine alone.",
    )
    group.add_argument("--actors", type=int, metavar="N", help="With --ray: processes. Default: one a GPU, else one.")


def segment(args: argparse.Namespace) -> int:
    """Run the command with parsed arguments; inputs that cannot be read do not stop the others."""
    from odise_rt.batch import remove_stale_frames, write_documents
    from odise_rt.bundle import Bundle
    from odise_rt.inputs import find_inputs
    from odise_rt.run_log import RunLog

    folder = named_bundle(args)
    job = _job(args)
    inputs = find_inputs(args.images, args.recursive, results=args.out)
    bundle = Bundle.open(folder, verify=False)  # hashes are compared when there is work for it
    keys = job.keys(inputs, bundle.digest)
    if args.out.exists() and not args.out.is_dir():
        raise OptionsError(f"--out {args.out} is a file: name a folder, which is made if it is missing")
    args.out.mkdir(parents=True, exist_ok=True)
    with RunLog(args.out) as log, _stopped_by_sigterm(), _own_limit_only():
        pending = inputs if args.overwrite else job.pending(inputs, keys, log)
        if pending:
            _work(args, bundle, job, pending, keys, log, done_before=len(inputs) - len(pending))
            remove_stale_frames(log, pending, keys)
        failed = write_documents(job, log, inputs, keys)
        run = _Run(args, log, inputs, keys, len(inputs) - len(pending), failed)
        (_print_json if args.json else _print_text)(run)
    return 2 if failed else 0


def _job(args: argparse.Namespace) -> Job:
    from odise_rt.batch import Job
    from odise_rt.interchange import check_tolerance
    from odise_rt.options import SegmentOptions

    formats = parse_formats(args.format)
    if args.every < 1:
        raise OptionsError(f"--every is {args.every}: expected a whole number of at least 1")
    check_tolerance(args.polygon_tolerance, "--polygon-tolerance")
    if args.actors is not None and (not (args.ray or args.ray_address) or args.actors < 1):
        raise OptionsError(f"--actors is {args.actors}: expected at least 1, together with --ray")
    given = {name: getattr(args, name) for name in MODEL_OPTIONS if getattr(args, name) is not None}
    options = SegmentOptions(outputs=("semantic",) if "semantic" in formats else ("panoptic",), **given)
    return Job(
        _words(args),
        options,
        formats,
        args.out,
        explain=args.explain,
        tolerance=args.polygon_tolerance,
        every=args.every,
        engine=f"{args.device}, {args.cpu_engine}",
    )


def _words(args: argparse.Namespace) -> Vocabulary:
    from odise_rt.lexicon import load_lexicon
    from odise_rt.vocabulary import Vocabulary

    if not args.vocab and args.lexicon is None:
        raise OptionsError(
            "no words were given: pass --vocab WORDS, or --vocab auto to name what a broad lexicon knows"
        )
    sources = [v for v in args.vocab if args.lexicon is None or v.strip().lower() != "auto"]
    vocabularies = [Vocabulary.load(text) for text in sources]
    if args.lexicon is not None:
        vocabularies.append(load_lexicon(args.lexicon))
    return functools.reduce(operator.add, vocabularies)


def _work(
    args: argparse.Namespace,
    bundle: Bundle,
    job: Job,
    pending: Sequence[Input],
    keys: dict[str, str],
    log: RunLog,
    done_before: int,
) -> None:
    """Segment what is pending and log it, with progress."""
    from tqdm import tqdm

    from odise_rt.batch import settle_earlier

    total = len(pending) + done_before
    names = {item.name for item in pending}
    quiet = args.quiet or (total == 1 and not pending[0].is_video)
    records = _records(args, bundle, job, pending, keys)
    record = next(records)  # the bar begins when the bundle is loaded and the words are encoded
    with tqdm(total=total, initial=done_before, unit="file", disable=quiet) as bar:
        while record is not None:
            log.append(settle_earlier(log, record))
            if record["name"] in names:
                bar.update()
            else:
                bar.set_postfix_str(f"frame {record['frame']}")
            record = next(records, None)


def _records(
    args: argparse.Namespace, bundle: Bundle, job: Job, pending: Sequence[Input], keys: dict[str, str]
) -> Iterator[Record | None]:
    from odise_rt.batch import segment_inputs
    from odise_rt.segmenter import Segmenter

    load = functools.partial(Segmenter.load, device=args.device, cpu_engine=args.cpu_engine, low_memory=args.low_memory)
    if args.ray or args.ray_address:
        from odise_rt.ray_batch import segment_on_ray

        address = args.ray_address or "local"
        placed = {"address": address, "actors": args.actors, "device": args.device, "threads": args.threads}
        # Processes of a cluster read the bundle themselves, in folders of their own.
        load_there = functools.partial(load, bundle.root.resolve(), verify=not args.no_verify)
        yield from segment_on_ray(load_there, job, pending, keys, **placed)
        return
    with load(bundle if args.no_verify else bundle.verify(), threads=args.threads) as segmenter:
        _prepare_words(segmenter, job.vocabulary, quiet=args.quiet)
        yield from segment_inputs(segmenter, job, pending, keys)


def _prepare_words(segmenter: Segmenter, vocabulary: Vocabulary, quiet: bool) -> None:
    from tqdm import tqdm

    bars: list[Any] = []

    def show(done: int, total: int) -> None:
        if total < _PROMPTS_WORTH_A_BAR or quiet:
            return
        if not bars:
            bars.append(tqdm(total=total, unit="word", desc="encoding words"))
        bars[0].update(done - bars[0].n)
        if done == total:
            bars.pop().close()

    segmenter.prepare(vocabulary, show)


@contextlib.contextmanager
def _own_limit_only() -> Iterator[None]:
    """Turn Pillow's own limit off: --max-pixels bounds what is read, and may be above it."""
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does: files in the making are removed, finished ones are logged."""

    def stop(number: int, frame: Any) -> None:
        print("odise-rt: stopped by SIGTERM; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, after_imports(stop))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- what the user sees ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    args: argparse.Namespace
    log: RunLog
    inputs: Sequence[Input]
    keys: dict[str, str]
    done_before: int
    failed: list[Record]


def _print_json(run: _Run) -> None:
    """Print one document, with one image's result in memory at a time."""
    from odise_rt.batch import finished

    write = functools.partial(print, end="")  # where the output is closed it writes nothing
    write('{"images": [')
    for number, record in enumerate(finished(run.log, run.inputs, run.keys)):
        files = [str(run.args.out / f) for f in record["files"]]
        entry = {"image": record["image"], "files": files, **record["result"]}
        entry |= {key: record[key] for key in ("frame", "time") if key in record}
        write((",\n" if number else "\n") + json.dumps(entry, ensure_ascii=False))
    rest = {"videos": _videos(run), "done_before": run.done_before, "failed": run.failed}
    write("],\n" + json.dumps(rest, ensure_ascii=False)[1:] + "\n")


def _videos(run: _Run) -> list[Record]:
    """An entry for each video, with the files that belong to all of it and not to one of its frames."""
    records = (run.log.find(item.name, run.keys[item.name]) for item in run.inputs if item.is_video)
    return [
        {"video": r["image"], "frames": r["frames"], "files": [str(run.args.out / f) for f in r["files"]]}
        for r in records
        if r is not None and "frames" in r
    ]


def _print_text(run: _Run) -> None:
    from odise_rt.batch import finished

    total, failed = len(run.inputs), len(run.failed)
    if total > 1 or run.inputs[0].is_video:
        print(f"{total - failed} of {total} files segmented; results in {run.args.out}")
    else:
        for record in finished(run.log, run.inputs, run.keys):
            _print_image(record, run.args.out)
    if run.done_before:
        print(f"{run.done_before} of them had been done before: --overwrite does them again")
    if run.failed:
        print(f"odise-rt: {failed} of {total} files could not be segmented:", file=sys.stderr)
        for entry in run.failed:
            print(f"  {' '.join(entry['error'].split())}", file=sys.stderr)


def _print_image(record: Record, folder: Path) -> None:
    result = record["result"]
    facts, segments = result["facts"], result["segments"]
    print(f"{len(segments)} segments in {facts['seconds']['total']:.2f} s on {facts['engine']}")
    for entry in sorted(segments, key=lambda s: -s["area"]):
        share = 100 * entry["area"] / (result["height"] * result["width"])
        kind = "thing" if entry["isthing"] else "stuff"
        print(f"  {entry['id']:>4}  {kind}  {entry['score']:.2f}  {share:5.1f} %  {entry['label']}")
        for name in entry.get("candidates", ()):
            scores = f"{name['score']:.2f} (masks {name['mask_score']:.2f}, CLIP {name['clip_score']:.2f})"
            print(f"{'':>13}{scores}  {name['label']}")
    for note in facts["notes"]:
        print(f"note: {note}")
    for path in record["files"]:
        print(folder / path)
