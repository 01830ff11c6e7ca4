"""The page's logic without the page: pictures come in, the network sees each once, and names change as often as wanted.

:class:`Workbench` is shared by all visitors. It keeps nothing of a visitor but the pictures in its bounded
:class:`PictureStore`, and a bounded number of words and views that were used last, all of it in memory; what to show
comes in with every call as :class:`Controls`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from odise_rt.demo.corrections import NONE, Corrections
from odise_rt.demo.downloads import FORMATS, Drawn
from odise_rt.demo.examples import Example
from odise_rt.demo.pictures import SEMANTIC_LONG_EDGE, SHOWN_LONG_EDGE, BoundedCache, GoneError, Picture, PictureStore
from odise_rt.demo.views import view
from odise_rt.errors import ImageError, InputError, OptionsError, VocabularyError
from odise_rt.image_run import MaskProposals
from odise_rt.options import OUTPUTS, Output, SegmentOptions
from odise_rt.preprocessing import load_image
from odise_rt.private_words import keep_words_out_of_the_log
from odise_rt.results import PanopticResult
from odise_rt.segmenter import Segmenter
from odise_rt.vocabulary import BUILTIN, GIVE_LISTS, Vocabulary

logger = logging.getLogger(__name__)

MAX_TEXT = 20_000
"""Characters of words that a visitor may type; lists of thousands belong on the command line."""
MAX_NAME = 120
DEFAULT_MAX_PIXELS = 32_000_000
"""Pixels of one picture. Larger ones would fill the memory that all visitors share."""
_VIEWS_KEPT = 64
_VOCABULARIES_KEPT = 16


@dataclass(frozen=True)
class Words:
    """One vocabulary as a visitor gives it."""

    text: str = ""
    """In the syntax of :meth:`Vocabulary.parse`. Never a file's name: the page must not read the server's files."""
    lists: tuple[str, ...] = ()
    """Names of built-in lists that are added."""

    def vocabulary(self) -> Vocabulary:
        """The classes: for the same words the same object, so that a slider neither parses nor hashes them again.

        Raises:
            VocabularyError: there is no word, or too much text, or a list that does not exist.
        """
        return _parsed(self)


@functools.lru_cache(maxsize=_VOCABULARIES_KEPT)
def _parsed(words: Words) -> Vocabulary:
    if len(words.text) > MAX_TEXT:
        raise VocabularyError(
            f"the words are {len(words.text):,} characters long, at most {MAX_TEXT:,} are accepted here: use "
            "`odise-rt segment --vocab FILE` for long lists"
        )
    parts = [Vocabulary.builtin(name) for name in words.lists]
    text = words.text.strip()
    if text.lower() in BUILTIN:
        parts.insert(0, Vocabulary.builtin(text.lower()))
    elif text or not parts:
        try:
            parts.insert(0, Vocabulary.parse(text))
        except VocabularyError as exc:
            raise VocabularyError(str(exc).replace(GIVE_LISTS, "tick the list below the field")) from exc
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@dataclass(frozen=True)
class Controls:
    """Everything that can be set on the page."""

    words: Words
    other: Words | None = None
    """A second vocabulary to compare with."""
    mode: Output = "panoptic"
    object_mask_threshold: float | None = None
    overlap_threshold: float | None = None
    clip_weight_seen: float | None = None
    clip_weight_unseen: float | None = None
    unknown: float = 0.0
    """Segments whose best word is below this are called unknown; 0: never."""
    least_score: float = 0.0
    """Instances below this are not shown."""
    corrections: Corrections = NONE
    """Made by hand in the result of ``words``,"""
    other_corrections: Corrections = NONE
    """and in that of ``other``."""

    def __post_init__(self) -> None:
        if self.mode not in OUTPUTS:
            raise OptionsError(f"the mode is {self.mode!r}: expected one of {', '.join(OUTPUTS)}")
        if not 0 <= self.least_score <= 1:
            raise OptionsError(f"the least score is {self.least_score!r}: expected a number in [0, 1]")
        for made in (self.corrections, self.other_corrections):
            if not all(0 <= x < 1 and 0 <= y < 1 for x, y, _ in made.places):
                raise OptionsError(
                    "the place of a corrected segment is outside of the picture: expected shares in [0, 1)"
                )
            if sum(len(word or "") + 1 for word in (*made.words, *(label for *_, label in made.places))) > MAX_TEXT:
                raise OptionsError(f"the corrected names are longer than {MAX_TEXT:,} characters: reload the page")

    def options(self) -> SegmentOptions:
        """For the runtime."""
        return SegmentOptions(
            outputs=(self.mode,),
            object_mask_threshold=self.object_mask_threshold,
            overlap_threshold=self.overlap_threshold,
            clip_weight_seen=self.clip_weight_seen,
            clip_weight_unseen=self.clip_weight_unseen,
            unknown=self.unknown or None,
        )

    @property
    def vocabularies(self) -> list[Words]:
        """One, or two to compare."""
        return [self.words] if self.other is None else [self.words, self.other]


class Workbench:
    """One segmenter, the pictures of all visitors, and what is shown of them. Threads may share it."""

    def __init__(
        self,
        segmenter: Segmenter,
        store: PictureStore | None = None,
        examples: list[Example] | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        keep_words_out_of_the_log()
        self.segmenter = segmenter
        self.store = PictureStore() if store is None else store
        self.examples = examples or []
        self.max_pixels = max_pixels
        self.network_runs = 0
        """How often the network ran so far."""
        self._views: BoundedCache[dict[str, Any]] = BoundedCache(_VIEWS_KEPT)
        self._recipes: BoundedCache[tuple[Controls, Words | None]] = BoundedCache(4 * _VIEWS_KEPT)
        # One network at a time: two would only share the same cores and need twice the memory.
        self._network = threading.Lock()
        # Likewise for downloads, whose arrays are as large as the picture.
        self._full_size = threading.Lock()

    # ---- pictures ------------------------------------------------------------------------------------------------

    def add(self, data: bytes, name: str) -> Picture:
        """Decode an uploaded file and keep it in memory.

        Raises:
            ImageError: it is no image, is broken or too large.
        """
        name = clean_name(name)
        if not data:
            raise ImageError(f"{name} is empty: choose another file")
        try:
            pixels = load_image(_NamedFile(data, name), self.max_pixels)
        except ImageError as exc:
            # What else there is to do is for programmers.
            raise ImageError(str(exc).partition(", or raise ")[0]) from exc
        return self.store.add(Picture(name, pixels))

    def add_example(self, index: int) -> Picture:
        """Take an example picture by its position."""
        if not 0 <= index < len(self.examples):
            raise InputError(f"there is no example {index}: reload the page")
        example = self.examples[index]
        pixels = load_image(example.path, self.max_pixels)
        return self.store.add(Picture(example.path.name, pixels))

    # ---- masks and names -----------------------------------------------------------------------------------------

    def masks(self, picture: Picture) -> tuple[MaskProposals, bool]:
        """The masks of a picture, and whether the network had to run for them."""
        with picture.lock:
            if picture.proposals is not None:
                return picture.proposals, False
            with self._network:
                options = SegmentOptions(max_pixels=self.max_pixels)
                picture.proposals = self.segmenter.find_masks(picture.pixels, options)
                self.network_runs += 1
                logger.info("network run %d: %.3f s", self.network_runs, sum(picture.proposals.seconds.values()))
            return picture.proposals, True

    def show(self, picture: Picture, controls: Controls) -> dict[str, Any]:
        """Name the masks of a picture and describe what the page draws.

        Args:
            picture: from :meth:`add` or the store.
            controls: words, mode and thresholds.

        Returns:
            Plain JSON types: ``picture``, one or two ``views`` (see :func:`odise_rt.demo.views.view`), ``mode`` and
            ``times`` in seconds.

        Raises:
            InputError: words or options that cannot be used.
        """
        vocabularies = [words.vocabulary() for words in controls.vocabularies]
        proposals, ran = self.masks(picture)
        views: list[dict[str, Any]] = []
        words_seconds, names_seconds = 0.0, 0.0
        for words, vocabulary in zip(controls.vocabularies, vocabularies, strict=True):
            start = time.perf_counter()
            self.segmenter.prepare(vocabulary)
            embedded = time.perf_counter()
            beside = controls.words if views else None
            made = controls.other_corrections if views else controls.corrections
            alone = dataclasses.replace(controls, words=words, other=None, corrections=made, other_corrections=NONE)
            views.append(self._view(picture, proposals, alone, beside))
            words_seconds += embedded - start
            names_seconds += time.perf_counter() - embedded
        times = {"network": sum(proposals.seconds.values()), "words": words_seconds, "names": names_seconds}
        return {
            "picture": picture.described,
            "mode": controls.mode,
            "views": views,
            "times": {key: round(seconds, 4) for key, seconds in times.items()} | {"ran": ran},
        }

    def _view(
        self, picture: Picture, proposals: MaskProposals, controls: Controls, beside: Words | None
    ) -> dict[str, Any]:
        """What the page draws for one vocabulary, perhaps beside another one."""
        key = _digest([dataclasses.astuple(controls), beside and dataclasses.astuple(beside)])
        place = f"{picture.token} {key}"
        self._recipes.put(place, (controls, beside))
        known = self._views.get(place)
        if known is None:
            long_edge = SEMANTIC_LONG_EDGE if controls.mode == "semantic" else SHOWN_LONG_EDGE
            at_page_size = dataclasses.replace(proposals, original_size=picture.shown_size(long_edge))
            vocabulary = controls.words.vocabulary()
            result = self.segmenter.name_masks(at_page_size, vocabulary, controls.options())
            first = beside.vocabulary() if beside else None
            seen = self.segmenter.bundle.training_vocabulary
            known = view(result, controls.mode, controls.least_score, seen, first, controls.corrections)
            known |= {"key": key, "classes": len(vocabulary), "seen": result.facts.seen_classes}
            self._views.put(place, known)
        return known

    # ---- downloads -----------------------------------------------------------------------------------------------

    def file(self, picture: Picture, key: str, kind: str) -> bytes:
        """What one view shows as a file at the picture's own size.

        Args:
            picture: that is shown.
            key: of the view.
            kind: of :data:`odise_rt.demo.downloads.FORMATS`.

        Raises:
            GoneError: ``key`` is of no view that was shown lately.
            InputError: there is no such format.
        """
        if kind not in FORMATS:
            raise InputError(f"there is no format {kind!r}: expected one of {', '.join(FORMATS)}")
        controls, beside = self._recipe(picture, key)
        with self._full_size:
            result = self._name(picture, controls)
            return FORMATS[kind].make(Drawn(picture, result, controls, beside.vocabulary() if beside else None))

    def _recipe(self, picture: Picture, key: str) -> tuple[Controls, Words | None]:
        recipe = self._recipes.get(f"{picture.token} {key}")
        if recipe is None:
            raise GoneError("this result is no longer in the server's memory: change a setting to make it anew")
        return recipe

    def _name(self, picture: Picture, controls: Controls) -> PanopticResult:
        """The result at the picture's own size."""
        proposals, _ = self.masks(picture)
        return self.segmenter.name_masks(proposals, controls.words.vocabulary(), controls.options())


class _NamedFile(io.BytesIO):
    """A file in memory with a name, by which messages of :func:`load_image` call it."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def clean_name(name: str) -> str:
    """A file name without folders and control characters, for display and downloads."""
    last = name.replace("\\", "/").rpartition("/")[2]
    kept = "".join(c for c in last if c.isprintable()).strip(" .")
    return kept[-MAX_NAME:] or "picture"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
