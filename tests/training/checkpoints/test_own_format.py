"""This project's checkpoint directories: round trips, atomic writing, and what is refused."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from odise_rt.errors import CheckpointError, ConfigError
from tests.training.checkpoints.published import Published
from training.checkpoints import load_checkpoint, save_checkpoint
from training.checkpoints.own_format import _NoRandomInitialisation, read_description, uninitialised_model
from training.models.odise import Odise

WORDS = ("owl", "großer Baum", "😀")


@pytest.fixture
def saved(published: Published, byte_tokenizer: str, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return save_checkpoint(
        tmp_path / "saved", published.model, tokenizer_json=byte_tokenizer, training_vocabulary=WORDS
    )


def test_fp32_round_trip_is_exact(published: Published, saved: Path, byte_tokenizer: str) -> None:
    loaded = load_checkpoint(saved)
    assert sorted(path.name for path in saved.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1, "who may read one may read all"
    expected = published.model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.model.state_dict().items())
    assert loaded.config == published.config
    assert loaded.training_vocabulary == WORDS
    assert loaded.tokenizer_json == byte_tokenizer
    assert len(loaded.report.loaded) == len(expected)
    assert not loaded.report.ignored
    assert torch.equal(loaded.model.noise, published.model.noise)


@pytest.mark.parametrize("variant", ["label", "caption"])
def test_fp16_round_trip(
    variant: str, published: Published, published_caption: Published, byte_tokenizer: str, tmp_path: Path
) -> None:
    model = (published if variant == "label" else published_caption).model
    path = save_checkpoint(
        tmp_path / "half", model, tokenizer_json=byte_tokenizer, training_vocabulary=(), storage="fp16"
    )
    found = load_checkpoint(path).model.state_dict()
    for key, tensor in model.state_dict().items():
        exact = tensor.dim() < 2 or key == "null_text_embedding"
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key], tensor if exact else tensor.half().float()), key
    stored = load_file(path / "model.safetensors")
    assert stored["unet.conv_in.weight"].dtype == torch.float16
    assert stored["unet.conv_in.bias"].dtype == stored["null_text_embedding"].dtype == torch.float32


def test_text_encoder_may_be_left_out(published: Published, byte_tokenizer: str, tmp_path: Path) -> None:
    path = save_checkpoint(
        tmp_path / "lean",
        published.model,
        tokenizer_json=byte_tokenizer,
        training_vocabulary=WORDS,
        include_sd_text=False,
    )
    assert published.model.sd_text is not None
    assert not any(key.startswith("sd_text") for key in load_file(path / "model.safetensors"))
    loaded = load_checkpoint(path)
    assert loaded.model.sd_text is None
    assert torch.equal(loaded.model.null_text_embedding, published.model.null_text_embedding)
    again = save_checkpoint(tmp_path / "again", loaded.model, tokenizer_json=byte_tokenizer, training_vocabulary=WORDS)
    assert read_description(again)["sd_text"] is False


def test_same_model_same_bytes(published: Published, byte_tokenizer: str, saved: Path, tmp_path: Path) -> None:
    other = save_checkpoint(
        tmp_path / "other", published.model, tokenizer_json=byte_tokenizer, training_vocabulary=WORDS
    )
    for path in saved.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_replaces_a_checkpoint_but_nothing_else(published: Published, byte_tokenizer: str, saved: Path) -> None:
    arguments: dict[str, Any] = {"tokenizer_json": byte_tokenizer, "training_vocabulary": ["new"]}
    save_checkpoint(saved, published.model, **arguments)
    assert load_checkpoint(saved).training_vocabulary == ("new",)
    precious = saved.parent / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="refused to replace it"):
        save_checkpoint(precious, published.model, **arguments)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["precious", "saved"]


def test_failed_write_leaves_the_old_one(
    published: Published, byte_tokenizer: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = (saved / "config.json").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write.*No space left.*free space"):
        save_checkpoint(saved, published.model, tokenizer_json=byte_tokenizer, training_vocabulary=["new"])
    monkeypatch.undo()
    assert (saved / "config.json").read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    load_checkpoint(saved)


def test_what_a_killed_save_left_goes_with_the_next(published: Published, byte_tokenizer: str, saved: Path) -> None:
    left = saved.with_name(".saved.dead1234.partial")
    left.mkdir()
    os.utime(left, (1, 1))
    save_checkpoint(saved, published.model, tokenizer_json=byte_tokenizer, training_vocabulary=["new"])
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_refuses_to_save_broken_or_overflowing_weights(
    published: Published, byte_tokenizer: str, tmp_path: Path
) -> None:
    weight = published.model.unet.conv_in.weight
    before = weight[0, 0, 0, 0].item()
    arguments: dict[str, Any] = {"tokenizer_json": byte_tokenizer, "training_vocabulary": ()}
    try:
        weight.data[0, 0, 0, 0] = 1e5
        with pytest.raises(CheckpointError, match=r"unet.conv_in.weight holds 1e\+05, beyond fp16's 65504"):
            save_checkpoint(tmp_path / "a", published.model, storage="fp16", **arguments)
        weight.data[0, 0, 0, 0] = float("nan")
        with pytest.raises(CheckpointError, match=r"unet.conv_in.weight holds NaN"):
            save_checkpoint(tmp_path / "a", published.model, **arguments)
    finally:
        weight.data[0, 0, 0, 0] = before
    assert not (tmp_path / "a").exists()


def test_tokenizer_must_belong_to_the_text_tower(
    published: Published, byte_tokenizer: str, tmp_path: Path, saved: Path
) -> None:
    larger = json.loads(byte_tokenizer)
    larger["model"]["vocab"] |= {f"piece{i}": 256 + i for i in range(60)}
    for text, message in (
        ("{}", "is no tokenizers file"),
        (json.dumps(larger), "has 316 tokens, CLIP's text tower 300"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(tmp_path / "a", published.model, tokenizer_json=text, training_vocabulary=())
        (saved / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(saved)


def test_what_is_no_checkpoint(published: Published, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing: expected a checkpoint directory"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"is a file, a released ODISE checkpoint.*checkpoints convert"):
        load_checkpoint(published.odise)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read.*incomplete"):
        load_checkpoint(published.diffusers)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read|does not describe"):
        load_checkpoint(published.diffusers / "vae")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, this version reads 1: upgrade odise_rt"),
        ({"format_version": 0}, "format version 0, this version reads 1: Save it again"),
        ({"format": "other"}, "does not describe a checkpoint of this project"),
        ({"config": {"name": "x"}}, r"config\.json: config does not fit this version .*missing variant"),
        ({"config": None}, "lacks config"),
        ({"sd_text": "yes"}, "lacks config, sd_text"),
        ({"training_vocabulary": [1]}, "training_vocabulary, or they are malformed"),
    ],
)
def test_altered_description(saved: Path, change: dict[str, object], message: str) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved)


def test_a_config_too_large_for_any_machine(saved: Path) -> None:
    path = saved / "config.json"
    description = json.loads(path.read_text())
    description["config"]["clip"]["text_width"] = 1 << 20
    path.write_text(json.dumps(description))
    with pytest.raises(ConfigError, match=r"describes a model that cannot be made here .*: check its sizes"):
        load_checkpoint(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_description_that_is_no_json_object(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json (is not valid JSON|does not describe)"):
        load_checkpoint(saved)


def test_weights_that_do_not_fit(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = load_file(path)
    save_file({key: tensor for key, tensor in whole.items() if not key.startswith("clip.visual.ln")}, path)
    with pytest.raises(CheckpointError, match=r"lacks clip.visual.ln_pre.weight, .* of the"):
        load_checkpoint(saved)
    save_file({**whole, "extra": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="holds the unexpected extra"):
        load_checkpoint(saved)
    save_file({**whole, "noise": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="unexpected noise"):
        load_checkpoint(saved)
    key = "unet.conv_in.weight"
    for dtype in (torch.int32, torch.bool, torch.complex64):
        save_file({**whole, key: whole[key].to(dtype)}, path)
        with pytest.raises(CheckpointError, match=rf"types differ: {key} {str(dtype)[6:]}, expected float32"):
            load_checkpoint(saved)
    for value in (math.nan, math.inf, 1e300):
        save_file({**whole, key: torch.full_like(whole[key], value, dtype=torch.float64)}, path)
        with pytest.raises(CheckpointError, match=f"NaN or infinite values in {key}"):
            load_checkpoint(saved)
    save_file({**whole, key: torch.ones_like(whole[key]).to(torch.float8_e4m3fn)}, path)
    assert load_checkpoint(saved).model.unet.conv_in.weight.eq(1).all()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        load_checkpoint(saved)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load_checkpoint(saved)


def test_model_without_initialisation_has_its_constants(published: Published) -> None:
    """Only random numbers are skipped: whatever is computed in a constructor and not stored must be there."""
    bare, whole = uninitialised_model(published.config), Odise(published.config)
    stored = set(whole.state_dict())
    constants = {name: buffer for name, buffer in whole.named_buffers() if name not in stored}
    assert {"noise", "clip_pixels.mean", "clip.attn_mask"} <= set(constants)
    found = dict(bare.named_buffers())
    for name, buffer in constants.items():
        assert torch.equal(found[name], buffer), name


def test_initialisers_that_draw_until_it_fits_end() -> None:
    """What an allocation finds in memory must not matter to them."""
    dirty = torch.full((1000,), 1e9)
    with _NoRandomInitialisation():
        torch.nn.init.trunc_normal_(dirty, std=0.02)
        assert torch.equal(torch.empty(3).uniform_(2.0, 4.0), torch.full((3,), 3.0))
        assert torch.equal(torch.nn.init.xavier_uniform_(torch.full((3, 3), 7.0)), torch.zeros(3, 3))
    assert torch.equal(dirty, torch.zeros(1000))
