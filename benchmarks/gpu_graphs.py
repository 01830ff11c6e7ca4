"""Images that stay on the GPU, from pixels to segments, around a network that only copies.

An engine needs a package that a machine with a GPU may lack, and the way of an image does not: buffers, streams,
captured graphs and their replays, the kernels between the networks, results that cross back. So here every stage is a
stand-in: of each output the first half is what came in, over and over, and the rest numbers of its own. The same
stages run through host memory on the CPU, and both must find the same segments: at first, from the captured graph,
with another picture and other thresholds in the same graph, with words that change behind the graph of the networks,
after scratch memory has moved, in three threads at once, and from a tensor that is still being written.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_rows import Emit, Row
from benchmarks.timed_picture import WORDS, picture
from odise_rt.backends.base import Device, StageFacts
from odise_rt.backends.device import CudaSession
from odise_rt.backends.device_arrays import DeviceArray
from odise_rt.backends.device_memory import DeviceMemory
from odise_rt.backends.image_pipeline import ImagePipeline
from odise_rt.backends.pool import StagePool
from odise_rt.bundle import Bundle
from odise_rt.errors import OdiseError
from odise_rt.kernels.native import Kernels
from odise_rt.options import SegmentOptions
from odise_rt.segmenter import Segmenter
from odise_rt.specs import IMAGE_STAGES, StageSpec
from odise_rt.text_embeddings import TextEmbedder

SIZES = ((256, 384), (300, 200))
"""Pixels: more windows than one, a canvas with padding."""
OTHER_PIXELS = 2e-3
"""Share of pixels on which two masks are as good as equal, which may go to either."""
STILL_WRITTEN_CYCLES = 100_000_000
"""Of the GPU's clock, for which a tensor is not written yet: some 50 ms."""
LOOSE = SegmentOptions(object_mask_threshold=0.0, overlap_threshold=0.0)
STRICT = SegmentOptions(object_mask_threshold=0.02, overlap_threshold=0.5)
OTHER_WORDS = ("cat; stuff: sky", "tree, bush; boat; stuff: sea", "apple")
"""One after the other: the networks run, are captured, and come from their graph."""
PART = "graphs"


class EchoStage:
    """A stage that copies, on the host and on the stream of a session."""

    def __init__(self, spec: StageSpec, session: CudaSession | None, device: Device) -> None:
        """``session=None``: on the host only."""
        self._spec, self._session = spec, session
        self.facts = StageFacts(spec.name, "copies", "copies", device, "", 0.0)

    @property
    def session(self) -> CudaSession | None:
        """See :class:`odise_rt.backends.base.StageOnStream`."""
        return self._session

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :class:`odise_rt.backends.base.Stage`."""
        dims = self._spec.check(inputs)
        given = np.concatenate([np.ravel(array).astype(np.float32) for array in _first(self._spec, inputs)])
        outputs = {}
        for tensor in self._spec.outputs:
            shape = tensor.resolve(dims)
            values = own_numbers(tensor.name, shape)
            values[: values.size // 2] = np.resize(given, values.size // 2)
            outputs[tensor.name] = values.reshape(shape)
        return outputs

    def bind(self, inputs: Mapping[str, DeviceArray]) -> EchoBound:
        """See :class:`odise_rt.backends.base.StageOnStream`."""
        assert self._session is not None, "made for the host"
        return EchoBound(self._spec, self._session, inputs)

    def close(self) -> None:
        """Nothing to release."""


class EchoBound:
    """See :class:`odise_rt.backends.base.BoundStage`. It wants scratch memory, to be told of it when it moves."""

    capturable = True

    def __init__(self, spec: StageSpec, session: CudaSession, inputs: Mapping[str, DeviceArray]) -> None:
        dims = spec.check(inputs)
        self._session, self._inputs = session, list(_first(spec, inputs))
        self._memory = DeviceMemory(session)
        self.outputs = {tensor.name: tensor.resolve(dims) for tensor in spec.outputs}
        self._own = {name: self._memory.upload(own_numbers(name, shape)) for name, shape in self.outputs.items()}
        self.scratch_bytes = max(array.nbytes for array in self._own.values())
        self._addresses: dict[str, int] = {}
        self._scratch: Any = None

    def use_scratch(self, scratch: Any) -> None:
        self._scratch = scratch

    def place(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def enqueue(self) -> None:
        for name, own in self._own.items():
            # By way of the scratch memory: a graph that kept an old place would show.
            scratch = int(self._scratch.handle)
            self._copy(own.pointer, scratch, own.nbytes)
            start, half = 0, own.nbytes // 4 // 2 * 4
            while start < half:
                for array in self._inputs:
                    size = min(array.nbytes, half - start)
                    self._copy(array.pointer, scratch + start, size)
                    start += size
            self._copy(scratch, self._addresses[name], own.nbytes)

    def _copy(self, source: int, target: int, size: int) -> None:
        if size > 0:
            whole = (DeviceArray(at, (size,), np.dtype(np.uint8), None) for at in (source, target))
            here, there = (self._session.view(array) for array in whole)
            here.copy_to(there, stream=self._session.stream)

    def close(self) -> None:
        self._memory.close()


def _first(spec: StageSpec, inputs: Mapping[str, Any]) -> Iterator[Any]:
    """The inputs that are echoed: of tokens and constants there is no need."""
    yield from (inputs[tensor.name] for tensor in spec.inputs[:2])


def own_numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32, flat: the same for a name and a shape, wherever they are asked for."""
    seed = sum(name.encode()) + int(np.prod(shape))
    return np.random.default_rng(seed).standard_normal(int(np.prod(shape)), np.float32)


