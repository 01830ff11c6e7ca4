"""The five stages in PyTorch behind the runtime's stage protocol.

With them :class:`odise_rt.segmenter.Segmenter` runs a checkpoint as it runs a bundle, so evaluation, verification and
benchmarks compare networks only: everything around them is the same code.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from odise_rt.specs import STAGES, ModelFacts, StageSpec, stage_specs
from training.models.mask_embedding import MAX_LOGIT_SCALE
from training.models.odise import Odise
from training.models.official_structure import official_clip_mask, official_decode_masks, official_unet_tap

MASK_PROMPTS = {"label": "{}", "caption": "a photo of a {}."}
"""Prompt around a word for the mask classifier, by variant (odise.md section 5.1)."""
CLIP_PROMPT = "a photo of a {}."


def model_facts(model: Odise) -> ModelFacts:
    """What the runtime must know of a model."""
    config = model.config
    return ModelFacts(
        variant=config.variant,
        window=config.window,
        size_divisor=config.size_divisor,
        clip_image_size=config.clip.image_size,
        clip_embed_dim=config.clip.embed_dim,
        context_length=config.clip.context_length,
        start_token=config.clip.start_token,
        end_token=config.clip.end_token,
        pad_token=0,
        null_text_length=config.sd_text.context_length,
        null_text_dim=config.sd_text.width,
        queries=config.head.queries,
        pyramid_channels=config.head.pyramid_channels,
        hidden_dim=config.head.hidden_dim,
        classification_dim=config.head.classification_dim,
        test_short_edge=config.test_short_edge,
        test_long_edge=config.test_long_edge,
        mask_logit_scale=float(model.mask_generator.mask_embedding.logit_scale.detach()),
        clip_logit_scale=float(model.clip.logit_scale.detach().exp().clamp(max=MAX_LOGIT_SCALE)),
        clip_weight_seen=config.clip_weight_seen,
        clip_weight_unseen=config.clip_weight_unseen,
        mask_prompt=MASK_PROMPTS[config.variant],
        clip_prompt=CLIP_PROMPT,
    )


@torch.no_grad()
def model_constants(model: Odise) -> dict[str, np.ndarray]:
    """The bundle's constants: ``noise``, ``null_text_embedding`` and, under label supervision, the projected
    ``no_object_embedding``; all float32.
    """
    constants = {"noise": model.noise, "null_text_embedding": model.null_text_embedding}
    no_object = model.mask_classifier.no_object_embedding
    if no_object is not None:
        constants["no_object_embedding"] = model.mask_classifier.project_text(no_object)[0]
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in constants.items()}


class TorchStage:
    """One stage of a PyTorch model, numpy in and numpy out, in the structure that ``model.structure`` names."""

    def __init__(self, model: Odise, spec: StageSpec) -> None:
        self.model = model
        self.spec = spec

    @property
    def provider(self) -> str:
        """What runs the stage, for the result's facts."""
        device = next(self.model.parameters()).device
        return f"PyTorch {torch.__version__} ({device}, {self.model.structure} structure)"

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by the names of the spec in, arrays by its output names out."""
        self.spec.check(inputs)
        parameter = next(self.model.parameters())
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        tensors = {name: tensor.to(parameter.device) for name, tensor in tensors.items()}
        outputs = self._call(tensors)
        named = zip(self.spec.outputs, outputs, strict=True)
        return {tensor_spec.name: tensor.float().cpu().numpy() for tensor_spec, tensor in named}

    def _call(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        model, name = self.model, self.spec.name
        official = model.structure == "official"
        if name == "mask_decoder":
            prediction = official_decode_masks(model, tensors) if official else model.decode_masks(**tensors)
            outputs = [prediction.mask_logits, prediction.mask_embedding]
            return tuple(outputs if prediction.object_logits is None else [*outputs, prediction.object_logits])
        if official and name == "unet_tap":
            return official_unet_tap(model, **tensors)
        if official and name == "clip_mask":
            return (official_clip_mask(model, **tensors),)
        out = getattr(model, name)(**tensors)
        return out if isinstance(out, tuple) else (out,)

    def close(self) -> None:
        """Nothing to release: the model belongs to the caller."""


def torch_stages(model: Odise) -> dict[str, TorchStage]:
    """All five stages of a model, keyed by :data:`odise_rt.specs.STAGES`."""
    specs = stage_specs(model_facts(model))
    return {name: TorchStage(model, specs[name]) for name in STAGES}
