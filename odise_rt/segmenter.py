"""The whole way from pixels and words to named segments. Read this file first.

::

    image ─ load, resize, pad ─ windows ─┬─ clip_image ─ implicit caption ─┐
                                         └──────────── unet_tap ───────────┴─ features of each window
            stitch windows ─ mask_decoder ─ mask logits, mask embeddings
            clip_mask ─ CLIP's embedding of each mask
    words ─ clip_text ─ text embeddings (cached)
            classify (two classifiers, best synonym, ensemble) ─ merge ─ PanopticResult

Masks do not depend on words: :meth:`Segmenter.find_masks` runs the network once for an image, and
:meth:`Segmenter.name_masks` names its masks with any vocabulary and thresholds in a fraction of that time.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import NoReturn, TypeVar, overload

import numpy as np

from odise_rt.backends.base import Backend
from odise_rt.backends.device_arrays import DeviceArray, is_on_device
from odise_rt.backends.pool import StagePool
from odise_rt.backends.select import CpuEngine, DeviceRequest, open_backend
from odise_rt.backends.window_batching import BatchingBackend, Observer, WindowBatching
from odise_rt.bundle import Bundle
from odise_rt.classification import Classification, Classifier, MaskEmbeddings, MaskNames, classify, clip_weights
from odise_rt.embedding_cache import EmbeddingCache, default_cache_dir
from odise_rt.errors import ImageError, InputError, OptionsError, VocabularyError, host_memory
from odise_rt.files import given_path
from odise_rt.image_run import BatchPlan, FittingBatches, ImageRun, MaskProposals, Pipeline, PlacedImage, Stopwatch
from odise_rt.naming import HostMasks, Named, NamingRequest
from odise_rt.options import ResolvedOptions, SegmentOptions, given_options
from odise_rt.postprocessing import MaskResizer, find_instances, semantic_map
from odise_rt.preprocessing import ImageLike, are_images, check_size, load_image, network_size, padded_size, prepare
from odise_rt.results import Candidate, Instance, PanopticResult, RunFacts, Segment
from odise_rt.specs import IMAGE_STAGES, LEVELS, STAGES, ModelFacts
from odise_rt.text_embeddings import Progress, TextEmbedder, model_key
from odise_rt.vocabulary import Vocabulary
from odise_rt.windows import Stitcher, WindowGrid, cut_windows, window_grid

logger = logging.getLogger(__name__)

AnyImage = TypeVar("AnyImage", bound=ImageLike)
"""The kind of the images of a list, which may be narrower than all that an image may be."""


class Segmenter:
    """Segments images by words with one bundle. Calls change nothing in it; threads may share it.

    Use it as a context manager, or call :meth:`close`, to release the engine's memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        stages: StagePool,
        embedder: TextEmbedder,
        pipeline: Pipeline | None = None,
    ) -> None:
        """Put parts together; :meth:`load` is the usual way. With a ``pipeline`` images stay on its GPU.

        Raises:
            BundleError: the bundle's constants cannot be used.
        """
        self.bundle = bundle
        self._backend = backend
        self._stages = stages
        self._embedder = embedder
        self._constants = bundle.constants()
        self._pipeline = pipeline
        self._fitting: FittingBatches = {}

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        device: DeviceRequest = "auto",
        threads: int | None = None,
        verify: bool = True,
        *,
        cpu_engine: CpuEngine = "onnxruntime",
        low_memory: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        disk_cache: bool = True,
        keep_text_encoder: bool = False,
        window_batching: WindowBatching | None = None,
        batch_observer: Observer | None = None,
        stay_on_gpu: bool = True,
    ) -> Segmenter:
        """Open a bundle and load its graphs.

        Args:
            bundle: its folder, or an opened :class:`Bundle`.
            device: ``"auto"`` takes a GPU if one really works, else the CPU; the choice is logged and in every result.
            threads: CPU threads inside an operator; ``None``: the cores that this process may use.
            verify: compare the SHA-256 of every file of the bundle; turn it off only for bundles you made here.
            cpu_engine: what runs the graphs where that is a CPU: ``"onnxruntime"``, or OpenVINO in float32
                (``"openvino"``) or with the networks' products in bfloat16 (``"openvino-bf16"``), which need the extra
                ``openvino``. OpenVINO compiles for each size of image, and is compared with ONNX Runtime the first time
                that it meets a bundle; that it agreed is noted in ``cache_dir``.
            low_memory: load each graph when it is needed and release it after. Peak memory is then that of the largest
                graph; every image pays for loading.
            cache_dir: folder for text embeddings; ``None``: ``$ODISE_RT_CACHE``, else the user's cache folder.
            disk_cache: keep text embeddings on disk.
            keep_text_encoder: keep the text encoder loaded as well, for new words in every call.
            window_batching: run windows of images that several threads segment at a time together; ``None``: each
                call runs its own.
            batch_observer: called for each such run with its stage, windows and callers.
            stay_on_gpu: where the CUDA kernels are built, keep an image on the GPU from pixels to segments. Not with
                ``low_memory`` or ``window_batching``.

        Raises:
            BundleError: the bundle is missing, altered, newer or unsafe.
            OptionsError: ``device``, ``threads``, ``cpu_engine`` or ``cache_dir`` has a value that is not accepted.
            BackendError: the device does not work, or the engine refuses a graph.
            MissingPackageError: no engine, or no package for the tokenizer, is installed.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
        folder = default_cache_dir() if cache_dir is None else given_path(cache_dir, "cache_dir", OptionsError)
        backend = open_backend(device, threads, opened, cpu_engine, folder)
        key = _cache_key(opened, backend)
        if window_batching is not None:
            if not isinstance(window_batching, WindowBatching):
                raise OptionsError(f"window_batching is {window_batching!r:.60}: expected a WindowBatching, or None")
            backend = BatchingBackend(backend, window_batching, batch_observer)
        # The text encoder runs once for a vocabulary; it is kept only on request.
        wanted = STAGES if keep_text_encoder else IMAGE_STAGES
        kept = (name for name in wanted if not low_memory and backend.keeps_loaded(opened, name))
        stages = StagePool(backend, opened, keep=frozenset(kept))
        cache = EmbeddingCache(folder, key) if disk_cache and folder is not None else None
        # Reads the tokenizer and the constants: what is wrong with them costs no loading of weights.
        segmenter = cls(opened, backend, stages, TextEmbedder(opened, stages, cache))
        with contextlib.ExitStack() as stack:
            stack.callback(segmenter.close)
            stages.load(IMAGE_STAGES)
            if backend.device == "cuda" and stay_on_gpu and not low_memory:
                from odise_rt.backends.image_pipeline import open_pipeline

                segmenter._pipeline = open_pipeline(opened, backend, stages)
            stack.pop_all()
        logger.info("bundle %s (%s, %s): %s", opened.name, opened.facts.variant, opened.precision, backend.description)
        return segmenter

    @property
    def facts(self) -> ModelFacts:
        """Sizes, prompts and defaults of the model."""
        return self.bundle.facts

    @property
    def device(self) -> str:
        """Where the network runs: ``"cpu"`` or ``"cuda"``."""
        return self._backend.device

    # ---- the public way ------------------------------------------------------------------------------------------

    @overload  # lists first: where Pillow has no types, a list may be an image
    def segment(
        self,
        image: list[ImageLike] | tuple[ImageLike, ...],
        vocabulary: Vocabulary | str,
        options: SegmentOptions | None = None,
    ) -> list[PanopticResult]: ...

    @overload  # a list of paths alone is none of images of any kind to type checkers
    def segment(
        self, image: list[AnyImage], vocabulary: Vocabulary | str, options: SegmentOptions | None = None
    ) -> list[PanopticResult]: ...

    @overload
    def segment(
        self, image: ImageLike, vocabulary: Vocabulary | str, options: SegmentOptions | None = None
    ) -> PanopticResult: ...

    def segment(
        self,
        image: ImageLike | list[ImageLike] | list[AnyImage] | tuple[ImageLike, ...],
        vocabulary: Vocabulary | str,
        options: SegmentOptions | None = None,
    ) -> PanopticResult | list[PanopticResult]:
        """Segment an image, or each image of a list or tuple.

        Args:
            image: a path, an open binary file, encoded bytes, a PIL image, or a uint8 array of shape (h, w) grey,
                (h, w, 3) RGB or (h, w, 4) RGBA; or a list or tuple of these. On a GPU with the CUDA kernels an RGB
                array may lie there (``__cuda_array_interface__`` or DLPack); it is not copied to the host.
            vocabulary: the classes, or words in the syntax of :meth:`Vocabulary.parse`.
            options: thresholds, sizes and outputs; ``None``: the model's defaults.

        Returns:
            The result at the size of the image as given; for a list or tuple, a list with one for each image.

        Raises:
            ImageError: an image cannot be used.
            VocabularyError: the vocabulary is empty or malformed, or has a class "unknown" beside the option
                ``unknown``.
            OptionsError: the options are no :class:`SegmentOptions`.
            BackendError: the engine failed.
            OutOfMemoryError: memory ran out, with one window at a time, too.
        """
        if isinstance(image, list | tuple):
            return list(self.segment_many(image, vocabulary, options))
        return self._segment(image, _vocabulary(vocabulary), options)

    def segment_many(
        self, images: Iterable[ImageLike], vocabulary: Vocabulary | str, options: SegmentOptions | None = None
    ) -> Iterator[PanopticResult]:
        """Segment images one after the other, each when its turn comes.

        Args:
            images: a list, a generator or the like, each image as for :meth:`segment`; a generator is asked for one at
                a time.
            vocabulary: as for :meth:`segment`.
            options: as for :meth:`segment`.

        Returns:
            A generator of the results, which raises what :meth:`segment` raises for an image when it comes to it.

        Raises:
            InputError: at once: a single image, or nothing that holds images.
            VocabularyError: at once, as :meth:`segment` does.
            OptionsError: at once: the options are no :class:`SegmentOptions`.
        """
        if not are_images(images):
            raise InputError(
                f"the images came as {type(images).__name__}: expected a list or an iterable of images; for one image "
                "there is segment()"
            )
        words = _vocabulary(vocabulary)
        self._settings(words, options)  # raises now, and not when the first result is asked for
        return (self._segment(image, words, options) for image in images)

    def _segment(self, image: ImageLike, words: Vocabulary, options: SegmentOptions | None) -> PanopticResult:
        settings = self._settings(words, options)
        if self._pipeline is None or settings.outputs != ("panoptic",):  # whatever else there is needs the masks here
            return self.name_masks(self.find_masks(image, options), words, options)
        return self._segment_on_gpu(self._pipeline, image, words, settings)

    def _settings(self, words: Vocabulary, options: SegmentOptions | None) -> ResolvedOptions:
        settings = given_options(options).resolve(self.facts)
        words.result_classes(settings.unknown)  # raises now if "unknown" is taken, before the network runs
        return settings

    @host_memory("encoding words")
    def prepare(self, vocabulary: Vocabulary | str, progress: Progress | None = None) -> None:
        """Encode a vocabulary ahead of its first use, e.g. to show progress for thousands of words.

        Args:
            vocabulary: the classes.
            progress: called with the prompts encoded so far and their number; not at all if they are cached.

        Raises:
            VocabularyError: the vocabulary is empty or malformed.
            BackendError: the text encoder failed.
            OutOfMemoryError: memory ran out.
        """
        self._embedder.embed(_vocabulary(vocabulary), progress)

    # ---- first half: pixels to masks -------------------------------------------------------------------------------

    @host_memory("looking for masks")
    def find_masks(self, image: ImageLike, options: SegmentOptions | None = None) -> MaskProposals:
        """Run the network on an image: mask proposals and their embeddings, independent of any word.

        Args:
            image: as for :meth:`segment`.
            options: of these, ``short_edge``, ``long_edge``, ``max_pixels`` and ``windows_per_batch`` matter here.

        Raises:
            ImageError: the image cannot be used.
            OptionsError: the options are no :class:`SegmentOptions`.
            BackendError: the engine failed, or gave embeddings that are not numbers.
            OutOfMemoryError: memory ran out, with one window at a time, too.
        """
        settings = given_options(options).resolve(self.facts)
        if self._pipeline is not None:
            return self._find_masks_on_gpu(self._pipeline, image, settings)
        if is_on_device(image):
            raise ImageError(
                f"the image lies on a GPU, but this segmenter passes images through host memory ({self.device}): copy "
                "it there first, or see `odise-rt doctor` for what the GPU path lacks"
            )
        watch = Stopwatch()
        pixels = load_image(image, settings.max_pixels)
        size = network_size(pixels.shape[0], pixels.shape[1], settings.short_edge, settings.long_edge)
        prepared = prepare(pixels, size, self.facts.size_divisor)
        watch.lap("preprocess")

        grid = window_grid(prepared.canvas.shape[2], prepared.canvas.shape[3], self.facts.window)
        plan = self._batch_plan(settings, grid)
        levels = self._features(prepared.canvas, grid, plan, watch)
        with self._stages.use("mask_decoder") as mask_decoder:
            decoded = mask_decoder.run(levels)
        del levels
        watch.lap("mask_decoder")

        with self._stages.use("clip_mask") as clip_mask:
            clip = clip_mask.run({"image": prepared.image, "mask_logits": decoded["mask_logits"]})
        watch.lap("clip_mask")

        object_logits = decoded["object_logits"][0] if "object_logits" in decoded else None
        embeddings = MaskEmbeddings(decoded["mask_embedding"][0], clip["mask_clip_embedding"][0], object_logits)
        embeddings.check()
        return MaskProposals(
            masks=HostMasks(decoded["mask_logits"][0]),
            embeddings=embeddings,
            original_size=prepared.original_size,
            network_size=prepared.network_size,
            windows=len(grid),
            window_side=grid.side,
            seconds=watch.seconds,
            windows_per_batch=plan.size,
            notes=plan.notes(),
        )

    def _find_masks_on_gpu(self, pipeline: Pipeline, image: ImageLike, settings: ResolvedOptions) -> MaskProposals:
        """:meth:`find_masks` in one go on the GPU, for pixels in the host's memory or on the GPU."""
        watch = Stopwatch()
        on_gpu = self._place_on_gpu(pipeline, image, settings, watch)
        found = on_gpu.plan.run_whole(lambda count: pipeline.run(on_gpu.pixels, on_gpu.network_size, count))
        watch.lap("network")
        return MaskProposals(masks=found.masks, embeddings=found.embeddings, **on_gpu.facts(watch))

    @host_memory("segmenting an image")
    def _segment_on_gpu(
        self, pipeline: Pipeline, image: ImageLike, words: Vocabulary, settings: ResolvedOptions
    ) -> PanopticResult:
        """:meth:`segment` in one go on the GPU, for pixels in the host's memory or on the GPU."""
        watch = Stopwatch()
        seen = words.seen(self.bundle.training_vocabulary)
        request = self._request(words, seen, settings)
        watch.lap("words")
        on_gpu = self._place_on_gpu(pipeline, image, settings, watch)
        named = on_gpu.plan.run_whole(
            lambda count: pipeline.segment(on_gpu.pixels, on_gpu.network_size, count, request)
        )
        watch.lap("pixels_to_segments")
        run = ImageRun(**on_gpu.facts(watch))
        segments = _segments(named, words, settings)
        watch.lap("panoptic")
        facts = self._run_facts(run, words, seen, settings, watch.seconds)
        return PanopticResult(named.segment_map, segments, words.result_classes(settings.unknown), facts)

    def _place_on_gpu(
        self, pipeline: Pipeline, image: ImageLike, settings: ResolvedOptions, watch: Stopwatch
    ) -> PlacedImage:
        pixels: np.ndarray | DeviceArray
        if is_on_device(image):
            pixels = pipeline.view(image)
            check_size(pixels.shape[1], pixels.shape[0], settings.max_pixels, "the image on the GPU")
        else:
            pixels = load_image(image, settings.max_pixels)
        original = (pixels.shape[0], pixels.shape[1])
        size = network_size(*original, settings.short_edge, settings.long_edge)
        watch.lap("preprocess")
        grid = window_grid(*padded_size(size, self.facts.size_divisor), self.facts.window)
        return PlacedImage(pixels, original, size, grid, self._batch_plan(settings, grid))

    def _batch_plan(self, settings: ResolvedOptions, grid: WindowGrid) -> BatchPlan:
        wanted = settings.windows_per_batch or self._backend.windows_per_batch(grid.side)
        return BatchPlan(grid, wanted, settings.windows_per_batch is not None, self._fitting)

    def _features(
        self, canvas: np.ndarray, grid: WindowGrid, plan: BatchPlan, watch: Stopwatch
    ) -> dict[str, np.ndarray]:
        """The feature pyramid of the whole canvas, window by window: level to (1, C, H/stride, W/stride)."""
        captions = np.empty((len(grid), self.facts.clip_embed_dim), np.float32)
        with self._stages.use("clip_image") as clip_image:

            def caption(start: int, stop: int) -> None:
                windows = cut_windows(canvas, grid, start, stop)
                captions[start:stop] = clip_image.run({"windows": windows})["image_embedding"]

            plan.run(len(grid), caption)
        watch.lap("clip_image")

        stitcher = Stitcher(grid, dict(zip(LEVELS, self.facts.level_strides, strict=True)))
        with self._stages.use("unet_tap") as unet_tap:

            def tap(start: int, stop: int) -> None:
                inputs = {
                    "windows": cut_windows(canvas, grid, start, stop),
                    "image_embedding": captions[start:stop],
                    "noise": self._constants["noise"],
                    "null_text_embedding": self._constants["null_text_embedding"],
                }
                features = unet_tap.run(inputs)
                watch.lap("unet_tap")
                stitcher.add(features)
                del features
                watch.lap("stitch")

            plan.run(len(grid), tap)
        levels = stitcher.finish()
        watch.lap("stitch")
        return levels

    # ---- second half: masks and words to segments ------------------------------------------------------------------

    @host_memory("naming masks")
    def name_masks(
        self, proposals: MaskProposals, vocabulary: Vocabulary | str, options: SegmentOptions | None = None
    ) -> PanopticResult:
        """Name the masks of an image with a vocabulary and merge them.

        Args:
            proposals: from :meth:`find_masks`; they can be named any number of times.
            vocabulary: the classes.
            options: of these, both thresholds, both ensemble weights, ``unknown``, ``explain``, ``outputs`` and
                ``instances_per_image`` matter here.

        Raises:
            InputError: the proposals are none.
            VocabularyError: the vocabulary is empty or malformed, or has a class "unknown" beside the option
                ``unknown``.
            OptionsError: the options are no :class:`SegmentOptions`.
            BackendError: the text encoder failed.
            OutOfMemoryError: memory ran out.
        """
        words = _vocabulary(vocabulary)
        settings = given_options(options).resolve(self.facts)
        watch = Stopwatch()
        seen = words.seen(self.bundle.training_vocabulary)
        request = self._request(words, seen, settings)
        watch.lap("words")
        masks = _proposals(proposals).masks
        resizer = MaskResizer((masks.shape[1], masks.shape[2]), proposals.network_size, proposals.original_size)
        named = masks.name(proposals.embeddings, request, resizer, watch.lap)
        segments = _segments(named, words, settings)
        classes, names, probabilities = words.result_classes(settings.unknown), named.names, named.names.probabilities
        watch.lap("panoptic")

        semantic, instances = None, None
        if "semantic" in settings.outputs:
            semantic = semantic_map(masks.array(), probabilities, resizer)
            watch.lap("semantic")
        if "instance" in settings.outputs:
            found = find_instances(masks.array(), probabilities, classes.isthing, resizer, settings.instances_per_image)
            # Many instances share a mask, under another name each.
            best = {query: _candidates(names, query, words) for query in {i.query for i in found}}
            size = proposals.original_size
            instances = tuple(
                Instance(
                    classes[i.class_index].name,
                    i.class_index,
                    i.score,
                    i.area,
                    i.box,
                    size,
                    i.bits,
                    best[i.query],
                )
                for i in found
                if i.area
            )
            watch.lap("instance")
        facts = self._run_facts(proposals, words, seen, settings, proposals.seconds | watch.seconds)
        return PanopticResult(named.segment_map, segments, classes, facts, semantic, instances)

    @host_memory("classifying masks")
    def classify_masks(
        self, proposals: MaskProposals, vocabulary: Vocabulary | str, options: SegmentOptions | None = None
    ) -> Classification:
        """What both classifiers say of every mask and class, before anything is merged; for analysis.

        Args:
            proposals: from :meth:`find_masks`.
            vocabulary: the classes.
            options: of these, both ensemble weights matter here.

        Raises:
            InputError: the proposals are none.
            VocabularyError: the vocabulary is empty or malformed.
            OptionsError: the options are no :class:`SegmentOptions`.
            BackendError: the text encoder failed.
            OutOfMemoryError: memory ran out.
        """
        words = _vocabulary(vocabulary)
        settings = given_options(options).resolve(self.facts)
        seen = words.seen(self.bundle.training_vocabulary)
        return classify(_proposals(proposals).embeddings, self._classifier(words, seen, settings))

    def _request(self, words: Vocabulary, seen: np.ndarray, settings: ResolvedOptions) -> NamingRequest:
        isthing = words.result_classes(settings.unknown).isthing
        return NamingRequest(self._classifier(words, seen, settings), words.words_hash, isthing, settings)

    def _classifier(self, words: Vocabulary, seen: np.ndarray, settings: ResolvedOptions) -> Classifier:
        return Classifier(
            self.facts,
            self._constants.get("no_object_embedding"),
            self._embedder.embed(words),
            words.first_word,
            clip_weights(seen, settings.clip_weight_seen, settings.clip_weight_unseen),
        )

    def _run_facts(
        self,
        run: ImageRun,
        words: Vocabulary,
        seen: np.ndarray,
        settings: ResolvedOptions,
        seconds: dict[str, float],
    ) -> RunFacts:
        return RunFacts(
            bundle=self.bundle.name,
            bundle_digest=self.bundle.digest,
            precision=self._precision(),
            device=self.device,
            engine=self._backend.description,
            stages=tuple(self._stages.facts().values()),
            image_size=run.original_size,
            network_size=run.network_size,
            windows=run.windows,
            window_side=run.window_side,
            words=len(words.words),
            seen_classes=int(seen.sum()),
            options=settings.to_dict(),
            seconds=seconds | {"total": sum(seconds.values())},
            windows_per_batch=run.windows_per_batch,
            notes=run.notes,
        )

    def _precision(self) -> str:
        """Precision of the engines that ran, else the bundle's; several are joined by "+"."""
        used = {facts.precision or self.bundle.precision for facts in self._stages.facts().values()}
        return "+".join(sorted(used)) or self.bundle.precision

    # ---- resources -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release the engine's memory. Safe to call twice."""
        if self._pipeline is not None:
            self._pipeline.close()
        self._stages.close()

    def __reduce__(self) -> NoReturn:
        """Engines cannot be sent to another process.

        Raises:
            InputError: always.
        """
        raise InputError(
            "a segmenter cannot be pickled or copied: call Segmenter.load in each process, and share results"
        )

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cache_key(bundle: Bundle, backend: Backend) -> str:
    """What text embeddings on disk depend on: the model, and the engine if it rounds more than the bundle's graph."""
    precision = getattr(backend, "text_precision", bundle.precision)
    return model_key(bundle) if precision == bundle.precision else f"{model_key(bundle)}-{precision}"


