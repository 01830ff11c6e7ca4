"""What is set up once for a size of image: buffers, bound engines, CUDA graphs.

See :mod:`odise_rt.backends.image_pipeline`, which keeps some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from odise_rt.backends.base import BoundStage, StageOnStream
from odise_rt.backends.captured_work import CapturedWork
from odise_rt.backends.device import CudaSession
from odise_rt.backends.device_arrays import DeviceArray
from odise_rt.backends.device_memory import DeviceMemory, buffer_of
from odise_rt.backends.naming_plan import NamingPlan
from odise_rt.kernels.native import Kernels
from odise_rt.kernels.resize_tables import resize_table
from odise_rt.specs import LEVELS, ModelFacts
from odise_rt.windows import window_grid

ALIGNMENT = 256
"""TensorRT wants tensors to start at multiples of so many bytes."""


@dataclass(frozen=True)
class Network:
    """The parts that images of all sizes share."""

    session: CudaSession
    kernels: Kernels
    stages: Mapping[str, StageOnStream]
    """The four stages of an image, by name."""
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


class _BoundStages:
    """Engines that are bound to the arrays which they read and write, and the memory of these."""

    def __init__(self, network: Network) -> None:
        self.memory = DeviceMemory(network.session)
        self._network = network
        self._bound: list[BoundStage] = []
        self._generation = -1

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory that the hungriest of the engines needs."""
        return max(bound.scratch_bytes for bound in self._bound)

    @property
    def capturable(self) -> bool:
        """Whether all engines can be captured."""
        return all(bound.capturable for bound in self._bound)

    def bind(
        self, stage: str, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray] | None = None
    ) -> tuple[BoundStage, Mapping[str, DeviceArray]]:
        """An engine that reads and writes these arrays, without ``outputs`` new ones; and what it writes."""
        bound = self._network.stages[stage].bind(inputs)
        self._bound.append(bound)
        if outputs is None:
            outputs = {name: self.memory.array(shape) for name, shape in bound.outputs.items()}
        for name, array in (*inputs.items(), *outputs.items()):
            bound.place(name, array.pointer)
        return bound, outputs

    def use_scratch(self, scratch: Any, generation: int) -> None:
        """Tell the engines where scratch memory is, if that moved since they were told."""
        if self._generation != generation:
            for bound in self._bound:
                bound.use_scratch(scratch)
            self._generation = generation

    def close(self) -> None:
        """Release everything. Safe to call twice."""
        while self._bound:
            self._bound.pop().close()
        self.memory.close()


class CanvasPlan:
    """Buffers and bound engines from a padded canvas to masks: what images of many sizes share."""

    def __init__(self, network: Network, size: tuple[int, int], batch: int) -> None:
        """Set up.

        Args:
            network: what it is made of.
            size: height and width of the canvas.
            batch: windows at a time.
        """
        self.size = size
        self._network = network
        self._grid = window_grid(size[0], size[1], network.facts.window)
        self.stages = _BoundStages(network)
        try:
            self.canvas = self.stages.memory.array((3, *size))
            """float32: the padded image."""
            self._prepare_windows(batch)
            self._decoder, self.outputs = self.stages.bind("mask_decoder", self._levels)
        except BaseException:
            self.close()
            raise

    def enqueue(self) -> None:
        """Put everything from the canvas to :attr:`outputs` on the stream."""
        kernels, session = self._network.kernels, self._network.session
        if len(self._grid) > 1:
            kernels.cut_windows(self.canvas, 0, self._windows, session.stream)
        for batch in self._batches:
            batch.clip_image.enqueue()
            batch.tap.enqueue()
            for source, place in batch.moves:
                session.view(source).copy_to(session.view(place), stream=session.stream)
        if len(self._grid) > 1:
            for level, canvas in self._levels.items():
                kernels.stitch_windows(self._features[level], _reshaped(canvas, canvas.shape[1:]), session.stream)
        self._decoder.enqueue()

    def close(self) -> None:
        """Release everything. Safe to call twice."""
        self.stages.close()

    def _prepare_windows(self, batch: int) -> None:
        facts, memory, grid = self._network.facts, self.stages.memory, self._grid
        total, side, channels = len(grid), grid.side, facts.pyramid_channels
        if total == 1:
            self._windows = _reshaped(self.canvas, (1, 3, side, side))
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
        memory = self.stages.memory
        windows = _rows(self._windows, start, count)
        caption = memory.array((count, self._network.facts.clip_embed_dim))
        clip_image, _ = self.stages.bind("clip_image", {"windows": windows}, {"image_embedding": caption})
        features, moves = {}, []
        for level, whole in self._features.items():
            place = _rows(whole, start, count)
            features[level] = place
            if place.pointer % ALIGNMENT:
                features[level] = memory.array(place.shape)
                moves.append((features[level], place))
        inputs = {"windows": windows, "image_embedding": caption, **self._network.constants}
        tap, _ = self.stages.bind("unet_tap", inputs, features)
        return _Batch(clip_image, tap, moves)


