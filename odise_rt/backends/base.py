"""What every engine offers: stages that map named arrays to named arrays.

A backend loads stages of a bundle for one device. A stage may be run by several threads at once. Both are released
by ``close()``; nothing relies on ``__del__``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from odise_rt.bundle import Bundle

if TYPE_CHECKING:
    from odise_rt.backends.device import CudaSession
    from odise_rt.backends.device_arrays import DeviceArray

Device = Literal["cpu", "cuda"]

LARGE_BUNDLE_BYTES = 1 << 30
"""From this size of graphs and weights on, a bundle on CPU is run with little memory. In ONNX Runtime stages give their
working memory back after each run, and read matrices where they lie in the bundle's file, mapped, instead of copying
them into an order of their own: the peak then is that of the hungriest stage instead of all of them together, and
neither costs a measurable part of a run, as both do for small models. In OpenVINO what was compiled for a size is kept
for fewer of them."""


@dataclass(frozen=True)
class StageFacts:
    """What a stage ran on; recorded in every result, so that no fallback is silent."""

    stage: str
    engine: str
    """Name and version, e.g. ``"onnxruntime 1.32.0"``."""
    provider: str
    """The engine's own word for where it runs, e.g. ``"CPUExecutionProvider"``."""
    device: Device
    file: str
    """Graph or engine file, relative to the bundle."""
    load_seconds: float
    precision: str = ""
    """Inside the graph; empty: the bundle's."""

    def to_dict(self) -> dict[str, str | float]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


class Stage(Protocol):
    """One loaded graph."""

    @property
    def facts(self) -> StageFacts:
        """What it runs on."""
        ...

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph.

        Args:
            inputs: the arrays of the stage's spec, C-contiguous. They are not written to.

        Returns:
            The arrays of the stage's spec; the caller owns them.

        Raises:
            BackendError: an array does not fit the spec, or the engine failed.
            OutOfMemoryError: there was not enough memory.
        """
        ...

    def close(self) -> None:
        """Release the graph and its weights; running it afterwards is an error."""
        ...


class BoundStage(Protocol):
    """A stage set up for inputs of certain shapes, to be run on arrays that lie on the GPU.

    Scratch memory and the addresses of inputs and outputs are the caller's. Not for several threads at once; to be
    closed before the stage is.
    """

    @property
    def outputs(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every output."""
        ...

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory that a run needs; 0 if it has its own."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether a run may be part of a CUDA graph."""
        ...

    def use_scratch(self, scratch: Any) -> None:
        """Work in this buffer of at least :attr:`scratch_bytes` from now on."""
        ...

    def place(self, name: str, address: int) -> None:
        """Say where an input or output lies on the GPU; what is on the stream already keeps the old place."""
        ...

    def enqueue(self) -> None:
        """Put one run on the stream of the stage's session.

        Raises:
            BackendError: the engine failed.
            OutOfMemoryError: there was not enough memory.
        """
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class StageOnStream(Stage, Protocol):
    """A stage whose runs can be put on the stream of a GPU session, on arrays that stay there."""

    @property
    def session(self) -> CudaSession | None:
        """Whose stream it is."""
        ...

    def bind(self, inputs: Mapping[str, DeviceArray]) -> BoundStage:
        """The stage set up for arrays like these, for a caller who holds the session's lock.

        Raises:
            BackendError: the stage is closed, or does not take such arrays.
        """
        ...


class Backend(Protocol):
    """An engine on a device."""

    @property
    def device(self) -> Device:
        """Where stages run."""
        ...

    @property
    def description(self) -> str:
        """One line for logs, e.g. ``"onnxruntime 1.32.0 on CPUExecutionProvider, 2 threads"``."""
        ...

    def load(self, bundle: Bundle, stage: str) -> Stage:
        """Load one stage of a bundle.

        Raises:
            BackendError: the engine refuses the graph or does not run it on this device.
        """
        ...

    def windows_per_batch(self, side: int) -> int:
        """How many windows of ``side`` pixels are best run at a time."""
        ...

    def keeps_loaded(self, bundle: Bundle, stage: str) -> bool:
        """Whether a stage should stay loaded between images, where memory is not asked to be spared."""
        ...


def windows_that_fill(device: Device, side: int, on_gpu: int = 8) -> int:
    """How many windows of ``side`` pixels keep a device busy.

    Args:
        device: one window of 512 x 512 fills the cores of a CPU, where a batch only needs memory.
        side: of a window in pixels.
        on_gpu: how many of 512 x 512 run together on a GPU, which takes little more time for eight than for one.
    """
    pixels = 512 * 512 * (1 if device == "cpu" else on_gpu)
    return max(1, pixels // (side * side))
