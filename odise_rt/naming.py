"""Masks and words to named segments: what to ask, what comes back, and the answer on the host.

Masks may lie in the host's memory or on a GPU; :meth:`Masks.name` answers where they are. See
:mod:`odise_rt.classification` and :mod:`odise_rt.postprocessing` for what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from odise_rt.classification import Classifier, MaskEmbeddings, MaskNames, name_queries
from odise_rt.options import ResolvedOptions
from odise_rt.postprocessing import MaskResizer, MergedSegment, merge_panoptic

Lap = Callable[[str], None]
"""Called with the name of each step when it is done."""


@dataclass(frozen=True, eq=False)
class NamingRequest:
    """The words and rules by which the masks of an image are named."""

    classifier: Classifier
    """The K classes, and how masks are compared with them."""
    words_id: str
    """Equal for equal words: by it their embeddings are found that lie on a GPU already."""
    isthing: np.ndarray
    """bool (K,); with ``options.unknown`` (K + 1,), "unknown" at the end."""
    options: ResolvedOptions

    @property
    def ranked(self) -> int:
        """Number of classes to rank for each mask."""
        return min(self.options.explain, len(self.classifier.first_word))

    @property
    def rank_all(self) -> bool:
        """Whether masks that are likeliest no object are ranked, too: they can still be instances."""
        return "instance" in self.options.outputs

    @property
    def wants_probabilities(self) -> bool:
        """Whether an output is asked for that is made of the probabilities of all classes."""
        return self.options.outputs != ("panoptic",)


@dataclass(frozen=True, eq=False)
class Named:
    """The masks of an image with names, and the segments that they become."""

    names: MaskNames
    segment_map: np.ndarray
    """int32 (h, w), 0 where no segment is."""
    segments: list[MergedSegment]
    """The segments in order of their ids."""


class Masks(Protocol):
    """The mask logits of one image, wherever they lie."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(Q, mh, mw)."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all logits."""
        ...

    def array(self) -> np.ndarray:
        """float32 (Q, mh, mw) in the host's memory; not to be written to."""
        ...

    def name(self, embeddings: MaskEmbeddings, request: NamingRequest, resizer: MaskResizer, lap: Lap) -> Named:
        """Name the masks and merge them.

        Args:
            embeddings: those of these masks.
            request: the words and rules.
            resizer: one for the size of these logits and of the image.
            lap: called when a step is done, except after the last one.
        """
        ...


def names_of(embeddings: MaskEmbeddings, request: NamingRequest) -> MaskNames:
    """The names of all masks, on the host."""
    options = request.options
    return name_queries(
        embeddings, request.classifier, best=options.explain, unknown=options.unknown, rank_all=request.rank_all
    )


class HostMasks:
    """Mask logits in the host's memory."""

    def __init__(self, logits: np.ndarray) -> None:
        """Wrap float32 (Q, mh, mw)."""
        self._logits = logits

    @property
    def shape(self) -> tuple[int, ...]:
        """(Q, mh, mw)."""
        return self._logits.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all logits."""
        return self._logits.nbytes

    def array(self) -> np.ndarray:
        """The array itself."""
        return self._logits

    def name(self, embeddings: MaskEmbeddings, request: NamingRequest, resizer: MaskResizer, lap: Lap) -> Named:
        """See :class:`Masks`."""
        options = request.options
        names = names_of(embeddings, request)
        lap("classify")
        segment_map, segments = merge_panoptic(
            self._logits,
            names.probabilities,
            request.isthing,
            resizer,
            options.object_mask_threshold,
            options.overlap_threshold,
        )
        return Named(names, segment_map, segments)