class ImagePlan:
    """Buffers, bound engines and graphs for images of one size."""

    def __init__(
        self, network: Network, canvas: CanvasPlan, original_size: tuple[int, int], network_size: tuple[int, int]
    ) -> None:
        """Set up.

        Args:
            network: what it is made of.
            canvas: that images of this size are padded to; must outlive this.
            original_size: height and width of the pixels.
            network_size: height and width in the network.
        """
        self.canvas = canvas
        self._network = network
        self._session = network.session
        self._stages = _BoundStages(network)
        self._network_work = CapturedWork(self._session, "the networks on the GPU")
        self._works: dict[NamingPlan, CapturedWork] = {}
        self._generation = -1
        self.host: dict[str, tuple[Any, np.ndarray]] = {}
        """Pinned buffers of the pixels, and of what the host wants to know where masks are not named at once."""
        self.outputs: dict[str, DeviceArray] = {}
        """Outputs of mask_decoder and clip_mask on the GPU, by name."""
        try:
            self._prepare_image(original_size, network_size)
            self._prepare_clip_mask()
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

    def find_masks(self) -> None:
        """Put everything from pixels to embeddings on the stream, their way to the host included."""
        self._use_scratch()
        self._run_network()
        for name, array in self.outputs.items():
            if name in self.host:
                buffer_of(array).copy_to(self.host[name][0], stream=self._session.stream)

    def segment(self, naming: NamingPlan) -> None:
        """Put everything from pixels to segments on the stream: one graph from the second time on that a naming comes.

        At first the masks are named behind the networks' graph, which needs no new capture for new words.
        """
        self._use_scratch()
        if naming not in self._works:
            self._works[naming] = CapturedWork(self._session, "an image on the GPU")

        self._works[naming].run(
            lambda: self._named_after(self._enqueue_network, naming),
            self._capturable,
            lambda: self._named_after(self._run_network, naming),
        )

    def forget(self, naming: NamingPlan) -> None:
        """Drop the graph that ends in a naming, before that is closed."""
        if naming in self._works:
            self._works.pop(naming).forget()

    def close(self) -> None:
        """Release everything but the canvas. Safe to call twice."""
        self._forget_graphs()
        self._stages.close()

    def _forget_graphs(self) -> None:
        self._network_work.forget()
        while self._works:
            self._works.popitem()[1].forget()

    # ---- setting up ------------------------------------------------------------------------------------------------

    def _prepare_image(self, original_size: tuple[int, int], network_size: tuple[int, int]) -> None:
        memory = self._stages.memory
        self._pixels = memory.array((*original_size, 3), "uint8")
        self.host["pixels"] = memory.pinned((*original_size, 3), "uint8")
        self._between = memory.array((original_size[0], network_size[1], 3), "uint8")
        self._down, self._across = (
            (memory.upload(table.first), memory.upload(table.weights))
            for table in (resize_table(network_size[axis], original_size[axis]) for axis in (0, 1))
        )
        self._image = self.canvas.canvas if network_size == self.canvas.size else memory.array((3, *network_size))

    def _prepare_clip_mask(self) -> None:
        masks = self.canvas.outputs
        inputs = {"image": _reshaped(self._image, (1, *self._image.shape)), "mask_logits": masks["mask_logits"]}
        self._clip_mask, found = self._stages.bind("clip_mask", inputs)
        self.outputs.update({**masks, **found})
        for name, array in self.outputs.items():
            if name != "mask_logits":
                self.host[name] = self._stages.memory.pinned(array.shape, array.dtype.name)

    def _use_scratch(self) -> None:
        session, both = self._session, (self.canvas.stages, self._stages)
        scratch = session.scratch(max(stages.scratch_bytes for stages in both))
        for stages in both:
            stages.use_scratch(scratch, session.generation)
        if self._generation != session.generation:
            self._forget_graphs()
            self._generation = session.generation

    # ---- running ---------------------------------------------------------------------------------------------------

    def _capturable(self) -> bool:
        return self.canvas.stages.capturable and self._stages.capturable

    def _run_network(self) -> None:
        self._network_work.run(self._enqueue_network, self._capturable)

    def _enqueue_network(self) -> None:
        kernels, stream, canvas = self._network.kernels, self._session.stream, self.canvas.canvas
        kernels.resize(self._pixels, self._across, self._between, self._down, canvas, stream)
        if self._image is not canvas:
            kernels.cut_windows(canvas, 0, _reshaped(self._image, (1, *self._image.shape)), stream)
        self.canvas.enqueue()
        self._clip_mask.enqueue()

    def _named_after(self, network: Callable[[], None], naming: NamingPlan) -> None:
        network()
        found = {name: _reshaped(array, array.shape[1:]) for name, array in self.outputs.items()}
        naming.enqueue(
            found["mask_logits"], found["mask_embedding"], found["mask_clip_embedding"], found.get("object_logits")
        )


def _rows(array: DeviceArray, start: int, count: int) -> DeviceArray:
    """``array[start : start + count]`` along the first axis."""
    step = array.nbytes // array.shape[0]
    return replace(array, pointer=array.pointer + start * step, shape=(count, *array.shape[1:]))


def _reshaped(array: DeviceArray, shape: tuple[int, ...]) -> DeviceArray:
    """The same memory under another shape."""
    return replace(array, shape=shape)
