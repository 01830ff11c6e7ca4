"""Writes Sticker World to disk as a COCO panoptic data set with captions, in parallel and reproducibly."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from odise_rt.errors import DatasetError
from training.data.sticker_world.nouns import ClassSelection, all_nouns, coco_categories
from training.data.sticker_world.scene import compose
from training.data.sticker_world.sprites import find_font, load_sprites

Split = Literal["train", "val"]
_SPLIT_STREAM = {"train": 0, "val": 1}
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is drawn."""

    seed: int
    split: Split = "train"
    size: int = 256
    classes: ClassSelection = "seen"
    font: Path | None = None


def segment_ids(count: int) -> np.ndarray:
    """Distinct, well-spread 24-bit segment ids for segments 1..count, so that the PNGs can be looked at."""
    return (np.arange(1, count + 1, dtype=np.int64) * 10_368_889) % (1 << 24)


def encode_ids(ids: np.ndarray) -> np.ndarray:
    """COCO panoptic colours: id = R + 256 G + 65536 B. Integer (H, W) to uint8 (H, W, 3)."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def scene_rng(seed: int, split: Split, index: int) -> np.random.Generator:
    """The random stream of one scene; independent of which worker draws it."""
    return np.random.default_rng([seed, _SPLIT_STREAM[split], index])


def _segment_info(segment_map: np.ndarray, number: int, png_id: int, category: int) -> dict[str, Any]:
    rows, columns = np.nonzero(segment_map == number)
    left, top = int(columns.min()), int(rows.min())
    return {
        "id": png_id,
        "category_id": category,
        "iscrowd": 0,
        "area": len(rows),
        "bbox": [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1],
    }


def _write_scene(recipe: Recipe, images: Path, masks: Path, index: int) -> dict[str, Any]:
    """Draw scene ``index``, write its two pictures, return its part of the annotations."""
    sprites = load_sprites(find_font(recipe.font))
    scene = compose(sprites, scene_rng(recipe.seed, recipe.split, index), recipe.size, recipe.classes)
    stem = f"{index + 1:012d}"
    buffer = io.BytesIO()
    Image.fromarray(scene.image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    (images / f"{stem}.jpg").write_bytes(buffer.getvalue())
    ids = np.concatenate([[0], segment_ids(len(scene.category_ids))])
    Image.fromarray(encode_ids(ids[scene.segment_map])).save(masks / f"{stem}.png")
    segments = [
        _segment_info(scene.segment_map, number, int(ids[number]), category)
        for number, category in enumerate(scene.category_ids, start=1)
    ]
    return {"stem": stem, "segments": segments, "captions": list(scene.captions)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(json.dumps(content), encoding="utf-8")
    partial_path.replace(path)


def _split_lists() -> dict[str, list[str]]:
    return {
        f"{'unseen' if unseen else 'seen'}_{'things' if thing else 'stuff'}": [
            noun.name for noun in all_nouns() if noun.unseen == unseen and noun.is_thing == thing
        ]
        for unseen in (False, True)
        for thing in (True, False)
    }


def write_dataset(root: Path, count: int, recipe: Recipe, workers: int = 1, overwrite: bool = False) -> None:
    """Draw ``count`` scenes of one split into ``root``.

    Pictures are drawn in a folder beside and moved into place when complete; the annotation files come last, so a
    split with ``annotations/panoptic_{split}.json`` is whole.

    Args:
        root: Data set folder, created if absent; other splits in it are left alone.
        count: Scenes, at least 1. The first n scenes of a longer run are the same as a run of n.
        recipe: Seed and contents.
        workers: Processes; does not change the result.
        overwrite: Replace the split if it is there.

    Raises:
        DatasetError: Bad counts, the split exists already, no font, or the disk refused.
    """
    if count < 1 or recipe.size < 64 or workers < 1 or recipe.seed < 0:
        raise DatasetError(
            f"cannot draw {count} scenes of {recipe.size} pixels with seed {recipe.seed} and {workers} workers: "
            "expected images >= 1, size >= 64, seed >= 0, workers >= 1"
        )
    find_font(recipe.font)
    annotations = root / "annotations"
    panoptic_file = annotations / f"panoptic_{recipe.split}.json"
    if panoptic_file.exists() and not overwrite:
        raise DatasetError(f"{panoptic_file} exists already: pass --overwrite to replace the split")
    draft = root / f".{recipe.split}.partial"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        annotations.mkdir(parents=True, exist_ok=True)
        folders = {"images": draft / "images", "masks": draft / "masks"}
        for folder in folders.values():
            folder.mkdir(parents=True)
        draw = partial(_write_scene, recipe, folders["images"], folders["masks"])
        progress = partial(tqdm, total=count, desc=f"drawing {recipe.split}", unit="scene")
        if workers == 1:
            records = list(progress(map(draw, range(count))))
        else:
            context = multiprocessing.get_context("spawn")
            # Ctrl-C goes to all processes of a terminal: this one alone says so, and ends the others.
            deaf = (signal.SIGINT, signal.SIG_IGN)
            with ProcessPoolExecutor(workers, context, signal.signal, deaf) as pool:
                records = list(progress(pool.map(draw, range(count), chunksize=16)))
        panoptic_file.unlink(missing_ok=True)
        for folder, name in ((folders["images"], recipe.split), (folders["masks"], f"panoptic_{recipe.split}")):
            shutil.rmtree(root / name, ignore_errors=True)
            folder.replace(root / name)
        _write_annotations(root, recipe, records)
    except OSError as exc:
        raise DatasetError(
            f"cannot write Sticker World to {root}: {exc}; free some space or choose another folder"
        ) from exc
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_annotations(root: Path, recipe: Recipe, records: list[dict[str, Any]]) -> None:
    info = {
        "description": "Sticker World",
        "seed": recipe.seed,
        "split": recipe.split,
        "classes": recipe.classes,
        "size": recipe.size,
    }
    images = [
        {"id": number, "file_name": f"{record['stem']}.jpg", "width": recipe.size, "height": recipe.size}
        for number, record in enumerate(records, start=1)
    ]
    caption_entries = [
        {"id": 100 * number + position, "image_id": number, "caption": caption}
        for number, record in enumerate(records, start=1)
        for position, caption in enumerate(record["captions"])
    ]
    annotations = [
        {"image_id": number, "file_name": f"{record['stem']}.png", "segments_info": record["segments"]}
        for number, record in enumerate(records, start=1)
    ]
    folder = root / "annotations"
    _write_json(root / "split.json", dict(_split_lists()))
    _write_json(
        folder / f"captions_{recipe.split}.json", {"info": info, "images": images, "annotations": caption_entries}
    )
    _write_json(
        folder / f"panoptic_{recipe.split}.json",
        {"info": info, "images": images, "annotations": annotations, "categories": coco_categories()},
    )