class EchoBackend:
    """Of such stages."""

    description = "a network that only copies"

    def __init__(self, session: CudaSession | None) -> None:
        """``session=None``: on the host."""
        self._session = session
        self.device: Device = "cpu" if session is None else "cuda"

    def load(self, bundle: Bundle, stage: str) -> EchoStage:
        """See :class:`odise_rt.backends.base.Backend`, as the next two."""
        return EchoStage(bundle.stages[stage].spec, self._session, self.device)

    def windows_per_batch(self, side: int) -> int:
        return 4

    def keeps_loaded(self, bundle: Bundle, stage: str) -> bool:
        return True


@contextlib.contextmanager
def echo_segmenter(bundle: Bundle, session: CudaSession | None) -> Iterator[Segmenter]:
    """A segmenter on such stages, whose images stay on the GPU if there is a session."""
    backend = EchoBackend(session)
    stages = StagePool(backend, bundle, keep=frozenset(bundle.stages))
    pipeline = None
    if session is not None:
        bound = {name: backend.load(bundle, name) for name in IMAGE_STAGES}
        pipeline = ImagePipeline(Kernels(), bound, bundle.facts, bundle.constants())
    with Segmenter(bundle, backend, stages, TextEmbedder(bundle, stages, None), pipeline) as segmenter:
        yield segmenter


def check(emit: Emit, bundle_dir: Path) -> None:
    """All rows of this part.

    Args:
        emit: receives them.
        bundle_dir: any bundle; its sizes and constants are used, and none of its graphs.
    """
    if not (bundle_dir / "bundle.json").is_file():
        emit(Row(PART, "bundle", "missing", detail=f"no bundle in {bundle_dir}: `make demo` makes one"))
        return
    bundle = Bundle.open(bundle_dir, verify=False, graphs=False)
    with echo_segmenter(bundle, None) as host, CudaSession() as session, echo_segmenter(bundle, session) as gpu:
        Comparison(emit, host, gpu, session).all()


