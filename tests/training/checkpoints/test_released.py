"""Published files into a model: every number arrives at its place, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from odise_rt.errors import CheckpointError
from odise_rt.vocabulary import Vocabulary
from tests.training.checkpoints.published import Published
from training.checkpoints import load_released
from training.models.odise import TRAINED, Odise


def assert_same_weights(ours: Odise, theirs: Odise) -> None:
    expected = theirs.state_dict()
    found = ours.state_dict()
    assert list(found) == list(expected)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def edited(path: Path, folder: Path, wrapper: str | None, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a torch file whose dictionary of tensors went through ``change``."""
    content = torch.load(path, weights_only=True)
    tensors: dict[str, Tensor] = content[wrapper] if wrapper else content
    change(tensors)
    copy = folder / path.name
    torch.save(content, copy)
    return copy


@pytest.mark.parametrize("variant", ["label", "caption"])
def test_every_weight_arrives(
    variant: str, published: Published, published_caption: Published, byte_tokenizer: str
) -> None:
    source = published if variant == "label" else published_caption
    loaded = load_released(source.config, **source.files(), tokenizer_json=byte_tokenizer)
    assert_same_weights(loaded.model, source.model)
    assert not loaded.model.training
    report = loaded.report
    # The embedding of "" is computed, all else is loaded.
    assert len(report.loaded) == len(source.model.state_dict()) - 1
    assert report.parameters == sum(parameter.numel() for parameter in source.model.parameters())
    assert report.loaded["unet.conv_in.weight"] == (8, 4, 3, 3)
    reasons = {reason for part in report.parts for reason in part.ignored_by_reason()}
    assert len(report.ignored) == 6
    assert len(reasons) == 4
    assert "6 ignored" in str(report)
    assert "moving average" in str(report)


def test_diffusers_directory_gives_the_same(published: Published, byte_tokenizer: str) -> None:
    files = published.files() | {"stable_diffusion": published.diffusers}
    assert_same_weights(load_released(published.config, **files, tokenizer_json=byte_tokenizer).model, published.model)


def test_diffusers_names_of_earlier_years(published: Published, byte_tokenizer: str, tmp_path: Path) -> None:
    """The VAE's attention had other names, the text encoder one level more and its position ids."""
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for folder, file in (
        ("vae", "diffusion_pytorch_model"),
        ("unet", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        tensors = load_file(published.diffusers / folder / f"{file}.safetensors")
        if folder == "vae":
            for new, old in renamed.items():
                tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for key, t in tensors.items()}
        if folder == "text_encoder":
            tensors = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in tensors.items()}
            tensors["text_model.embeddings.position_ids"] = torch.arange(32)[None]
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / f"{file}.safetensors")
    files = published.files() | {"stable_diffusion": tmp_path}
    assert_same_weights(load_released(published.config, **files, tokenizer_json=byte_tokenizer).model, published.model)


def test_without_heads_they_start_fresh(published: Published, byte_tokenizer: str) -> None:
    files = published.files() | {"odise": None}
    loaded = load_released(published.config, **files, tokenizer_json=byte_tokenizer)
    gate = loaded.model.implicit_captioner.caption_gate
    assert torch.count_nonzero(gate) == 0
    assert {part.module for part in loaded.report.parts} == {"unet", "vae", "sd_text", "clip"}
    no_object = loaded.model.mask_classifier.no_object_embedding
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    tokens[0, :2] = torch.tensor([298, 299])
    assert no_object is not None
    assert torch.allclose(no_object, published.model.clip_text(tokens)[0])


def test_training_vocabulary(published: Published, byte_tokenizer: str) -> None:
    loaded = load_released(published.config, **published.files(), tokenizer_json=byte_tokenizer)
    assert loaded.training_vocabulary == Vocabulary.builtin("coco").words
    named = load_released(
        published.config, **published.files(), tokenizer_json=byte_tokenizer, training_vocabulary=["owl"]
    )
    assert named.training_vocabulary == ("owl",)


def test_clip_in_open_clips_layouts(published: Published, byte_tokenizer: str, tmp_path: Path) -> None:
    """A distributed trainer's prefix, the text tower in its own module, half precision, a safetensors file."""
    text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    tensors = published.model.clip.state_dict()
    layouts = {
        "module.pt": {f"module.{key}": tensor for key, tensor in tensors.items()},
        "text.pt": {f"text.{key}" if key.startswith(text) else key: tensor for key, tensor in tensors.items()},
        "half.pt": {key: tensor.half() for key, tensor in tensors.items()},
    }
    for name, content in layouts.items():
        torch.save({"state_dict": content, "epoch": 32}, tmp_path / name)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "clip.safetensors")
    for path in sorted(tmp_path.iterdir()):
        files = published.files() | {"clip": path}
        found = load_released(published.config, **files, tokenizer_json=byte_tokenizer).model.clip.state_dict()
        for key, tensor in tensors.items():
            expected = tensor.half().float() if path.name == "half.pt" else tensor
            assert torch.equal(found[key], expected), (path.name, key)


