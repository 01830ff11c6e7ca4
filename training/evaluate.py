"""Measure a checkpoint or a bundle on a panoptic or a semantic data set.

Panoptic sets are in COCO's format (--format coco, or ade20k-panoptic): PQ, mean IoU, mask AP. Semantic sets lie as they
are published or prepared for detectron2: mean IoU and pixel accuracy; docs/training.md has a table of their folders.

    python -m training.evaluate training/pretrained/odise-tiny --data runs/sticker --out out/eval
    python -m training.evaluate CHECKPOINT_OR_BUNDLE --format voc-21 --data datasets --out out/voc

Several processes share the pictures: torchrun --nproc-per-node N -m training.evaluate ..., each on a GPU of its own.
Writes OUT/metrics.json, with what was measured and how, and OUT/pictures.html with the best and worst pictures. Until
then, what was measured is in OUT/measured: after a kill the same command goes on there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from odise_rt.backends.select import CpuEngine
from odise_rt.bundle import file_sha256
from odise_rt.command_line import CommandParser, command, whole_number
from odise_rt.errors import CheckpointError, DatasetError, OptionsError
from odise_rt.files import atomic_writer, check_writable
from odise_rt.options import ResolvedOptions, SegmentOptions
from odise_rt.segmenter import Segmenter
from odise_rt.specs import IMAGE_STAGES
from odise_rt.version import __version__
from odise_rt.vocabulary import Vocabulary
from training.checkpoints.own_format import file_hashes, load_checkpoint
from training.command_line import add_classes_argument, is_bundle, parse_model_arguments
from training.data.coco_instances import CocoInstances
from training.data.coco_panoptic import HELD_OUT, CocoPanoptic, held_out_part
from training.data.semantic_formats import SEMANTIC_FORMATS
from training.data.semantic_sets import SemanticSet
from training.distributed import gathered, leave, rank, start_processes
from training.evaluation import METRICS, data_vocabulary, evaluate
from training.evaluation_log import FOLDER as LOG_FOLDER
from training.evaluation_log import open_log, remove_log
from training.evaluation_loop import EvaluationReport, progress_bar
from training.picture_page import BestAndWorst
from training.run_state import content_hash
from training.semantic_evaluation import evaluate_semantic
from training.torch_pipeline import TorchPipeline
from training.torch_stages import TorchBackend, TorchStage, torch_segmenter

logger = logging.getLogger("training.evaluate")

FORMATS = ("coco", "ade20k-panoptic", *SEMANTIC_FORMATS)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = CommandParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument(
        "--format", choices=FORMATS, default="coco", help="What the data set is and how it lies on disk."
    )
    parser.add_argument(
        "--data", type=Path, help="Folder of the data set; of a published set also the folder that holds it."
    )
    parser.add_argument(
        "--split",
        help="The part of the data set to measure on. Default: val, and of --format coco the first that is there of "
        f"{', '.join(HELD_OUT)}.",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        help="Instead of --data, of a panoptic set: its JSON file. --images and --masks go with it.",
    )
    parser.add_argument("--images", type=Path, help="With --annotations: the folder of the pictures.")
    parser.add_argument("--masks", type=Path, help="With --annotations: the folder of the PNGs.")
    parser.add_argument(
        "--instances",
        type=Path,
        help="COCO JSON of instances to measure AP against, which may overlap, as published AP is: "
        "instances_val2017.json, ade20k_instance_val.json. Default: the things of the panoptic set.",
    )
    add_classes_argument(parser, "such as the prompt-engineered lists of the published figures")
    parser.add_argument("--out", type=Path, required=True, help="Folder for metrics.json and pictures.html.")
    parser.add_argument("--limit", type=whole_number(1), help="Measure on the first N pictures only. Default: all.")
    parser.add_argument(
        "--metrics",
        help="Comma-separated choice of pq, miou and ap for a panoptic set; pq is always computed. A semantic set has "
        "miou only. Default: all.",
    )
    parser.add_argument("--pictures", type=whole_number(0), default=8, help="Best and worst pictures to show of each.")
    parser.add_argument(
        "--clip-weight-seen", type=float, help="CLIP's weight for classes seen in training. Default: the model's."
    )
    parser.add_argument(
        "--clip-weight-unseen", type=float, help="CLIP's weight for other classes. Default: the model's."
    )
    parser.add_argument(
        "--overlap-threshold", type=float, help="Least share of its mask that a segment keeps. Default: the model's."
    )
    parsed = parse_model_arguments(parser, argv)
    if parsed.split is None:
        there = held_out_part(parsed.data) if parsed.format == "coco" and parsed.data is not None else None
        parsed.split = there or "val"
    return parsed


@contextlib.contextmanager
def open_segmenter(
    path: Path, device: str, threads: int | None, cpu_engine: CpuEngine | None = None
) -> Iterator[Segmenter]:
    """A segmenter for a checkpoint or a bundle folder, for the time of a ``with`` block.

    Args:
        path: the folder.
        device: of :func:`training.command_line.parse_model_arguments`: of PyTorch, or of the runtime for a bundle.
        threads: of the runtime; None: all usable cores.
        cpu_engine: of the runtime.

    Raises:
        CheckpointError: the folder is neither.
    """
    if is_bundle(path):
        engine = cpu_engine or "onnxruntime"
        with Segmenter.load(path, device, threads, cpu_engine=engine) as segmenter:  # type: ignore[arg-type]
            yield segmenter
        return
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{path} is neither a checkpoint (config.json) nor a bundle (bundle.json): name the folder of one"
        )
    loaded = load_checkpoint(path)
    model = loaded.model.to(device)
    pipeline = None
    if device.startswith("cuda"):  # where images stay from their pixels to their segments
        specs = TorchBackend(model).specs
        pipeline = TorchPipeline(model, {name: TorchStage(model, specs[name]) for name in IMAGE_STAGES})
    with torch_segmenter(model, loaded.tokenizer_json, loaded.training_vocabulary, pipeline=pipeline) as segmenter:
        yield segmenter


def chosen_metrics(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Metrics to compute; raises :class:`OptionsError` for an unknown one or one that the format does not have."""
    possible = ("miou",) if arguments.format in SEMANTIC_FORMATS else METRICS
    if arguments.metrics is None:
        return possible
    metrics = tuple(name.strip() for name in arguments.metrics.split(",") if name.strip())
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise OptionsError(f"--metrics has {unknown}: expected some of {', '.join(METRICS)}")
    refused = sorted(set(metrics) - set(possible))
    if refused:
        raise OptionsError(
            f"--metrics has {refused}, but {arguments.format} says only the class of each pixel: expected miou. PQ and "
            "AP need segments, as in --format coco or ade20k-panoptic"
        )
    return metrics


