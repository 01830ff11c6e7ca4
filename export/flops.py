"""Operations and bytes of every stage, counted on the model: the official structure beside the pruned one.

``torch.utils.flop_counter`` counts matrix products and convolutions (2 operations for each multiplication and addition)
while the stages run on fake tensors, which have shapes and no data: exact, and done in a minute at full size. Bytes are
counted the same way, from the tensors that every operation reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from export.stages import ClipImage, ClipMask, ClipText, MaskDecoder, UnetTap
from odise_rt.specs import MASK_STRIDE, STAGES, ModelFacts, stage_specs
from odise_rt.windows import window_grid
from training.models import frozen
from training.models.odise import Odise
from training.models.official_structure import (
    official_clip_image,
    official_clip_mask,
    official_decode_masks,
    official_unet_tap,
)

Stage = Callable[..., object]


@dataclass(frozen=True)
class StageFlops:
    """Operations of one stage for one image."""

    official: int
    """Operations of the official structure, which is everything that the published code computes."""
    pruned: int
    """Operations of our structure."""


@dataclass(frozen=True)
class StageWork:
    """What one stage computes and moves for one image, in one structure, float32."""

    flops: int
    weight_bytes: int
    """Bytes of the parameters and buffers that some operation reads, each counted once."""
    boundary_bytes: int
    """Bytes of the stage's inputs and outputs."""
    moved_bytes: int
    """Bytes that all operations together read and write when each goes through memory. Eager execution moves as many,
    less what stays in caches. Views move nothing."""

    @property
    def least_bytes(self) -> int:
        """What any execution must move at least: weights, inputs and outputs, each once."""
        return self.weight_bytes + self.boundary_bytes


def count_work(model: Odise, facts: ModelFacts, height: int, width: int) -> dict[str, dict[str, StageWork]]:
    """Count operations and bytes for one image; arguments as for :func:`count_flops`.

    Returns:
        Structure (``"official"``, ``"pruned"``) to stage to work; ``clip_text`` is for one prompt.
    """
    work: dict[str, dict[str, StageWork]] = {"official": {}, "pruned": {}}
    for structure, name, stage, inputs in _runs(model, facts, height, width):
        with _ByteCounter() as moved:
            flops, outputs = _count(stage, inputs)
        boundary = sum(_size(t) for t in (*inputs, *tree_leaves(outputs)) if isinstance(t, Tensor))
        work[structure][name] = StageWork(flops, sum(moved.weights.values()), boundary, moved.total)
    return {structure: {name: stages[name] for name in STAGES} for structure, stages in work.items()}


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
    counts: dict[str, dict[str, int]] = {name: {} for name in STAGES}
    for structure, name, stage, inputs in _runs(model, facts, height, width):
        counts[name][structure], _ = _count(stage, inputs)
    return {name: StageFlops(**count) for name, count in counts.items()}


def _runs(model: Odise, facts: ModelFacts, height: int, width: int) -> Iterator[tuple[str, str, Stage, list[Tensor]]]:
    """Structure, stage name, stage and its fake inputs, while operations act on fake tensors."""
    grid = window_grid(height, width, facts.window)
    dims = {"N": len(grid), "s": grid.side, "Q": facts.queries, "L": 1}
    dims |= {"H": height, "W": width, "h": height, "w": width}
    dims |= {"mh": height // MASK_STRIDE, "mw": width // MASK_STRIDE}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _frozen(model), _with_sd_text(model):
        structures = {"official": _official_stages(model), "pruned": _pruned_stages(model)}
        for name, spec in stage_specs(facts).items():
            inputs = [torch.zeros(tensor.resolve(dims), dtype=getattr(torch, tensor.dtype)) for tensor in spec.inputs]
            for structure, stages in structures.items():
                yield structure, name, stages[name], inputs


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

    def clip_image(windows: Tensor) -> object:
        return official_clip_image(model, windows)

    def clip_mask(image: Tensor, mask_logits: Tensor) -> object:
        return official_clip_mask(model, image, mask_logits)

    return {
        "clip_image": clip_image,
        "unet_tap": unet_tap,
        "mask_decoder": mask_decoder,
        "clip_mask": clip_mask,
        "clip_text": ClipText(model),
    }


def _count(stage: Stage, inputs: list[Tensor]) -> tuple[int, object]:
    """Operations, and the stage's outputs."""
    # The math backend is the one whose products the counter knows on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs = stage(*inputs)
    return int(counter.get_total_flops()), outputs


class _ByteCounter(TorchDispatchMode):
    """Adds up the tensors that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.weights: dict[int, int] = {}
        """Address of each parameter or buffer that was read to its bytes."""

    def __torch_dispatch__(
        self, func: Any, _types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        for tensor in read:
            if not isinstance(tensor, FakeTensor):  # only weights are real
                storage = tensor.untyped_storage()
                self.weights[storage.data_ptr()] = storage.nbytes()
        if not func.is_view:
            self.total += sum(_size(t) for t in (*read, *tree_leaves(outputs)) if isinstance(t, Tensor))
        return outputs


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
