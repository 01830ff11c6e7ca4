"""The short training that :mod:`training.ablation` varies, to measure the paper's claims on two CPU cores.

Commands, after Sticker World is drawn (``docs/training.md``); the second takes some two hours::

    python -m training.pretrain.text_encoder --checkpoint training/pretrained/odise-tiny --scenes runs/frozen \\
        --out runs/odise-tiny-captions
    torchrun --nproc-per-node 2 -m training.ablation --threads 1 --data runs/sticker \\
        --frozen runs/odise-tiny-captions --out runs/ablation

``sticker_tiny_label`` in small: its two phases, with Muon for the matrices and a rate that falls linearly, which gets
further in few iterations. All runs get the same budget; none of their settings was tuned for one of them.
"""

from __future__ import annotations

import dataclasses

from training.configs import sticker_tiny_label
from training.experiment import Experiment, OptimizerOptions


def experiment() -> Experiment:
    """Single windows first, then scenes of four windows."""
    label = sticker_tiny_label.experiment()
    windows, scenes = label.phases
    return dataclasses.replace(
        label,
        name="sticker_tiny_ablation",
        phases=(
            dataclasses.replace(windows, iterations=200, cached_views=3200),
            dataclasses.replace(scenes, iterations=100, cached_views=400),
        ),
        optimizer=OptimizerOptions(learning_rate=1e-3, matrix_rate=3e-3, warmup=0.05, decay="linear"),
    )
