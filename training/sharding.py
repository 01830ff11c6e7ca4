"""FSDP: every process keeps a part of each tensor, of the frozen networks too, and gathers whole ones while they work.

PyTorch's ``fully_shard``. Blocks of VAE and UNet gather themselves when they are called. CLIP's image tower is read
layer by layer through its weights, so what reads it gathers the tower first (:class:`Gathered`). What is left, trained
parts included, is one group for the time of a step; its gradients and optimizer state are sharded like its weights.
CLIP's text tower stays whole, as processes embed words at a pace of their own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from training.checkpoints.own_format import uninitialised_model
from training.distributed import rank, world_size
from training.models.clip_features import ClipFeatureOdise
from training.models.odise import Odise
from training.training_step import TrainingStep

logger = logging.getLogger(__name__)

Parallel = Literal["ddp", "fsdp"]
"""How several processes train together: each with the whole model, or with a part of every tensor."""

_UNITS = (ResnetBlock2D, Transformer2DModel, Downsample2D, Upsample2D)
"""Blocks that :class:`DiffusionFeatures` calls as modules."""


class Gathered:
    """Calls a function while the module whose weights it reads is whole; without gradients to them."""

    def __init__(self, function: Callable[..., Any], module: FSDPModule) -> None:
        self.function = function
        self.module = module

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        self.module.unshard()
        try:
            return self.function(*arguments)
        finally:
            self.module.reshard()


def shard(step: TrainingStep) -> None:
    """Leave this process its part of every tensor of a step; all processes must call this with equal weights."""
    model = step.model
    mesh = init_device_mesh(model.noise.device.type, (world_size(),))
    _scalars_to_vectors(model)
    whole_parts: list[nn.Module] = [model.clip]
    if model.sd_text is not None and model.config.conditioning == "caption":
        whole_parts.append(model.sd_text)
    tower = set(model.clip.visual.parameters())
    ignored = {p for part in whole_parts for p in part.parameters()} - tower
    for network in (model.vae, model.unet):
        for module in network.modules():
            if isinstance(module, _UNITS):
                fully_shard(module, mesh=mesh)
    fully_shard(model.clip.visual, mesh=mesh)
    if model.sd_text is not None and model.sd_text not in whole_parts:
        fully_shard(model.sd_text, mesh=mesh)
    fully_shard(step, mesh=mesh, ignored_params=ignored)
    logger.info("process %d keeps %.2f of %.2f M parameters", rank(), _kept(model) / 1e6, _total(model) / 1e6)
    visual = model.clip.visual
    model.clip_image_encoder = Gathered(model.clip_image_encoder, visual)  # type: ignore[assignment]
    model.mask_clip = Gathered(model.mask_clip, visual)  # type: ignore[assignment]
    if isinstance(model, ClipFeatureOdise):
        model.token_maps = Gathered(model.token_maps, visual)  # type: ignore[method-assign, assignment]


@contextlib.contextmanager
def usable(step: nn.Module) -> Iterator[None]:
    """Let the model of a sharded step be used outside of it, by all processes alike; any other step is left alone."""
    if not isinstance(step, FSDPModule):
        yield
        return
    step.unshard()
    try:
        yield
    finally:
        step.reshard()


@contextlib.contextmanager
def gradients_stay_local(wrapped: nn.Module) -> Iterator[None]:
    """Add up gradients of a step in this process alone; the next backward pass outside shares the sums."""
    if isinstance(wrapped, DistributedDataParallel):
        with wrapped.no_sync():
            yield
    elif isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            wrapped.set_requires_gradient_sync(True)
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which this process has a part, gathered from all of them; others as they are."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor in the form that a parameter of this process has: its shape, and its part of it."""
    shaped = tensor.reshape(parameter.shape)
    if not isinstance(parameter, DTensor):
        return shaped
    # Every process has read the same file: nothing needs to be sent.
    shaped = shaped.to(parameter.device)
    return distribute_tensor(shaped, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_model(model: Odise) -> Odise | None:
    """An unsharded copy on the CPU for process 0, None for the others; all must call this together."""
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if not sharded:
        return model if rank() == 0 else None
    copy = uninitialised_model(model.config) if rank() == 0 else None
    if copy is not None and model.sd_text is None:
        copy.drop_sd_text()
    targets = {} if copy is None else copy.state_dict()
    for name, tensor in model.state_dict().items():
        gathered = whole(tensor)
        if copy is not None:
            targets[name].copy_(gathered.reshape(targets[name].shape))
    return copy


def _kept(model: Odise) -> int:
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(part.numel() for part in parts)


def _total(model: Odise) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _scalars_to_vectors(model: Odise) -> None:
    """Give trained scalars one dimension: a tensor is divided along its first."""
    for name, parameter in model.trained_parameters().items():
        if parameter.dim() == 0:
            owner, _, last = name.rpartition(".")
            vector = nn.Parameter(parameter.detach().reshape(1), requires_grad=parameter.requires_grad)
            model.get_submodule(owner).register_parameter(last, vector)
