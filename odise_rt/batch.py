"""Many images and videos: what each becomes, what is done already, and the documents of the whole run.

A record (a dict of plain JSON types, one line of :class:`odise_rt.run_log.RunLog`) says what became of an image, a
frame or a video. Its key says all that its files depend on: the file (path, size, time of change), the bundle, the
words, the options, the engine and the formats. Only what has no record with the right key is worked on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odise_rt.errors import ImageError, OutOfMemoryError, VideoError
from odise_rt.files import atomic_writer, write_json
from odise_rt.inputs import Input, result_names
from odise_rt.options import SegmentOptions
from odise_rt.result_files import FAILED_FILE, Written, check_classes, write_coco, write_cvat, write_result
from odise_rt.run_log import RunLog
from odise_rt.version import __version__
from odise_rt.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np

    from odise_rt.results import PanopticResult
    from odise_rt.segmenter import Segmenter

WRITERS = 2
"""Threads that draw and write results."""
IN_FLIGHT = 5
"""Images in memory at a time: one read ahead, one in the network, the others being written."""
Record = dict[str, Any]

_SKIPPED = (ImageError, VideoError, OutOfMemoryError)
"""Errors that end one input; the others go on."""


@dataclass(frozen=True)
class Job:
    """What to do with every image and video of a run.

    Raises:
        VocabularyError: with the option ``unknown``, a class has that name.
        OptionsError: a format cannot hold so many classes.
    """

    vocabulary: Vocabulary
    options: SegmentOptions
    formats: tuple[str, ...]
    folder: Path
    """Where the results go; it must exist."""
    _: KW_ONLY
    explain: bool = False
    """Whether the JSON holds each segment's best names, as many as ``options.explain`` says."""
    tolerance: float = 1.0
    """How far in pixels polygons may leave the masks' outlines."""
    every: int = 1
    """Segment every n-th frame of a video."""
    engine: str = ""
    """The device and engine that were asked for: of another precision, results differ."""

    def __post_init__(self) -> None:
        check_classes(self.formats, len(self.classes))  # better told before the first image

    @property
    def classes(self) -> Vocabulary:
        """The vocabulary of the results."""
        return self.vocabulary.result_classes(self.options.unknown)

    def keys(self, inputs: Sequence[Input], bundle_digest: str) -> dict[str, str]:
        """The key of each input's record, by name: a hash of what its results depend on, and one of what is written."""
        options = dataclasses.asdict(self.options)
        del options["windows_per_batch"], options["max_pixels"]  # they do not change results
        written = [options.pop("outputs"), options.pop("explain"), self.formats, self.explain, self.tolerance]
        common: list[Any] = [__version__, bundle_digest, self.vocabulary.content_hash, options, self.every, self.engine]
        return {item.name: f"{_hash([common, *_identity(item.path)])}-{_hash(written)}" for item in inputs}

    def pending(self, inputs: Sequence[Input], keys: dict[str, str], log: RunLog) -> list[Input]:
        """The inputs that are not done: no record with their key, or a file of it is missing."""
        return [item for item in inputs if not self._is_done(item, keys[item.name], log)]

    def _is_done(self, item: Input, key: str, log: RunLog) -> bool:
        record = log.finished_record(item.name, key)
        if record is None or not {"result", "frames"} & set(record):
            return False
        return all(log.is_done(name, key) for name in frame_names(record))


