"""The cores that a process may use, and who goes by them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from odise_rt import cli, cores
from odise_rt.backends.ort import OrtBackend
from odise_rt.cores import usable_cores
from odise_rt.doctor import examine
from odise_rt.serve.command import settings_from


@pytest.fixture(autouse=True)
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of ``/proc/self``, which tells of no control groups."""
    folder = tmp_path / "proc"
    folder.mkdir()
    monkeypatch.setattr(cores, "_PROCESS", folder)
    return folder


def limit(process: Path, version: int, group: str, limits: dict[str, str], root: str = "/") -> None:
    """Put the process into a control group; ``limits`` are those of groups ("quota period"), by their folders."""
    tree = process.parent / f"tree{version}"
    for name, value in limits.items():
        (tree / name).mkdir(parents=True, exist_ok=True)
        if version == 2:
            (tree / name / "cpu.max").write_text(value + "\n")
        else:
            for part, number in zip(("quota", "period"), value.split(), strict=True):
                (tree / name / f"cpu.cfs_{part}_us").write_text(number + "\n")
    kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,cpu,cpuacct"
    others = "30 1 0:2 / / rw - ext4 /dev/sda rw\n33 1 0:4 / /nowhere rw - cgroup cgroup rw,memory\n\nbroken - \n"
    (process / "mountinfo").write_text(f"{others}32 1 0:3 {root} {tree} rw,nosuid shared:9 - {kind}\n")
    (process / "cgroup").write_text(
        f"4:memory:/elsewhere\nbroken\n{'0::' if version == 2 else '3:cpu,cpuacct:'}{group}\n"
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("group", "root", "limits", "expected"),
    [
        ("/", "/", {".": "200000 100000"}, 2),
        ("/", "/", {".": "50000 100000"}, 1),
        ("/", "/", {".": "210000 100000"}, 3),
        ("/", "/", {".": "9900000 100000"}, 8),
        ("/pod/box", "/", {"pod/box": "400000 100000", "pod": "300000 100000", ".": "700000 100000"}, 3),
        ("/pod/box", "/", {"pod/box": "400000 100000", "pod/other": "100000 100000"}, 4),
        ("/docker/box", "/docker/box", {".": "200000 100000"}, 2),
        ("/docker/box", "/docker", {"box": "200000 100000"}, 2),
        ("/../other", "/", {".": "200000 100000"}, 2),
        ("/", "/", {".": "-1 100000"}, 8),
        ("/", "/", {".": "0 100000"}, 8),
        ("/", "/", {".": "200000 0"}, 8),
        ("/", "/", {".": "many 100000"}, 8),
        ("/gone", "/", {}, 8),
    ],
)
def test_limits_of_control_groups_are_obeyed(
    version: int,
    group: str,
    root: str,
    limits: dict[str, str],
    expected: int,
    process: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    limit(process, version, group, limits, root)
    assert usable_cores() == expected


def test_no_limit_of_version_2_has_a_word(process: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    limit(process, 2, "/pod", {"pod": "max 100000", ".": "500000 100000"})
    assert usable_cores() == 5
    (process.parent / "tree2" / "cpu.max").write_bytes(b"\xff")
    assert usable_cores() == 8


def test_everybody_goes_by_the_cores_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch, label_bundle: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 5, 6, 7, 9}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cores() == 6
    assert OrtBackend("cpu").threads == 6
    assert examine([])["cores"] == 6
    args = cli.make_parser().parse_args(["serve", str(label_bundle), "--device", "cpu", "--replicas", "2"])
    assert settings_from(args).worker.threads == 3


def test_a_limit_holds_for_everybody(process: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    limit(process, 2, "/", {".": "200000 100000"})
    assert OrtBackend("cpu").threads == 2
    assert examine([])["cores"] == 2


def test_systems_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cores() == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1