class Comparison:
    """The same calls on the host and on the GPU."""

    def __init__(self, emit: Emit, host: Segmenter, gpu: Segmenter, session: CudaSession) -> None:
        """``session`` is that of ``gpu``."""
        self._emit, self._host, self._gpu, self._session = emit, host, gpu, session
        self._expected: dict[tuple[object, ...], np.ndarray] = {}

    def all(self) -> None:
        """Every row."""
        for size in SIZES:
            name = f"{size[0]}x{size[1]}"
            self._row(f"{name}, at first", partial(self._same, size, 0))
            self._row(f"{name}, from the graph", partial(self._same, size, 0))
            self._row(f"{name}, another picture", partial(self._same, size, 1))
            self._row(f"{name}, other thresholds", partial(self._same, size, 1, STRICT))
            self._row(f"{name}, other words each time", partial(self._other_words, size))
            self._row(f"{name}, masks first, names later", partial(self._in_two_steps, size))
        self._row("after scratch memory moved", self._scratch_moved)
        self._row("three threads", self._threads)
        self._row("a tensor that is still being written", self._tensor)

    def _row(self, name: str, other_pixels: Callable[[], float | None]) -> None:
        try:
            other = other_pixels()
        except OdiseError as exc:
            self._emit(Row(PART, name, "fail", "correctness", detail=f"{type(exc).__name__}: {exc}"[:300]))
            return
        if other is None:
            self._emit(Row(PART, name, "missing", "correctness", detail="needs a CUDA build of PyTorch"))
            return
        status = "pass" if other <= OTHER_PIXELS else "fail"
        detail = "against the same stages through host memory"
        self._emit(Row(PART, name, status, "correctness", {"other_pixels": other}, detail))  # type: ignore[arg-type]

    def _image(self, size: tuple[int, int], number: int) -> np.ndarray:
        return np.ascontiguousarray(np.roll(picture(*size), 37 * number, axis=(0, 1)))

    def _wanted(self, size: tuple[int, int], number: int, options: SegmentOptions, words: str = WORDS) -> np.ndarray:
        key = (*size, number, options is STRICT, words)
        if key not in self._expected:
            self._expected[key] = self._host.segment(self._image(size, number), words, options).segment_map
        return self._expected[key]

    def _same(self, size: tuple[int, int], number: int, options: SegmentOptions = LOOSE, words: str = WORDS) -> float:
        found = self._gpu.segment(self._image(size, number), words, options).segment_map
        return float((found != self._wanted(size, number, options, words)).mean())

    def _other_words(self, size: tuple[int, int]) -> float:
        return max(self._same(size, number, LOOSE, words) for number, words in enumerate(OTHER_WORDS))

    def _in_two_steps(self, size: tuple[int, int]) -> float:
        masks = self._gpu.find_masks(self._image(size, 1), LOOSE)
        self._gpu.find_masks(self._image(size, 0), LOOSE)  # what is kept of an image outlives the next one
        found = self._gpu.name_masks(masks, WORDS, LOOSE).segment_map
        return float((found != self._wanted(size, 1, LOOSE)).mean())

    def _scratch_moved(self) -> float:
        with self._session.use("moving scratch memory"):
            self._session.scratch(2 * int(self._session.scratch(1).size))
        return max(self._same(size, number) for size in SIZES for number in (0, 1, 0))

    def _threads(self) -> float:
        jobs = [(size, number) for number in (0, 1, 2) for size in SIZES]
        for job in jobs:
            self._wanted(*job, LOOSE)
        worst: list[float] = []
        errors: list[OdiseError] = []

        def work(offset: int) -> None:
            try:
                for step in range(2 * len(jobs)):
                    worst.append(self._same(*jobs[(offset + step) % len(jobs)]))
            except OdiseError as exc:
                errors.append(exc)

        threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 1, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return max(worst)

    def _tensor(self) -> float | None:
        late = late_tensor(self._image(SIZES[0], 2))
        if late is None:
            return None
        found = self._gpu.segment(late, WORDS, LOOSE).segment_map
        return float((found != self._wanted(SIZES[0], 2, LOOSE)).mean())


def late_tensor(image: np.ndarray) -> Any:
    """A tensor on the GPU, of PyTorch, that gets its pixels some time after this returns; ``None`` without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_stream(torch.cuda.Stream())
    pixels = torch.from_numpy(image).pin_memory()
    tensor = torch.zeros(image.shape, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(STILL_WRITTEN_CYCLES)
    tensor.copy_(pixels, non_blocking=True)
    return tensor
