"""Turns a COCO file of instances, as annotation tools write it, into the panoptic set that training reads.

    python -m training.data.instances_to_panoptic labels.json --out DATA --split train

writes DATA/annotations/panoptic_train.json and DATA/annotations/panoptic_train/ with a PNG for each picture; the
pictures themselves are to lie in DATA/train/. All categories are things. Where instances overlap, the smaller one is in
front; what is wholly covered is left out. Pixels of no instance are void, and belong to no mask that is learnt.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from odise_rt.command_line import CommandParser, command
from odise_rt.errors import DatasetError
from odise_rt.files import atomic_writer
from odise_rt.options import DEFAULT_MAX_PIXELS
from training.data.coco_fields import field_of, flag_of, image_id_of, number_of, read_coco, text_of
from training.data.coco_instances import is_segmentation, mask_of
from training.data.picture_files import ImageId


@dataclass(frozen=True)
class Converted:
    """What was written."""

    annotations: Path
    pictures: int
    segments: int
    covered: int
    """Instances that no pixel was left of."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = CommandParser(prog="python -m training.data.instances_to_panoptic", description=__doc__)
    parser.add_argument("instances", type=Path, help="COCO JSON with images, annotations and categories.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of the data set; holds SPLIT/ with pictures.")
    parser.add_argument("--split", required=True, help="Name of the part that these pictures are, e.g. train or val.")
    return parser.parse_args(argv)


def convert(instances: Path, out: Path, split: str) -> Converted:
    """Write the panoptic part; the JSON file comes last, so that where it is, all is there.

    Args:
        instances: COCO JSON of polygons, or run lengths.
        out: folder of the data set.
        split: name of the part.

    Raises:
        DatasetError: a file that is missing, broken or contradicts itself, or pictures of more than
            ``odise_rt.options.DEFAULT_MAX_PIXELS`` pixels.
    """
    content = read_coco(instances, ("images", "annotations", "categories"))
    categories = [_category(entry, f"{instances}: categories[{i}]") for i, entry in enumerate(content["categories"])]
    known = {category["id"] for category in categories}
    of_image: dict[ImageId, list[tuple[dict[str, Any], str]]] = {
        image_id_of(entry, "id", f"{instances}: images[{i}]"): [] for i, entry in enumerate(content["images"])
    }
    for position, entry in enumerate(content["annotations"]):
        where = f"{instances}: annotations[{position}]"
        image_id = image_id_of(entry, "image_id", where)
        if image_id not in of_image:
            raise DatasetError(f"{where} is of image id {image_id}, which is not declared")
        if number_of(entry, "category_id", where) not in known:
            raise DatasetError(f"{where} names category {entry['category_id']}, which is not declared")
        if not is_segmentation(field_of(entry, "segmentation", where)):
            raise DatasetError(f"{where} has no outline: expected polygons or run lengths, a box is not enough")
        of_image[image_id].append((entry, where))
    folder = out / "annotations" / f"panoptic_{split}"
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, entry in enumerate(content["images"], 1):
        image_id, where = entry["id"], f"{instances}: image id {entry['id']}"
        size = number_of(entry, "height", where), number_of(entry, "width", where)
        if min(size) < 1 or size[0] * size[1] > DEFAULT_MAX_PIXELS:
            raise DatasetError(f"{where} is {size[1]} x {size[0]}: expected 1 to {DEFAULT_MAX_PIXELS:,} pixels")
        ids, segments = paint(of_image[image_id], size)
        name = f"{number:08d}.png"
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
        Image.fromarray(colours).save(folder / name)
        file_name = text_of(entry, "file_name", where)
        images.append({"id": image_id, "file_name": file_name, "height": size[0], "width": size[1]})
        annotations.append({"image_id": image_id, "file_name": name, "segments_info": segments})
    path = out / "annotations" / f"panoptic_{split}.json"
    with atomic_writer(path) as file:
        file.write(json.dumps({"images": images, "annotations": annotations, "categories": categories}).encode())
    count = sum(len(annotation["segments_info"]) for annotation in annotations)
    return Converted(path, len(images), count, len(content["annotations"]) - count)


def paint(
    instances: Sequence[tuple[dict[str, Any], str]], size: tuple[int, int]
) -> tuple[npt.NDArray[np.int32], list[dict[str, Any]]]:
    """One picture's segments: crowds behind all others, and small ones in front of large ones.

    Args:
        instances: entries of ``annotations``, each with where it stands.
        size: (height, width).

    Returns:
        int32 (height, width) of segment ids, 0 where nothing is, and the ``segments_info`` of those that are seen.
    """
    found = []
    for entry, where in instances:
        mask = mask_of(entry["segmentation"], size, where)
        iscrowd = "iscrowd" in entry and flag_of(entry, "iscrowd", where)
        found.append((mask, entry["category_id"], iscrowd))
    found.sort(key=lambda item: (not item[2], -int(item[0].sum())))
    ids = np.zeros(size, np.int32)
    for number, (mask, _, _) in enumerate(found, 1):
        ids[mask] = number
    areas = np.bincount(ids.ravel(), minlength=len(found) + 1)
    segments = []
    for number, (_, category, iscrowd) in enumerate(found, 1):
        if areas[number]:
            rows, columns = np.nonzero(ids == number)
            left, top = int(columns.min()), int(rows.min())
            box = [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1]
            info = {"id": number, "category_id": category, "iscrowd": int(iscrowd), "area": int(areas[number])}
            segments.append({**info, "bbox": box})
    return ids, segments


def _category(entry: Any, where: str) -> dict[str, Any]:
    kept = {"id": number_of(entry, "id", where), "name": text_of(entry, "name", where), "isthing": 1}
    return {**kept, "synonyms": entry["synonyms"]} if "synonyms" in entry else kept


@command("the JSON file was not written; the same command begins anew")
def main(argv: Sequence[str]) -> int:
    """Run; returns the exit status."""
    arguments = parse(argv)
    done = convert(arguments.instances, arguments.out, arguments.split)
    print(f"wrote {done.annotations}: {done.pictures} pictures, {done.segments} segments")
    if done.covered:
        print(f"{done.covered} instances are wholly behind others and were left out")
    pictures = arguments.out / arguments.split
    if not pictures.is_dir():
        print(f"the pictures are still to be put into {pictures}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
