"""odise-tiny with label supervision on Sticker World: the checkpoint that ships with this repository.

Command, after the frozen models are trained (see ``training/pretrained/odise-tiny/README.md`` for all steps)::

    torchrun --nproc-per-node 2 -m training.train sticker_tiny_label --threads 1 --data runs/sticker \\
        --frozen runs/frozen-tiny --out runs/odise-tiny

Hardware: two CPU cores. One process a core is faster than two threads, as the tensors are small. Frozen features of
the first phase's single windows and of the second phase's whole scenes are kept on disk (some 4 GB).
"""

from __future__ import annotations

from training.config import preset
from training.data.transforms import JitterOptions
from training.experiment import Experiment, OptimizerOptions, Phase
from training.losses import CriterionOptions, PointOptions


def experiment() -> Experiment:
    """Single windows first, then scenes of four windows, as at test time."""
    return Experiment(
        name="sticker_tiny_label",
        model=preset("odise-tiny"),
        phases=(
            Phase(
                iterations=2400,
                batch=16,
                jitter=JitterOptions(target=256, crop=128, smallest=0.5, largest=1.2),
                cached_views=8000,
            ),
            Phase(
                iterations=2800,
                batch=4,
                jitter=JitterOptions(target=256, crop=256, smallest=0.7, largest=1.3),
                cached_views=1600,
            ),
        ),
        criterion=CriterionOptions(points=PointOptions(points=3072)),
        optimizer=OptimizerOptions(learning_rate=1e-3, warmup=0.03, milestones=(0.8, 0.95)),
        save_every=100,
        picture_every=1000,
    )
