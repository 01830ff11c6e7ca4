"""The comparison that an engine which compiles graphs must pass the first time that it meets a bundle on a machine.

The expected outputs come from the bundle's graphs in ONNX Runtime, which the export compared with PyTorch, on a picture
that is drawn from a formula. That a stage agreed is written down in the user's cache folder, so that it is done once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from odise_rt.backends.base import Stage
from odise_rt.backends.ort import OrtBackend
from odise_rt.bundle import Bundle
from odise_rt.check_picture import landscape
from odise_rt.engine_check import Arrays, Bounds, Case, check_stage
from odise_rt.errors import BackendError
from odise_rt.files import write_json
from odise_rt.preprocessing import prepare
from odise_rt.specs import StageSpec
from odise_rt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

VERSION = 1
"""Version of this comparison; raise it, and every engine is compared again."""
MAX_NOTE_BYTES = 1 << 20
_WORDS = ("sky", "grass", "house", "a photo of a purple elephant balloon.")


@dataclass(frozen=True)
class Comparison:
    """A stage of an engine that has yet to be compared."""

    stage: StageSpec
    identity: str
    case: Case
    bounds: Bounds
    note: Path | None
    """Where to write down that it agreed."""

    def check(self, run: Callable[[Arrays], Arrays]) -> None:
        """Compare the stage, and note that it agreed.

        Raises:
            BackendError: it does not.
        """
        checks = check_stage(run, self.stage, [self.case], self.bounds)
        wrong = [check.describe(self.bounds) for check in checks if not check.passed]
        if wrong:
            raise BackendError(
                f"stage {self.stage.name} is wrong in {self.identity}: {'; '.join(wrong)} compared with ONNX Runtime; "
                "it is not used: take cpu_engine='onnxruntime', or another version of the engine"
            )
        logger.info("stage %s in %s agrees with ONNX Runtime", self.stage.name, self.identity)
        if self.note is None:
            return
        try:
            self.note.parent.mkdir(parents=True, exist_ok=True)
            found = [check.to_dict() for check in checks]
            write_json(self.note, {"stage": self.stage.name, "identity": self.identity, "checks": found})
        except OSError as exc:
            logger.warning("cannot note in %s that a stage agreed (%s): the next load compares again", self.note, exc)


class FirstUse:
    """Knows which stages of an engine have to be compared with ONNX Runtime's.

    Args:
        folder: for notes of those that were; ``None``: none are kept, every load compares.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / "checked"
        self._cases: dict[str, Case] = {}

    def comparison(
        self, bundle: Bundle, stage: str, identity: str, bounds: Bounds, threads: int | None = None
    ) -> Comparison | None:
        """What a stage has to be compared with; ``None`` if it was before.

        Args:
            bundle: opened.
            stage: its name.
            identity: whatever the engine's results depend on: versions, precision, processor.
            bounds: that it must keep.
            threads: for ONNX Runtime.

        Raises:
            MissingPackageError: ONNX Runtime is not installed.
        """
        note = self._path(bundle, stage, identity)
        if note is not None and _agreed(note, stage, identity):
            return None
        if stage not in self._cases:
            self._cases |= _text_case(bundle, threads) if stage == "clip_text" else _image_cases(bundle, threads)
        return Comparison(bundle.stages[stage].spec, identity, self._cases.pop(stage), bounds, note)

    def _path(self, bundle: Bundle, stage: str, identity: str) -> Path | None:
        if self._folder is None:
            return None
        text = json.dumps([VERSION, bundle.stages[stage].file.digest, bundle.digest, stage, identity])
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _agreed(note: Path, stage: str, identity: str) -> bool:
    try:
        if note.stat().st_size > MAX_NOTE_BYTES:
            return False
        content = json.loads(note.read_bytes())
        return bool(content["stage"] == stage and content["identity"] == identity)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False  # there is none, or it is damaged: compare again


def _image_cases(bundle: Bundle, threads: int | None) -> dict[str, Case]:
    """What the stages of a picture of one window get and give in ONNX Runtime, one loaded at a time."""
    facts, constants, cases = bundle.facts, bundle.constants(), {}
    backend = OrtBackend("cpu", threads)

    def run(stage: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        loaded: Stage = backend.load(bundle, stage)
        try:
            outputs = loaded.run(inputs)
        finally:
            loaded.close()
        cases[stage] = Case(inputs, outputs)
        return outputs

    side = facts.window
    prepared = prepare(landscape(side, side), (side, side), facts.size_divisor)
    windows = prepared.canvas
    caption = run("clip_image", {"windows": windows})["image_embedding"]
    noise, context = constants["noise"], constants["null_text_embedding"]
    levels = run(
        "unet_tap",
        {"windows": windows, "image_embedding": caption, "noise": noise, "null_text_embedding": context},
    )
    masks = run("mask_decoder", levels)["mask_logits"]
    run("clip_mask", {"image": prepared.image, "mask_logits": masks})
    return cases


def _text_case(bundle: Bundle, threads: int | None) -> dict[str, Case]:
    inputs = {bundle.stages["clip_text"].spec.inputs[0].name: Tokenizer(bundle.tokenizer_path, bundle.facts)(_WORDS)}
    stage = OrtBackend("cpu", threads).load(bundle, "clip_text")
    try:
        return {"clip_text": Case(inputs, stage.run(inputs))}
    finally:
        stage.close()