def open_data(arguments: argparse.Namespace) -> CocoPanoptic | SemanticSet:
    """The data set that the command line names; raises :class:`OptionsError` if it does not name one."""
    explicit = [arguments.annotations, arguments.images, arguments.masks]
    if arguments.format in SEMANTIC_FORMATS and any([*explicit, arguments.instances]):
        raise OptionsError(
            f"--annotations, --images, --masks and --instances are of panoptic sets: {arguments.format} needs --data"
        )
    if any(explicit):
        if not all(explicit) or arguments.data is not None:
            raise OptionsError("--annotations, --images and --masks come together and replace --data")
        covered = arguments.format == "ade20k-panoptic"
        return CocoPanoptic(arguments.annotations, arguments.images, arguments.masks, covered=covered)
    if arguments.data is None:
        raise OptionsError("no data set is named: give --data FOLDER")
    if arguments.format == "coco":
        return CocoPanoptic.from_root(arguments.data, arguments.split, with_captions=False)
    if arguments.format == "ade20k-panoptic":
        return CocoPanoptic.from_ade20k(arguments.data, arguments.split)
    return SemanticSet.from_root(arguments.data, arguments.format, arguments.split, chosen_words(arguments))


def open_instances(arguments: argparse.Namespace, data: CocoPanoptic, metrics: Sequence[str]) -> CocoInstances | None:
    """The truth for AP that the command line names, if it does; raises :class:`OptionsError` where AP is left out."""
    if arguments.instances is None:
        return None
    if "ap" not in metrics:
        raise OptionsError("--instances is what AP is measured against, and --metrics leaves AP out: drop one of them")
    return CocoInstances(arguments.instances, data)


def chosen_words(arguments: argparse.Namespace) -> Vocabulary | None:
    """Words of --classes; without it those of the data set, and of ADE20K ours, whose synonyms are told apart."""
    if arguments.classes is not None:
        return Vocabulary.load(arguments.classes)
    return Vocabulary.builtin("ade20k") if arguments.format == "ade20k-panoptic" else None


def summary(report: EvaluationReport) -> list[tuple[str, str]]:
    """The main numbers as (name, value); "-" for a group that has nothing to average."""
    lines = [("model", report.model), ("engine", report.engine)]
    lines += [("pictures", f"{report.pictures}, {report.seconds_per_picture:.2f} s each")]
    details = {
        "PQ": ("pq", report.pq, "SQ {sq:.1f}, RQ {rq:.1f}, {categories} classes"),
        "mIoU": (
            "miou",
            report.miou,
            "{miou_with_predicted:.1f} with classes that are only predicted, pixel accuracy {pixel_accuracy:.1f}, "
            "{classes} classes",
        ),
        "mask AP": ("ap", report.ap, "AP50 {ap50:.1f}"),
    }
    for title, (key, groups, more) in details.items():
        for group, scores in groups.items():
            known = not math.isnan(scores[key])
            lines.append((f"{title} {group}", f"{scores[key]:.1f} ({more.format(**scores)})" if known else "-"))
    return lines


