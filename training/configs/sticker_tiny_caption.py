"""odise-tiny with caption supervision on Sticker World.

Command::

    torchrun --nproc-per-node 2 -m training.train sticker_tiny_caption --threads 1 --data runs/sticker \\
        --frozen runs/frozen-tiny --out runs/odise-tiny-caption

Same data, budget and hardware as :mod:`training.configs.sticker_tiny_label`; its feature caches are shared.
"""

from __future__ import annotations

import dataclasses

from training.config import preset
from training.configs import sticker_tiny_label
from training.experiment import Experiment


def experiment() -> Experiment:
    """The label experiment with the other supervision."""
    return dataclasses.replace(
        sticker_tiny_label.experiment(), name="sticker_tiny_caption", model=preset("odise-tiny-caption")
    )
