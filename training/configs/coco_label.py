"""ODISE with label supervision on COCO panoptic, as published.

Command, on 4 nodes of 8 GPUs (batch 64 = 2 pictures a GPU)::

    torchrun --nnodes 4 --nproc-per-node 8 -m training.train coco_label --data COCO --split train2017 \\
        --frozen SD1_CLIP_CHECKPOINT --classes coco_panoptic_with_prompt_eng.txt --out runs/coco-label --workers 4

The label file lies beside the authors' code; without ``--classes`` COCO's 133 plain names are learnt.
COCO holds ``train2017/``, ``annotations/panoptic_train2017.json``, ``annotations/panoptic_train2017/`` and
``annotations/captions_train2017.json``; the frozen checkpoint is Stable Diffusion 1.x and CLIP ViT-L/14@336 converted
by ``python -m training.checkpoints``.

Hardware and cost, as the authors give them: 32 V100 (32 GB) for 6 days, about 4,600 GPU hours. A picture is 4 windows,
2.86 TFLOP of frozen networks each forward (diffusion 2.48, CLIP's image tower 0.38), the UNet's 0.74 once more to
recompute its activations, and the UNet's backward pass to its conditioning. This repository has not run it.

Expected (published): COCO PQ 55.4, mAP 46.0, mIoU 65.2; ADE20K PQ 22.6, mAP 14.4, mIoU 29.9, with the authors'
prompt-engineered label files, AP against the data sets' instance files (``training.evaluate --instances``: without it
AP is not comparable) and mIoU as ``miou_with_predicted``, on ADE20K that of ``--format ade20k-150``.
"""

from __future__ import annotations

from training.config import preset
from training.data.transforms import JitterOptions
from training.experiment import Experiment, Phase


def experiment() -> Experiment:
    """92,188 iterations of 64 pictures: 50 epochs."""
    return Experiment(
        name="coco_label",
        model=preset("odise-sd1"),
        phases=(Phase(iterations=92_188, batch=64, jitter=JitterOptions(diagonal_crops=True)),),
        precision="fp16",
        cropped_out_targets=True,
        gradient_checkpointing=True,
        save_every=1000,
        picture_every=5000,
    )
