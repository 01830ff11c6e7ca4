"""Floating-point operations of every stage, counted on the model: the official structure beside the pruned one.

``torch.utils.flop_counter`` counts matrix products and convolutions (2 operations for each multiplication and addition)
while the stages run on fake tensors, which have shapes and no data: exact, and done in a minute at full size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from export.stages import ClipImage, ClipMask, ClipText, MaskDecoder, UnetTap
from odise_rt.specs import STAGES, ModelFacts, stage_specs
from odise_rt.windows import window_grid
from training.models import frozen
from training.models.odise import Odise
from training.models.official_structure import official_clip_mask, official_decode_masks, official_unet_tap

Stage = Callable[..., object]


@dataclass(frozen=True)
class StageFlops:
    """Operations of one stage for one image."""

    official: int
    """In the official structure: everything that the published code computes."""
    pruned: int
    """In ours."""


def count_flops(model: Odise, facts: ModelFacts, height: int, width: int) -> dict[str, StageFlops]:
    """Count the operations for one image.

    Args:
        model: its weights are not read.
        facts: of the same model.
        height: of the image inside the network in pixels, a multiple of ``size_divisor``.
        width: likewise.

    Returns:
        Stage to operations. ``clip_text`` is for one prompt: it runs once for a vocabulary, not for an image.
    """
    grid = window_grid(height, width, facts.window)
    dims = {"N": len(grid), "s": grid.side, "Q": facts.queries, "L": 1}
    dims |= {"H": height, "W": width, "h": height, "w": width, "mh": height // 4, "mw": width // 4}
    counts = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _frozen(model), _with_sd_text(model):
        ours, theirs = _pruned_stages(model), _official_stages(model)
        for name, spec in stage_specs(facts).items():
            inputs = [torch.zeros(tensor.resolve(dims), dtype=getattr(torch, tensor.dtype)) for tensor in spec.inputs]
            counts[name] = StageFlops(official=_count(theirs[name], inputs), pruned=_count(ours[name], inputs))
    return {name: counts[name] for name in STAGES}


@contextmanager
def _frozen(model: Odise) -> Iterator[None]:
    """The counter watches modules through gradient hooks, which fake copies of trainable parameters do not support."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _with_sd_text(model: Odise) -> Iterator[None]:
    """The official code runs the diffusion text encoder for every window, whether or not a checkpoint kept it."""
    kept = model.sd_text
    if kept is None:
        model.sd_text = frozen.build_sd_text(model.config.sd_text).eval()
    try:
        yield
    finally:
        model.sd_text = kept


def _pruned_stages(model: Odise) -> dict[str, Stage]:
    return {
        "clip_image": ClipImage(model),
        "unet_tap": UnetTap(model),
        "mask_decoder": MaskDecoder(model),
        "clip_mask": ClipMask(model),
        "clip_text": ClipText(model),
    }


def _official_stages(model: Odise) -> dict[str, Stage]:
    def unet_tap(windows: Tensor, image_embedding: Tensor, noise: Tensor, null_text_embedding: Tensor) -> object:
        return official_unet_tap(model, windows, image_embedding, noise, null_text_embedding)

    def mask_decoder(s2: Tensor, s3: Tensor, s4: Tensor, s5: Tensor) -> object:
        return official_decode_masks(model, {"s2": s2, "s3": s3, "s4": s4, "s5": s5})

    def clip_mask(image: Tensor, mask_logits: Tensor) -> object:
        return official_clip_mask(model, image, mask_logits)

    return {
        "clip_image": ClipImage(model),
        "unet_tap": unet_tap,
        "mask_decoder": mask_decoder,
        "clip_mask": clip_mask,
        "clip_text": ClipText(model),
    }


def _count(stage: Stage, inputs: list[Tensor]) -> int:
    # The math backend is the one whose products the counter knows on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage(*inputs)
    return int(counter.get_total_flops())
