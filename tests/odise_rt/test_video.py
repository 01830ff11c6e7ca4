"""Videos made here with PyAV: frames in, overlay and JSON out, and what is wrong with those that cannot be used."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor, wait
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from odise_rt import InputError, OptionsError, Segmenter, VideoError, cli, video
from odise_rt.video import VideoReader, VideoWriter, segment_video
from tests.odise_rt.fake_bundle import colour_image

av = pytest.importorskip("av", reason="Requires: the package av (extra 'video')")

WORDS = "thing: red; green; stuff: blue; thing: white"


def moving(step: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Blue, with a red square that moves to the right and a green one that stays."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 2] = 255
    image[8:28, 4 + 4 * step : 24 + 4 * step] = (255, 0, 0)
    image[36:60, 60:90] = (0, 255, 0)
    return image


def make_video(path: Path, frames: list[np.ndarray], rate: int = 10, rotation: int = 0) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for pixels in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make_video(tmp_path / "clip.mp4", [moving(i) for i in range(8)])


def run(bundle: Path, *arguments: Any) -> int:
    return cli.main(
        ["segment", "--bundle", str(bundle), "--threads", "1", "-q", "--vocab", WORDS, *map(str, arguments)]
    )


def test_frames_are_read_in_order(clip: Path) -> None:
    with VideoReader(clip) as reader:
        assert reader.rate == 10
        frames = list(reader)
    assert [f.index for f in frames] == list(range(8))
    np.testing.assert_allclose([f.time for f in frames], np.arange(8) / 10, atol=1e-3)
    assert np.abs(frames[3].pixels.astype(int) - moving(3)).mean() < 12
    with VideoReader(clip, every=3) as reader:
        assert reader.rate == Fraction(10, 3)
        assert [f.index for f in reader] == [0, 3, 6]


def test_a_closed_reader_gives_no_frame(clip: Path) -> None:
    """FFmpeg itself ends the process where a closed container is read."""
    with VideoReader(clip) as reader:
        frames = iter(reader)
        assert next(frames).index == 0
    with pytest.raises(VideoError, match="was closed after frame 0"):
        next(frames)
    assert reader.rate == 10
    with pytest.raises(VideoError, match="was iterated over before"):
        list(reader)
    never_begun = VideoReader(clip)
    never_begun.close()
    with pytest.raises(VideoError, match="was closed before its first frame"):
        list(never_begun)


def test_a_frame_that_grows_too_large_is_no_damage(clip: Path) -> None:
    with VideoReader(clip) as reader:
        frames = iter(reader)
        next(frames)
        reader._max_pixels = 100
        with pytest.raises(VideoError, match="has frames of 96 x 64") as caught:
            next(frames)
    assert "broken" not in str(caught.value)


def test_a_reader_is_iterated_over_once(clip: Path) -> None:
    with VideoReader(clip) as reader:
        assert len(list(reader)) == 8
        with pytest.raises(VideoError, match="open another VideoReader"):
            list(reader)


def test_closing_waits_for_the_frame_that_another_thread_decodes(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, may_end = threading.Event(), threading.Event()
    upright = video._upright

    def slow(frame: Any) -> np.ndarray:
        decoding.set()
        assert may_end.wait(10)
        return upright(frame)

    monkeypatch.setattr(video, "_upright", slow)
    reader = VideoReader(clip)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(next, iter(reader))
        assert decoding.wait(10)
        closing = pool.submit(reader.close)
        assert not wait([closing], timeout=0.1).done
        may_end.set()
        assert first.result(10).pixels.shape == (64, 96, 3)
        closing.result(10)


@pytest.mark.parametrize("path", [None, b"clip.mp4", "a\0b"])
def test_what_is_no_path_is_said(path: Any) -> None:
    with pytest.raises(VideoError, match="expected a path"):
        VideoReader(path)


def test_a_path_is_no_reader(segmenter: Segmenter, clip: Path) -> None:
    with pytest.raises(InputError, match="came as str: expected an opened VideoReader"):
        next(segment_video(segmenter, str(clip), WORDS))  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers(clip: Path) -> None:
    with VideoReader(clip, every=np.int64(4)) as reader:  # type: ignore[arg-type]
        assert [frame.index for frame in reader] == [0, 4]


def test_things_keep_number_and_colour(segmenter: Segmenter, clip: Path) -> None:
    with VideoReader(clip) as reader:
        found = list(segment_video(segmenter, reader, WORDS))
    assert len(found) == 8
    for label in ("red", "green", "blue"):
        marks = {
            (s.track_id, colour)
            for f in found
            for s, colour in zip(f.result.segments, f.colours, strict=True)
            if s.label == label
        }
        assert len(marks) == 1, label
    boxes = [next(s.box for s in f.result.segments if s.label == "red") for f in found]
    assert boxes[-1][0] - boxes[0][0] >= 24, "the red square moved all the while"


def test_command_line(label_bundle: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o"
    assert run(label_bundle, clip, "--out", out, "--every", 2) == 0
    assert sorted(p.name for p in (out / "clip.frames").iterdir()) == [f"{i:06d}.json" for i in (0, 2, 4, 6)]
    data = json.loads((out / "clip.frames/000004.json").read_text())
    assert (data["frame"], data["time"]) == (4, pytest.approx(0.4, abs=1e-3))
    assert all(s["track_id"] >= 1 for s in data["segments"])
    with VideoReader(out / "clip.overlay.mp4") as reader:
        frames = list(reader)
    assert [f.index for f in frames] == [0, 1, 2, 3]
    np.testing.assert_allclose([f.time for f in frames], [0, 0.2, 0.4, 0.6], atol=2e-3)
    assert frames[0].pixels.shape == (448, 672, 3)
    assert "1 of 1 files segmented" in capsys.readouterr().out

    before = (out / "clip.overlay.mp4").stat().st_mtime_ns
    assert run(label_bundle, clip, "--out", out, "--every", 2, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["videos"] == [{"video": str(clip), "frames": 4, "files": [str(out / "clip.overlay.mp4")]}]
    assert (out / "clip.overlay.mp4").stat().st_mtime_ns == before, "finished videos are not done again"
    (out / "clip.frames/000004.json").unlink()
    assert run(label_bundle, clip, "--out", out, "--every", 2) == 0
    assert (out / "clip.overlay.mp4").stat().st_mtime_ns != before


def test_frames_of_an_earlier_run_do_not_stay(label_bundle: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    assert run(label_bundle, clip, "--out", out, "--format", "json,coco") == 0
    own = out / "clip.frames/000001.txt"
    own.write_text("a remark")
    assert run(label_bundle, clip, "--out", out, "--format", "json,coco", "--every", "4") == 0
    left = {p.relative_to(out).as_posix() for p in out.rglob("*.frames/*")}
    kept = {f"clip.frames/{i}.{ending}" for i in ("000000", "000004") for ending in ("json", "jpg")}
    assert left == kept | {"clip.frames/000001.txt"} | {f"panoptic/clip.frames/{i}.png" for i in ("000000", "000004")}


def test_annotations_come_with_the_pictures_they_are_of(label_bundle: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    Image.fromarray(colour_image()).save(tmp_path / "photo.png")
    assert run(label_bundle, clip, tmp_path / "photo.png", "--out", out, "--format", "coco,labelme,cvat") == 0
    coco = json.loads((out / "panoptic.json").read_text())
    assert [i["file_name"] for i in coco["images"]] == [f"clip.frames/{i:06d}.jpg" for i in range(8)] + ["photo.png"]
    for image, annotation in zip(coco["images"][:-1], coco["annotations"], strict=False):
        with Image.open(out / image["file_name"]) as picture:
            assert (picture.height, picture.width) == (image["height"], image["width"])
        assert (out / "panoptic" / annotation["file_name"]).is_file()
    labelme = out / "labelme/clip.frames/000003.json"
    assert (labelme.parent / json.loads(labelme.read_text())["imagePath"]).is_file()
    assert 'name="clip.frames/000007.jpg"' in (out / "cvat.xml").read_text()


def test_broken_videos_are_typed_errors(clip: Path, tmp_path: Path) -> None:
    content = clip.read_bytes()
    cases = {
        "missing.mp4": None,
        "empty.mp4": b"",
        "text.mp4": b"this is no video at all, only words" * 50,
        "no_index.mp4": content[: len(content) // 2],
        "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile {clip}\n".encode(),
    }
    for name, data in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(VideoError, match=name), VideoReader(tmp_path / name) as reader:
            list(reader)
    (tmp_path / "picture.mp4").write_bytes(b"")
    with pytest.raises(VideoError, match="megapixels"):
        VideoReader(clip, max_pixels=1000)
    with pytest.raises(OptionsError, match="every"):
        VideoReader(clip, every=0)


def test_broken_video_does_not_stop_the_others(
    label_bundle: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.mp4").write_bytes(clip.read_bytes()[:900])
    assert run(label_bundle, tmp_path / "broken.mp4", clip, "--out", tmp_path / "o") == 2
    assert "broken.mp4" in capsys.readouterr().err
    failed = json.loads((tmp_path / "o/failed.json").read_text())
    assert [f["kind"] for f in failed] == ["VideoError"]
    assert {p.name for p in (tmp_path / "o").glob("*.mp4")} == {"clip.overlay.mp4"}


def test_a_video_too_wide_for_the_encoder_does_not_stop_the_others(
    label_bundle: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = tmp_path / "a_wide.avi"
    with av.open(str(wide), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 20_000, 16, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(np.full((16, 20_000, 3), 200, np.uint8), format="rgb24")
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    assert run(label_bundle, wide, clip, "--out", tmp_path / "o") == 2
    assert "a_wide.overlay.mp4 of frames of 20000 x 16" in capsys.readouterr().err
    failed = json.loads((tmp_path / "o/failed.json").read_text())
    assert [(f["image"], f["kind"]) for f in failed] == [(str(wide), "VideoError")]
    assert {p.name for p in (tmp_path / "o").glob("*.mp4")} == {"clip.overlay.mp4"}


def test_a_name_too_long_for_its_results_is_that_videos_failure(
    label_bundle: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / f"{'a' * 250}.mp4"
    long.write_bytes(clip.read_bytes())
    assert run(label_bundle, long, clip, "--out", tmp_path / "o") == 2
    assert "too long for those of its results: rename it" in capsys.readouterr().err
    assert (tmp_path / "o" / "clip.overlay.mp4").is_file()


def test_video_that_ends_in_rubbish_leaves_no_half_overlay(label_bundle: Path, tmp_path: Path) -> None:
    """Damage in the middle of the data: MPEG-TS has no index that would refuse the file at once."""
    path = make_video(tmp_path / "clip.ts", [moving(i) for i in range(30)])
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    content[len(content) // 3 :] = rng.integers(0, 256, len(content) - len(content) // 3, np.uint8).tobytes()
    path.write_bytes(content)
    code = run(label_bundle, path, "--out", tmp_path / "o")
    assert code in (0, 2)
    overlays = list((tmp_path / "o").glob("*.mp4"))
    assert len(overlays) == (1 if code == 0 else 0), "as many as decoders call sound"
    for overlay in overlays:
        with VideoReader(overlay) as reader:
            assert list(reader)


def test_odd_sizes_and_changing_ones(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "odd.mp4", Fraction(30000, 1001)) as writer:
        writer.write(np.full((33, 47, 3), 200, np.uint8), 0.0)
        writer.write(np.full((40, 60, 3), 100, np.uint8), 0.04)
        writer.write(np.full((33, 47, 3), 50, np.uint8), 0.04)
    with VideoReader(tmp_path / "odd.mp4") as reader:
        frames = list(reader)
    assert [f.pixels.shape for f in frames] == [(34, 48, 3)] * 3
    assert abs(int(frames[2].pixels.mean()) - 50) < 4


def test_writer_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), VideoWriter(tmp_path / "x.mp4", Fraction(10)) as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8), 0.0)
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_writer_leaves_nothing_where_ffmpeg_fails(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "x.mp4", Fraction(10))

    def refuse(*_: object, **__: object) -> None:
        raise av.FFmpegError(1, "no muxer")

    writer._av = types.SimpleNamespace(FFmpegError=av.FFmpegError, open=refuse)
    with pytest.raises(VideoError, match="no muxer"), writer:
        pytest.fail("it did not open")
    assert list(tmp_path.iterdir()) == []

    with pytest.raises(VideoError, match="no muxer"), VideoWriter(tmp_path / "x.mp4", Fraction(10)) as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8), 0.0)
        writer._stream = types.SimpleNamespace(encode=refuse)  # what is held back cannot be encoded
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_no_error_of_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(video, "atomic_writer", lambda _: contextlib.nullcontext(Full()))
    with pytest.raises(OSError, match="No space"), VideoWriter(tmp_path / "x.mp4", Fraction(10)) as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8), 0.0)


def test_memory_does_not_grow_with_the_length(segmenter: Segmenter, tmp_path: Path) -> None:
    """Frames are let go one by one: 24 frames hold no more than 8 do."""
    import tracemalloc

    peaks = []
    for count in (8, 24):
        path = make_video(tmp_path / f"{count}.mp4", [moving(i % 8) for i in range(count)])
        with VideoReader(path) as reader, VideoWriter(tmp_path / "o.mp4", reader.rate) as writer:
            tracemalloc.start()
            for found in segment_video(segmenter, reader, WORDS):
                writer.write(found.overlay(), found.frame.time)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_missing_package_is_named(clip: Path) -> None:
    code = f"""
import sys
sys.modules["av"] = None
from odise_rt.video import VideoReader
from odise_rt import MissingPackageError
try:
    VideoReader({str(clip)!r})
except MissingPackageError as exc:
    print(exc)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "pip install 'odise_rt[video]'" in done.stdout
