"""The GPU check: rows, time budget, report and verdict with stand-ins for its parts; and what it says without a GPU."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu_check, gpu_network
from benchmarks.gpu_network import compare_outputs, network_values
from benchmarks.gpu_rows import (
    Clock,
    Part,
    Row,
    Target,
    describe,
    failed,
    judge_targets,
    markdown,
    read_rows,
    row_writer,
    run_part,
)
from benchmarks.harness import REPOSITORY, Summary
from odise_rt.backends.ort import OrtBackend
from odise_rt.bundle import Bundle
from odise_rt.engine_facts import ENGINE_KINDS
from odise_rt.kernels.native import FOLDER_VARIABLE
from odise_rt.specs import STAGES
from tests.odise_rt.engine_bundle import write_engines
from tests.odise_rt.fake_bundle import write_bundle
from tests.odise_rt.fake_gpu import GPU, Calls
from tests.odise_rt.kernels.emulated import Emulation

PART = Part("kernels", 5, "kernels against float64")


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def writing(path: Path, *rows: Row, then: str = "") -> list[str]:
    lines = "".join(row.to_json() + "\n" for row in rows)
    return script(f"open({str(path)!r}, 'a').write({lines!r})\n{then}")


GOOD = Row("kernels", "one", "pass", "correctness", {"error": 1e-4})


def test_rows_survive_the_file(tmp_path: Path) -> None:
    row = Row(
        "kernels", "mask_pool | fp16", "fail", "correctness", {"error": float("nan"), "n": 3, "gpu": "H200"}, "why"
    )
    assert "NaN" not in row.to_json()
    emit = row_writer(tmp_path / "rows")
    emit(row)
    emit(GOOD)
    back = list(read_rows(tmp_path / "rows"))
    assert back[0].values == {"error": "nan", "n": 3, "gpu": "H200"}
    assert back[1] == GOOD
    with pytest.raises(ValueError, match="status"):
        Row("kernels", "x", "fine")  # type: ignore[arg-type]


def test_a_part_that_ends_well_gives_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    assert run_part(PART, writing(file, GOOD), file, 30) == [GOOD]


def test_a_part_that_hangs_is_ended_and_keeps_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    start = time.monotonic()
    rows = run_part(PART, writing(file, GOOD, then="import time; time.sleep(60)"), file, 1.5)
    assert time.monotonic() - start < 20
    assert rows[0] == GOOD
    assert rows[1].status == "late"
    assert not failed(rows)


@pytest.mark.parametrize(
    ("then", "says"), [("raise SystemExit(3)", "exit status 3"), ("import os; os.abort()", "killed by signal 6")]
)
def test_a_part_that_breaks_off_fails_the_check(tmp_path: Path, then: str, says: str) -> None:
    file = tmp_path / "rows"
    rows = run_part(PART, writing(file, GOOD, then=then), file, 30)
    assert rows[0] == GOOD
    assert rows[1].status == "error"
    assert says in rows[1].detail
    assert failed(rows)


def test_a_part_without_rows_and_one_without_time(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_text(GOOD.to_json() + "\n", encoding="utf-8")  # of a part before: must not count
    assert run_part(PART, script("pass"), file, 30)[0].status == "error"
    assert run_part(PART, script("raise SystemExit(1)"), file, 0)[0].status == "late"


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_text(GOOD.to_json() + "\n" + GOOD.to_json()[:20], encoding="utf-8")
    assert list(read_rows(file)) == [GOOD]


def test_the_clock_cuts_the_last_parts() -> None:
    now = [100.0]
    clock = Clock(60, lambda: now[0])
    a, b, c = (Part(name, 40, "") for name in "abc")
    assert clock.share(a, [b, c]) == 40
    now[0] += 35
    assert clock.share(b, [c]) == 25
    now[0] += 99
    assert clock.share(c) == 0


def test_a_part_gets_what_the_others_leave() -> None:
    now = [0.0]
    clock = Clock(100, lambda: now[0])
    a, b = Part("a", 30, ""), Part("b", 30, "")
    assert clock.share(a, [b]) == 70
    now[0] += 10
    assert clock.share(b) == 90


def test_all_parts_fit_into_eight_minutes() -> None:
    assert sum(part.seconds for part in gpu_check.PARTS) <= gpu_check.TOTAL_SECONDS < 480


def test_targets_are_met_missed_or_not_measured() -> None:
    rows = [
        Row("runtime", "runtime", "measured", "time", {"median_ms": 20.0}),
        Row("official network", "official", "measured", "time", {"median_ms": 70.0}),
    ]
    wanted = ("official", "median_ms"), ("runtime", "median_ms")
    met, missed, absent = judge_targets(
        [Target("3 x", 3, *wanted), Target("4 x", 4, *wanted), Target("pool", 0.6, ("mask_pool", "of_copy_bandwidth"))],
        rows,
    )
    assert (met.detail, met.values["value"]) == ("met", 3.5)
    assert missed.detail == "missed"
    assert absent.status == "missing"
    assert "mask_pool" in absent.detail
    assert not failed([met, missed, absent])


def test_every_target_names_a_row_that_a_part_makes() -> None:
    text = "".join(
        (REPOSITORY / "benchmarks" / f"gpu_{n}.py").read_text(encoding="utf-8") for n in ("kernels", "network")
    )
    for target in gpu_check.TARGETS:
        for name, key in filter(None, (target.numerator, target.denominator)):
            assert name.split()[0] in text
            assert f'"{key}"' in text


def test_markdown_holds_every_row_and_escapes_bars() -> None:
    page = markdown([GOOD, Row("engines", "a|b", "missing", detail="two\nlines")], {"GPU": "H200"})
    assert "- GPU: H200" in page
    assert "1 pass, 1 missing" in page
    assert "| a\\|b | missing | two lines |" in page
    assert "| one | pass | error 0.0001 |" in page
    assert (
        describe(Row("p", "n", "measured", values={"us": 12345.6, "x": 0.12345, "n": 7})) == "us 12,346; x 0.123; n 7"
    )


def fake_options(tmp_path: Path, *parts: str) -> argparse.Namespace:
    return gpu_check.parse(["--parts", *parts, "--out", str(tmp_path / "results" / "h200"), "--seconds", "60"])


def test_report_of_several_parts(tmp_path: Path) -> None:
    options = fake_options(tmp_path, "machine", "kernels", "runtime")

    def command(_options: argparse.Namespace, part: Part, file: Path) -> list[str]:
        if part.name == "kernels":
            return script("import os; os._exit(9)")
        return writing(file, Row(part.name, f"{part.name} row", "measured", values={"ms": 1.5}))

    rows = [row for found in gpu_check.run_parts(options, command) for row in found]
    page = gpu_check.write_report(options, rows)
    assert [row.part for row in rows] == ["machine", "kernels", "runtime"]
    assert failed(rows)
    data = json.loads((tmp_path / "results" / "h200.json").read_text(encoding="utf-8"))
    assert [row["status"] for row in data["rows"]] == ["measured", "error", "measured"]
    assert "commit" in data["environment"]
    assert (tmp_path / "results" / "h200.md").read_text(encoding="utf-8") == page
    assert "exit status 9" in page
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == ["h200.json", "h200.md"]


def test_a_check_that_compared_nothing_is_none() -> None:
    """Without kernels or a bundle each row says what is missing, and nothing is wrong: that is no success."""
    parts = ["machine", "kernels", "runtime"]
    rows = [
        Row("machine", "GPU", "measured"),
        Row("kernels", "kernels", "missing", detail="make kernels"),
        Row("runtime", "bundle", "missing"),
    ]
    text, status = gpu_check.verdict(rows, parts, gpu_check.CORRECTNESS)
    assert status == 1
    assert "NO RESULT from: kernels, runtime" in text
    rows.append(Row("kernels", "mask_pool", "pass", "correctness"))
    text, status = gpu_check.verdict(rows, parts, gpu_check.CORRECTNESS)
    assert status == 0
    assert "NO RESULT from: runtime" in text
    assert gpu_check.verdict(rows, parts, parts)[1] == 1  # it was asked for by name


def test_command_line() -> None:
    assert len(gpu_check.parse([]).parts) == len(gpu_check.PARTS)
    assert gpu_check.parse([]).all_parts
    assert not gpu_check.parse(["--parts", "kernels"]).all_parts
    command = gpu_check.child_command(gpu_check.parse(["--quick"]), gpu_check.PARTS[1], Path("rows"))
    child = gpu_check.parse(command[3:])
    assert (child.parts, child.emit, child.quick) == (["kernels"], Path("rows"), True)
    for wrong in (["--parts", "nothing"], ["--seconds", "0"], ["--emit", "rows"]):
        with pytest.raises(SystemExit):
            gpu_check.parse(wrong)


def test_compare_outputs() -> None:
    expected = {"a": np.array([1.0, -4.0]), "b": np.ones(2)}
    assert compare_outputs({"a": np.array([1.0, -3.0]), "b": np.ones(2)}, expected) == (0.25, 0.125, [])
    assert compare_outputs({"a": np.array([np.nan, 1.0])}, expected)[2] == ["a", "b"]
    values = network_values(Summary.of([0.1]), (1024, 1024), 400e12, 3 << 30, "device_gib")
    assert math.isclose(float(values["of_matmul_rate"]), 0.31)
    assert values["device_gib"] == 3


def test_engines_that_are_not_here_are_rows(tmp_path: Path) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "bundle"))
    rows: list[Row] = []
    names = [name for name, _ in gpu_network._engines(rows.append, bundle)]
    if names:
        pytest.skip("this machine has a GPU that ONNX Runtime can use")
    assert {row.status for row in rows} == {"missing"}
    assert {f"{kind} {stage}" for kind in ENGINE_KINDS for stage in STAGES} <= {row.name for row in rows}
    assert all(row.detail for row in rows)


def test_stages_are_compared_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ONNX Runtime on the CPU as engine and as reference: right results pass, a wrong one fails."""
    folder = write_bundle(tmp_path / "bundle")
    backend = OrtBackend("cpu", 1)

    class Wrong:
        def __init__(self, stage: Any) -> None:
            self.stage = stage

        def run(self, inputs: Any) -> Any:
            return {name: -array for name, array in self.stage.run(inputs).items()}

        def close(self) -> None:
            self.stage.close()

    def engines(_emit: Any, bundle: Any) -> Any:
        yield "right", lambda stage: backend.load(bundle, stage)
        yield "wrong", lambda stage: Wrong(backend.load(bundle, stage))

    monkeypatch.setattr(gpu_network, "_engines", engines)
    monkeypatch.setattr(gpu_network, "_reference_backend", lambda checkpoint: (backend, "the CPU"))
    rows: list[Row] = []
    gpu_network.check_engines(rows.append, folder, tmp_path, quick=True)
    assert [(row.name, row.status) for row in rows if row.name != "image on the GPU"] == [
        (f"{engine} {stage}", status) for engine, status in (("right", "pass"), ("wrong", "fail")) for stage in STAGES
    ]


