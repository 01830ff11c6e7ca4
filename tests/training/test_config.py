"""What a config may hold, and how one that may not be is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from odise_rt.errors import ConfigError
from training.config import PRESETS, OdiseConfig


def described(name: str = "odise-tiny") -> dict[str, Any]:
    """A preset as a checkpoint's config.json holds it."""
    data: dict[str, Any] = json.loads(json.dumps(PRESETS[name].to_dict()))
    return data


@pytest.mark.parametrize("name", PRESETS)
def test_comes_back_from_json(name: str) -> None:
    assert OdiseConfig.from_dict(described(name)) == PRESETS[name]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("window", "128", r"window is '128': expected a whole number from 1"),
        ("window", True, r"window is True: expected a whole number"),
        ("window", 128.5, r"window is 128.5: expected a whole number"),
        ("window", None, r"window is None: expected a whole number"),
        ("window", 0, r"window is 0: expected a whole number from 1"),
        ("head.queries", -1, r"head.queries is -1: expected a whole number from 1"),
        ("head.mask_decoder_layers", 10**9, r"head.mask_decoder_layers is 1000000000: expected .* to 1000"),
        ("vae.scaling_factor", math.nan, r"vae.scaling_factor is nan: expected a number"),
        ("vae.scaling_factor", "x" * 1000, r"vae.scaling_factor is 'xxx.{,40}': expected a number"),
        ("clip_weight_seen", 1.5, r"clip_weight_seen is 1.5: expected a number from 0 to 1"),
        ("clip_weight_unseen", math.inf, r"clip_weight_unseen is inf: expected a number from 0 to 1"),
        ("timestep", 1000, r"timestep is 1000: expected a whole number from 0 to 999"),
        ("clip.quick_gelu", 1, r"clip.quick_gelu is 1: expected true or false"),
        ("name", 3, r"name is 3: expected text"),
        ("name", " ", r"config ' ': a name needs a letter"),
        ("name", "a\nb\x1b[31m", r"config 'a\\nb.*': a name needs a letter, and no character that is not printed"),
        ("variant", "both", r"variant is 'both': expected 'label' or 'caption'"),
        ("conditioning", [], r"conditioning is \[\]: expected 'implicit'"),
        ("vae.channels", [16, 32, 64], r"vae.channels is \[16, 32, 64\]: expected a list of 4"),
        ("unet.channels", [32, "48", 56, 64], r"unet.channels\[1\] is '48': expected a whole number"),
        ("unet.channels", 32, r"unet.channels is 32: expected a list of 4"),
        ("unet.layers_per_block", 1, r"unet.layers_per_block is 1: expected 2"),
        ("clip", [], r"clip is \[\]: expected an object"),
        ("head.colour", 3, r"unknown head.colour"),
        ("unet.channels", [32, 48, 56, 66], r"unet.channels\[3\] 66 must be a multiple of unet.heads 4"),
        ("vae.norm_groups", 7, r"vae.channels\[0\] 16 must be a multiple of vae.norm_groups 7"),
        ("head.attention_heads", 7, r"head.hidden_dim 96 must be a multiple of head.attention_heads 7"),
        ("head.pyramid_channels", 130, r"head.pyramid_channels 130 must be a multiple of 4 \* head.norm_groups = 32"),
        ("clip.text_heads", 3, r"clip.text_width 128 must be a multiple of clip.text_heads 3"),
        ("sd_text.width", 96, r"unet.context_dim 64 must equal sd_text.width 96"),
        ("clip.end_token", 4096, r"clip.start_token 4094 and end_token 4096 must be two ids below .*vocab_size 4096"),
        ("clip.end_token", 4093, r"clip.end_token 4093 must be the largest id, 4095"),
        ("test_long_edge", 100, r"test_short_edge 256 is above test_long_edge 100"),
    ],
)
def test_a_wrong_value_is_named(field: str, value: object, message: str) -> None:
    data = described()
    *sections, last = field.split(".")
    place = data
    for section in sections:
        place = place[section]
    place[last] = value
    with pytest.raises(ConfigError, match=message):
        OdiseConfig.from_dict(data)


@pytest.mark.parametrize("field", ["window", "vae", "head.queries"])
def test_a_missing_field_is_named(field: str) -> None:
    data = described()
    *sections, last = field.split(".")
    del (data[sections[0]] if sections else data)[last]
    with pytest.raises(ConfigError, match=f"missing {field}"):
        OdiseConfig.from_dict(data)


def test_a_config_made_in_code_is_checked_as_well() -> None:
    with pytest.raises(ConfigError, match="config 'x': window is 0"):
        OdiseConfig(name="x", window=0)
