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
"""Told the name of each step when it is done."""


@dataclass(frozen=True, eq=False)
class NamingRequest:
    """By which words and rules the masks of an image are named."""

    classifier: Classifier
    """Of the K classes."""
    words_id: str
    """Equal for equal words, so that what was uploaded of them is found again."""
    isthing: np.ndarray
    """bool (K,); with ``options.unknown`` (K + 1,), "unknown" at the end."""
    options: ResolvedOptions

    @property
    def ranked(self) -> int:
        """Classes to rank for each mask."""
        return min(self.options.explain, len(self.classifier.first_word))

    @property
    def rank_all(self) -> bool:
        """Whether masks that are likeliest no object are ranked, too: they can still be instances."""
        return "instance" in self.options.outputs

    @property
    def wants_probabilities(self) -> bool:
        """Whether something is to be made of the probabilities of all classes."""
        return self.options.outputs != ("panoptic",)


@dataclass(frozen=True, eq=False)
class Named:
    """The masks of an image with names, and the segments that they become."""

    names: MaskNames
    segment_map: np.ndarray
    """int32 (h, w), 0 where no segment is."""
    segments: list[MergedSegment]
    """In order of their ids."""


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
            embeddings: of the masks.
            request: by what.
            resizer: for these mask logits and the image's size.
            lap: told when a step is done; not of the last one.
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
