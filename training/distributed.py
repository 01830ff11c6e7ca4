"""The few collective operations that training needs, each a plain identity in a single process."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from odise_rt.errors import OptionsError, first_line

T = TypeVar("T")


def world_size() -> int:
    """Processes that train together; 1 outside of torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def start_processes(device: str, backend: str | None = None) -> str:
    """Join the other processes of a torchrun; returns this process's device.

    Args:
        device: of PyTorch; ``cuda``, with or without a number, becomes the GPU of this process's own number.
        backend: what they talk through; None: NCCL on GPUs, else gloo.

    Raises:
        OptionsError: this process has no GPU of its own, or the others cannot be reached.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return device
    try:
        if device.startswith("cuda"):
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
            torch.cuda.set_device(device)
        # Rank 0 may compute the feature cache for hours while the others wait.
        backend = backend or ("nccl" if device.startswith("cuda") else "gloo")
        dist.init_process_group(backend, timeout=timedelta(hours=6))
    except (ValueError, RuntimeError) as exc:
        raise OptionsError(
            f"this process cannot join the others on {device} ({first_line(exc)}): start as many as there are GPUs, or "
            "with --device cpu, by torchrun"
        ) from exc
    return device


def share_of(items: Sequence[T]) -> Sequence[T]:
    """This process's part of a sequence: those of all processes, in rank order, are the whole in its order."""
    first, last = (len(items) * bound // world_size() for bound in (rank(), rank() + 1))
    return items[first:last]


def gathered(value: T) -> list[T]:
    """The value of each process in rank order for the first process, nothing for the others; all must call together."""
    if world_size() == 1:
        return [value]
    values: list[T] | None = [value] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


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
