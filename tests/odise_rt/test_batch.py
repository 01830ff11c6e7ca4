"""Batches as they are interrupted: what is done stays done, and the documents of the whole are right after a resume."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from odise_rt import OptionsError, Segmenter, batch, cli, rle
from odise_rt.batch import Job, segment_inputs
from odise_rt.bundle import file_sha256
from odise_rt.errors import OutOfMemoryError
from odise_rt.inputs import Input, find_inputs
from odise_rt.options import SegmentOptions
from odise_rt.result_files import FORMATS
from odise_rt.run_log import FILE_NAME, RunLog
from odise_rt.vocabulary import Vocabulary
from tests.odise_rt.fake_bundle import colour_image

ROOT = Path(__file__).parents[2]
WORDS = "red; green; stuff: blue; white"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(colour_image(60 + i, 96)).save(folder / f"p{i}.png")
    return folder


def command(bundle: Path, *arguments: Any) -> list[str]:
    return ["segment", "--bundle", str(bundle), "--threads", "1", "-q", "--vocab", WORDS, *map(str, arguments)]


def digest_of(folder: Path) -> dict[str, bytes]:
    """Every result's content, without times."""
    content = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in (FILE_NAME, ".run.lock"):
            data = path.read_bytes()
            if path.suffix == ".json" and "facts" in (document := json.loads(data)):
                del document["facts"]["seconds"], document["facts"]["stages"]  # known words need no text encoder
                data = json.dumps(document).encode()
            content[path.relative_to(folder).as_posix()] = data
    return content


def changes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.rglob("p[0-9].json")}


# ---- resuming --------------------------------------------------------------------------------------------------------


def test_finished_files_are_not_done_again(
    label_bundle: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = command(label_bundle, photos, "--out", tmp_path / "o", "--format", "json,coco")
    assert cli.main(run) == 0
    before = changes(tmp_path / "o")
    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, "load", lambda *args, **kwargs: pytest.fail("nothing is left to do"))
        assert cli.main(run) == 0
    assert "6 of them had been done before" in capsys.readouterr().out
    assert changes(tmp_path / "o") == before

    Image.fromarray(colour_image(70, 96)).save(photos / "p2.png")  # one changes,
    (tmp_path / "o/p4.json").unlink()  # the result of one is lost,
    (tmp_path / "o/p5.json").write_text("{")  # that of one is cut short,
    Image.fromarray(colour_image(50, 96)).save(photos / "p9.png")  # and one is new
    assert cli.main(run) == 0
    after = changes(tmp_path / "o")
    assert {n for n in after if after[n] != before.get(n)} == {"p2.json", "p4.json", "p5.json", "p9.json"}
    coco = json.loads((tmp_path / "o/panoptic.json").read_text())
    assert [Path(i["file_name"]).stem for i in coco["images"]] == ["p0", "p1", "p2", "p3", "p4", "p5", "p9"]
    assert [i["id"] for i in coco["images"]] == [a["image_id"] for a in coco["annotations"]] == [1, 2, 3, 4, 5, 6, 7]
    assert coco["images"][2]["height"] == 70


