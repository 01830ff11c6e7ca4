"""Segments followed from frame to frame, so that numbers and colours in a video stay with what they mark.

A thing is the same one if it has the same class and its mask overlaps that of a track, best overlaps first; a stuff
class is one track as long as it is seen. Classes are told apart by their place in the vocabulary, which is the same for
all frames of a video: names may occur twice. Tracks that were not seen for a while are forgotten, so memory is bounded.
There is no network and no motion model in it: things that move farther than their own size between two frames, or
change their class, get a new number.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from odise_rt.results import Box, PanopticResult, Segment
from odise_rt.visualize import Colour, class_colour, unknown_colour

MIN_IOU = 0.2
"""Least intersection over union of a thing with its track."""
PATIENCE = 30
"""Frames for which a track that is not seen is remembered."""
MAX_LOST = 256
"""Tracks that are remembered at most while they are not seen."""


@dataclass
class _Track:
    id: int
    class_index: int
    isthing: bool
    number: int
    """Tells tracks of one class apart by colour; the smallest that is free when the track begins."""
    last_seen: int
    box: Box
    bits: np.ndarray
    """uint8: the mask inside its box, row by row, eight pixels a byte."""
    area: int


class SegmentTracker:
    """Gives the segments of one video's frames track ids and colours. Not for use by several threads at once."""

    def __init__(self, min_iou: float = MIN_IOU, patience: int = PATIENCE) -> None:
        """Start a video.

        Args:
            min_iou: least intersection over union of a thing with its track, in (0, 1].
            patience: frames for which a track that is not seen is remembered, at least 0.
        """
        self._min_iou = min_iou
        self._patience = patience
        self._tracks: dict[int, _Track] = {}
        self._frame = -1
        self._next_id = 1
        self._size: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Number of tracks that are remembered."""
        return len(self._tracks)

    def update(self, result: PanopticResult) -> PanopticResult:
        """The next frame's result, of the same vocabulary as those before, with a ``track_id`` in each segment."""
        self._frame += 1
        if self._size != result.size:  # masks of another size cannot be compared; stuff goes on
            self._size = result.size
            self._tracks = {t.id: t for t in self._tracks.values() if not t.isthing}
        matched = self._match(result)
        for segment in result.segments:
            track = matched.get(segment.id)
            if track is None:
                kind, number = segment.class_index, self._free_number(segment.class_index)
                track = _Track(self._next_id, kind, segment.isthing, number, 0, segment.box, np.zeros(0, np.uint8), 0)
                self._next_id += 1
                self._tracks[track.id] = track
                matched[segment.id] = track
            self._see(track, segment, result)
        self._forget()
        segments = tuple(dataclasses.replace(s, track_id=matched[s.id].id) for s in result.segments)
        return dataclasses.replace(result, segments=segments)

    def colours(self, result: PanopticResult) -> list[Colour]:
        """A colour for each segment of the latest :meth:`update`, the same in every frame."""
        colours = []
        for segment in result.segments:
            assert segment.track_id is not None, "the result comes from update"
            number = self._tracks[segment.track_id].number
            colours.append(unknown_colour(number) if segment.unknown else class_colour(segment.class_index, number))
        return colours

    def _match(self, result: PanopticResult) -> dict[int, _Track]:
        """Segment id to the track that it goes on with."""
        by_class: dict[int, list[Segment]] = {}
        for segment in result.segments:
            by_class.setdefault(segment.class_index, []).append(segment)
        matched: dict[int, _Track] = {}
        pairs = []
        for track in self._tracks.values():
            candidates = by_class.get(track.class_index)
            if candidates is None:
                continue
            if not track.isthing:
                matched[candidates[0].id] = track
                continue
            shared = _shared_pixels(track, result.segment_map, len(result.segments))
            for segment in candidates:
                iou = shared[segment.id] / max(1, track.area + segment.area - shared[segment.id])
                if iou >= self._min_iou:
                    pairs.append((-iou, -track.last_seen, track.id, segment.id))
        taken: set[int] = set()
        for _, _, track_id, segment_id in sorted(pairs):
            if track_id not in taken and segment_id not in matched:
                taken.add(track_id)
                matched[segment_id] = self._tracks[track_id]
        return matched

    def _see(self, track: _Track, segment: Segment, result: PanopticResult) -> None:
        left, top, right, bottom = segment.box
        track.last_seen, track.box, track.area = self._frame, segment.box, segment.area
        if track.isthing:
            track.bits = np.packbits(result.segment_map[top:bottom, left:right] == segment.id)

    def _free_number(self, class_index: int) -> int:
        used = {t.number for t in self._tracks.values() if t.class_index == class_index}
        return next(n for n in range(len(used) + 1) if n not in used)

    def _forget(self) -> None:
        lost = sorted((t.last_seen, t.id) for t in self._tracks.values() if t.last_seen != self._frame)
        too_many = max(0, len(lost) - MAX_LOST)
        for rank, (last_seen, identifier) in enumerate(lost):
            if rank < too_many or self._frame - last_seen > self._patience:
                del self._tracks[identifier]


def _shared_pixels(track: _Track, segment_map: np.ndarray, count: int) -> np.ndarray:
    """Pixels of a track's last mask that each segment id has now, int64 (count + 1,)."""
    left, top, right, bottom = track.box
    height, width = bottom - top, right - left
    inside = np.unpackbits(track.bits, count=height * width).reshape(height, width).astype(bool)
    return np.bincount(segment_map[top:bottom, left:right][inside], minlength=count + 1)
