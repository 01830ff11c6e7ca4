"""ODISE with caption supervision on COCO: class-agnostic masks, and words from captions.

Command, on 4 nodes of 8 GPUs (batch 64 = 2 pictures a GPU)::

    torchrun --nnodes 4 --nproc-per-node 8 -m training.train coco_caption --data COCO --split train2017 \\
        --frozen SD1_CLIP_CHECKPOINT --classes coco_panoptic_with_prompt_eng.txt --out runs/coco-caption --workers 4

Data, hardware and cost as in :mod:`training.configs.coco_label`. The grounding loss contrasts the pictures of all
processes, so the global batch of 64 is part of the method; smaller ones weaken it.

Expected (published): COCO PQ 45.6, mAP 38.4, mIoU 52.4; ADE20K PQ 23.4, mAP 13.9, mIoU 28.7, measured as in
:mod:`training.configs.coco_label`. This repository has not run it.
"""

from __future__ import annotations

import dataclasses

from training.config import preset
from training.configs import coco_label
from training.experiment import Experiment


def experiment() -> Experiment:
    """The label experiment with the other supervision."""
    return dataclasses.replace(coco_label.experiment(), name="coco_caption", model=preset("odise-sd1-caption"))
