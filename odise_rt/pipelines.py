"""A call in the manner of Hugging Face's ``pipeline``, for code that already speaks it.

>>> from odise_rt import pipeline
>>> segment = pipeline("open-vocabulary-segmentation", bundle="out/odise-tiny")  # doctest: +SKIP
>>> segment("photo.jpg", "dog; stuff: grass")  # doctest: +SKIP
[{'score': 0.93, 'label': 'dog', 'mask': <PIL.Image.Image image mode=L size=640x480>}, ...]

One image gives a list of segments, a list or tuple of images a list of such lists, and any other iterable (a generator,
a folder's images, a data set) a generator that reads ahead of nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from odise_rt.errors import OptionsError
from odise_rt.options import OUTPUTS, Output, SegmentOptions, given_options
from odise_rt.preprocessing import are_images

if TYPE_CHECKING:
    from odise_rt.backends.select import DeviceRequest
    from odise_rt.preprocessing import ImageLike
    from odise_rt.results import PanopticResult
    from odise_rt.segmenter import Segmenter
    from odise_rt.vocabulary import Vocabulary

Annotation = dict[str, Any]
"""``score`` (``None`` for semantic), ``label``, and ``mask``, a PIL image of mode L with 0 and 255."""

TASKS = ("open-vocabulary-segmentation", "image-segmentation")


def pipeline(
    task: str,
    bundle: str | os.PathLike[str] | None = None,
    words: Vocabulary | str | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    device: DeviceRequest = "auto",
    **load: Any,
) -> SegmentationPipeline:
    """Load a bundle as a callable.

    Args:
        task: one of :data:`TASKS`; both mean the same.
        bundle: the bundle's folder.
        words: the vocabulary of calls that name none; ``"auto"`` names what a broad lexicon knows.
        model: another name for ``bundle``, as Hugging Face calls it.
        device: as for :meth:`Segmenter.load`.
        load: more arguments of :meth:`Segmenter.load`.

    Raises:
        OptionsError: the task is another one, or no bundle is named.
        VocabularyError: the words cannot be read.
        OdiseError: of other kinds, as :meth:`Segmenter.load` raises them.
    """
    from odise_rt.segmenter import Segmenter

    if task not in TASKS:
        raise OptionsError(f"the task is {task!r}: expected {' or '.join(map(repr, TASKS))}")
    folder = bundle if bundle is not None else model
    if folder is None:
        raise OptionsError("no bundle was named: pass bundle='FOLDER'")
    vocabulary = None if words is None else _vocabulary(words)  # before gigabytes are loaded
    return SegmentationPipeline(Segmenter.load(folder, device=device, **load), vocabulary)


class SegmentationPipeline:
    """Calls one :class:`Segmenter`. A context manager, or call :meth:`close`; threads may share it."""

    task = TASKS[0]

    def __init__(self, segmenter: Segmenter, words: Vocabulary | str | None = None) -> None:
        """Use a loaded segmenter; ``words`` are the classes for calls that name none."""
        self.segmenter = segmenter
        self._words = None if words is None else _vocabulary(words)

    def __call__(
        self,
        inputs: ImageLike | list[ImageLike] | Iterable[ImageLike],
        words: Vocabulary | str | None = None,
        *,
        subtask: Output = "panoptic",
        threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        unknown: float | None = None,
        options: SegmentOptions | None = None,
    ) -> Any:
        """Segment an image, a list of images, or the images of an iterable.

        Args:
            inputs: an image is whatever :meth:`Segmenter.segment` takes: a path, bytes, a PIL image, an array.
            words: the classes, a built-in list's name, or words as text; ``None``: those of the pipeline.
            subtask: what to give: one segment a pixel, one class a pixel, or instances that may overlap.
            threshold: least score of a mask in [0, 1]; ``None``: the model's.
            overlap_mask_area_threshold: least share of its mask that a segment keeps; ``None``: the model's.
            unknown: call a segment "unknown" where no word reaches this probability.
            options: everything else; the arguments above win.

        Returns:
            A list of annotations; for a list or tuple of images a list of these, for another iterable a generator of
            these.

        Raises:
            InputError: an image, the words or an option cannot be used.
        """
        if subtask not in OUTPUTS:
            raise OptionsError(f"subtask is {subtask!r}: expected {', '.join(map(repr, OUTPUTS))}")
        vocabulary = self._words if words is None else _vocabulary(words)
        if vocabulary is None:
            raise OptionsError("no words were given: pass them to the call, or words='auto' to the pipeline")
        settings = _options(options, subtask, threshold, overlap_mask_area_threshold, unknown)

        def one(image: ImageLike) -> list[Annotation]:
            return _annotations(self.segmenter.segment(image, vocabulary, settings), subtask)

        if isinstance(inputs, list | tuple):
            return [one(image) for image in inputs]
        return map(one, inputs) if are_images(inputs) else one(inputs)  # type: ignore[arg-type]

    def close(self) -> None:
        """Release the engine's memory."""
        self.segmenter.close()

    def __enter__(self) -> SegmentationPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _vocabulary(words: Vocabulary | str) -> Vocabulary:
    from odise_rt.vocabulary import Vocabulary

    return Vocabulary.load(words) if isinstance(words, str) else words


def _options(
    options: SegmentOptions | None,
    subtask: Output,
    threshold: float | None,
    overlap: float | None,
    unknown: float | None,
) -> SegmentOptions:
    import dataclasses

    changes: dict[str, Any] = {"outputs": (subtask,), "explain": 0}
    given = {"object_mask_threshold": threshold, "overlap_threshold": overlap, "unknown": unknown}
    changes |= {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(given_options(options), **changes)


def _annotations(result: PanopticResult, subtask: Output) -> list[Annotation]:
    if subtask == "panoptic":
        return result.to_huggingface()
    if subtask == "instance":
        assert result.instances is not None, "the options asked for them"
        return [{"score": i.score, "label": i.label, "mask": _picture(i.mask)} for i in result.instances]
    classes = result.semantic_map
    assert classes is not None, "the options asked for it"
    names = result.vocabulary.names
    return [{"score": None, "label": names[k], "mask": _picture(classes == k)} for k in np.unique(classes)]


def _picture(mask: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(mask.astype(np.uint8) * 255)
