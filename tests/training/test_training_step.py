"""One training step: what gets gradients, recomputation, mixed precision, captions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import training.frozen_features
from training.batches import LiveBatches
from training.checkpoints.own_format import load_checkpoint
from training.config import caption_variant
from training.data.coco_panoptic import CocoPanoptic
from training.data.transforms import JitterOptions
from training.data.views import TrainingViews
from training.experiment import Precision
from training.frozen_features import frozen_features
from training.losses import Criterion, CriterionOptions, PointOptions
from training.models.odise import Odise
from training.optimizer import undecayed_names
from training.training_step import ClassText, StepInput, TrainingStep
from training.words import WordEmbedder

SIDE = 64
CLASS_OF = {11: 0, 12: 1, 13: 2}
WORDS = ("sky", "grass", "lawn", "ball")


@pytest.fixture(scope="module")
def parts(mini_frozen: Path) -> tuple[Odise, WordEmbedder]:
    torch.set_num_threads(1)
    loaded = load_checkpoint(mini_frozen)
    torch.manual_seed(0)
    with torch.no_grad():  # gates start closed; open, the captioner matters
        loaded.model.implicit_captioner.caption_gate.normal_()
        loaded.model.implicit_captioner.time_gate.normal_()
    return loaded.model.train(), WordEmbedder(loaded.model, loaded.tokenizer_json)


def step_of(
    model: Odise, embedder: WordEmbedder, precision: Precision = "fp32", recompute: bool = False
) -> TrainingStep:
    criterion = Criterion(CriterionOptions(points=PointOptions(points=64)))
    text = ClassText(embedder(WORDS), (1, 2, 1)) if model.config.variant == "label" else None
    return TrainingStep(model, criterion, text, precision, recompute)


def batch_of(data: Path, embedder: WordEmbedder | None = None, pictures: int = 2) -> StepInput:
    jitter = JitterOptions(target=SIDE, crop=SIDE, smallest=1.0, largest=1.0)
    views = TrainingViews(CocoPanoptic.from_root(data, "train"), CLASS_OF, jitter, seed=2)
    return next(LiveBatches(views, SIDE, embedder, workers=0).batches([range(pictures)]))


def gradients(step: TrainingStep, batch: StepInput) -> tuple[float, dict[str, torch.Tensor]]:
    step.model.zero_grad(set_to_none=True)
    loss = torch.stack(list(step(batch).values())).sum()
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in step.model.named_parameters() if p.grad is not None}


def test_all_trained_parameters_and_no_others_get_gradients(parts: tuple[Odise, WordEmbedder], mini_data: Path) -> None:
    model, embedder = parts
    found = gradients(step_of(model, embedder), batch_of(mini_data))[1]
    assert set(found) == set(model.trained_parameters())
    captioner = [name for name in found if name.startswith("implicit_captioner")]
    assert captioner
    assert all(float(found[name].abs().sum()) > 0 for name in captioner), "the captioner learns through the UNet"


@pytest.mark.parametrize("windows", [1, 2, 100])
@pytest.mark.parametrize("captioned", [False, True])
def test_recomputation_changes_memory_not_gradients(
    captioned: bool,
    windows: int,
    parts: tuple[Odise, WordEmbedder],
    mini_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, embedder = parts
    monkeypatch.setattr(training.frozen_features, "PIXELS_AT_ONCE", windows * model.config.window**2)
    batch = batch_of(mini_data, pictures=3)
    if captioned:
        context = model.null_text_embedding.expand(3, -1, -1) + torch.arange(3.0)[:, None, None]
        batch = dataclasses.replace(batch, caption_context=context)
    loss, plain = gradients(step_of(model, embedder), batch)
    again, recomputed = gradients(step_of(model, embedder, recompute=True), batch)
    if windows == 100:  # the same arithmetic; parts of a batch round in their own way
        assert again == loss
    assert again == pytest.approx(loss, rel=1e-6)
    for name, gradient in plain.items():
        assert torch.allclose(recomputed[name], gradient, rtol=1e-5, atol=1e-6), name


def test_recomputed_activations_are_of_a_few_windows(
    parts: tuple[Odise, WordEmbedder], mini_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the backward pass holds at once does not grow with the batch."""
    model, embedder = parts
    monkeypatch.setattr(training.frozen_features, "PIXELS_AT_ONCE", model.config.window**2)
    seen: list[int] = []
    levels = training.frozen_features.window_levels
    monkeypatch.setattr(
        training.frozen_features,
        "window_levels",
        lambda model, arrays, *rest: seen.append(len(arrays["mean"])) or levels(model, arrays, *rest),
    )
    gradients(step_of(model, embedder, recompute=True), batch_of(mini_data, pictures=3))
    assert seen == [1] * 6, "each window forward, and again in the backward pass"


