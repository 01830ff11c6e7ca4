"""A bundle appears whole or not at all."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest

from export.bundle_writer import BundleWriter
from export.weight_store import WeightStore
from odise_rt.bundle import MANIFEST_NAME
from odise_rt.errors import ExportError


def _fill(writer: BundleWriter, text: str = "new") -> None:
    (writer.folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
    (writer.graphs / "a.onnx").write_bytes(b"graph")


def _export(out: Path, text: str, force: bool = False) -> None:
    with BundleWriter(out, force) as writer:
        _fill(writer, text)
        writer.publish()


def _fail(out: Path, error: BaseException) -> None:
    with BundleWriter(out, force=True) as writer:
        _fill(writer, "half done")
        raise error


def _found(out: Path) -> str:
    return (out / MANIFEST_NAME).read_text(encoding="utf-8")


def test_publishes_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "bundle"
    _export(out, "one")
    assert _found(out) == "one"
    assert (out / "onnx" / "a.onnx").read_bytes() == b"graph"
    assert [p.name for p in out.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("error", [ExportError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["bundle", "made/for/it/bundle"])
def test_a_failed_or_interrupted_export_leaves_nothing(tmp_path: Path, place: str, error: BaseException) -> None:
    with pytest.raises(type(error)):
        _fail(tmp_path / place, error)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"cannot write beside .*File name too long"):
        _export(tmp_path / "made" / "for it" / ("x" * 250), "one")
    assert list(tmp_path.iterdir()) == []

    def full(path: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(ExportError, match=r"cannot write beside .*No space left"):
        _export(tmp_path / "there" / "bundle", "one")
    assert list((tmp_path / "there").iterdir()) == []


def test_folders_that_were_made_stay_when_somebody_uses_them(tmp_path: Path) -> None:
    out = tmp_path / "made" / "for it" / "bundle"
    with pytest.raises(KeyboardInterrupt), BundleWriter(out):
        (tmp_path / "made" / "notes").write_text("another's")
        raise KeyboardInterrupt
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["notes"]


def test_what_another_export_removes_first_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".bundle.killed.partial"
    left.mkdir()
    is_dir = Path.is_dir

    def then_gone(path: Path, **options: bool) -> bool:
        found = is_dir(path, **options)
        if path == left and found:
            left.rmdir()
        return found

    monkeypatch.setattr(Path, "is_dir", then_gone)
    _export(tmp_path / "bundle", "one")
    assert _found(tmp_path / "bundle") == "one"


def test_a_bundle_is_replaced_only_when_forced(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    _export(out, "one")
    with pytest.raises(ExportError, match="pass --force"):
        BundleWriter(out)
    _export(out, "two", force=True)
    assert _found(out) == "two"
    assert list(tmp_path.iterdir()) == [out]


def test_a_failed_forced_export_keeps_the_old_bundle(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    _export(out, "one")
    with pytest.raises(ExportError):
        _fail(out, ExportError("does not agree"))
    assert _found(out) == "one"
    assert list(tmp_path.iterdir()) == [out]


def test_never_replaces_what_is_no_bundle(tmp_path: Path) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("precious", encoding="utf-8")
    with pytest.raises(ExportError, match="no bundle"):
        BundleWriter(out, force=True)
    file = tmp_path / "file"
    file.write_text("precious", encoding="utf-8")
    with pytest.raises(ExportError, match="a file or a link"):
        BundleWriter(file, force=True)
    link = tmp_path / "link"
    link.symlink_to(out)
    with pytest.raises(ExportError, match="a file or a link"):
        BundleWriter(link, force=True)


@pytest.mark.parametrize("out", [".", "..", "made/..", "/"])
def test_a_bundle_needs_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="give a folder inside it as --out"):
        BundleWriter(Path(out))


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    _export(out, "one")
    assert _found(out) == "one"


def test_of_two_exports_the_first_wins_whole(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with BundleWriter(out) as first, BundleWriter(out) as second:
        _fill(first, "first")
        _fill(second, "second")
        (second.graphs / "b.onnx").write_bytes(b"only in the second")
        first.publish()
        with pytest.raises(ExportError, match="pass --force"):
            second.publish()
    assert _found(out) == "first"
    assert [p.name for p in (out / "onnx").iterdir()] == ["a.onnx"]
    assert list(tmp_path.iterdir()) == [out]


def test_of_two_forced_exports_the_last_wins_whole(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with BundleWriter(out, force=True) as first, BundleWriter(out, force=True) as second:
        _fill(first, "first")
        _fill(second, "second")
        (first.graphs / "b.onnx").write_bytes(b"only in the first")
        first.publish()
        second.publish()
    assert _found(out) == "second"
    assert [p.name for p in (out / "onnx").iterdir()] == ["a.onnx"]
    assert list(tmp_path.iterdir()) == [out]


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    abandoned = tmp_path / ".bundle.killed.partial"
    abandoned.mkdir()
    (abandoned / "half.onnx").write_bytes(b"half")
    fresh = tmp_path / ".bundle.fresh.partial"
    fresh.mkdir()
    other = tmp_path / ".other.killed.partial"
    other.mkdir()
    hour_ago = time.time() - 3600
    for folder in (abandoned, other):
        os.utime(folder, (hour_ago, hour_ago))
    with BundleWriter(out) as running:
        os.utime(running.folder, (hour_ago, hour_ago))
        _export(out, "one")
        # Locked folders are somebody's work, however old, and so may be those of the last minute.
        assert running.folder.is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".bundle.fresh.partial", ".other.killed.partial", "bundle"]


def test_a_bundle_caught_in_its_replacement_returns(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    caught = tmp_path / ".bundle.killed.partial" / "replaced"
    caught.mkdir(parents=True)
    (caught / MANIFEST_NAME).write_text("old", encoding="utf-8")
    hour_ago = time.time() - 3600
    os.utime(caught.parent, (hour_ago, hour_ago))
    with pytest.raises(ExportError):
        _fail(out, ExportError("does not agree"))
    assert _found(out) == "old"


def test_constants_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    arrays = {"noise": np.arange(6, dtype=np.float32).reshape(1, 6), "null_text_embedding": np.ones((1, 2, 3))}
    written = []
    for name in ("one", "two"):
        with BundleWriter(tmp_path / name) as writer:
            writer.write_constants(arrays)
            written.append((writer.folder / "constants.npz").read_bytes())
            with np.load(writer.folder / "constants.npz", allow_pickle=False) as stored:
                np.testing.assert_array_equal(stored["noise"], arrays["noise"])
                assert stored["null_text_embedding"].dtype == np.float32
    assert written[0] == written[1]


def test_an_unwritable_place_is_an_export_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(ExportError, match="cannot write beside"), BundleWriter(tmp_path / "file" / "bundle"):
        pass


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was refused stays in the file's buffer, so that closing it fails once more."""
    out = tmp_path / "bundle"
    _export(out, "one")

    def full(store: WeightStore) -> None:
        store._file.close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WeightStore, "close", full)
    with pytest.raises(OSError, match="the first error"), BundleWriter(out, force=True) as writer:
        writer.weights("a")
        raise OSError(errno.ENOSPC, "the first error")
    with pytest.raises(ExportError, match="free space"), BundleWriter(out, force=True) as writer:
        _fill(writer, "two")
        writer.weights("a")
        writer.publish()
    assert _found(out) == "one"
    assert list(tmp_path.iterdir()) == [out]


def test_force_replaces_bundles_only(tmp_path: Path) -> None:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "bundle.json").write_text('{"app": 1}')
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match=r"holds thesis.tex beside a bundle"):
        BundleWriter(folder, force=True)
    assert (folder / "thesis.tex").is_file()
    (folder / "thesis.tex").rename(folder / ".thesis.tex")
    (folder / ".git").mkdir()
    with pytest.raises(ExportError, match=r"holds .git beside a bundle"):
        BundleWriter(folder, force=True)
    (folder / ".git").rmdir()
    BundleWriter(folder, force=True)
