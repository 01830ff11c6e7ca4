from __future__ import annotations

import pytest
import torch

from odise_rt.errors import ConfigError
from training.initialization import random_checkpoint


def test_the_same_seed_gives_the_same_living_model_and_another_seed_another() -> None:
    first = random_checkpoint("odise-tiny-caption", 3)
    again = random_checkpoint("odise-tiny-caption", 3)
    other = random_checkpoint("odise-tiny-caption", 4)
    states = [loaded.model.state_dict() for loaded in (first, again, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    weight = "unet.mid_block.resnets.0.conv1.weight"
    assert not torch.equal(states[0][weight], states[2][weight])
    assert all(tensor.isfinite().all() for tensor in states[0].values())
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    prediction, clip = first.model.segment_features(picture)
    share = (prediction.mask_logits > 0).float().mean()
    assert 0.01 < share < 0.99
    assert 0.1 < prediction.mask_embedding.std() < 10
    assert clip.std() > 0.01


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ConfigError, match=r"odise-large.*expected one of odise-sd1"):
        random_checkpoint("odise-large", 0)
