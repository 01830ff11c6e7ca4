"""The released label model on data of one's own: all trained parts go on from its heads.

Commands, of which the first two make a checkpoint of the released files and a panoptic set of instances; the label
file lies beside the authors' code::

    python -m training.checkpoints convert --config odise-sd1 --odise odise_label_coco_50e-b67d2efc.pth \\
        --stable-diffusion sd-v1-3.ckpt --clip ViT-L-14-336px.pt \\
        --training-labels coco_panoptic_with_prompt_eng.txt --out checkpoints/odise-label
    python -m training.data.instances_to_panoptic labels.json --out DATA --split train
    torchrun --nproc-per-node 8 -m training.train finetune_label --data DATA --frozen checkpoints/odise-label \\
        --heads checkpoints/odise-label --out runs/finetuned

Batch, rate and length are a place to start from, chosen without a run: ``--batch``, ``--learning-rate`` and
``--iterations`` change them. On one GPU, ``--micro-batches 16`` takes its pictures one by one. This repository has
not run it.
"""

from __future__ import annotations

import dataclasses

from training.configs import coco_label
from training.data.transforms import JitterOptions
from training.experiment import Experiment, OptimizerOptions, Phase


def experiment() -> Experiment:
    """5,000 iterations of 16 pictures, cropped and recomputed as in the published training."""
    return dataclasses.replace(
        coco_label.experiment(),
        name="finetune_label",
        phases=(Phase(iterations=5000, batch=16, jitter=JitterOptions(diagonal_crops=True)),),
        optimizer=OptimizerOptions(learning_rate=1e-4, warmup=0.02, decay="linear"),
        save_every=250,
        picture_every=500,
    )
