"""odise-tiny trained further, from its own heads, on many more views: the second half of its training.

Command, after ``sticker_tiny_label`` and the refinement of CLIP (``training/pretrained/odise-tiny/README.md``)::

    torchrun --nproc-per-node 2 -m training.train sticker_tiny_refine --threads 1 --data runs/sticker \\
        --frozen runs/frozen-refined --heads runs/odise-tiny/checkpoint --out runs/odise-tiny-refined

Muon moves the matrices: from fresh heads it reached in 200 iterations the loss that AdamW reached in some 300 (one try,
peak rates 3e-3 and 1e-3, neither tuned). The rate falls linearly: in ``sticker_tiny_label`` the loss fell most when the
rate was cut.

Hardware: two CPU cores, and 8 GB of disk for the frozen features of 24,000 windows.
"""

from __future__ import annotations

from training.config import preset
from training.data.transforms import JitterOptions
from training.experiment import Experiment, OptimizerOptions, Phase
from training.losses import CriterionOptions, PointOptions


def experiment() -> Experiment:
    """Scenes of four windows."""
    return Experiment(
        name="sticker_tiny_refine",
        model=preset("odise-tiny"),
        phases=(
            Phase(
                iterations=4300,
                batch=4,
                jitter=JitterOptions(target=256, crop=256, smallest=0.7, largest=1.3),
                cached_views=6000,
            ),
        ),
        criterion=CriterionOptions(points=PointOptions(points=3072)),
        optimizer=OptimizerOptions(learning_rate=5e-4, matrix_rate=2e-3, warmup=0.02, decay="linear"),
        seed=43,
        save_every=100,
        picture_every=1000,
    )
