"""An image on one GPU from pixels to segments: what lies between the networks stays on the device, too.

::

    uint8 pixels ─ resize, pad ─ cut windows ─ clip_image ─ unet_tap ─ stitch ─ mask_decoder ─ clip_mask
                                                                                     │             │
    words, uploaded once ─ cosines ─ classes ─ panoptic merge ─ segments, boxes ─ segment map, to the host

Where all stages are TensorRT engines, everything from pixels to segments (:meth:`ImagePipeline.segment`) is one CUDA
graph for each size of image and vocabulary, from the second time on that both come: a run then copies the pixels in,
launches the graph and allocates nothing. New words are named behind the graph of the networks. Images of many sizes are
padded to the same canvas, whose buffers and engines they share (:class:`~odise_rt.backends.image_plan.CanvasPlan`).
Each of these caches drops its least recently used entry when it is full. Stages in ONNX Runtime, which allocates while
it runs, are put on the same stream one by one.

:meth:`ImagePipeline.run` returns the masks of an image unnamed, to be named several times: embeddings cross to the
host, mask logits stay on the GPU (:class:`DeviceMasks`) until words come.

Pixels are resized as Pillow does it, bit for bit, and windows are stitched in the order of
:class:`odise_rt.windows.Stitcher`, so this path and the one through host memory feed the networks the same numbers.

Tested with the real cuda-core on a driver made of host memory, a stand-in of TensorRT, and the kernels' source on the
CPU: this module has not run on a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from odise_rt.backends.base import Backend, StageOnStream
from odise_rt.backends.cuda import CudaBackend
from odise_rt.backends.cuda_core import cuda_errors
from odise_rt.backends.device import CudaSession
from odise_rt.backends.device_arrays import DeviceArray, as_device_array
from odise_rt.backends.device_memory import DeviceMemory, buffer_of
from odise_rt.backends.image_plan import CanvasPlan, ImagePlan, Network
from odise_rt.backends.naming_plan import NamingPlan, WordsOnGpu, naming_key, words_key
from odise_rt.backends.ort import OrtStage
from odise_rt.backends.pool import StagePool
from odise_rt.backends.trt import TrtStage
from odise_rt.bundle import Bundle
from odise_rt.classification import MaskEmbeddings
from odise_rt.errors import BackendError, ImageError, MissingPackageError, OutOfMemoryError
from odise_rt.image_run import PipelineResult, Size
from odise_rt.kernels.launch_plans import MERGE_QUERIES
from odise_rt.kernels.native import Kernels, why_no_kernels
from odise_rt.naming import Lap, Named, NamingRequest
from odise_rt.postprocessing import MaskResizer
from odise_rt.preprocessing import padded_size
from odise_rt.specs import IMAGE_STAGES, ModelFacts

logger = logging.getLogger(__name__)

MAX_SHAPES = 4
"""Sizes of canvases whose buffers and engines are kept."""
MAX_SIZES = 16
"""Sizes of images on these canvases, and of results with their words: pixels, the segment map, graphs."""
MAX_WORDS = 2
"""Vocabularies that stay on the GPU: ten thousand words are 40 MB at full size."""
MAX_SPARE = 4
"""Buffers of mask logits that wait for the next image."""

T = TypeVar("T")
K = TypeVar("K")


class _ImageKey(NamedTuple):
    """What an :class:`ImagePlan` depends on."""

    original_size: Size
    """Height and width of the pixels."""
    network_size: Size
    """Height and width in the network, before padding."""
    windows_per_batch: int


class _CanvasKey(NamedTuple):
    """What a :class:`CanvasPlan` depends on."""

    size: Size
    """Height and width of the canvas."""
    windows_per_batch: int


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
    stages: dict[str, StageOnStream] = {}
    for name in IMAGE_STAGES:
        with pool.use(name) as stage:
            if not isinstance(stage, TrtStage | OrtStage) or stage.session is None:
                logger.warning("images pass through host memory between stages: %s", why_no_kernels())
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


class ImagePipeline:
    """The image stages of one model on one GPU. Threads may share it; they take turns."""

    def __init__(
        self,
        kernels: Kernels,
        stages: Mapping[str, StageOnStream],
        facts: ModelFacts,
        constants: Mapping[str, np.ndarray],
    ) -> None:
        """Put parts together; :func:`open_pipeline` is the usual way.

        Args:
            kernels: on the GPU of the stages.
            stages: the four of an image, on one session; they must be closed after this.
            facts: of the model.
            constants: ``noise`` and ``null_text_embedding``.

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
        self._canvases: OrderedDict[_CanvasKey, CanvasPlan] = OrderedDict()
        self._plans: OrderedDict[_ImageKey, ImagePlan] = OrderedDict()
        self._namings: OrderedDict[tuple[object, ...], NamingPlan] = OrderedDict()
        self._words: OrderedDict[tuple[object, ...], WordsOnGpu] = OrderedDict()
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

    def run(
        self, pixels: np.ndarray | DeviceArray, network_size: tuple[int, int], windows_per_batch: int
    ) -> PipelineResult:
        """Find the masks of one image.

        Args:
            pixels: uint8 (h, w, 3) RGB, contiguous, on the host or on the GPU.
            network_size: height and width in the network, before padding.
            windows_per_batch: windows that the networks get at a time.

        Raises:
            BackendError: an engine was not built for this size, or the pipeline is closed.
            OutOfMemoryError: nothing was changed; fewer windows at a time need less.
        """
        with self.session.use("segmenting an image"):
            self._check_open()
            key = _ImageKey((pixels.shape[0], pixels.shape[1]), network_size, windows_per_batch)
            return self._making_room({key, self._canvas_key(key)}, lambda: self._run(key, pixels))

    def segment(
        self,
        pixels: np.ndarray | DeviceArray,
        network_size: tuple[int, int],
        windows_per_batch: int,
        request: NamingRequest,
    ) -> Named:
        """From pixels to segments in one go: only the segment map and a few facts of each mask cross back.

        Args:
            pixels: as for :meth:`run`, like the next two.
            network_size: height and width in the network, before padding.
            windows_per_batch: windows that the networks get at a time.
            request: by which words and rules.

        Raises:
            BackendError: an engine was not built for this size, or the pipeline is closed.
            OutOfMemoryError: nothing was changed; fewer windows at a time need less.
        """
        with self.session.use("segmenting an image"):
            self._check_open()
            key = _ImageKey((pixels.shape[0], pixels.shape[1]), network_size, windows_per_batch)
            named = naming_key(request, self._network.facts.queries, key.network_size, key.original_size)
            keep = {key, self._canvas_key(key), named}
            return self._making_room(keep, lambda: self._segment(key, named, pixels, request))

    def close(self) -> None:
        """Release everything but the stages. Safe to call twice."""
        if not self._open:
            return
        with self.session.use("closing the image pipeline"):
            self.session.stream.sync()
            while self._plans:
                self._plans.popitem()[1].close()
            while self._canvases:
                self._canvases.popitem()[1].close()
            while self._namings:
                self._namings.popitem()[1].close()
            while self._words:
                self._words.popitem()[1].close()
            self._spare.clear()
            self._memory.close()  # mask logits that somebody still holds, too
            self._open = False

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self._open:
            raise BackendError("the segmenter is closed: load it again")

    def _run(self, key: _ImageKey, pixels: np.ndarray | DeviceArray) -> PipelineResult:
        with cuda_errors("segmenting an image"):
            plan = self._plan(key)
            plan.feed(pixels)
            plan.find_masks()
            masks = self._keep_masks(plan.outputs["mask_logits"])
            self.session.stream.sync()
        found = {name: array[0].copy() for name, (_, array) in plan.host.items() if name != "pixels"}
        embeddings = MaskEmbeddings(found["mask_embedding"], found["mask_clip_embedding"], found.get("object_logits"))
        embeddings.check()
        return PipelineResult(masks, embeddings)

    def _keep_masks(self, logits: DeviceArray) -> DeviceMasks:
        """A copy of the logits that outlives the next image; its buffer comes back when nobody holds it."""
        shape = logits.shape[1:]
        kept = None
        for _ in range(len(self._spare)):  # others may come in meanwhile, at the end
            buffer = self._spare.popleft()
            if kept is None and buffer.shape == shape:
                kept = buffer
            else:
                self._spare.append(buffer)
        self._free_spare(MAX_SPARE)
        if kept is None:
            kept = self._memory.array(shape)
        buffer_of(logits).copy_to(buffer_of(kept), stream=self.session.stream)
        masks = DeviceMasks(self, kept)
        weakref.finalize(masks, self._spare.append, kept).atexit = False
        return masks

    def _segment(
        self,
        key: _ImageKey,
        named: tuple[object, ...],
        pixels: np.ndarray | DeviceArray,
        request: NamingRequest,
    ) -> Named:
        with cuda_errors("segmenting an image"):
            plan = self._plan(key)
            naming = self._naming(named, request, self._network.facts.queries, key.network_size, key.original_size)
            plan.feed(pixels)
            naming.feed(request)
            plan.segment(naming)
            self.session.stream.sync()
            return naming.result()

    def _canvas_key(self, key: _ImageKey) -> _CanvasKey:
        return _CanvasKey(padded_size(key.network_size, self._network.facts.size_divisor), key.windows_per_batch)

    def _plan(self, key: _ImageKey) -> ImagePlan:
        """The plan of a size of image, on that of its canvas."""
        on_canvas = self._canvas_key(key)
        canvas = _kept(
            self._canvases,
            on_canvas,
            MAX_SHAPES,
            lambda: CanvasPlan(self._network, on_canvas.size, on_canvas.windows_per_batch),
            self._drop_canvas,
        )
        return _kept(
            self._plans,
            key,
            MAX_SIZES,
            lambda: ImagePlan(self._network, canvas, key.original_size, key.network_size),
            lambda oldest: self._plans.pop(oldest).close(),
        )

    def _drop_canvas(self, key: _CanvasKey) -> None:
        canvas = self._canvases.pop(key)
        for image in [k for k, plan in self._plans.items() if plan.canvas is canvas]:
            self._plans.pop(image).close()
        canvas.close()

    def _naming(
        self,
        key: tuple[object, ...],
        request: NamingRequest,
        queries: int,
        network_size: Size,
        original_size: Size,
    ) -> NamingPlan:
        """The plan of a size of result and its words; what was set up for words that go, goes with them."""
        words = _kept(
            self._words,
            words_key(request),
            MAX_WORDS,
            lambda: WordsOnGpu(self.session, request),
            self._drop_words,
        )
        return _kept(
            self._namings,
            key,
            MAX_SIZES,
            lambda: NamingPlan(
                self.session, self._network.kernels, words, request, queries, network_size, original_size
            ),
            self._drop_naming,
        )

    def _drop_naming(self, key: tuple[object, ...]) -> None:
        naming = self._namings.pop(key)
        for plan in self._plans.values():
            plan.forget(naming)
        naming.close()

    def _drop_words(self, key: tuple[object, ...]) -> None:
        words = self._words.pop(key)
        for named in [k for k, naming in self._namings.items() if naming.words is words]:
            self._drop_naming(named)
        words.close()

    def _making_room(self, keys: set[tuple[Any, ...]], work: Callable[[], T]) -> T:
        """Do some work, once more without what other sizes and words hold if memory runs out."""
        try:
            return work()
        except OutOfMemoryError:
            if not self._forget_all_but(keys):
                raise
            return work()

    def _forget_all_but(self, keys: set[tuple[Any, ...]]) -> bool:
        """Make room: release what other sizes and words hold. False if there are none."""
        plans = [key for key in self._plans if key not in keys]
        namings = [key for key in self._namings if key not in keys]
        if plans or namings:
            logger.info("out of memory: forgetting %d other sizes of images and results", len(plans) + len(namings))
        for image in plans:
            self._plans.pop(image).close()
        canvases = [key for key in self._canvases if key not in keys]
        for canvas in canvases:
            self._drop_canvas(canvas)
        for named in namings:
            self._drop_naming(named)
        used = {id(naming.words) for naming in self._namings.values()}
        unused = [key for key, words in self._words.items() if id(words) not in used]
        for vocabulary in unused:
            self._drop_words(vocabulary)
        self._free_spare(0)
        self.session.give_back()
        return bool(plans or canvases or namings or unused)

    def _free_spare(self, most: int) -> None:
        while len(self._spare) > most:
            self._memory.free(self._spare.popleft())

    def name(
        self, logits: DeviceArray, embeddings: MaskEmbeddings, request: NamingRequest, resizer: MaskResizer
    ) -> Named:
        """Names and segments of masks that :meth:`run` found; logits are float32 (Q, mh, mw).

        Raises:
            BackendError: the pipeline is closed, or a size does not fit.
            OutOfMemoryError: the vocabulary or the result is too large.
        """
        with self.session.use("naming masks"):
            self._check_open()
            queries, network_size, original_size = logits.shape[0], resizer.network_size, resizer.original_size
            key = naming_key(request, queries, network_size, original_size)

            def work() -> Named:
                with cuda_errors("naming masks"):
                    return self._naming(key, request, queries, network_size, original_size).run(
                        logits, embeddings, request
                    )

            return self._making_room({key}, work)

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
    """Mask logits of one image on the GPU; see :class:`odise_rt.naming.Masks`."""

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

    def name(self, embeddings: MaskEmbeddings, request: NamingRequest, resizer: MaskResizer, lap: Lap) -> Named:
        """See :class:`odise_rt.naming.Masks`."""
        named = self._pipeline.name(self._logits, embeddings, request, resizer)
        lap("name_masks")
        return named


def _kept(kept: OrderedDict[K, T], key: K, most: int, make: Callable[[], T], drop: Callable[[K], object]) -> T:
    """The entry of a key; a new one takes the place of the least recently used, of which ``drop`` gets rid."""
    if key not in kept:
        while len(kept) >= most:
            drop(next(iter(kept)))
        kept[key] = make()
    kept.move_to_end(key)
    return kept[key]
