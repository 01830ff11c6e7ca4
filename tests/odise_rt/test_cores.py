"""The cores that a process may use, and who goes by them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from odise_rt import cli
from odise_rt.backends.ort import OrtBackend
from odise_rt.cores import usable_cores
from odise_rt.doctor import examine
from odise_rt.serve.command import settings_from


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


def test_systems_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cores() == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1
