"""What the page asks the server for, as JSON, and the :class:`Controls` that it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from odise_rt.demo.corrections import Corrections
from odise_rt.demo.session import Controls, Words
from odise_rt.typed_fields import Range

Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Settings:
    """The page's controls."""

    words: str
    lists: tuple[str, ...]
    compare: bool
    other_words: str
    other_lists: tuple[str, ...]
    mode: Literal["panoptic", "semantic", "instance"]
    object_mask_threshold: Share
    overlap_threshold: Share
    clip_weight_seen: Share
    clip_weight_unseen: Share
    unknown: Share
    least_score: Share


@dataclass(frozen=True)
class ByHand:
    """The corrections of one result."""

    places: tuple[tuple[Share, Share, str], ...]
    """As in :class:`Corrections`, but empty text leaves a segment out."""
    words: tuple[str, ...]

    def corrections(self) -> Corrections:
        """What it means."""
        return Corrections(tuple((x, y, label or None) for x, y, label in self.places), self.words)


@dataclass(frozen=True)
class Masks:
    """Find the masks of a picture."""

    visitor: str
    token: str


@dataclass(frozen=True)
class Names:
    """Name the masks of a picture."""

    visitor: str
    token: str
    settings: Settings
    by_hand: tuple[ByHand, ByHand]
    """In the result of the first and of the second vocabulary."""

    def controls(self) -> Controls:
        """What it means. A comparison does not begin before there are words for it."""
        given = self.settings
        second = Words(given.other_words, given.other_lists)
        return Controls(
            words=Words(given.words, given.lists),
            other=second if given.compare and (second.text.strip() or second.lists) else None,
            mode=given.mode,
            object_mask_threshold=given.object_mask_threshold,
            overlap_threshold=given.overlap_threshold,
            clip_weight_seen=given.clip_weight_seen,
            clip_weight_unseen=given.clip_weight_unseen,
            unknown=given.unknown,
            least_score=given.least_score,
            corrections=self.by_hand[0].corrections(),
            other_corrections=self.by_hand[1].corrections(),
        )


@dataclass(frozen=True)
class Leave:
    """Forget a visitor's pictures."""

    visitor: str
