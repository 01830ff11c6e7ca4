"""How one image goes through the network: how many windows at a time, how long each step takes, what comes out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from odise_rt.backends.device_arrays import DeviceArray
from odise_rt.classification import MaskEmbeddings
from odise_rt.errors import OutOfMemoryError
from odise_rt.naming import Masks, Named, NamingRequest
from odise_rt.windows import WindowGrid

logger = logging.getLogger(__name__)

T = TypeVar("T")

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageRun:
    """How one image went through the network."""

    original_size: tuple[int, int]
    """Height and width of the image as given."""
    network_size: tuple[int, int]
    """Height and width inside the network, before padding."""
    windows: int
    window_side: int
    seconds: dict[str, float]
    """Wall-clock seconds of each step so far."""
    windows_per_batch: int = 0
    """Windows that were run at a time."""
    notes: tuple[str, ...] = ()
    """Deviations from the plan, as sentences for the user."""


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskProposals(ImageRun):
    """Mask proposals of one image with their embeddings; they do not depend on words."""

    masks: Masks
    """Mask logits, a quarter of the padded canvas; on a GPU they may still lie there."""
    embeddings: MaskEmbeddings

    @property
    def mask_logits(self) -> np.ndarray:
        """float32 (Q, mh, mw), in the host's memory."""
        return self.masks.array()


@dataclass(frozen=True)
class PlacedImage:
    """An image that is about to run on a GPU, where its pixels may lie already."""

    pixels: np.ndarray | DeviceArray
    original_size: tuple[int, int]
    network_size: tuple[int, int]
    grid: WindowGrid
    plan: BatchPlan

    def facts(self, watch: Stopwatch) -> dict[str, Any]:
        """The fields of :class:`ImageRun`, once the image has run."""
        return {
            "original_size": self.original_size,
            "network_size": self.network_size,
            "windows": len(self.grid),
            "window_side": self.grid.side,
            "seconds": watch.seconds,
            "windows_per_batch": self.plan.size,
            "notes": self.plan.notes(),
        }


FittingBatches = dict[tuple[int, int], int]
"""Windows at a time that fitted after memory had run out, by (side of the windows, their number in an image)."""


@dataclass(frozen=True, eq=False)
class PipelineResult:
    """Masks of one image and their embeddings, as the networks give them."""

    masks: Masks
    embeddings: MaskEmbeddings


class Pipeline(Protocol):
    """The image stages of a model on one device, where an image stays from its pixels to its segments.

    See :class:`odise_rt.backends.image_pipeline.ImagePipeline`, which is that of the runtime.
    """

    def view(self, image: object) -> DeviceArray:
        """An image on the device, without a copy."""
        ...

    def run(
        self, pixels: np.ndarray | DeviceArray, network_size: tuple[int, int], windows_per_batch: int
    ) -> PipelineResult:
        """Find the masks of one image."""
        ...

    def segment(
        self,
        pixels: np.ndarray | DeviceArray,
        network_size: tuple[int, int],
        windows_per_batch: int,
        request: NamingRequest,
    ) -> Named:
        """Find the masks of one image, name them and merge them into segments."""
        ...

    def close(self) -> None:
        """Release everything but the stages."""
        ...


class BatchPlan:
    """How many windows run at a time: as many as the engine likes, and half of that when memory runs out."""

    def __init__(self, grid: WindowGrid, size: int, fixed: bool, fitting: FittingBatches) -> None:
        """Plan the windows of one image.

        Args:
            grid: the windows.
            size: most windows at a time.
            fixed: whether the caller asked for this size; it is then kept, and running out of memory is an error.
            fitting: what earlier images learned. It is read and added to, as running out of memory costs more time
                than an image does.
        """
        self._wanted, self._fixed = min(size, len(grid)), fixed
        self._fitting, self._key = fitting, (grid.side, len(grid))
        self.size = self._wanted if fixed else min(self._wanted, fitting.get(self._key, self._wanted))

    def run(self, total: int, work: Callable[[int, int], None]) -> None:
        """Call ``work(start, stop)`` for all windows, a batch at a time. It must do all of a batch or nothing."""
        start = 0
        while start < total:
            stop = min(start + self.size, total)
            try:
                work(start, stop)
            except OutOfMemoryError as exc:
                if self._fixed or stop - start == 1:
                    raise
                self._take_fewer(stop - start, exc)
            else:
                start = stop

    def run_whole(self, work: Callable[[int], T]) -> T:
        """Call ``work(windows at a time)``, which must do everything or nothing."""
        while True:
            try:
                return work(self.size)
            except OutOfMemoryError as exc:
                if self._fixed or self.size == 1:
                    raise
                self._take_fewer(self.size, exc)

    def _take_fewer(self, count: int, exc: OutOfMemoryError) -> None:
        self.size = self._fitting[self._key] = (count + 1) // 2
        logger.warning("out of memory with %d windows at a time, trying %d: %s", count, self.size, exc)

    def notes(self) -> tuple[str, ...]:
        """Deviations from the plan, as sentences for the user."""
        if self.size == self._wanted:
            return ()
        return (f"out of memory with {self._wanted} windows at a time: ran {self.size} at a time",)


class Stopwatch:
    """Wall-clock seconds of each step; a step of several laps adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
