"""What engines are compared with: inputs that a stage gets when a picture is segmented, and what it makes of them.

During an export PyTorch gives them. For a bundle that is there already its CPU graphs do, which its export compared
with PyTorch; that needs no checkpoint. Random inputs would exercise neither the range of activations nor thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from odise_rt.backends.base import Backend, Device, Stage, StageFacts
from odise_rt.backends.ort import OrtBackend, import_onnxruntime
from odise_rt.backends.pool import StagePool
from odise_rt.bundle import Bundle
from odise_rt.check_picture import landscape
from odise_rt.engine_check import Arrays, Case
from odise_rt.errors import ExportError
from odise_rt.options import SegmentOptions
from odise_rt.segmenter import Segmenter
from odise_rt.specs import STAGES, ModelFacts
from odise_rt.text_embeddings import TextEmbedder
from odise_rt.vocabulary import Vocabulary

CHECK_WORDS = (
    "sky; grass, meadow; house, building; window; sun; road, path; tree, trees; person; purple elephant balloon",
    "sky; ground; tree",
)
"""Words for the two pictures of a comparison, of different numbers."""


@dataclass(frozen=True)
class References:
    """What engines of every stage must compute."""

    by: str
    """Who gave the outputs, for engine.json."""
    cases: dict[str, list[Case]]


def check_sound(source: str, arrays: Arrays) -> None:
    """Refuse what nothing can be compared with: NaN, infinities, and nothing but zeros, which damaged weights give.

    Raises:
        ExportError: naming the source and the array.
    """
    for name, array in arrays.items():
        finite = np.isfinite(array).all()
        if not (finite and array.any()):
            what = "nothing but zeros" if finite else "NaN or infinite values"
            raise ExportError(f"{source}: {name} holds {what}: the model's weights are damaged, get them again")


class RecordedStage:
    """A stage that keeps its first inputs and outputs."""

    def __init__(self, stage: Stage, name: str, cases: dict[str, Case]) -> None:
        self._stage, self._name, self._cases = stage, name, cases

    @property
    def facts(self) -> StageFacts:
        """The facts of the stage inside."""
        return self._stage.facts

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run the stage inside; keep a copy of the first call.

        Raises:
            ExportError: nothing can be compared with what it gives.
        """
        outputs = self._stage.run(inputs)
        if self._name not in self._cases:
            check_sound(f"stage {self._name} in {self.facts.engine}", outputs)
            kept = ({name: array.copy() for name, array in arrays.items()} for arrays in (inputs, outputs))
            self._cases[self._name] = Case(*kept)
        return outputs

    def close(self) -> None:
        """Close the stage inside."""
        self._stage.close()


@dataclass
class RecordingBackend:
    """Another backend, with every stage recorded."""

    inner: Backend
    cases: dict[str, Case] = field(default_factory=dict)
    """Stage to the inputs of its first call, and what it made of them."""

    @property
    def device(self) -> Device:
        """Where the backend inside runs."""
        return self.inner.device

    @property
    def description(self) -> str:
        """The backend inside in one line."""
        return self.inner.description

    def windows_per_batch(self, side: int) -> int:
        """As many as the backend inside runs at a time."""
        return self.inner.windows_per_batch(side)

    def keeps_loaded(self, bundle: Bundle, stage: str) -> bool:
        """Whether the backend inside keeps a stage loaded."""
        return self.inner.keeps_loaded(bundle, stage)

    def load(self, bundle: Bundle, stage: str) -> RecordedStage:
        """Load a stage and record it."""
        return RecordedStage(self.inner.load(bundle, stage), stage, self.cases)


def engine_pictures(facts: ModelFacts) -> tuple[np.ndarray, np.ndarray]:
    """Two pictures that the engines' profiles hold: one window exactly, and two windows that need padding
    and, where the sizes allow it, overlap.

    Unlike the pictures that graphs are verified on, both give windows of full size: engines are built for no other.
    """
    window, divisor = facts.window, facts.size_divisor
    pad = max(divisor // 8, 1)
    width = max(2 * window - divisor, window + divisor)
    return landscape(window, window), landscape(window - pad, width - pad, seed=1)


def reference_options(pixels: np.ndarray, largest_batch: int) -> SegmentOptions:
    """Options under which the network sees a picture at its own size, two windows at a time, or one where engines take
    no more."""
    return SegmentOptions(
        short_edge=min(pixels.shape[:2]), long_edge=max(pixels.shape[:2]), windows_per_batch=min(2, largest_batch)
    )


def references_from_bundle(bundle: Bundle, largest_batch: int, threads: int | None = None) -> References:
    """Run the engine pictures through a bundle on the CPU.

    Args:
        bundle: opened.
        largest_batch: of windows that the engines take.
        threads: inside an operator; ``None``: all cores.
    """
    cases: dict[str, list[Case]] = {name: [] for name in STAGES}
    for pixels, words in zip(engine_pictures(bundle.facts), CHECK_WORDS, strict=True):
        backend = RecordingBackend(OrtBackend("cpu", threads))
        stages = StagePool(backend, bundle, keep=frozenset())
        with Segmenter(bundle, backend, stages, TextEmbedder(bundle, stages, cache=None)) as segmenter:
            segmenter.segment(pixels, Vocabulary.parse(words), reference_options(pixels, largest_batch))
        for name, case in backend.cases.items():
            cases[name].append(case)
    version = import_onnxruntime().__version__
    return References(f"the bundle's {bundle.precision} graphs in ONNX Runtime {version} on CPU", cases)
