"""An image on one GPU from pixels to masks: what lies between the networks stays on the device, too.

::

    uint8 pixels ─ resize, pad ─ cut windows ─ clip_image ─ unet_tap ─ stitch ─ mask_decoder ─ clip_mask
                                                                                     │             │
                                                        mask logits, which stay here ┘   embeddings┴─ to the host

Where all stages are TensorRT engines it is one CUDA graph for each size of image; the least recently used ones go when
there are more than :data:`MAX_SHAPES`. Once a size was seen, a run copies the pixels in, launches the graph and
allocates nothing. Stages in ONNX Runtime, which allocates while it runs, are put on the same stream one by one.

Mask logits stay on the GPU for the panoptic merge (:class:`DeviceMasks`), which needs the scores that words give to
masks; only the map of owners crosses back.

Pixels are resized as Pillow does it, bit for bit, and windows are stitched in the order of
:class:`odise_rt.windows.Stitcher`, so this path and the one through host memory feed the networks the same numbers.

Written to the documented interfaces of cuda-core and TensorRT, and tested with stand-ins that run the kernels' source
on the CPU: this module has not run on a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from odise_rt.backends.base import Backend
from odise_rt.backends.cuda import CudaBackend, why_no_stream
from odise_rt.backends.device import CudaSession, DeviceArray, as_device_array, cuda_errors
from odise_rt.backends.device_memory import DeviceMemory, buffer_of
from odise_rt.backends.image_plan import ImagePlan, MergePlan, Network
from odise_rt.backends.ort import OrtStage
from odise_rt.backends.pool import StagePool
from odise_rt.backends.trt import TrtStage
from odise_rt.bundle import Bundle
from odise_rt.classification import MaskEmbeddings
from odise_rt.errors import BackendError, ImageError, MissingPackageError, OutOfMemoryError
from odise_rt.kernels.launch_plans import MERGE_QUERIES
from odise_rt.kernels.native import Kernels
from odise_rt.postprocessing import MaskResizer, PixelOwners
from odise_rt.specs import IMAGE_STAGES, ModelFacts

logger = logging.getLogger(__name__)

MAX_SHAPES = 4
"""Sizes of images whose buffers and graph are kept, and sizes of results of the panoptic merge."""
MAX_SPARE = 4
"""Buffers of mask logits that wait for the next image."""

T = TypeVar("T")
K = TypeVar("K", bound="tuple[int, ...]")
P = TypeVar("P", ImagePlan, MergePlan)

_ImageKey = tuple[int, int, int, int, int]
"""Height and width of the pixels and in the network, and windows at a time."""


def open_pipeline(bundle: Bundle, backend: Backend, pool: StagePool) -> ImagePipeline | None:
    """A pipeline over the image stages of a segmenter, if they run on one stream of a GPU and the kernels are there.

    Args:
        bundle: opened.
        backend: of the pool.
        pool: keeps its image stages loaded, and must be closed after the pipeline.

    Returns:
        ``None`` where images must pass through host memory between stages; a warning says why on a GPU.
    """
    if not isinstance(backend, CudaBackend):
        return None
    stages: dict[str, TrtStage | OrtStage] = {}
    for name in IMAGE_STAGES:
        with pool.use(name) as stage:
            if not isinstance(stage, TrtStage | OrtStage) or stage.session is None:
                logger.warning("images pass through host memory between stages: %s", why_no_stream())
                return None
            stages[name] = stage
    if bundle.facts.queries > MERGE_QUERIES:
        logger.warning("images pass through host memory between stages: more than %d masks", MERGE_QUERIES)
        return None
    try:
        kernels = Kernels()
    except (BackendError, MissingPackageError) as exc:
        logger.warning("images pass through host memory between stages: %s", exc)
        return None
    return ImagePipeline(kernels, stages, bundle.facts, bundle.constants())


@dataclass(frozen=True, eq=False)
class PipelineResult:
    """What the networks say of one image."""

    masks: DeviceMasks
    embeddings: MaskEmbeddings


class ImagePipeline:
    """The image stages of one model on one GPU. Threads may share it; they take turns."""

    def __init__(
        self,
        kernels: Kernels,
        stages: Mapping[str, TrtStage | OrtStage],
        facts: ModelFacts,
        constants: Mapping[str, np.ndarray],
        max_shapes: int = MAX_SHAPES,
    ) -> None:
        """Put parts together; :func:`open_pipeline` is the usual way.

        Args:
            kernels: on the GPU of the stages.
            stages: the four of an image, on one session; they must be closed after this.
            facts: of the model.
            constants: ``noise`` and ``null_text_embedding``.
            max_shapes: sizes that are kept.

        Raises:
            BackendError: the stages do not share a GPU session.
        """
        sessions = {id(stage.session): stage.session for stage in stages.values()}
        session = next(iter(sessions.values()))
        if len(sessions) != 1 or session is None:
            raise BackendError("the stages of an image pipeline must share one GPU session: load them with one backend")
        self.session: CudaSession = session
        self._memory = DeviceMemory(self.session)
        with self.session.use("putting the model's constants on the GPU"):
            placed = {
                name: self._memory.upload(constants[name].astype(np.float32))
                for name in ("noise", "null_text_embedding")
            }
        self._network = Network(self.session, kernels, stages, facts, placed)
        self._max_shapes = max_shapes
        self._plans: OrderedDict[_ImageKey, ImagePlan] = OrderedDict()
        self._merges: OrderedDict[tuple[int, ...], MergePlan] = OrderedDict()
        self._spare: deque[DeviceArray] = deque()
        """Buffers of mask logits that nobody holds any more; what is put in here comes from any thread."""
        self._open = True

    def view(self, image: object) -> DeviceArray:
        """A uint8 (h, w, 3) RGB image on the GPU, without a copy.

        Raises:
            ImageError: it has another type or shape.
            BackendError: it is not contiguous.
        """
        with self.session.use("reading an image on the GPU"):
            array = as_device_array(image, self.session.handle)
        assert array is not None, "the caller asked is_on_device"
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
            raise ImageError(
                f"the image on the GPU is {array.dtype} {array.shape}: expected uint8 (h, w, 3) RGB, values 0 to 255"
            )
        return array

    def run(self, pixels: np.ndarray | DeviceArray, size: tuple[int, int], windows_per_batch: int) -> PipelineResult:
        """Find the masks of one image.

        Args:
            pixels: uint8 (h, w, 3) RGB, contiguous, on the host or on the GPU.
            size: height and width in the network, before padding.
            windows_per_batch: windows that the networks get at a time.

        Raises:
            BackendError: an engine was not built for this size, or the pipeline is closed.
            OutOfMemoryError: nothing was changed; fewer windows at a time need less.
        """
        with self.session.use("segmenting an image"):
            self._check_open()
            key = (pixels.shape[0], pixels.shape[1], *size, windows_per_batch)
            return self._making_room(key, lambda: self._run(key, pixels))

    def close(self) -> None:
        """Release everything but the stages. Safe to call twice."""
        if not self._open:
            return
        with self.session.use("closing the image pipeline"):
            self.session.stream.sync()
            while self._plans:
                self._plans.popitem()[1].close()
            while self._merges:
                self._merges.popitem()[1].close()
            self._spare.clear()
            self._memory.close()  # mask logits that somebody still holds, too
            self._open = False

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self._open:
            raise BackendError("the segmenter is closed: load it again")

    def _run(self, key: _ImageKey, pixels: np.ndarray | DeviceArray) -> PipelineResult:
        with cuda_errors("segmenting an image"):
            plan = self._kept(self._plans, key, lambda: ImagePlan(self._network, key[:2], key[2:4], key[4]))
            plan.feed(pixels)
            plan.execute()
            masks = self._keep_masks(plan.outputs["mask_logits"])
            self.session.stream.sync()
        found = {name: array[0].copy() for name, (_, array) in plan.host.items() if name != "pixels"}
        embeddings = MaskEmbeddings(found["mask_embedding"], found["mask_clip_embedding"], found.get("object_logits"))
        return PipelineResult(masks, embeddings)

    def _keep_masks(self, logits: DeviceArray) -> DeviceMasks:
        """A copy of the logits that outlives the next image; its buffer comes back when nobody holds it."""
        shape = logits.shape[1:]
        kept = next((buffer for buffer in list(self._spare) if buffer.shape == shape), None)
        if kept is not None:
            self._spare.remove(kept)
        self._free_spare(MAX_SPARE)
        if kept is None:
            kept = self._memory.array(shape)
        buffer_of(logits).copy_to(buffer_of(kept), stream=self.session.stream)
        masks = DeviceMasks(self, kept)
        weakref.finalize(masks, self._spare.append, kept).atexit = False
        return masks

    def _kept(self, plans: OrderedDict[K, P], key: K, make: Callable[[], P]) -> P:
        """The plan of a size; a new one takes the place of the least recently used."""
        if key not in plans:
            while len(plans) >= self._max_shapes:
                plans.popitem(last=False)[1].close()
            plans[key] = make()
        plans.move_to_end(key)
        return plans[key]

    def _making_room(self, key: tuple[int, ...], work: Callable[[], T]) -> T:
        """Do some work, once more without what other sizes hold if memory runs out."""
        try:
            return work()
        except OutOfMemoryError:
            if not self._forget_all_but(key):
                raise
            return work()

    def _forget_all_but(self, key: tuple[int, ...]) -> bool:
        """Make room: release what other sizes hold. False if there are none."""
        held: tuple[OrderedDict[Any, Any], ...] = (self._plans, self._merges)
        others = [(plans, other) for plans in held for other in plans if other != key]
        if others:
            logger.info("out of memory: forgetting %d other sizes of images and results", len(others))
        for plans, other in others:
            plans.pop(other).close()
        self._free_spare(0)
        return bool(others)

    def _free_spare(self, most: int) -> None:
        while len(self._spare) > most:
            self._memory.free(self._spare.popleft())

    def merge(self, logits: DeviceArray, scores: np.ndarray, resizer: MaskResizer) -> tuple[np.ndarray, np.ndarray]:
        """Owners and areas of :func:`odise_rt.kernels.reference.panoptic_merge`; scores are float32 (Q,)."""
        with self.session.use("merging masks"):
            self._check_open()
            key = (*logits.shape, *resizer.size)
            return self._making_room(key, lambda: self._merge(key, logits, scores, resizer))

    def _merge(
        self, key: tuple[int, ...], logits: DeviceArray, scores: np.ndarray, resizer: MaskResizer
    ) -> tuple[np.ndarray, np.ndarray]:
        with cuda_errors("merging masks"):
            plan = self._kept(self._merges, key, lambda: MergePlan(self.session, len(scores), resizer.size))
            return plan.run(self._network.kernels, logits, scores, resizer.test_size)

    def download(self, array: DeviceArray) -> np.ndarray:
        """An array on the host."""
        with self.session.use("reading masks"):
            self._check_open()
            with contextlib.closing(DeviceMemory(self.session)) as memory:
                pinned, found = memory.pinned(array.shape, array.dtype.name)
                buffer_of(array).copy_to(pinned, stream=self.session.stream)
                self.session.stream.sync()
                copied: np.ndarray = found.copy()
            return copied


class DeviceMasks:
    """Mask logits of one image on the GPU; see :class:`odise_rt.postprocessing.Masks`."""

    def __init__(self, pipeline: ImagePipeline, logits: DeviceArray) -> None:
        """Wrap float32 (Q, mh, mw)."""
        self._pipeline = pipeline
        self._logits = logits
        self._on_host: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(Q, mh, mw)."""
        return self._logits.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all logits."""
        return self._logits.nbytes

    def array(self) -> np.ndarray:
        """The logits on the host, copied there once.

        Raises:
            BackendError: the segmenter was closed before.
        """
        if self._on_host is None:
            self._on_host = self._pipeline.download(self._logits)
        return self._on_host

    def owners(self, scores: np.ndarray, kept: np.ndarray, resizer: MaskResizer) -> PixelOwners:
        """See :class:`odise_rt.postprocessing.Masks`; owners are numbered by their query."""
        taking_part = np.zeros(len(scores), np.float32)
        taking_part[kept] = scores[kept]
        owner, areas = self._pipeline.merge(self._logits, taking_part, resizer)
        return PixelOwners(owner, kept, len(scores), *areas[:, kept].astype(np.int64))