@pytest.mark.parametrize("cached", [False, True])
def test_gradients_of_micro_batches_add_up(cached: bool, parts: tuple[Odise, WordEmbedder], mini_data: Path) -> None:
    model, embedder = parts
    batch = batch_of(mini_data, pictures=4)
    if cached:
        assert batch.images is not None
        features = frozen_features(model, batch.images.float() / 255)
        batch = dataclasses.replace(batch, images=None, features=features)
    context = model.null_text_embedding.expand(4, -1, -1) + torch.arange(4.0)[:, None, None]
    batch = dataclasses.replace(batch, caption_context=context)
    step = step_of(model, embedder)
    loss, whole = gradients(step, batch)
    pieces = [gradients(step, part) for part in batch.split(4)]
    assert sum(piece[0] for piece in pieces) == pytest.approx(loss, rel=1e-5)
    for name, gradient in whole.items():
        total = torch.stack([found[name] for _, found in pieces]).sum(0)
        # Masked attention goes by signs of logits: one that rounding turns over changes gradients by some tenths of a
        # percent, a wrong divisor by all of them.
        assert float((total - gradient).norm()) <= 0.02 * float(gradient.norm()), name


def test_bf16_is_close_to_fp32(parts: tuple[Odise, WordEmbedder], mini_data: Path) -> None:
    model, embedder = parts
    batch = batch_of(mini_data)
    exact, _ = gradients(step_of(model, embedder), batch)
    rounded, found = gradients(step_of(model, embedder, precision="bf16"), batch)
    assert rounded == pytest.approx(exact, rel=0.03)
    assert rounded != exact, "autocast did nothing"
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


def test_caption_supervision(mini_data: Path, mini_frozen: Path) -> None:
    loaded = load_checkpoint(mini_frozen)
    torch.manual_seed(3)
    model = Odise(caption_variant(dataclasses.replace(loaded.config)))
    for part in ("vae", "unet", "clip"):
        getattr(model, part).load_state_dict(getattr(loaded.model, part).state_dict())
    embedder = WordEmbedder(model, loaded.tokenizer_json)
    assert embedder.template == "a photo of a {}."
    batch = batch_of(mini_data, embedder)
    assert batch.word_text is not None
    assert batch.word_text.shape[:2] == (2, 8)
    _, found = gradients(step_of(model.train(), embedder), batch)
    assert set(found) == set(model.trained_parameters())


def test_word_embeddings_are_remembered_and_bounded(parts: tuple[Odise, WordEmbedder]) -> None:
    model, embedder = parts
    calls: list[int] = []
    fresh = WordEmbedder(model, embedder.tokenizer._tokenizer.to_str(), remembered=3)
    encode = fresh.embed
    fresh.embed = lambda texts: calls.append(len(texts)) or encode(texts)  # type: ignore[method-assign, func-returns-value]
    first = fresh(["a", "b", "a"])
    assert torch.equal(first[0], first[2])
    fresh(["b", "c"])
    fresh(["d"])  # forgets "a"
    fresh(["b", "c", "a"])
    assert calls == [2, 1, 1, 1]


def test_norms_and_biases_are_not_decayed(parts: tuple[Odise, WordEmbedder]) -> None:
    model = parts[0]
    undecayed, trained = undecayed_names(model), model.trained_parameters()
    assert {"mask_generator.mask_decoder.norm.weight", "mask_generator.pixel_decoder.mask_features.bias"} <= undecayed
    for name in ("mask_generator.mask_decoder.query_features.weight", "mask_classifier.text_projection.weight"):
        assert name in trained
        assert name not in undecayed
