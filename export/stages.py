"""One thin module a graph: what of the model goes into it, under the names and dimensions of its spec.

The specs come from :func:`odise_rt.specs.stage_specs`, the same that the runtime checks its arrays against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from odise_rt.specs import STAGES, ModelFacts, StageSpec, TensorSpec, parse_dim, stage_specs
from training.models.odise import Odise

Outputs = tuple[Tensor, ...]


class _Stage(nn.Module):
    """Calls one stage method of a model and owns only the parts that it reads.

    Tracing looks at every parameter that the traced module owns, for every node: owning the whole model would make it
    several times slower.
    """

    PARTS: tuple[str, ...]
    """Paths of the submodules that the stage reads; weights keep these paths as their names."""

    def __init__(self, model: Odise) -> None:
        super().__init__()
        # Not registered: the parts are.
        object.__setattr__(self, "model", model)
        for path in self.PARTS:
            owner: nn.Module = self
            *parents, name = path.split(".")
            for parent in parents:
                if not hasattr(owner, parent):
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            owner.add_module(name, model.get_submodule(path))

    model: Odise


class ClipImage(_Stage):
    """Windows to CLIP image embeddings: the captioner's input."""

    PARTS = ("clip.visual", "clip_pixels")

    def forward(self, windows: Tensor) -> Outputs:
        """See :meth:`Odise.clip_image`."""
        return (self.model.clip_image(windows),)


class UnetTap(_Stage):
    """Windows to projected diffusion features: captioner, VAE, UNet and feature pyramid up to the last taps."""

    PARTS = ("implicit_captioner", "vae", "unet", "feature_pyramid")

    def forward(self, windows: Tensor, image_embedding: Tensor, noise: Tensor, null_text_embedding: Tensor) -> Outputs:
        """See :meth:`Odise.unet_tap`."""
        return self.model.unet_tap(windows, image_embedding, noise, null_text_embedding)


class MaskDecoder(_Stage):
    """Stitched levels to masks and their classification embeddings."""

    PARTS = ("mask_generator",)

    def forward(self, s2: Tensor, s3: Tensor, s4: Tensor, s5: Tensor) -> Outputs:
        """See :meth:`Odise.decode_masks`."""
        prediction = self.model.decode_masks(s2, s3, s4, s5)
        outputs = (prediction.mask_logits, prediction.mask_embedding)
        return outputs if prediction.object_logits is None else (*outputs, prediction.object_logits)


class ClipMask(_Stage):
    """Image and masks to CLIP mask embeddings: the discriminative classifier."""

    PARTS = ("clip.visual", "clip_pixels")

    def forward(self, image: Tensor, mask_logits: Tensor) -> Outputs:
        """See :meth:`Odise.clip_mask`."""
        return (self.model.clip_mask(image, mask_logits),)


class ClipText(_Stage):
    """Token ids to text embeddings and their projections."""

    PARTS = ("clip", "mask_classifier")

    def forward(self, tokens: Tensor) -> Outputs:
        """See :meth:`Odise.clip_text`."""
        return self.model.clip_text(tokens)


_MODULES: dict[str, type[_Stage]] = {
    "clip_image": ClipImage,
    "unet_tap": UnetTap,
    "mask_decoder": MaskDecoder,
    "clip_mask": ClipMask,
    "clip_text": ClipText,
}

WEIGHT_FILES: dict[str, str] = {"clip_image": "clip_visual", "clip_mask": "clip_visual"}
"""Stages whose weights go into one file: both run CLIP's image tower, which is then stored once."""

_TRACE_DIMS: dict[str, int] = {"N": 2, "Q": 7, "L": 3, "mh": 48, "mw": 80, "h": 187, "w": 310, "H": 192, "W": 320}
"""Sizes at which graphs are traced. All differ, and none is 0 or 1, which tracing would take for constants."""


@dataclass(frozen=True)
class StageGraph:
    """A graph to be exported."""

    spec: StageSpec
    module: nn.Module
    """Takes the spec's inputs in order and returns its outputs in order."""
    window: int
    """Largest side of a window in pixels."""

    @property
    def name(self) -> str:
        """Name of the stage."""
        return self.spec.name

    @property
    def weight_file(self) -> str:
        """Stem of the file that holds its weights."""
        return WEIGHT_FILES.get(self.name, f"{self.name}.onnx")

    def trace_inputs(self) -> tuple[Tensor, ...]:
        """Example inputs whose sizes fix nothing but what the spec fixes."""
        generator = torch.Generator().manual_seed(0)
        dims = dict(_TRACE_DIMS, s=self.window // 2 + 32)
        return tuple(_example(tensor, dims, generator) for tensor in self.spec.inputs)

    def dynamic_dims(self) -> tuple[dict[int, str], ...]:
        """The symbolic axes of each input: axis to the symbol, or quotient of one, that it has in the spec."""
        return tuple(
            {axis: dim for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)} for tensor in self.spec.inputs
        )


def stage_graphs(model: Odise, facts: ModelFacts) -> dict[str, StageGraph]:
    """The five graphs of a model in the order of :data:`odise_rt.specs.STAGES`; all share the model's weights."""
    specs = stage_specs(facts)
    return {name: StageGraph(specs[name], _MODULES[name](model).eval(), facts.window) for name in STAGES}


def _example(tensor: TensorSpec, dims: dict[str, int], generator: torch.Generator) -> Tensor:
    shape = []
    for dim in tensor.shape:
        symbol, divisor = parse_dim(dim) if isinstance(dim, str) else ("", 1)
        shape.append(dims[symbol] // divisor if symbol else int(dim))
    if tensor.dtype == "int64":
        return torch.ones(shape, dtype=torch.int64)
    return torch.rand(shape, generator=generator)
