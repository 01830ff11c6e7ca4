"""Graph files are run on the CPU and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from export import cpu_check
from export.cpu_check import CpuCheck
from odise_rt.engine_check import Bounds
from odise_rt.errors import ExportError
from odise_rt.specs import StageSpec


@pytest.mark.parametrize(("threads", "expected"), [(None, 3), (2, 2)])
def test_threads_are_those_asked_for_or_all_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int | None, expected: int
) -> None:
    def refuse(path: str, options: Any, providers: list[str]) -> None:
        raise RuntimeError(f"{options.intra_op_num_threads} threads\non {providers}")

    check = CpuCheck(StageSpec("clip_text", (), ()), [], Bounds(0, 0), tmp_path, threads)
    monkeypatch.setattr(cpu_check, "usable_cores", lambda: 3)
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(ExportError, match=rf"^the title: ONNX Runtime .* does not run g\.onnx: {expected} threads$"):
        check.file(tmp_path / "g.onnx", "the title")