def _identity(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError:  # the failure is told when the file is opened
        return str(path), -1, -1
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def _hash(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _same_results(key: str, other: str) -> bool:
    """Whether two keys stand for the same results, perhaps written in other formats."""
    return key.partition("-")[0] == other.partition("-")[0]


def segment_inputs(
    segmenter: Segmenter, job: Job, inputs: Sequence[Input], keys: Mapping[str, str]
) -> Iterator[Record]:
    """Segment one input after the other, while the next image is decoded and the last results are written.

    Drawing and packing a picture takes longer than a GPU needs for the next image, so both ends have threads of their
    own. At most ``IN_FLIGHT`` images are in memory.

    Yields:
        The records of :func:`segment_input`, in the order of the inputs.
    """
    with ThreadPoolExecutor(1) as readers, ThreadPoolExecutor(WRITERS) as writers:
        ahead: deque[Future[np.ndarray] | None] = deque()
        written: deque[Future[Record]] = deque()
        try:
            for number, item in enumerate(inputs):
                while len(ahead) < 2 and number + len(ahead) < len(inputs):
                    following = inputs[number + len(ahead)]
                    ahead.append(None if following.is_video else readers.submit(_load, job, following))
                pixels = ahead.popleft()
                if pixels is None:
                    while written:
                        yield written.popleft().result()
                    yield from segment_input(segmenter, job, item, keys[item.name])
                    continue
                common = _common(item, keys[item.name])
                try:
                    loaded = pixels.result()
                    result = segmenter.segment(loaded, job.vocabulary, job.options)
                except _SKIPPED as exc:
                    written.append(_ready(_failed(common, exc)))
                else:
                    written.append(writers.submit(_write_image, result, loaded, job, item, common))
                while written and (written[0].done() or len(written) > IN_FLIGHT - 2):
                    yield written.popleft().result()
            while written:
                yield written.popleft().result()
        except GeneratorExit:  # nobody listens any more
            raise
        except BaseException:  # stopped: what has begun is finished, and told before the reason
            for begun in [entry for entry in written if not entry.cancel()]:
                yield begun.result()
            raise
        finally:  # what has not begun is not begun
            for future in (*ahead, *written):
                if future is not None:
                    future.cancel()


def _ready(record: Record) -> Future[Record]:
    """A result for which no thread is needed: that none can be started may be what failed."""
    future: Future[Record] = Future()
    future.set_result(record)
    return future


def segment_input(segmenter: Segmenter, job: Job, item: Input, key: str) -> Iterator[Record]:
    """Segment one image or video and write its files.

    Yields:
        A record for each frame of a video, and last the record of the input itself, with ``error`` if it cannot be
        used.
    """
    common = _common(item, key)
    try:
        if item.is_video:
            with _names_that_fit(item):
                yield from _segment_video(segmenter, job, item, common)
        else:
            pixels = _load(job, item)
            yield _write_image(segmenter.segment(pixels, job.vocabulary, job.options), pixels, job, item, common)
    except _SKIPPED as exc:
        yield _failed(common, exc)


@contextlib.contextmanager
def _names_that_fit(item: Input) -> Iterator[None]:
    """Make a name that is too long for its results an error of this input. Other errors of a disk end the run."""
    try:
        yield
    except OSError as exc:
        if exc.errno != errno.ENAMETOOLONG:
            raise
        raise ImageError(f"{item.path}: its name is too long for those of its results: rename it") from exc


def _common(item: Input, key: str) -> Record:
    return {"name": item.name, "key": key, "image": str(item.path)}


def _failed(common: Record, exc: Exception) -> Record:
    return common | {"error": str(exc), "kind": type(exc).__name__}


def _load(job: Job, item: Input) -> np.ndarray:
    from odise_rt.preprocessing import load_image

    return load_image(item.path, job.options.max_pixels)


def _write_image(result: PanopticResult, pixels: np.ndarray, job: Job, item: Input, common: Record) -> Record:
    try:
        with _names_that_fit(item):
            written = write_result(
                result,
                pixels,
                item.path,
                job.folder,
                item.name,
                job.formats,
                explain=job.explain,
                tolerance=job.tolerance,
                file_name=item.file_name,
            )
    except ImageError as exc:
        return _failed(common, exc)
    return common | _written(written) | {"result": result.to_dict(explain=job.explain)}


def _segment_video(segmenter: Segmenter, job: Job, item: Input, common: Record) -> Iterator[Record]:
    from odise_rt.video import VideoReader, VideoWriter, segment_video

    overlay, formats = "overlay" in job.formats, [f for f in job.formats if f != "overlay"]
    target = f"{item.name}.overlay.mp4"
    (job.folder / target).parent.mkdir(parents=True, exist_ok=True)
    frames, files = 0, {}
    with VideoReader(item.path, job.every, job.options.max_pixels) as reader, contextlib.ExitStack() as stack:
        writer = stack.enter_context(VideoWriter(job.folder / target, reader.rate)) if overlay else None
        for found in segment_video(segmenter, reader, job.vocabulary, job.options):
            frames += 1
            if writer:
                writer.write(found.overlay(), found.frame.time)
            name = frame_name(item.name, found.frame.index)
            picture = job.folder / _picture_name(name)
            extra = {"video": str(item.path), "frame": found.frame.index, "time": round(found.frame.time, 6)}
            written = write_result(
                found.result,
                found.frame.pixels,
                picture,
                job.folder,
                name,
                formats,
                explain=job.explain,
                tolerance=job.tolerance,
                extra=extra,
            )
            if {"coco", "labelme", "cvat"} & set(formats):  # annotations are of pictures
                written.files[_picture_name(name)] = _save_frame(picture, found.frame.pixels)
            of_frame = common | {"name": name, **extra}
            yield of_frame | _written(written) | {"result": found.result.to_dict(explain=job.explain)}
    if overlay:
        files[target] = (job.folder / target).stat().st_size
    yield common | {"files": files, "frames": frames, "every": job.every}


def _picture_name(frame: str) -> str:
    return f"{frame}.jpg"


def _save_frame(path: Path, pixels: Any) -> int:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as file:
        Image.fromarray(pixels).save(file, format="JPEG", quality=95)
    return path.stat().st_size


def _written(written: Written) -> Record:
    record: Record = {"files": written.files}
    if written.coco is not None:
        record["coco"] = written.coco
    if written.cvat is not None:
        record["cvat"] = written.cvat
    return record


def frame_name(video: str, index: int) -> str:
    """Stem of the results of one frame."""
    return f"{_frames_folder(video)}/{index:06d}"


def _frames_folder(video: str) -> str:
    return f"{video}.frames"


def settle_earlier(log: RunLog, record: Record) -> Record:
    """Deal with the files that an earlier run wrote for the same input, and give the record to log.

    Files in formats that this run does not write are removed if words, options, bundle or input have changed. If the
    results are the same, the files stay and are listed as the record's ``kept``. The pictures of ``panoptic.json``, a
    document of a whole run, stay in any case.

    Args:
        log: has the earlier record, if there is one.
        record: of what was done now.
    """
    name = record["name"]
    if name not in log:
        return record
    earlier = log.read(name)
    left = {file: size for file, size in _files(earlier).items() if file not in record.get("files", ())}
    if _same_results(earlier["key"], record["key"]):
        return record | ({"kept": left} if left else {})
    for file in {n for n in result_names(name) if not n.startswith("panoptic/")} & left.keys():
        with contextlib.suppress(FileNotFoundError):
            if (log.folder / file).stat().st_size == left[file]:  # else it is somebody else's by now
                (log.folder / file).unlink()
    return record


def _files(record: Record) -> dict[str, int]:
    """Every file that a record lists, with its size in bytes."""
    return {**record.get("kept", {}), **record.get("files", {})}


def remove_stale_frames(log: RunLog, inputs: Iterable[Input], keys: Mapping[str, str]) -> None:
    """Remove the files of frames that an earlier run with other options wrote for these videos and this one did not."""
    folders = {_frames_folder(item.name): keys[item.name] for item in inputs if item.is_video}
    for name in log.names() if folders else ():
        key = folders.get(name.rpartition("/")[0])
        if key is not None and log.find(name, key) is None:
            for file in {*result_names(name), _picture_name(name)} & _files(log.read(name)).keys():
                (log.folder / file).unlink(missing_ok=True)


def frame_names(record: Record) -> Iterator[str]:
    """Names of the frames of a video's record; none for an image."""
    for number in range(record.get("frames", 0)):
        yield frame_name(record["name"], number * record["every"])


def finished(log: RunLog, inputs: Iterable[Input], keys: dict[str, str]) -> Iterator[Record]:
    """The records of all images and frames of this run that were segmented, in the order of the inputs."""
    for item in inputs:
        record = log.find(item.name, keys[item.name])
        if record is None or "error" in record:
            continue
        if "frames" in record:
            yield from (log.read(name) for name in frame_names(record))
        else:
            yield record


def failures(log: RunLog, inputs: Iterable[Input], keys: dict[str, str]) -> list[Record]:
    """``image``, ``error`` and ``kind`` of every input that could not be used."""
    records = (log.find(item.name, keys[item.name]) for item in inputs)
    return [{k: r[k] for k in ("image", "error", "kind")} for r in records if r and "error" in r]


def write_documents(job: Job, log: RunLog, inputs: Sequence[Input], keys: dict[str, str]) -> list[Record]:
    """Write what is about the whole run: ``panoptic.json``, ``cvat.xml``, and ``failed.json`` if anything failed.

    Returns:
        The :func:`failures`.
    """
    if "coco" in job.formats:
        write_coco(job.folder, lambda: (r["coco"] for r in finished(log, inputs, keys)), job.classes)
    if "cvat" in job.formats:
        write_cvat(job.folder, (r["cvat"] for r in finished(log, inputs, keys)), job.classes)
    failed = failures(log, inputs, keys)
    if failed:
        write_json(job.folder / FAILED_FILE, failed)
    else:
        (job.folder / FAILED_FILE).unlink(missing_ok=True)
    return failed
