"""Every recorded stage of the official implementation beside ours, each fed what was recorded as its input.

The networks are those of ``training.models``; classification and merging are the runtime's own numpy functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from odise_rt.classification import class_logits
from odise_rt.postprocessing import sigmoid
from odise_rt.text_embeddings import normalise
from tests.parity.reference_run import WINDOWS, Run
from training.models import frozen
from training.torch_stages import model_constants

LEVELS = ("s2", "s3", "s4", "s5")

Arrays = dict[str, np.ndarray]


def image_embedding(run: Run) -> Arrays:
    """Windows to CLIP embeddings."""
    embedding = run.model.clip_image(run.windows)
    return {f"captioner.image_embed{suffix}": embedding[i : i + 1].numpy() for i, suffix in enumerate(WINDOWS)}


def empty_caption(run: Run) -> Arrays:
    """Nothing to the diffusion text encoder's embedding of ""."""
    assert run.model.sd_text is not None
    return {"sd_text_embed": frozen.null_text_embedding(run.model.sd_text, run.model.config.sd_text).numpy()}


def implicit_captioner(run: Run) -> Arrays:
    """CLIP embedding to the UNet's context and the increment of its time embedding."""
    out: Arrays = {}
    for suffix in WINDOWS:
        embedding, empty = run.tensor(f"captioner.image_embed{suffix}"), run.tensor("sd_text_embed")
        context, increment = run.model.implicit_captioner(embedding, empty)
        out |= {f"unet.context{suffix}": context.numpy(), f"unet.cond_emb{suffix}": increment.numpy()}
    return out


def vae_encoder(run: Run) -> Arrays:
    """Windows to latents and the encoder's taps."""
    features = run.model.diffusion_features
    mean, taps = features.encode(features.to_vae_pixels(run.windows))
    latent = mean * run.model.config.vae.scaling_factor
    out = {f"latent{suffix}": latent[i : i + 1].numpy() for i, suffix in enumerate(WINDOWS)}
    return out | {f"tap.vae_enc.{i}": tap[:1].numpy() for i, tap in enumerate(taps)}


def noised_latent(run: Run) -> Arrays:
    """Latent to the UNet's input."""
    factor = run.model.config.vae.scaling_factor
    add_noise = run.model.diffusion_features.add_noise
    return {f"unet.in{s}": add_noise(run.tensor(f"latent{s}") / factor, run.model.noise).numpy() for s in WINDOWS}


def unet_taps(run: Run) -> Arrays:
    """Noised latent and conditioning to the UNet's taps."""
    inputs = (run.tensor(key) for key in ("unet.in", "unet.context", "unet.cond_emb"))
    taps = run.model.diffusion_features.denoise_prefix(*inputs)
    return {f"tap.unet.{i}": tap.numpy() for i, tap in enumerate(taps)}


def vae_decoder(run: Run) -> Arrays:
    """Clean latent to the decoder's taps."""
    mean = run.tensor("latent") / run.model.config.vae.scaling_factor
    return {f"tap.vae_dec.{i}": tap.numpy() for i, tap in enumerate(run.model.diffusion_features.decode_prefix(mean))}


def feature_pyramid(run: Run) -> Arrays:
    """Taps of a window to its levels."""
    names = [f"tap.vae_enc.{i}" for i in (0, 1)] + [f"tap.unet.{i}" for i in range(4)]
    taps = [run.tensor(name) for name in [*names, "tap.vae_dec.0", "tap.vae_dec.1"]]
    levels = run.model.feature_pyramid(taps, run.facts.window)
    return {f"window.out.{name}": level.numpy() for name, level in levels.items()}


def stitched_pyramid(run: Run) -> Arrays:
    """The image to the stitched levels: all of the above at once."""
    levels = run.model.pyramid(torch.from_numpy(run.image.canvas))
    return {f"backbone.out.{name}": level.numpy() for name, level in levels.items()}


def pixel_decoder(run: Run) -> Arrays:
    """Stitched levels to mask features and refined levels."""
    levels = {name: run.tensor(f"backbone.out.{name}") for name in LEVELS}
    features, refined = run.model.mask_generator.pixel_decoder(levels)
    out = {"pixdec.mask_features": features.numpy()}
    return out | {f"pixdec.ms.{i}": level.numpy() for i, level in enumerate(refined)}


def mask_decoder(run: Run) -> Arrays:
    """Mask features and refined levels to masks and their embeddings, as at inference."""
    return _masks(run, aux=False)


def mask_decoder_with_aux(run: Run) -> Arrays:
    """The same as in training: after every layer, attention masks from full-size logits."""
    return _masks(run, aux=True)


def _masks(run: Run, aux: bool) -> Arrays:
    refined = [run.tensor(f"pixdec.ms.{i}") for i in range(3)]
    generator = run.model.mask_generator
    out = generator.predict(run.tensor("pixdec.mask_features"), refined, aux=aux)
    arrays = {
        "predictor.pred_masks": out.mask_logits,
        "predictor.mask_embed": out.mask_embedding,
        "predictor.mask_pooled_features": out.pooled,
        "predictor.logit_scale": generator.mask_embedding.logit_scale,
        **{f"predictor.aux{i}.mask_embed": head.mask_embedding for i, head in enumerate(out.aux)},
    }
    if out.object_logits is not None:
        arrays["predictor.pred_logits"] = out.object_logits
    return {key: tensor.numpy() for key, tensor in arrays.items()}


