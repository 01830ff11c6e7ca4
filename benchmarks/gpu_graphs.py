"""Images that stay on the GPU, from pixels to segments, around a network that only copies.

An engine needs a package that a machine with a GPU may lack, and the way of an image does not: buffers, streams,
captured graphs and their replays, the kernels between the networks, results that cross back. So here every stage is a
stand-in: of each output the first half is what came in, over and over, and the rest numbers of its own. It needs no
bundle either: the manifest of one is made here (:func:`write_manifest`), with the tokenizer of odise-tiny. The same
stages run through host memory on the CPU, and both must find the same segments: at first, from the captured graph,
with another picture and other thresholds in the same graph, with words that change behind the graph of the networks,
after scratch memory has moved, in three threads at once, and from a tensor that is still being written.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_rows import Emit, Row
from benchmarks.preparation import TINY_CHECKPOINT
from benchmarks.timed_picture import WORDS, picture
from odise_rt.backends.base import Device, StageFacts
from odise_rt.backends.device import CudaSession
from odise_rt.backends.device_arrays import DeviceArray
from odise_rt.backends.device_memory import DeviceMemory
from odise_rt.backends.image_pipeline import ImagePipeline
from odise_rt.backends.pool import StagePool
from odise_rt.bundle import CONSTANTS_NAME, MANIFEST_NAME, SCHEMA_VERSION, TOKENIZER_NAME, Bundle, file_sha256
from odise_rt.errors import OdiseError
from odise_rt.files import write_json
from odise_rt.kernels.native import Kernels
from odise_rt.options import SegmentOptions
from odise_rt.segmenter import Segmenter
from odise_rt.specs import IMAGE_STAGES, ModelFacts, StageSpec, stage_specs
from odise_rt.text_embeddings import TextEmbedder
from odise_rt.version import __version__

SIZES = ((256, 384), (300, 200))
"""Pixels: more windows than one, a canvas with padding."""
OTHER_PIXELS = 2e-3
"""Share of pixels on which two masks are as good as equal, which may go to either."""
STILL_WRITTEN_CYCLES = 100_000_000
"""Cycles of the GPU's clock for which a tensor is not written yet: some 50 ms."""
LOOSE = SegmentOptions(object_mask_threshold=0.0, overlap_threshold=0.0)
STRICT = SegmentOptions(object_mask_threshold=0.1, overlap_threshold=0.05)
OTHER_WORDS = ("cat; stuff: sky", "tree, bush; boat; stuff: sea", "apple")
"""One after the other: the networks run, are captured, and come from their graph."""
PART = "graphs"
FACTS = ModelFacts(
    variant="label",
    window=128,
    size_divisor=64,
    clip_image_size=128,
    clip_embed_dim=128,
    context_length=32,
    start_token=4094,
    end_token=4095,
    pad_token=0,
    null_text_length=32,
    null_text_dim=64,
    queries=30,
    pyramid_channels=128,
    hidden_dim=96,
    classification_dim=96,
    test_short_edge=256,
    test_long_edge=640,
    mask_logit_scale=20.0,
    clip_logit_scale=20.0,
    clip_weight_seen=0.5,
    clip_weight_unseen=0.7,
    mask_prompt="{}",
    clip_prompt="a photo of a {}.",
)
"""Facts of a model of the size of odise-tiny, whose tokenizer is used."""


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
    """float32, flat: the same for a name and a shape, wherever they are asked for.

    As mask logits they are low, so that the masks that are made of the picture win their pixels.
    """
    seed = sum(name.encode()) + int(np.prod(shape))
    numbers = np.random.default_rng(seed).standard_normal(int(np.prod(shape)), np.float32)
    return numbers - np.float32(4) if name == "mask_logits" else numbers


class EchoBackend:
    """A backend that hands out such stages."""

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


def write_manifest(folder: Path) -> Bundle:
    """A bundle without graphs in an empty folder: :data:`FACTS`, constants of noise, the tokenizer of odise-tiny."""
    random = np.random.default_rng(1)
    latent = (1, 4, FACTS.latent_side, FACTS.latent_side)
    constants = {
        "noise": random.standard_normal(latent, np.float32),
        "null_text_embedding": random.standard_normal((1, FACTS.null_text_length, FACTS.null_text_dim), np.float32),
        "no_object_embedding": random.standard_normal(FACTS.classification_dim, np.float32),
    }
    np.savez(folder / CONSTANTS_NAME, **constants)  # type: ignore[arg-type]  # its stub knows no such names
    shutil.copyfile(TINY_CHECKPOINT / TOKENIZER_NAME, folder / TOKENIZER_NAME)
    nowhere = {"sha256": "0" * 64, "parameters": 0}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "name": "echo",
        "producer": {"odise_rt": __version__},
        "precision": "fp32",
        "model": FACTS.to_dict(),
        "stages": {
            name: {"file": f"onnx/{name}.onnx", **nowhere, **spec.to_dict()}
            for name, spec in stage_specs(FACTS).items()
        },
        "files": {name: file_sha256(folder / name) for name in (CONSTANTS_NAME, TOKENIZER_NAME)},
        "training_vocabulary": ["cat", "sky"],
    }
    write_json(folder / MANIFEST_NAME, manifest)
    return Bundle.open(folder, graphs=False)


def check(emit: Emit) -> None:
    """All rows of this part."""
    with tempfile.TemporaryDirectory(prefix="odise-echo-") as folder:
        bundle = write_manifest(Path(folder))
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