class OnGpu:
    """An array that says it lies on the GPU."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": array.dtype.str, "data": (array.ctypes.data, False), "version": 3,
        }  # fmt: skip


@pytest.mark.parametrize("broken", [None, "odise_image_stitch", "odise_merge_f32"])
def test_images_that_stay_on_the_gpu_are_compared(
    install_gpu: Callable[..., Calls],
    emulation: Emulation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str | None,
) -> None:
    """On a GPU made of host memory: right kernels pass, one that writes nothing fails."""
    gpu = install_gpu(emulation, tmp_path)
    opened = Bundle.open(write_bundle(tmp_path / "bundle"))
    write_engines(opened, verified_on=GPU)
    monkeypatch.setenv("ODISE_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_network, "_on_gpu", OnGpu)
    launch = emulation.launch
    monkeypatch.setattr(
        emulation, "launch", lambda name, arguments: None if name == broken else launch(name, arguments)
    )
    rows: list[Row] = []
    gpu_network.check_pipeline(rows.append, opened.root)
    assert len(rows) == 6
    assert {row.status for row in rows} == {"fail" if broken else "pass"}
    assert gpu.device_bytes == 0
    monkeypatch.setenv(FOLDER_VARIABLE, "/not/built")
    rows.clear()
    gpu_network.check_pipeline(rows.append, opened.root)
    assert [(row.status, row.detail) for row in rows] == [
        ("missing", "needs cuda-core and the CUDA kernels (make kernels)")
    ]


def test_without_a_gpu_it_is_one_error(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path / "x")],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "NVIDIA GPU" in done.stderr
    assert not list(tmp_path.iterdir())