def test_openai_facts_are_compared(published: Published, byte_tokenizer: str, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor], resolution: int) -> None:
        tensors.update(
            input_resolution=torch.tensor(resolution), context_length=torch.tensor(32), vocab_size=torch.tensor(300)
        )

    good = edited(published.clip, tmp_path, None, lambda tensors: add(tensors, 32))
    files = published.files() | {"clip": good}
    assert len(load_released(published.config, **files, tokenizer_json=byte_tokenizer).report.ignored) == 9
    edited(published.clip, tmp_path, None, lambda tensors: add(tensors, 336))
    with pytest.raises(CheckpointError, match="input_resolution 336, the config 32"):
        load_released(published.config, **files, tokenizer_json=byte_tokenizer)


@pytest.mark.parametrize(
    ("part", "wrong", "message"),
    [
        ("stable_diffusion", "clip", "is a CLIP checkpoint, expected Stable Diffusion weights.*sd-v1-3.ckpt"),
        ("stable_diffusion", "odise", "is a released ODISE checkpoint, expected Stable Diffusion"),
        ("clip", "compvis", "is a Stable Diffusion checkpoint in CompVis format, expected CLIP.*ViT-L-14-336px"),
        ("clip", "diffusers", "is a directory: expected a file of tensors"),
        ("odise", "clip", "is a CLIP checkpoint, expected ODISE weights.*odise_label_coco"),
    ],
)
def test_wrong_kind(published: Published, byte_tokenizer: str, part: str, wrong: str, message: str) -> None:
    files = published.files() | {part: getattr(published, wrong)}
    with pytest.raises(CheckpointError, match=message):
        load_released(published.config, **files, tokenizer_json=byte_tokenizer)


def test_wrong_variant(published: Published, published_caption: Published, byte_tokenizer: str) -> None:
    with pytest.raises(CheckpointError, match="trained with captions, config 'smallest' is the label variant"):
        load_released(published.config, **published_caption.files(), tokenizer_json=byte_tokenizer)
    with pytest.raises(CheckpointError, match=r"trained with labels.*take the config without -caption"):
        load_released(published_caption.config, **published.files(), tokenizer_json=byte_tokenizer)


def test_wrong_size_names_shapes_and_counts(published: Published, byte_tokenizer: str) -> None:
    wide = dataclasses.replace(published.config.head, mask_decoder_ffn=24)
    config = dataclasses.replace(published.config, head=wide)
    with pytest.raises(CheckpointError, match=r"linear1\.weight 16x32, expected 24x32.* and 1 more.*of this config"):
        load_released(config, **published.files(), tokenizer_json=byte_tokenizer)


def test_missing_and_unexpected_keys_are_named(published: Published, byte_tokenizer: str, tmp_path: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".input_proj." in key][:7]:
            del tensors[key]
        tensors["sem_seg_head.predictor.surprise"] = torch.ones(1)

    files = published.files() | {"odise": edited(published.odise, tmp_path, "model", damage)}
    with pytest.raises(CheckpointError) as caught:
        load_released(published.config, **files, tokenizer_json=byte_tokenizer)
    message = str(caught.value)
    assert message.count("sem_seg_head.pixel_decoder.input_proj.") == 5
    assert "and 2 more" in message
    assert "unexpected sem_seg_head.predictor.surprise" in message


def test_not_a_number(published: Published, byte_tokenizer: str, tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    broken = edited(published.compvis, tmp_path, "state_dict", lambda t: t[key].view(-1)[3].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=f"NaN or infinite values in {key}"):
        load_released(
            published.config, **published.files() | {"stable_diffusion": broken}, tokenizer_json=byte_tokenizer
        )


def test_stable_diffusion_two(published: Published, byte_tokenizer: str, tmp_path: Path) -> None:
    def newer(tensors: dict[str, Tensor]) -> None:
        tensors["cond_stage_model.model.ln_final.weight"] = torch.ones(4)

    path = edited(published.compvis, tmp_path, "state_dict", newer)
    with pytest.raises(CheckpointError, match="is Stable Diffusion 2"):
        load_released(published.config, **published.files() | {"stable_diffusion": path}, tokenizer_json=byte_tokenizer)


def test_diffusers_directory_that_is_none(published: Published, byte_tokenizer: str, tmp_path: Path) -> None:
    files = published.files() | {"stable_diffusion": tmp_path}
    with pytest.raises(
        CheckpointError, match=r"vae holds no weights \(found nothing\): expected a diffusers directory"
    ):
        load_released(published.config, **files, tokenizer_json=byte_tokenizer)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(CheckpointError, match="describes VQModel, expected AutoencoderKL"):
        load_released(published.config, **files, tokenizer_json=byte_tokenizer)
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no readable JSON"):
        load_released(published.config, **files, tokenizer_json=byte_tokenizer)


def test_head_tables_name_every_trained_tensor(published: Published) -> None:
    trained = {key for key in published.model.state_dict() if key.split(".")[0] in TRAINED}
    assert trained == set(published.model.trained_parameters())