def text_embeddings(run: Run) -> Arrays:
    """Words to projected text embeddings."""
    out = {"text_head.text_embed": run.embed_words()[0]}
    if run.variant == "label":
        out["text_head.null_embed"] = model_constants(run.model)["no_object_embedding"][None]
    return out


def mask_classification(run: Run) -> Arrays:
    """Mask embeddings and text embeddings to class logits."""
    masks, text = normalise(run.recorded["predictor.mask_embed"][0]), normalise(run.recorded["text_head.text_embed"])
    scale = float(run.recorded["predictor.logit_scale"])
    logits = class_logits(masks, text, run.vocabulary.first_word, scale)
    if run.variant == "label":
        null = normalise(run.recorded["text_head.null_embed"])
        logits = np.concatenate([logits, class_logits(masks, null, np.zeros(1, np.int64), scale)], axis=1)
    return {"pred_logits": logits[None]}


def mask_clip(run: Run) -> Arrays:
    """Image and masks to CLIP's mask embeddings."""
    embedding = run.model.clip_mask(torch.from_numpy(run.image.image), run.tensor("predictor.pred_masks"))
    return {"clip.mask_embed": embedding.numpy()}


def clip_classification(run: Run) -> Arrays:
    """CLIP's mask embeddings to class logits."""
    masks, text = normalise(run.recorded["clip.mask_embed"][0]), normalise(run.embed_words()[1])
    logits = class_logits(masks, text, run.vocabulary.first_word, run.facts.clip_logit_scale)
    return {"clip.mask_pred_open_logits": logits[None]}


def ensemble(run: Run) -> Arrays:
    """Both embeddings to the ensemble's log probabilities, and those with "no object"."""
    recorded = run.recorded
    objects = recorded["predictor.pred_logits"] if run.variant == "caption" else None
    found = run.classify(recorded["predictor.mask_embed"], recorded["clip.mask_embed"], objects)
    weight = np.where(run.seen, run.facts.clip_weight_seen, run.facts.clip_weight_unseen).astype(np.float32)
    mixed = (1 - weight) * found.mask_log_probabilities + weight * found.clip_log_probabilities
    # The runtime normalises what the official code leaves as log(p + 1e-8), over K + 1 classes.
    log_sum = np.log1p(1e-8 * found.probabilities.shape[1])
    return {"clip_head.pred_open_logits": mixed[None], "final.mask_cls": np.log(found.probabilities) + log_sum}


def enlarged_masks(run: Run) -> Arrays:
    """Mask logits to the image's pixels."""
    masks = _enlarge(run, run.recorded["predictor.pred_masks"][0])
    return {"final.mask_pred": masks[:, ::4, ::4]}


def semantic_scores(run: Run) -> Arrays:
    """Masks and class probabilities to the score of every class at every pixel."""
    probabilities = recorded_probabilities(run)[:, :-1]
    masks = sigmoid(_enlarge(run, run.recorded["predictor.pred_masks"][0])[:, ::8, ::8])
    return {"sem_seg.every8": np.einsum("qk,qhw->khw", probabilities, masks)}


def recorded_probabilities(run: Run) -> np.ndarray:
    """Class probabilities (Q, K + 1) that follow from the recorded ``final.mask_cls``."""
    exponentials = np.exp(run.recorded["final.mask_cls"])
    probabilities: np.ndarray = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def _enlarge(run: Run, logits: np.ndarray) -> np.ndarray:
    height, width = run.resizer.original_size
    return np.stack([run.resizer(mask, slice(0, height), slice(0, width)) for mask in logits])


STAGES: tuple[Callable[[Run], Arrays], ...] = (
    image_embedding,
    empty_caption,
    implicit_captioner,
    vae_encoder,
    noised_latent,
    unet_taps,
    vae_decoder,
    feature_pyramid,
    stitched_pyramid,
    pixel_decoder,
    mask_decoder,
    mask_decoder_with_aux,
    text_embeddings,
    mask_classification,
    mask_clip,
    clip_classification,
    ensemble,
    enlarged_masks,
    semantic_scores,
)


@dataclass(frozen=True)
class Comparison:
    """One tensor of ours against the recorded one."""

    stage: str
    key: str
    compared: int
    """Entries compared; where only some were kept, fewer than the tensor has."""
    max_error: float
    mean_error: float
    scale: float
    """Largest magnitude of the recorded tensor."""

    @property
    def ratio(self) -> float:
        """Largest error in units of the scale."""
        return self.max_error / self.scale


@torch.no_grad()
def compare(run: Run, stage: Callable[[Run], Arrays]) -> list[Comparison]:
    """Run one stage on recorded input and compare all that was recorded of its output."""
    results = []
    for key, ours in stage(run).items():
        expected = run.recorded.expected(key)
        assert expected is not None, f"{key} was not recorded for the {run.variant} variant"
        kept = expected.of(ours)
        assert kept.shape == expected.values.shape, f"{key}: ours {ours.shape}, recorded {expected.values.shape}"
        error = np.abs(kept.astype(np.float64) - expected.values)
        results.append(
            Comparison(stage.__name__, key, error.size, float(error.max()), float(error.mean()), expected.scale)
        )
    return results
