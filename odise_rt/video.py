"""Videos in, segmented frames and an overlay video out (extra ``video``: PyAV).

Frames are decoded, segmented and encoded one at a time, so memory does not grow with the length. A file is opened as
the container that it is, by its own bytes alone: playlists and other formats that name further files are refused.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from odise_rt.errors import InputError, MissingPackageError, OptionsError, VideoError, first_line
from odise_rt.files import atomic_writer, given_path
from odise_rt.options import DEFAULT_MAX_PIXELS, SegmentOptions, is_whole
from odise_rt.results import PanopticResult
from odise_rt.tracking import SegmentTracker
from odise_rt.visualize import Colour
from odise_rt.vocabulary import Vocabulary

if TYPE_CHECKING:
    from odise_rt.segmenter import Segmenter

_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,ogg,flv"
_TICKS = 60_000
"""Units of an overlay's time stamps in a second: holds every common frame rate, and MPEG-4's bound of 65,535."""
_DEFAULT_RATE = Fraction(25)


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded frame."""

    index: int
    """Position in the video, counted from 0 over all frames."""
    time: float
    """Seconds from the start."""
    pixels: np.ndarray
    """uint8 (h, w, 3) RGB, upright."""


@dataclass(frozen=True, eq=False)
class FrameResult:
    """One segmented frame."""

    frame: Frame
    result: PanopticResult
    """The frame's result; its segments have track ids."""
    colours: list[Colour]
    """One for each segment, the same for a track in every frame."""

    def overlay(self) -> np.ndarray:
        """The frame with its segments drawn over it, uint8 (h, w, 3); without a legend, whose width would change."""
        return np.asarray(self.result.overlay(self.frame.pixels, legend=False, colours=self.colours))


