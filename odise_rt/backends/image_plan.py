"""What is set up once for a size of image: buffers, bound engines, CUDA graphs.

See :mod:`odise_rt.backends.image_pipeline`, which keeps some of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from odise_rt.backends.base import BoundStage, StageOnStream
from odise_rt.backends.device import CapturedWork, CudaSession, DeviceArray
from odise_rt.backends.device_memory import DeviceMemory, buffer_of
from odise_rt.backends.naming_plan import NamingPlan
from odise_rt.kernels.native import Kernels
from odise_rt.kernels.resize_tables import resize_table
from odise_rt.preprocessing import padded_size
from odise_rt.specs import LEVELS, ModelFacts
from odise_rt.windows import window_grid

ALIGNMENT = 256
"""TensorRT wants tensors to start at multiples of so many bytes."""


@dataclass(frozen=True)
class Network:
    """The parts that all sizes share."""

    session: CudaSession
    kernels: Kernels
    stages: Mapping[str, StageOnStream]
    """The four of an image."""
    facts: ModelFacts
    constants: Mapping[str, DeviceArray]
    """``noise`` and ``null_text_embedding``, float32 on the GPU."""


@dataclass(frozen=True)
class _Batch:
    """Some windows on their way through the two networks that see windows."""

    clip_image: BoundStage
    tap: BoundStage
    moves: list[tuple[DeviceArray, DeviceArray]]
    """Features that could not be written to their place, because it does not start where TensorRT wants it."""


class ImagePlan:
    """Buffers, bound engines and graphs for images of one size."""

    def __init__(self, network: Network, original: tuple[int, int], size: tuple[int, int], batch: int) -> None:
        """Set up.

        Args:
            network: what it is made of.
            original: height and width of the pixels.
            size: height and width in the network.
            batch: windows at a time.
        """
        facts = network.facts
        self._network = network
        self._session = network.session
        self._memory = DeviceMemory(self._session)
        self._works: dict[NamingPlan | None, CapturedWork] = {}
        self._generation = -1
        self._bound: list[BoundStage] = []
        self.host: dict[str, tuple[Any, np.ndarray]] = {}
        """Pinned buffers of the pixels, and of what the host wants to know where masks are not named at once."""
        self.outputs: dict[str, DeviceArray] = {}
        """Of mask_decoder and clip_mask."""
        canvas = padded_size(size, facts.size_divisor)
        self._grid = window_grid(canvas[0], canvas[1], facts.window)
        try:
            self._prepare_image(original, size, canvas)
            self._prepare_windows(batch)
            self._prepare_heads()
        except BaseException:
            self.close()
            raise

    def feed(self, pixels: np.ndarray | DeviceArray) -> None:
        """Put pixels on the way to their buffer."""
        if isinstance(pixels, DeviceArray):
            self._session.view(pixels).copy_to(buffer_of(self._pixels), stream=self._session.stream)
            return
        pinned, staging = self.host["pixels"]
        np.copyto(staging, pixels)
        pinned.copy_to(buffer_of(self._pixels), stream=self._session.stream)

    def execute(self, naming: NamingPlan | None = None) -> None:
        """Put everything from pixels to embeddings on the stream, or with ``naming`` everything to segments."""
        session = self._session
        scratch = session.scratch(max(bound.scratch_bytes for bound in self._bound))
        if self._generation != session.generation:
            self._forget_graphs()
            for bound in self._bound:
                bound.use_scratch(scratch)
            self._generation = session.generation
        if naming not in self._works:
            self._works[naming] = CapturedWork(session, "an image on the GPU")
        self._works[naming].run(lambda: self._enqueue(naming), lambda: all(bound.capturable for bound in self._bound))

    def forget(self, naming: NamingPlan) -> None:
        """Drop the graph that ends in a naming, before that is closed."""
        if naming in self._works:
            self._works.pop(naming).forget()

    def close(self) -> None:
        """Release everything. Safe to call twice."""
        self._forget_graphs()
        while self._bound:
            self._bound.pop().close()
        self._memory.close()

    def _forget_graphs(self) -> None:
        while self._works:
            self._works.popitem()[1].forget()

    # ---- setting up ------------------------------------------------------------------------------------------------

    def _prepare_image(self, original: tuple[int, int], size: tuple[int, int], canvas: tuple[int, int]) -> None:
        memory = self._memory
        self._pixels = memory.array((*original, 3), "uint8")
        self.host["pixels"] = memory.pinned((*original, 3), "uint8")
        self._between = memory.array((original[0], size[1], 3), "uint8")
        self._down, self._across = (
            (memory.upload(table.first), memory.upload(table.weights))
            for table in (resize_table(size[axis], original[axis]) for axis in (0, 1))
        )
        self._canvas = memory.array((3, *canvas))
        self._image = self._canvas if size == canvas else memory.array((3, *size))

    def _prepare_windows(self, batch: int) -> None:
        facts, memory, grid = self._network.facts, self._memory, self._grid
        total, side, channels = len(grid), grid.side, facts.pyramid_channels
        if total == 1:
            self._windows = _reshaped(self._canvas, (1, 3, side, side))
        else:
            self._windows = memory.array((total, 3, side, side))
        strides = dict(zip(LEVELS, facts.level_strides, strict=True))
        self._features = {level: memory.array((total, channels, side // k, side // k)) for level, k in strides.items()}
        self._levels = self._features
        if total > 1:
            self._levels = {
                level: memory.array((1, channels, grid.canvas[0] // k, grid.canvas[1] // k))
                for level, k in strides.items()
            }
        self._batches = [self._prepare_batch(start, min(batch, total - start)) for start in range(0, total, batch)]

    def _prepare_batch(self, start: int, count: int) -> _Batch:
        memory = self._memory
        windows = _rows(self._windows, start, count)
        caption = memory.array((count, self._network.facts.clip_embed_dim))
        clip_image = self._bind("clip_image", {"windows": windows}, {"image_embedding": caption})
        features, moves = {}, []
        for level, whole in self._features.items():
            place = _rows(whole, start, count)
            features[level] = place
            if place.pointer % ALIGNMENT:
                features[level] = memory.array(place.shape)
                moves.append((features[level], place))
        inputs = {"windows": windows, "image_embedding": caption, **self._network.constants}
        return _Batch(clip_image, self._bind("unet_tap", inputs, features), moves)

    def _prepare_heads(self) -> None:
        self._decoder = self._bind("mask_decoder", self._levels)
        inputs = {"image": _reshaped(self._image, (1, *self._image.shape)), "mask_logits": self.outputs["mask_logits"]}
        self._clip_mask = self._bind("clip_mask", inputs)
        for name, array in self.outputs.items():
            if name != "mask_logits":
                self.host[name] = self._memory.pinned(array.shape, array.dtype.name)

    def _bind(
        self, stage: str, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray] | None = None
    ) -> BoundStage:
        """An engine that reads and writes these arrays; without ``outputs`` new ones, listed in :attr:`outputs`."""
        bound = self._network.stages[stage].bind(inputs)
        self._bound.append(bound)
        if outputs is None:
            outputs = {name: self._memory.array(shape) for name, shape in bound.outputs.items()}
            self.outputs.update(outputs)
        for name, array in (*inputs.items(), *outputs.items()):
            bound.place(name, array.pointer)
        return bound

    # ---- running ---------------------------------------------------------------------------------------------------

    def _enqueue(self, naming: NamingPlan | None) -> None:
        kernels, stream = self._network.kernels, self._session.stream
        kernels.resize(self._pixels, self._across, self._between, self._down, self._canvas, stream)
        if self._image is not self._canvas:
            kernels.cut_windows(self._canvas, 0, _reshaped(self._image, (1, *self._image.shape)), stream)
        if len(self._grid) > 1:
            kernels.cut_windows(self._canvas, 0, self._windows, stream)
        for batch in self._batches:
            batch.clip_image.enqueue()
            batch.tap.enqueue()
            for source, place in batch.moves:
                self._session.view(source).copy_to(self._session.view(place), stream=stream)
        if len(self._grid) > 1:
            for level, canvas in self._levels.items():
                kernels.stitch_windows(self._features[level], _reshaped(canvas, canvas.shape[1:]), stream)
        self._decoder.enqueue()
        self._clip_mask.enqueue()
        if naming is not None:
            found = {name: _reshaped(array, array.shape[1:]) for name, array in self.outputs.items()}
            naming.enqueue(
                found["mask_logits"],
                found["mask_embedding"],
                found["mask_clip_embedding"],
                found.get("object_logits"),
            )
            return
        for name, array in self.outputs.items():
            if name in self.host:
                buffer_of(array).copy_to(self.host[name][0], stream=stream)


def _rows(array: DeviceArray, start: int, count: int) -> DeviceArray:
    """``array[start : start + count]`` along the first axis."""
    step = array.nbytes // array.shape[0]
    return replace(array, pointer=array.pointer + start * step, shape=(count, *array.shape[1:]))


def _reshaped(array: DeviceArray, shape: tuple[int, ...]) -> DeviceArray:
    """The same memory under another shape."""
    return replace(array, shape=shape)
