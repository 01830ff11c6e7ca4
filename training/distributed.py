"""The few collective operations that training needs, each a plain identity in a single process."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes that train together; 1 outside of torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def everywhere(holds: bool) -> bool:
    """Whether something holds in every process; all of them must ask together."""
    if world_size() == 1:
        return holds
    answers: list[bool | None] = [None] * world_size()
    dist.all_gather_object(answers, holds)
    return all(answers)


def leave(status: int) -> NoReturn:
    """End this process, whose work is done and written, with an exit status.

    One of several processes ends without taking the interpreter down first. FSDP's caches keep the process group alive,
    and a thread of its that still holds a tensor when Python finalises is ended in the middle of C++ code, which aborts
    a process that has done everything right ("terminate called without an active exception").
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(status)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def mean_over_processes(value: Tensor) -> Tensor:
    """Average of a detached tensor over all processes."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total / world_size()


class _GatherWithGradient(torch.autograd.Function):
    """All-gather along dim 0 whose backward returns to each process the sum of all processes' gradients for its part.

    DistributedDataParallel averages parameter gradients, so a loss over the gathered batch that every process computes
    in full gets exactly the single-process gradient: summed here, divided by the world size there.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def gather(local: Tensor) -> Tensor:
    """Concatenate every process's tensor along dim 0 in rank order, differentiably.

    Args:
        local: (B, ...), the same shape on every process.

    Returns:
        (world * B, ...).
    """
    if world_size() == 1:
        return local
    gathered: Tensor = _GatherWithGradient.apply(local)
    return gathered
