"""Measure a checkpoint or a bundle on a COCO-format panoptic data set.

Example: python -m training.evaluate training/pretrained/odise-tiny --data runs/sticker --split val --output out/eval

Writes OUTPUT/metrics.json and OUTPUT/pictures.html with the best and worst pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from odise_rt.errors import CheckpointError, DatasetError, OdiseError, OptionsError
from odise_rt.options import SegmentOptions
from odise_rt.segmenter import Segmenter
from training.checkpoints.own_format import load_checkpoint
from training.data.coco_panoptic import CocoPanoptic
from training.evaluation import METRICS, EvaluationReport, evaluate
from training.picture_page import BestAndWorst
from training.torch_stages import torch_segmenter

logger = logging.getLogger("training.evaluate")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="A checkpoint folder, or a bundle folder made by export.")
    parser.add_argument("--data", type=Path, required=True, help="Folder of a COCO-format panoptic data set.")
    parser.add_argument("--split", default="val", help="The part of the data set to measure on.")
    parser.add_argument("--output", type=Path, required=True, help="Folder for metrics.json and pictures.html.")
    parser.add_argument("--limit", type=int, help="Measure on the first N pictures only.")
    parser.add_argument(
        "--metrics", default="pq,miou,ap", help="Comma-separated choice of pq, miou and ap; pq is always computed."
    )
    parser.add_argument("--pictures", type=int, default=8, help="Best and worst pictures to show of each.")
    parser.add_argument("--device", help="cpu or cuda for a checkpoint; by default cuda where there is one.")
    parser.add_argument("--threads", type=int, help="CPU threads; by default PyTorch's choice.")
    parser.add_argument("--clip-weight-seen", type=float, help="CLIP's weight for seen classes; default: the model's.")
    parser.add_argument("--clip-weight-unseen", type=float, help="The same for unseen classes.")
    parser.add_argument("--overlap-threshold", type=float, help="Share of its mask that a segment must keep.")
    return parser.parse_args(argv)


@contextlib.contextmanager
def open_segmenter(path: Path, device: str, threads: int | None) -> Iterator[Segmenter]:
    """A segmenter for a checkpoint or a bundle folder, for the time of a ``with`` block.

    Raises:
        CheckpointError: the folder is neither.
    """
    if (path / "bundle.json").exists():
        with Segmenter.load(path, "cuda" if device.startswith("cuda") else "cpu", threads) as segmenter:
            yield segmenter
        return
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{path} is neither a checkpoint (config.json) nor a bundle (bundle.json): name the folder of one"
        )
    loaded = load_checkpoint(path)
    model = loaded.model.to(device)
    with torch_segmenter(model, loaded.tokenizer_json, loaded.training_vocabulary) as segmenter:
        yield segmenter


def summary(report: EvaluationReport) -> list[tuple[str, str]]:
    """The main numbers as (name, value)."""
    lines = [("model", report.model), ("engine", report.engine)]
    lines += [("pictures", f"{report.pictures}, {report.seconds_per_picture:.2f} s each")]
    for group, scores in report.pq.items():
        if scores["categories"]:
            lines.append(
                (
                    f"PQ {group}",
                    f"{scores['pq']:.1f} (SQ {scores['sq']:.1f}, RQ {scores['rq']:.1f}, "
                    f"{scores['categories']:.0f} classes)",
                )
            )
    for group, scores in report.miou.items():
        if scores["classes"]:
            lines.append((f"mIoU {group}", f"{scores['miou']:.1f}"))
    for group, scores in report.ap.items():
        lines.append((f"mask AP {group}", f"{scores['ap']:.1f} (AP50 {scores['ap50']:.1f})"))
    return lines


def save_text(path: Path, text: str) -> None:
    """Write beside and rename; raises :class:`DatasetError` when the disk refuses."""
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.rename(path)
    except OSError as exc:
        raise DatasetError(f"cannot write {path}: {exc}") from exc


def _bar(indices: Sequence[int]) -> Iterator[int]:
    return iter(tqdm(indices, desc="evaluate", mininterval=5))


def main(argv: Sequence[str]) -> int:
    """Run; returns the exit status."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        metrics = [name.strip() for name in arguments.metrics.split(",") if name.strip()]
        unknown = sorted(set(metrics) - set(METRICS))
        if unknown:
            raise OptionsError(f"--metrics has {unknown}: expected some of {', '.join(METRICS)}")
        options = SegmentOptions(
            overlap_threshold=arguments.overlap_threshold,
            clip_weight_seen=arguments.clip_weight_seen,
            clip_weight_unseen=arguments.clip_weight_unseen,
        )
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        data = CocoPanoptic.from_root(arguments.data, arguments.split, with_captions=False)
        kept = BestAndWorst(data, arguments.pictures)
        count = len(data) if arguments.limit is None else min(arguments.limit, len(data))
        with open_segmenter(arguments.model, device, arguments.threads) as segmenter:
            report = evaluate(segmenter, data, range(count), metrics, options, kept, _bar)
        lines = summary(report)
        save_text(arguments.output / "metrics.json", json.dumps(report.to_dict(), indent=1) + "\n")
        save_text(arguments.output / "pictures.html", kept.page(f"{arguments.model.name} on {arguments.split}", lines))
    except OdiseError as exc:
        logger.error("%s", exc)
        return 1
    for name, value in lines:
        logger.info("%-22s %s", name, value)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
