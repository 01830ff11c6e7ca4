"""The kernels under compute-sanitizer: what is launched, and what is made of its words. It needs a GPU itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import gpu_check, gpu_sanitizer
from benchmarks.gpu_rows import Row
from odise_rt.kernels import native
from tests.odise_rt import fake_driver
from tests.odise_rt.fake_gpu import Calls, write_fatbins

CLEAN = "========= COMPUTE-SANITIZER\nlaunched 90 kernels\n========= ERROR SUMMARY: 0 errors\n"
RACES = (
    "========= COMPUTE-SANITIZER\n"
    "========= Error: Race reported between Write access at odise_merge_f32+0x1f0 and Read access at +0x2a0\n"
    "=========\nlaunched 90 kernels\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n"
)
CRASH = (
    "========= COMPUTE-SANITIZER\n"
    "========= Invalid __global__ write of size 4 bytes\n"
    "=========     at odise_pool_finish_f16+0x150\n"
    "launched 90 kernels\n========= ERROR SUMMARY: 12 errors\n"
)


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, CLEAN, ("pass", {"findings": 0, "launches": 90}, "")),
        (0, RACES, ("fail", {"findings": 3, "launches": 90}, "Error: Race reported between Write access at")),
        (1, CRASH, ("fail", {"findings": 12, "launches": 90}, "Invalid __global__ write of size 4 bytes")),
        (1, CLEAN, ("fail", {"findings": 0, "launches": 90}, "status 1")),
        # A program that launched nothing has shown nothing.
        (0, "========= ERROR SUMMARY: 0 errors\n", ("error", {}, "broke off with status 0")),
        (255, "========= Target application returned an error\nno device", ("error", {}, "255: no device")),
        (1, "", ("error", {}, "nothing")),
        (
            1,
            "========= Error: Device not supported. Please refer to\n",
            ("missing", {}, "does not support this device"),
        ),
    ],
)
def test_verdict(status: int, output: str, expected: tuple[str, dict[str, int], str]) -> None:
    row = gpu_sanitizer.verdict("memcheck", status, output)
    assert (row.status, row.values) == expected[:2]
    assert expected[2] in row.detail


def program(folder: Path, text: str) -> Path:
    made = folder / "compute-sanitizer"
    made.write_text(f"#!{sys.executable}\nimport sys, time\n{text}\n")
    made.chmod(0o755)
    return made


def test_every_tool_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(
        tmp_path,
        "assert sys.argv[3:] == [sys.executable, '-m', 'benchmarks.gpu_sanitizer']\n"
        f"print({RACES!r} if sys.argv[2] == 'racecheck' else {CLEAN!r})",
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    rows: list[Row] = []
    gpu_sanitizer.check(rows.append, seconds=60)
    assert [(row.name, row.status) for row in rows] == [
        ("racecheck", "fail"),
        ("memcheck", "pass"),
        ("synccheck", "pass"),
        ("initcheck", "pass"),
    ]


def test_what_is_missing_or_slow_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    rows: list[Row] = []
    gpu_sanitizer.check(rows.append, seconds=60)
    assert [row.status for row in rows] == ["missing"]
    (tmp_path / "toolkit").mkdir()
    slow = program(tmp_path / "toolkit", "time.sleep(30)")
    (tmp_path / "toolkit" / "nvcc").write_text("")
    (tmp_path / "toolkit" / "nvcc").chmod(0o755)
    (tmp_path / "nvcc").symlink_to(tmp_path / "toolkit" / "nvcc")
    assert gpu_sanitizer.find_sanitizer() == str(slow)
    monkeypatch.setattr(gpu_sanitizer, "TOOLS", {"memcheck": 1.0})
    gpu_sanitizer.check(rows.append, seconds=0.2)
    assert [row.status for row in rows] == ["missing", "late"]


def test_it_runs_only_when_it_is_asked_for() -> None:
    assert "sanitizer" not in gpu_check.parse([]).parts
    assert gpu_check.parse(["--parts", "sanitizer"]).parts == ["sanitizer"]


@pytest.mark.skipif(fake_driver.why_not() is not None, reason=f"{fake_driver.why_not()}")
@pytest.mark.parametrize("compiled", [False, True])
def test_every_kernel_is_launched(
    request: pytest.FixtureRequest,
    install_gpu: Callable[..., Calls],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    compiled: bool,
) -> None:
    """By the real cuda-core. Compiled ones are also run, by a machine to which races and stray accesses are errors."""
    gpu = install_gpu(request.getfixturevalue("compiled_for")(90).kernels if compiled else None)
    write_fatbins(tmp_path)
    monkeypatch.setenv(native.FOLDER_VARIABLE, str(tmp_path))
    assert gpu_sanitizer.main() == 0
    driver = fake_driver.installed()
    assert driver is not None
    assert capsys.readouterr().out == f"launched {len(driver.launched)} kernels\n"
    # That of a TensorRT plugin has another order of arguments; bfloat16 has tensor cores on this GPU.
    others = {name for name in fake_driver.parameters() if "finish_after" in name or "simt_bf16" in name}
    assert {one.kernel for one in driver.launched} == set(fake_driver.parameters()) - others
    assert gpu.device_bytes == 0
