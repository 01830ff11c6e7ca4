"""What killed processes left goes, or comes back; what somebody writes stays."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from odise_rt.partial_folder import partial_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def age(folder: Path) -> None:
    os.utime(folder, (1, 1))


def left(place: Path, content: str = "half") -> Path:
    """As by a process that was killed long ago."""
    folder = place.with_name(f".{place.name}.dead1234.partial")
    (folder / content).mkdir(parents=True)
    age(folder)
    return folder


def test_a_folder_is_there_for_its_block(tmp_path: Path) -> None:
    with partial_folder(tmp_path / "place") as folder:
        assert folder.parent == tmp_path
    assert names(tmp_path) == []
    with partial_folder(tmp_path / "place") as folder:
        folder.rename(tmp_path / "place")
    assert names(tmp_path) == ["place"]


def test_what_was_abandoned_goes(tmp_path: Path) -> None:
    left(tmp_path / "place")
    with partial_folder(tmp_path / "place") as folder:
        assert names(tmp_path) == [folder.name]


def test_what_was_abandoned_while_it_replaced_comes_back_to_its_own_place(tmp_path: Path) -> None:
    """And not to that of another whose name begins alike."""
    folder = left(tmp_path / "odise.fp16", "replaced")
    with partial_folder(tmp_path / "odise"):
        assert folder.is_dir()
    with partial_folder(tmp_path / "odise.fp16"):
        assert not folder.exists()
    assert names(tmp_path) == ["odise.fp16"]


def test_what_somebody_writes_stays(tmp_path: Path) -> None:
    with partial_folder(tmp_path / "place") as first:
        age(first)
        with partial_folder(tmp_path / "place"):
            assert first.is_dir()


def test_where_there_are_no_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = left(tmp_path / "place")
    with partial_folder(tmp_path / "place") as made:
        assert names(tmp_path) == sorted([folder.name, made.name])


def test_a_private_umask_keeps_it_private(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with partial_folder(tmp_path / "place") as folder:
            assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