class VideoReader:
    """The frames of one video. A context manager; iterate over it once, before it is closed."""

    def __init__(self, path: str | os.PathLike[str], every: int = 1, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        """Open a video.

        Args:
            path: the file.
            every: give each n-th frame, beginning with the first; the others are decoded and passed over.
            max_pixels: videos of larger frames are refused.

        Raises:
            VideoError: it is no video, is broken, or its frames are too large.
            OptionsError: ``every`` is no whole number of at least 1.
            MissingPackageError: PyAV is not installed.
        """
        if not is_whole(every) or every < 1:
            raise OptionsError(f"every is {every!r:.60}: expected a whole number of at least 1")
        self.path = given_path(path, "the video", VideoError)
        self._av = _import_av()
        self._every = int(every)
        self._max_pixels = max_pixels
        self._broken = (self._av.FFmpegError, OSError, ValueError)  # what FFmpeg makes of damage, or of seeks in it
        self._resources = contextlib.ExitStack()
        self._using = threading.Lock()  # FFmpeg crashes where a container is closed while it is read
        self._closed = self._begun = False
        try:
            file = self._resources.enter_context(self.path.open("rb"))
        except OSError as exc:
            raise VideoError(f"cannot read the video {self.path} ({exc.strerror}): check the path") from exc
        try:
            self._container = self._resources.enter_context(
                self._av.open(file, options={"format_whitelist": _CONTAINERS, "protocol_whitelist": ""})
            )
            if not self._container.streams.video:
                raise VideoError(f"{self.path} holds no pictures: expected a video such as MP4, MKV, WebM, AVI or MOV")
            self._stream = self._container.streams.video[0]
            self._stream.thread_type = "AUTO"
            self._check_size(self._stream.width or 1, self._stream.height or 1)
            rate = self._stream.average_rate or self._stream.guessed_rate or _DEFAULT_RATE
            self._rate = Fraction(rate) / self._every
        except (VideoError, *self._broken) as exc:
            self.close()
            if isinstance(exc, VideoError):
                raise
            raise VideoError(f"{self.path} is not a video that can be read ({first_line(exc)}): {_EXPECTED}") from exc
        except BaseException:
            self.close()
            raise

    @property
    def rate(self) -> Fraction:
        """Frames in a second that this reader gives, 25 / ``every`` if the file does not say."""
        return self._rate

    def __iter__(self) -> Iterator[Frame]:
        """Frames in the order in which they are shown.

        Raises:
            VideoError: the data is broken, a frame is too large, or there is no frame; or the reader was closed, or
                iterated over before.
        """
        if self._begun:
            raise VideoError(f"{self.path} was iterated over before: open another VideoReader to begin anew")
        self._begun = True
        return self._frames()

    def _frames(self) -> Iterator[Frame]:
        decoded, index, start = None, -1, None
        while True:
            with self._using:
                if self._closed:
                    raise VideoError(f"{self.path} was closed {_where(index)}: take its frames before that")
                try:
                    decoded = decoded or enumerate(self._container.decode(self._stream))
                    index, frame = next(decoded, (index, None))
                    if frame is None:
                        break
                    if index % self._every:
                        continue
                    self._check_size(frame.width, frame.height)
                    seconds = frame.time if frame.time is not None else float(index / (self._rate * self._every))
                    pixels = _upright(frame)
                except VideoError:  # which is a ValueError, too
                    raise
                except self._broken as exc:
                    raise VideoError(
                        f"{self.path} is broken {_where(index)} ({first_line(exc)}): repair or download it again"
                    ) from exc
            start = seconds if start is None else start
            yield Frame(index, seconds - start, pixels)
        if index < 0:
            raise VideoError(f"{self.path} holds no frame that can be decoded: repair or download it again")

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            raise VideoError(
                f"{self.path} has frames of {width} x {height} = {width * height / 1e6:.1f} megapixels, at most "
                f"{self._max_pixels / 1e6:.1f} are accepted: scale it down, or raise max_pixels"
            )

    def close(self) -> None:
        """Close the file, once the frame that is being decoded is. Safe to call twice."""
        with self._using:
            self._closed = True
            self._resources.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def segment_video(
    segmenter: Segmenter,
    reader: VideoReader,
    vocabulary: Vocabulary | str,
    options: SegmentOptions | None = None,
    tracker: SegmentTracker | None = None,
) -> Iterator[FrameResult]:
    """Segment the frames of a video, one after the other, with track ids and colours that stay.

    Args:
        segmenter: a loaded one.
        reader: the opened video.
        vocabulary: the classes.
        options: thresholds, sizes and outputs.
        tracker: one for each video; ``None``: with its default settings.

    Raises:
        InputError: the reader is none.
        VideoError: as iterating over the reader does.
    """
    if not isinstance(reader, VideoReader):
        raise InputError(f"the video came as {type(reader).__name__}: expected an opened VideoReader")
    tracker = tracker or SegmentTracker()
    words = Vocabulary.parse(vocabulary) if isinstance(vocabulary, str) else vocabulary
    for frame in reader:
        result = tracker.update(segmenter.segment(frame.pixels, words, options))
        yield FrameResult(frame, result, tracker.colours(result))


class VideoWriter:
    """Writes an MP4 (H.264, or MPEG-4 where there is no encoder for that): a context manager.

    The file appears when the block ends without an error.

    Raises:
        VideoError: the encoder failed.
    """

    def __init__(self, path: str | os.PathLike[str], rate: Fraction) -> None:
        """Prepare to write.

        Args:
            path: where the file will be; its folder must exist.
            rate: frames in a second, for the encoder's planning; frames carry their own time.
        """
        self._path = Path(path)
        self._rate = rate
        self._av = _import_av()
        self._stream: Any = None
        self._last = -1

    def __enter__(self) -> VideoWriter:
        with contextlib.ExitStack() as stack, self._encoding():
            file = stack.enter_context(atomic_writer(self._path))
            self._container = self._av.open(file, "w", format="mp4")
            stack.push(self._close)
            stack.push(self._flush)
            self._resources = stack.pop_all()
        return self

    def write(self, pixels: np.ndarray, seconds: float) -> None:
        """Add a frame, uint8 (h, w, 3) RGB; later ones are brought to the size of the first.

        Raises:
            VideoError: the encoder does not take frames of this size, or failed.
        """
        pixels = _even(pixels)
        with self._encoding(f" of frames of {pixels.shape[1]} x {pixels.shape[0]}"):
            if self._stream is None:
                self._stream = self._open_stream(pixels.shape[1], pixels.shape[0])
            frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if (frame.width, frame.height) != (self._stream.width, self._stream.height):
                frame = frame.reformat(width=self._stream.width, height=self._stream.height)
            self._last = max(round(seconds * _TICKS), self._last + 1)  # time stamps must grow
            frame.pts, frame.time_base = self._last, Fraction(1, _TICKS)
            for packet in self._stream.encode(frame):
                self._container.mux(packet)

    def _open_stream(self, width: int, height: int) -> Any:
        codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
        stream = self._container.add_stream(codec, rate=self._rate.limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, _TICKS)
        if codec == "libx264":
            stream.options = {"crf": "20", "preset": "veryfast"}
        else:
            stream.bit_rate = width * height * 4
        return stream

    def _flush(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what the encoder holds back."""
        if kind is None and self._stream is not None:
            with self._encoding():
                for packet in self._stream.encode():
                    self._container.mux(packet)

    def _close(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the container. After an error, that error is raised, and not what follows from it."""
        with self._encoding() if kind is None else contextlib.suppress(self._av.FFmpegError):
            self._container.close()

    @contextlib.contextmanager
    def _encoding(self, what: str = "") -> Iterator[None]:
        """Turn errors of FFmpeg into errors of this video."""
        try:
            yield
        except self._av.FFmpegError as exc:
            raise VideoError(
                f"cannot write the video {self._path}{what} ({first_line(exc)}): scale the video down, as encoders "
                "bound the sides of frames (H.264: 16,384 pixels), or write no overlay of it"
            ) from exc

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.__exit__(kind, error, trace)


def _where(index: int) -> str:
    return f"after frame {index}" if index >= 0 else "before its first frame"


def _even(pixels: np.ndarray) -> np.ndarray:
    """The frame with even sides, as encoders need them: the last row or column is repeated."""
    height, width = pixels.shape[:2]
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return np.ascontiguousarray(pixels)


def _upright(frame: Any) -> np.ndarray:
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # counterclockwise, by the file's display matrix
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _import_av() -> Any:
    try:
        import av
    except ImportError as exc:
        raise MissingPackageError("videos need the package av (PyAV): pip install 'odise_rt[video]'") from exc
    return av


_EXPECTED = "expected MP4, MOV, MKV, WebM, AVI, MPEG, WMV or OGV"
