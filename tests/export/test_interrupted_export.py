"""Exports as processes of their own: killed, out of disk, and two into one place.

The checkpoint is the small one of these tests; the commands, files and renames are the real ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from odise_rt.bundle import MANIFEST_NAME, Bundle
from odise_rt.partial_folder import _ABANDONED_SECONDS
from tests.export.conftest import small_config
from tests.odise_rt.fake_bundle import write_bundle
from training.checkpoints import save_checkpoint
from training.checkpoints.own_format import uninitialised_model
from training.config import ODISE_TINY
from training.initialization import initialise, tokenizer_for

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with odise-tiny's windows: a whole export needs them."""
    changes = {"window": ODISE_TINY.window, "test_short_edge": ODISE_TINY.test_short_edge}
    config = dataclasses.replace(small_config(), **changes)
    model = uninitialised_model(config)
    initialise(model, seed=3)
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    save_checkpoint(folder, model.eval(), tokenizer_json=tokenizer_for(config), training_vocabulary=["sky", "tree"])
    return folder


def start(checkpoint: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "export.build_engines", "--checkpoint", str(checkpoint), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--threads", "1", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=900)
    return process.returncode, output


def partial(out: Path) -> Path | None:
    return next(out.parent.glob(f".{out.name}.*.partial"), None)


def kill_when(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """SIGKILL for the process and all that it started, as soon as it has come so far."""
    deadline = time.monotonic() + 600
    while not reached():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def age(out: Path) -> None:
    """Make what was left look abandoned, as it is some time later."""
    past = time.time() - 2 * _ABANDONED_SECONDS
    for folder in out.parent.glob(f".{out.name}.*.partial"):
        os.utime(folder, (past, past))


def graphs(out: Path) -> int:
    folder = partial(out)
    return len(list(folder.glob("onnx/*.onnx"))) if folder else 0


def written(out: Path) -> bool:
    folder = partial(out)
    return folder is not None and (folder / MANIFEST_NAME).exists()


def test_kill_9_leaves_no_bundle_or_a_whole_one(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    old = write_bundle(tmp_path / "old")
    points: list[Callable[[], bool]] = [
        lambda: partial(out) is not None,
        lambda: graphs(out) >= 2,
        lambda: written(out),
    ]
    for point in points:
        kill_when(start(checkpoint, out), point)
        assert not out.exists() or Bundle.open(out).verified
        assert partial(out) is not None, "the kill came too late to test anything"
        age(out)

    # One that was to replace a bundle leaves the old one as it was.
    old.rename(out)
    digest = Bundle.open(out).digest
    kill_when(start(checkpoint, out, "--force"), lambda: graphs(out) >= 1)
    assert Bundle.open(out).digest == digest
    age(out)

    # The next export works and removes all that was left.
    code, output = finish(start(checkpoint, out, "--force"))
    assert code == 0, output[-3000:]
    assert Bundle.open(out).verified
    assert Bundle.open(out).name == "small"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_of_two_exports_into_one_place_one_wins_whole(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    processes = [start(checkpoint, out), start(checkpoint, out)]
    ends = [finish(process) for process in processes]
    assert sorted(code for code, _ in ends) == [0, 1], [output[-2000:] for _, output in ends]
    loser = next(output for code, output in ends if code == 1)
    assert "there is a bundle at" in loser
    assert "Traceback" not in loser
    assert Bundle.open(out).verified
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own with so much room."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.parametrize("megabytes", [2, 8])
def test_a_full_disk_is_named_and_the_old_bundle_intact(checkpoint: Path, tmp_path: Path, megabytes: int) -> None:
    with small_disk(tmp_path / "disk", megabytes) as disk:
        out = write_bundle(disk / "bundle")
        digest = Bundle.open(out).digest
        code, output = finish(start(checkpoint, out, "--force"))
        assert code == 1, output[-3000:]
        assert "No space left" in output or "no space left" in output, output[-3000:]
        assert "Traceback" not in output, output[-3000:]
        assert Bundle.open(out).digest == digest
        assert [p.name for p in disk.iterdir()] == ["bundle"]
