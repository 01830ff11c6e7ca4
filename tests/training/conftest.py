"""A data set of a few drawn pictures, a model small enough to train in a test, and an experiment for both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from training.checkpoints.own_format import save_checkpoint
from training.config import ODISE_TINY, OdiseConfig, caption_variant
from training.data.transforms import JitterOptions
from training.experiment import Experiment, OptimizerOptions, Phase, Precision
from training.losses import CriterionOptions, PointOptions
from training.models.odise import Odise

SIDE = 64
FP16_SCALE = 8.0
"""Loss scale that fp16 starts with in tests; the usual 65536 would spend all five iterations on coming down."""


def mini_config() -> OdiseConfig:
    head = dataclasses.replace(ODISE_TINY.head, queries=6, pixel_decoder_layers=1, mask_decoder_layers=3)
    return dataclasses.replace(
        ODISE_TINY, name="mini", head=head, window=SIDE, test_short_edge=SIDE, test_long_edge=2 * SIDE
    )


def mini_experiment(kind: str = "label", cached: bool = True) -> Experiment:
    """Five iterations: three on cached single windows, two on scenes of four windows.

    ``kind`` is a variant, ``variant-precision`` or ``variant-precision-batch``; the latter two recompute activations
    too.
    """
    variant, precision, batch = (*kind.split("-"), "", "")[:3]
    views = int(batch or 2)
    small = JitterOptions(target=SIDE, crop=SIDE, smallest=0.7, largest=1.3)
    large = JitterOptions(target=2 * SIDE, crop=2 * SIDE, smallest=0.7, largest=1.0)
    config = mini_config()
    return Experiment(
        name="mini",
        model=caption_variant(config) if variant == "caption" else config,
        phases=(Phase(3, views, small, 4 if cached else 0), Phase(2, views, large, 0)),
        criterion=CriterionOptions(points=PointOptions(points=64)),
        optimizer=OptimizerOptions(learning_rate=1e-3, warmup=0.2),
        precision=cast(Precision, precision or "fp32"),
        gradient_checkpointing=bool(precision),
        save_every=2,
        picture_every=100,
    )


def write_mini_data(root: Path, split: str, pictures: int) -> None:
    """Pictures of a disc on a two-coloured ground, in COCO's panoptic format."""
    random = np.random.default_rng(len(split))
    folders = {name: root / name for name in (split, f"panoptic_{split}", "annotations")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    images, annotations, captions = [], [], []
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for number in range(1, pictures + 1):
        ids = np.where(rows < SIDE // 2, 1, 2)
        y, x = random.integers(16, 48, 2)
        ids[(rows - y) ** 2 + (columns - x) ** 2 < 144] = 3
        colours = random.integers(0, 256, (4, 3))
        picture = np.clip(colours[ids] + random.integers(-9, 9, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folders[split] / f"{number}.png")
        encoded = np.stack([ids, np.zeros_like(ids), np.zeros_like(ids)], axis=2).astype(np.uint8)
        Image.fromarray(encoded).save(folders[f"panoptic_{split}"] / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE})
        segments = [
            {"id": i, "category_id": 10 + i, "iscrowd": 0, "area": int((ids == i).sum()), "bbox": [0, 0, SIDE, SIDE]}
            for i in (1, 2, 3)
        ]
        annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
        captions.append({"id": number, "image_id": number, "caption": "a red ball under the blue sky on grass."})
    categories = [
        {"id": 11, "name": "sky", "isthing": 0},
        {"id": 12, "name": "grass", "isthing": 0, "synonyms": ["lawn"]},
        {"id": 13, "name": "ball", "isthing": 1},
        {"id": 14, "name": "zebra", "isthing": 1},
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folders["annotations"] / f"panoptic_{split}.json").write_text(json.dumps(content))
    (folders["annotations"] / f"captions_{split}.json").write_text(json.dumps({"annotations": captions}))


@pytest.fixture(scope="session")
def mini_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a data set with splits ``train`` and ``val``; its category "zebra" has no segment."""
    root = tmp_path_factory.mktemp("mini_data")
    write_mini_data(root, "train", 5)
    write_mini_data(root, "val", 3)
    return root


@pytest.fixture(scope="session")
def byte_tokenizer_json() -> str:
    """A tokenizer of bytes: enough to spell anything."""
    pieces = {piece: index for index, piece in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=pieces, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    text: str = tokenizer.to_str()
    return text


@pytest.fixture(scope="session")
def mini_frozen(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_json: str) -> Path:
    """A checkpoint with random weights, which supplies the frozen networks."""
    torch.manual_seed(0)
    model = Odise(mini_config())
    model.refresh_null_text_embedding()
    folder = tmp_path_factory.mktemp("mini_frozen") / "checkpoint"
    return save_checkpoint(folder, model, tokenizer_json=byte_tokenizer_json, training_vocabulary=())