def measured_settings(
    arguments: argparse.Namespace,
    segmenter: Segmenter,
    data: CocoPanoptic | SemanticSet,
    instances: CocoInstances | None,
    vocabulary: Vocabulary,
    options: ResolvedOptions,
    metrics: Sequence[str],
) -> dict[str, Any]:
    """What the numbers of every picture come from, in plain JSON types: files by their SHA-256, but no pictures."""
    bundle = segmenter.bundle
    settings: dict[str, Any] = {
        "version": __version__,
        "model": arguments.model.name,
        "model_sha256": bundle.digest or file_hashes(arguments.model),
        "training_words": len(bundle.training_vocabulary),
        "device": segmenter.device,
        "cpu_engine": arguments.cpu_engine,
        "format": arguments.format,
        "split": arguments.split,
        "classes": len(vocabulary),
        "words": len(vocabulary.words),
        "words_sha256": vocabulary.content_hash,
        "metrics": list(metrics),
        # What is asked of the model follows from the metrics, whatever the options say.
        "options": {name: value for name, value in dataclasses.asdict(options).items() if name != "outputs"},
    }
    if isinstance(data, CocoPanoptic):
        settings["annotations"] = {data.annotations_path.name: file_sha256(data.annotations_path)}
        if instances is not None:
            settings["instances"] = {instances.path.name: file_sha256(instances.path)}
    else:
        settings |= {
            "title": SEMANTIC_FORMATS[arguments.format].title,
            "pictures_sha256": content_hash(data.image_ids),
        }
    return settings


def described_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings as (name, value) for people."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {text(inner)}" for name, inner in value.items())
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return [(name.replace("_", " "), text(value)) for name, value in settings.items() if value is not None]


def save_text(path: Path, text: str) -> None:
    """Write beside and rename; raises :class:`DatasetError` when the disk refuses."""
    try:
        with atomic_writer(path) as file:
            file.write(text.encode())
    except OSError as exc:
        raise DatasetError(f"cannot write {path}: {exc}") from exc


def join(arguments: argparse.Namespace) -> None:
    """Join the other processes of a torchrun, if there are any, and note this one's device in the arguments.

    Raises:
        OptionsError: a bundle on a GPU, which all of them would take the first of, or no GPU for this process.
    """
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    if several and is_bundle(arguments.model) and arguments.device != "cpu":
        raise OptionsError(
            f"{arguments.model} is a bundle, which every process would run on the first GPU: measure it in one "
            "process, or with --device cpu"
        )
    arguments.device = start_processes(arguments.device, backend="gloo")  # counts and pictures lie on the host


@command("the same command goes on where it was")
def main(argv: Sequence[str]) -> int:
    """Run; returns the exit status."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        join(arguments)
        return measure_model(arguments)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def measure_model(arguments: argparse.Namespace) -> int:
    """Measure and write; returns the exit status."""
    metrics = chosen_metrics(arguments)
    options = SegmentOptions(
        overlap_threshold=arguments.overlap_threshold,
        clip_weight_seen=arguments.clip_weight_seen,
        clip_weight_unseen=arguments.clip_weight_unseen,
    )
    data = open_data(arguments)
    words = instances = None
    if isinstance(data, SemanticSet):
        vocabulary = data.vocabulary
    else:
        instances, words = open_instances(arguments, data, metrics), chosen_words(arguments)
        vocabulary = data_vocabulary(data.categories, words)
    kept = BestAndWorst(data, arguments.pictures)
    indices = range(len(data))[: arguments.limit]
    table, page = arguments.out / "metrics.json", arguments.out / "pictures.html"
    for path in (table, page):
        check_writable(path)
    progress = progress_bar("evaluate") if rank() == 0 else iter
    with contextlib.ExitStack() as stack:
        segmenter = stack.enter_context(
            open_segmenter(arguments.model, arguments.device, arguments.threads, arguments.cpu_engine)
        )
        resolved = options.resolve(segmenter.facts)
        settings = measured_settings(arguments, segmenter, data, instances, vocabulary, resolved, metrics)
        log = stack.enter_context(open_log(arguments.out, rank(), settings))
        if len(log):
            logger.info(
                "%d pictures were measured by a run that was interrupted; to measure them again, remove %s",
                *(len(log), arguments.out / LOG_FOLDER),
            )
        if isinstance(data, SemanticSet):
            report = evaluate_semantic(segmenter, data, indices, options, kept, progress, shared=True, log=log)
        else:
            report = evaluate(
                segmenter,
                data,
                indices,
                metrics,
                options,
                kept,
                progress,
                words,
                instances=instances,
                shared=True,
                log=log,
            )
    for best, worst in gathered((kept.best, kept.worst))[1:]:
        kept.merge(best, worst)
    if rank() != 0:
        return 0
    lines = summary(report)
    where = arguments.split if arguments.format == "coco" else f"{arguments.format}, {arguments.split}"
    document = {**report.to_dict(), "settings": settings}
    save_text(page, kept.page(f"{arguments.model.name} on {where}", [*lines, *described_settings(settings)]))
    save_text(table, json.dumps(document, indent=1) + "\n")  # last: where it is, all is there
    remove_log(arguments.out)
    for name, value in lines:
        logger.info("%-22s %s", name, value)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