def _proposals(proposals: MaskProposals) -> MaskProposals:
    if isinstance(proposals, MaskProposals):
        return proposals
    raise InputError(f"the proposals came as {type(proposals).__name__}: expected what find_masks gives")


def _vocabulary(words: Vocabulary | str) -> Vocabulary:
    if isinstance(words, Vocabulary):
        return words
    if isinstance(words, str):
        return Vocabulary.parse(words)
    raise VocabularyError(
        f"the vocabulary came as {type(words).__name__}: expected a Vocabulary or words as text; "
        "Vocabulary.from_lists takes lists"
    )


def _segments(named: Named, words: Vocabulary, settings: ResolvedOptions) -> tuple[Segment, ...]:
    classes = words.result_classes(settings.unknown)
    return tuple(
        Segment(
            s.id,
            classes[s.class_index].name,
            s.class_index,
            s.score,
            s.area,
            s.box,
            s.isthing,
            unknown=s.class_index == len(words),
            candidates=_candidates(named.names, s.query, words),
        )
        for s in named.segments
    )


def _candidates(names: MaskNames, query: int, words: Vocabulary) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(words[int(k)].name, int(k), float(score), float(mask), float(clip))
        for k, score, mask, clip in zip(
            names.classes[query], names.scores[query], names.mask_scores[query], names.clip_scores[query], strict=True
        )
    )