def test_hashes_are_compared_once_and_only_where_there_is_work(
    new_bundle: Callable[[], Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = new_bundle()
    run = command(bundle, photos / "p0.png", "--out", tmp_path / "o", "--format", "json")
    tokenizer = bundle / "tokenizer.json"
    sound = tokenizer.read_bytes()
    tokenizer.write_bytes(sound + b" ")
    assert cli.main(run) == 1
    assert "tokenizer.json was altered" in capsys.readouterr().err
    assert cli.main([*run, "--no-verify"]) == 0
    assert cli.main(run) == 0, "nothing is left to do"
    tokenizer.write_bytes(sound)
    with mock.patch("odise_rt.bundle.file_sha256", wraps=file_sha256) as compared:
        assert cli.main([*run, "--overwrite"]) == 0
    files = [call.args[0].name for call in compared.call_args_list]
    assert files.count("tokenizer.json") == 1


@pytest.mark.parametrize(
    "change",
    [
        ["--unknown", "0.5"],
        ["--vocab", "car"],
        ["--format", "json,rle"],
        ["--explain"],
        ["--overwrite"],
        ["--device", "cpu"],
    ],
)
def test_other_options_do_everything_again(label_bundle: Path, photos: Path, tmp_path: Path, change: list[str]) -> None:
    run = command(label_bundle, photos, "--out", tmp_path / "o", "--format", "json")
    assert cli.main(run) == 0
    before = changes(tmp_path / "o")
    assert cli.main([*run, *change]) == 0
    after = changes(tmp_path / "o")
    assert all(after[name] != before[name] for name in before)


def test_what_is_left_of_another_format_is_right_or_gone(label_bundle: Path, photos: Path, tmp_path: Path) -> None:
    """Else an overlay of other words would lie beside the results."""
    out, photo = tmp_path / "o", photos / "p0.png"

    def run(formats: str, *arguments: str) -> set[str]:
        assert cli.main([*command(label_bundle, photo, "--out", out, "--format", formats), *arguments]) == 0
        return {p.relative_to(out).as_posix() for p in out.rglob("*.*") if not p.name.startswith((".", "run."))}

    assert run("overlay,rle,coco") == {"p0.overlay.png", "p0.rle.json", "panoptic.json", "panoptic/p0.png"}
    overlay = (out / "p0.overlay.png").read_bytes()
    found = run("json,semantic,labelme", "--explain")
    assert found >= {"p0.overlay.png", "p0.rle.json", "p0.json", "p0.semantic.png"}, "the same words: all is right"
    assert (out / "p0.overlay.png").read_bytes() == overlay
    (out / "p0.rle.json").write_text("[]")
    # Other words: also what an earlier run than the last one wrote goes, but neither what somebody else has written
    # since, nor the document of a run with its pictures.
    assert run("png", "--vocab", "car") == {"p0.panoptic.png", "p0.rle.json", "panoptic.json", "panoptic/p0.png"}
    photo.write_bytes(photo.read_bytes()[:100])
    assert cli.main(command(label_bundle, photo, "--out", out, "--format", "png")) == 2
    assert not (out / "p0.panoptic.png").exists(), "of a picture that is no longer there"


def test_two_runs_may_share_a_folder(label_bundle: Path, photos: Path, tmp_path: Path) -> None:
    """The documents are of the files that the command names, whatever else lies in the folder."""
    for name in ("p0", "p1"):
        run = command(label_bundle, photos / f"{name}.png", "--out", tmp_path / "o", "--format", "json,coco")
        assert cli.main(run) == 0
    coco = json.loads((tmp_path / "o/panoptic.json").read_text())
    assert [i["file_name"] for i in coco["images"]] == ["p1.png"]
    assert (tmp_path / "o/p0.json").is_file()


def test_broken_files_are_tried_again(label_bundle: Path, photos: Path, tmp_path: Path) -> None:
    good = (photos / "p3.png").read_bytes()
    (photos / "p3.png").write_bytes(good[: len(good) // 2])
    run = command(label_bundle, photos, "--out", tmp_path / "o", "--format", "json,coco")
    assert cli.main(run) == 2
    assert [Path(f["image"]).name for f in json.loads((tmp_path / "o/failed.json").read_text())] == ["p3.png"]
    assert len(json.loads((tmp_path / "o/panoptic.json").read_text())["annotations"]) == 5
    (photos / "p3.png").write_bytes(good)
    assert cli.main(run) == 0
    assert not (tmp_path / "o/failed.json").exists()
    assert len(json.loads((tmp_path / "o/panoptic.json").read_text())["annotations"]) == 6


SLOW_WRITES = """
import time
from odise_rt import files
from odise_rt.__main__ import run
# Half of each file is on disk for a moment, so that the signal meets files in the making.
import odise_rt.result_files as result_files
def slow(picture, path):
    with files.atomic_writer(path) as file:
        file.write(b"half a picture")
        file.flush()
        time.sleep(0.15)
        file.seek(0)
        picture.save(file, format="PNG")
result_files._save_png = slow
run()
"""


def start(bundle: Path, photos: Path, out: Path) -> subprocess.Popen[str]:
    arguments = command(bundle, photos, "--out", out, "--format", "overlay,json,coco,cvat,png")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITES, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for_lines(log: Path, count: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if log.exists() and log.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("the run makes no progress")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_run_goes_on(label_bundle: Path, photos: Path, tmp_path: Path, sent: signal.Signals) -> None:
    whole, out = tmp_path / "whole", tmp_path / "o"
    run = command(label_bundle, photos, "--format", "overlay,json,coco,cvat,png")
    assert cli.main([*run, "--out", str(whole)]) == 0
    process = start(label_bundle, photos, out)
    wait_for_lines(out / FILE_NAME, 2, process)
    time.sleep(0.08)  # in the middle of a picture
    process.send_signal(sent)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
    assert "Traceback" not in errors
    assert not (out / "panoptic.json").exists()
    for path in out.rglob("[!.]*.png"):
        with Image.open(path) as image:
            image.load()
    for path in out.rglob("[!.]*.json"):
        json.loads(path.read_text())
    done = set(changes(out).items())
    assert 2 <= len(done) < 6
    logged = {json.loads(line)["name"] for line in (out / FILE_NAME).read_bytes().splitlines(keepends=True)[:2]}

    assert cli.main([*run, "--out", str(out)]) == 0
    assert {(n, t) for n, t in done if n.removesuffix(".json") in logged} <= set(changes(out).items())
    assert digest_of(out) == digest_of(whole), "as if it had never been stopped"
    assert not list(out.rglob("*.tmp"))


def test_finished_images_are_told_at_once(
    segmenter: Segmenter, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill costs what was being written, not what waited for others."""

    class AtOnce(ThreadPoolExecutor):
        def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            done = super().submit(function, *args, **kwargs)
            wait([done])
            return done

    monkeypatch.setattr("odise_rt.batch.ThreadPoolExecutor", AtOnce)
    segmented = []
    monkeypatch.setattr(
        Segmenter, "segment", lambda self, *a, real=Segmenter.segment: segmented.append(a) or real(self, *a)
    )
    job = Job(Vocabulary.parse(WORDS), SegmentOptions(), ("json",), tmp_path)
    inputs = find_inputs([str(photos)])
    for number, record in enumerate(segment_inputs(segmenter, job, inputs, job.keys(inputs, "digest"))):
        assert record["name"] == f"p{number}"
        assert len(segmented) == number + 1


def test_what_is_being_written_when_a_run_stops_is_told(
    segmenter: Segmenter, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, stopped = threading.Semaphore(0), threading.Event()

    def write(*args: Any, real: Any = batch.write_result, **kwargs: Any) -> Any:
        begun.release()
        stopped.wait(10)
        return real(*args, **kwargs)

    def segment(self: Segmenter, *args: Any, real: Any = Segmenter.segment) -> Any:
        if len(calls) == 2:
            assert all(begun.acquire(timeout=10) for _ in range(2))
            stopped.set()
            raise KeyboardInterrupt
        calls.append(args)
        return real(self, *args)

    calls: list[Any] = []
    told: list[str] = []
    monkeypatch.setattr(batch, "write_result", write)
    monkeypatch.setattr(Segmenter, "segment", segment)
    job = Job(Vocabulary.parse(WORDS), SegmentOptions(), ("json",), tmp_path)
    inputs = find_inputs([str(photos)])
    records = segment_inputs(segmenter, job, inputs, job.keys(inputs, "digest"))
    with pytest.raises(KeyboardInterrupt):
        told.extend(record["name"] for record in records)
    assert told == ["p0", "p1"]


def test_a_failure_is_told_where_no_thread_can_be_started(
    segmenter: Segmenter, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, not by that of the thread that would tell it."""

    class Limited(ThreadPoolExecutor):
        def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            if self._max_workers == batch.WRITERS:
                raise RuntimeError("can't start new thread")
            return super().submit(function, *args, **kwargs)

    def fail(self: Segmenter, *args: Any) -> Any:
        raise OutOfMemoryError("memory ran out")

    monkeypatch.setattr(batch, "ThreadPoolExecutor", Limited)
    monkeypatch.setattr(Segmenter, "segment", fail)
    job = Job(Vocabulary.parse(WORDS), SegmentOptions(), ("json",), tmp_path)
    inputs = find_inputs([str(photos)])
    records = list(segment_inputs(segmenter, job, inputs, job.keys(inputs, "digest")))
    assert {record["error"] for record in records} == {"memory ran out"}
    assert len(records) == len(inputs)


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for name in ("a", "b"):
            log.append({"name": name, "key": "k", "files": {}})
    content = (tmp_path / FILE_NAME).read_bytes()
    (tmp_path / FILE_NAME).write_bytes(content + b'not json\n{"name": "c", "key": "k", "fi')
    with RunLog(tmp_path) as log:
        assert [log.is_done(n, "k") for n in "abc"] == [True, True, False]
        assert not log.is_done("a", "other key")
        log.append({"name": "c", "key": "k", "files": {}})
        assert log.is_done("c", "k")
        assert log.read("b")["name"] == "b"
    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    assert [json.loads(line)["name"] for line in (lines[0], lines[1], lines[3])] == ["a", "b", "c"]


def test_log_does_not_grow_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("odise_rt.run_log._WORTH_COMPACTING", 2_000)
    for _ in range(30):
        with RunLog(tmp_path) as log:
            for name in "abc":
                log.append({"name": name, "key": "k", "files": {}, "text": "x" * 100})
    assert (tmp_path / FILE_NAME).stat().st_size < 4_000
    with RunLog(tmp_path) as log:
        assert all(log.is_done(n, "k") for n in "abc")


def test_log_is_replaced_where_no_open_file_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    opened, open_path, replace = [], Path.open, Path.replace

    def remember(self: Path, *args: Any, **options: Any) -> Any:
        opened.append(open_path(self, *args, **options))
        return opened[-1]

    def refuse(self: Path, target: Path) -> Path:
        if any(Path(file.name) in (self, target) and not file.closed for file in opened):
            raise PermissionError(errno.EACCES, "used by another process", str(target))
        return replace(self, target)

    with RunLog(tmp_path) as log:
        for _ in range(2):
            log.append({"name": "a", "key": "k", "files": {}})
    monkeypatch.setattr("odise_rt.run_log._WORTH_COMPACTING", 1)
    monkeypatch.setattr(Path, "open", remember)
    monkeypatch.setattr(Path, "replace", refuse)
    with RunLog(tmp_path) as log:
        assert log.is_done("a", "k")
    assert len((tmp_path / FILE_NAME).read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("place", "marker", "kept"),
    [
        (".", None, False),
        ("b/c", None, False),
        ("video", "video/.run.lock", True),
        ("a/video/frames", "a/video/.run.lock", True),
        ("odise-tiny/engines", "odise-tiny/bundle.json", True),
        (".odise-tiny.x.partial/onnx", None, True),
    ],
)
def test_leftovers_of_this_run_alone_are_removed(tmp_path: Path, place: str, marker: str | None, kept: bool) -> None:
    left = tmp_path / place / ".p0.json-0123456789ab.tmp"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    if marker:
        (tmp_path / marker).touch()
    RunLog(tmp_path).close()
    assert left.exists() == kept


def test_one_run_at_a_time_writes_into_a_folder(
    label_bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o").mkdir()
    with RunLog(tmp_path / "o"):
        with pytest.raises(OptionsError, match="another run"):
            RunLog(tmp_path / "o")
        assert cli.main(command(label_bundle, photos, "--out", tmp_path / "o")) == 1
    assert "another run writes into" in capsys.readouterr().err


def test_keys_name_all_that_results_depend_on(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"1")
    item = Input(path, "a")
    base = Job(Vocabulary.parse("red"), SegmentOptions(), ("json",), tmp_path)
    keys = {base.keys([item], "digest")["a"], base.keys([item], "other")["a"]}
    assert base.keys([item], "digest")["a"] in keys
    for job in (
        Job(Vocabulary.parse("stuff: red"), SegmentOptions(), ("json",), tmp_path),
        Job(Vocabulary.parse("red"), SegmentOptions(overlap_threshold=0.1), ("json",), tmp_path),
        Job(Vocabulary.parse("red"), SegmentOptions(), ("json", "png"), tmp_path),
        Job(Vocabulary.parse("red"), SegmentOptions(), ("json",), tmp_path, every=2),
        Job(Vocabulary.parse("red"), SegmentOptions(), ("json",), tmp_path, engine="cpu, openvino-bf16"),
    ):
        keys.add(job.keys([item], "digest")["a"])
    os.utime(path, ns=(1, 1))
    keys.add(base.keys([item], "digest")["a"])
    path.write_bytes(b"12")
    os.utime(path, ns=(1, 1))
    keys.add(base.keys([item], "digest")["a"])
    assert len(keys) == 9
    assert base.keys([Input(tmp_path / "none.png", "n")], "digest")


def test_more_classes_than_a_semantic_picture_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for count, formats in ((65_536, ("semantic",)), (65_537, ("json",))):
        monkeypatch.setattr(Job, "classes", range(count))
        Job(Vocabulary.parse("red"), SegmentOptions(), formats, tmp_path)
    with pytest.raises(OptionsError, match="65,537: leave out"):
        Job(Vocabulary.parse("red"), SegmentOptions(), ("json", "semantic"), tmp_path)


def test_memory_does_not_hold_results(tmp_path: Path) -> None:
    """A log of 5,000 images with 2 KB each takes a fraction of that in memory."""
    import tracemalloc

    with RunLog(tmp_path) as log:
        tracemalloc.start()
        for i in range(5_000):
            log.append({"name": f"image {i}", "key": "k" * 64, "files": {}, "result": "x" * 2000})
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held < 3 * 2**20
        assert log.read("image 1234")["name"] == "image 1234"


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_folders_in_folders(
    label_bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "b/c").mkdir(parents=True)
    shutil.copy(photos / "p0.png", photos / "b/c/p0.png")
    shutil.copy(photos / "p0.png", photos / "b/p0.png")
    assert [i.name for i in find_inputs([str(photos)])] == [f"p{i}" for i in range(6)]
    names = [i.name for i in find_inputs([str(photos)], recursive=True)]
    assert names[:2] == ["b/c/p0", "b/p0"]
    run = command(label_bundle, photos, "--recursive", "--out", tmp_path / "o", "--format", "json,coco")
    assert cli.main(run) == 0
    assert (tmp_path / "o/b/c/p0.json").is_file()
    coco = json.loads((tmp_path / "o/panoptic.json").read_text())
    assert coco["images"][0] == {"id": 1, "file_name": "b/c/p0.png", "height": 60, "width": 96}
    assert (tmp_path / "o/panoptic" / coco["annotations"][0]["file_name"]).is_file()


def test_folder_that_holds_only_folders_says_how(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    Image.fromarray(colour_image()).save(tmp_path / "a/b/x.png")
    with pytest.raises(OptionsError, match="--recursive"):
        find_inputs([str(tmp_path / "a")])
    (tmp_path / "a/clip.mp4").write_bytes(b"")
    with pytest.raises(OptionsError, match="videos one by one"):
        find_inputs([str(tmp_path / "a")])


def test_results_are_not_taken_for_images(label_bundle: Path, photos: Path) -> None:
    """With the results inside the folder, or among its images, a second run finds the same inputs as the first."""
    for i in range(2, 6):
        (photos / f"p{i}.png").unlink()
    for out, recursive in ((photos / "results", ["--recursive"]), (photos, []), (photos, ["--recursive"])):
        shutil.rmtree(photos / "results", ignore_errors=True)
        for formats in ("overlay,png,semantic,json,coco", "overlay,json"):
            run = command(label_bundle, photos, *recursive, "--out", out, "--format", formats)
            assert cli.main(run) == 0
            assert len(list(out.glob("p?.json"))) == 2
            assert not list(out.rglob("*.overlay.overlay.png"))
    pattern = [i.name for i in find_inputs([str(photos / "**/p?.png")], results=photos)]
    assert pattern == [f"p{i}" for i in range(2)]
    named = find_inputs([str(photos / "panoptic/*.png")], results=photos)
    assert len(named) == 2, "results that are named by the pattern are meant"


def test_unusual_file_names(label_bundle: Path, tmp_path: Path) -> None:
    names = ["ü 日本 😀.png", "new\nline.png", "-q.png", "a&<b>'\"c.png", "bytes \udcff.png", "x.y.z.png"]
    (tmp_path / "in").mkdir()
    for name in names:
        Image.fromarray(colour_image()).save(tmp_path / "plain.png")
        (tmp_path / "plain.png").replace(tmp_path / "in" / name)
    arguments = command(label_bundle, tmp_path / "in", "--out", tmp_path / "o", "--format", ",".join(FORMATS))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    for done_before in (0, 6):
        run = [sys.executable, "-m", "odise_rt", *arguments, "--json"]
        done = subprocess.run(run, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["done_before"] == done_before
        assert {Path(i["image"]).name for i in document["images"]} == set(names)
    assert len(json.loads((tmp_path / "o/panoptic.json").read_text())["images"]) == 6


def test_what_a_folder_holds_beside_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files of macOS that are called like images are passed over; videos are not left out without a word."""
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.HEIC", "._a.jpg", "in/._c.png", "in/c.heif", "clip.overlay.mp4"):
        (tmp_path / name).touch()
    assert [i.name for i in find_inputs([str(tmp_path)])] == ["a", "b"]
    assert not caplog.text
    caplog.set_level("WARNING", logger="odise_rt")  # which a command before may have made quieter
    for name in ("clip.mp4", "b.MOV", "in/d.avi"):
        (tmp_path / name).touch()
    for recursive, count in ((False, 2), (True, 3)):
        caplog.clear()
        assert len(find_inputs([str(tmp_path)], recursive)) == count
        assert f"videos ({count}) are left out" in caplog.text


def test_links_that_lead_in_circles(tmp_path: Path) -> None:
    Image.fromarray(colour_image()).save(tmp_path / "x.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [i.name for i in find_inputs([str(tmp_path)], recursive=True)] == ["x"]


# ---- COCO panoptic as its readers take it ----------------------------------------------------------------------------


def test_panoptic_set_is_consistent(label_bundle: Path, photos: Path, tmp_path: Path) -> None:
    """What panopticapi checks when it reads a set: every id of a PNG has one entry, of its area, and no other."""
    run = command(label_bundle, photos, "--out", tmp_path / "o", "--format", "coco,json,rle", "--unknown", "0.99")
    assert cli.main(run) == 0
    coco = json.loads((tmp_path / "o/panoptic.json").read_text())
    categories = {c["id"]: c for c in coco["categories"]}
    assert [c["name"] for c in coco["categories"]][-1] == "unknown"
    images = {i["id"]: i for i in coco["images"]}
    assert len(images) == len(coco["annotations"]) == 6
    for annotation in coco["annotations"]:
        with Image.open(tmp_path / "o/panoptic" / annotation["file_name"]) as image:
            coded = np.asarray(image).astype(np.uint32)
        ids = coded[..., 0] + 256 * coded[..., 1] + 65536 * coded[..., 2]
        image_info = images[annotation["image_id"]]
        assert ids.shape == (image_info["height"], image_info["width"])
        found = dict(zip(*np.unique(ids[ids > 0], return_counts=True), strict=True))
        assert {s["id"]: s["area"] for s in annotation["segments_info"]} == found
        seen_stuff = [
            s["category_id"] for s in annotation["segments_info"] if not categories[s["category_id"]]["isthing"]
        ]
        assert len(seen_stuff) == len(set(seen_stuff))
        coded_masks = json.loads((tmp_path / f"o/{Path(annotation['file_name']).stem}.rle.json").read_text())
        for entry in coded_masks:
            assert np.array_equal(rle.decode(entry["segmentation"]), ids == entry["segment_id"])


def test_json_document_of_a_resumed_run(
    label_bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = command(label_bundle, photos, "--out", tmp_path / "o", "--format", "json", "--json")
    assert cli.main(run) == 0
    first = json.loads(capsys.readouterr().out)
    assert cli.main(run) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["images"] == first["images"]
    assert (first["done_before"], again["done_before"]) == (0, 6)
    assert again["failed"] == []
