"""Finished folders take their place whole, and what was there comes back where that fails."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from odise_rt.errors import OptionsError
from odise_rt.files import atomic_writer, check_writable, flush_folder, make_partial_folder, replace_folder


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append((os.fstat(file).st_size, (tmp_path / "result").exists()))
    )
    with atomic_writer(tmp_path / "result") as file:
        file.write(b"12345")
    assert synced == [(5, False)]


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_who_reads_a_new_folder_is_for_the_umask_to_say(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        made = make_partial_folder(tmp_path / "place")
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o777 & ~umask
    assert made.parent == tmp_path


def test_a_folder_takes_a_free_place_or_that_of_another(tmp_path: Path) -> None:
    place = tmp_path / "place"
    for content in ("first", "second"):
        replace_folder(folder(tmp_path / "finished", content), place)
        assert (place / "file").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["place"], "nothing is left beside it"
    flush_folder(place)


def test_a_folder_is_flushed_by_what_windows_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses files that are open for reading, which is all that a read-only file can be."""
    flushed = []

    def fsync(file: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(os.fstat(file).st_ino)

    finished = folder(tmp_path / "finished", "content")
    (finished / "read-only").write_text("content")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "read-only")
    flush_folder(finished)
    assert flushed == [(finished / "file").stat().st_ino]


def test_the_old_one_comes_back_when_the_new_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, finished = folder(tmp_path / "place", "old"), folder(tmp_path / "finished", "new")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self == finished:
            raise OSError(errno.ENOSPC, "no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no space left"):
        replace_folder(finished, place, aside=".hidden.", old_name="before")
    assert (place / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finished", "place"]


def test_another_process_may_take_the_old_one_away_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, finished = folder(tmp_path / "place", "old"), folder(tmp_path / "finished", "new")
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        if self == place:
            rename(place, tmp_path / "taken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    replace_folder(finished, place)
    assert (place / "file").read_text() == "new"
    assert (tmp_path / "taken/file").read_text() == "old"


@pytest.mark.parametrize("name", ["a file/out.json", "a folder"])
def test_a_place_that_takes_no_file_is_found_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    (tmp_path / "a folder").mkdir()
    with pytest.raises(OptionsError, match=r"cannot write .*: name another --out"):
        check_writable(tmp_path / name)


def test_the_folder_of_a_file_that_comes_later_is_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "out.json")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]
