"""CMakeLists.txt: what it says and does with and without nvcc; and, marked slow, the compiled kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from odise_rt.kernels.sources import STAMP, sources_digest, why_stale

ROOT = Path(__file__).resolve().parents[3]
NVCC = shutil.which("nvcc")
NAMES = ("mask_pooling", "panoptic_merge", "deformable_attention", "image_windows", "naming")

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")


def cmake(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_PATH", "CUDAHOSTCXX")}
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(
        [str(shutil.which("cmake")), *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def no_nvcc(tmp_path: Path) -> str:
    """A PATH with what CMake needs, and no nvcc; CMake also looks in /usr/local/cuda, so that is shut off by a root."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("cc", "c++", "gcc", "g++", "ld", "ar", "as", "make", "uname", "sh"):
        found = shutil.which(tool)
        if found:
            (folder / tool).symlink_to(found)
    return str(folder)


def configure(build: Path, path: str, *options: str) -> subprocess.CompletedProcess[str]:
    return cmake("-S", str(ROOT), "-B", str(build), "-DCMAKE_MAKE_PROGRAM=make", *options, path=path)


def test_without_nvcc_auto_says_so_in_one_line_and_builds_nothing(tmp_path: Path, no_nvcc: str) -> None:
    done = configure(tmp_path / "build", no_nvcc)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "odise_rt kernels" in line]
    assert len(lines) == 1
    assert "skipped, nvcc was not found" in lines[0]
    built = cmake("--build", str(tmp_path / "build"), path=f"{no_nvcc}:{os.environ['PATH']}")
    assert built.returncode == 0, built.stdout + built.stderr
    assert not list((tmp_path / "build").glob("*.fatbin"))


def test_without_nvcc_on_is_an_error(tmp_path: Path, no_nvcc: str) -> None:
    done = configure(tmp_path / "build", no_nvcc, "-DODISE_RT_KERNELS=ON")
    assert done.returncode != 0
    assert "nvcc was not found" in done.stderr
    assert "CUDACXX" in done.stderr


def test_off_and_unknown_values(tmp_path: Path, no_nvcc: str) -> None:
    done = configure(tmp_path / "off", no_nvcc, "-DODISE_RT_KERNELS=OFF")
    assert done.returncode == 0
    assert "odise_rt kernels: off" in done.stdout
    done = configure(tmp_path / "bad", no_nvcc, "-DODISE_RT_KERNELS=maybe")
    assert done.returncode != 0
    assert "expected AUTO, ON or OFF" in done.stderr


def test_every_source_is_listed() -> None:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for source in sorted((ROOT / "odise_rt" / "kernels").glob("*.cu*")):
        stem = source.name if source.suffix == ".cuh" else source.stem
        assert stem in text, f"{source.name} is missing from CMakeLists.txt"


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_the_stamp_is_the_loaders(tmp_path: Path) -> None:
    done = cmake("-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_CUDA_ARCHITECTURES=90")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "configured.sha256").read_text().strip() == sources_digest()
    assert not (tmp_path / STAMP).exists(), "not before all is built"


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_one_architecture_compiles_without_spills_and_links_its_c_functions(tmp_path: Path) -> None:
    options = ["-DODISE_RT_KERNELS=ON", "-DCMAKE_CUDA_ARCHITECTURES=90", "-DODISE_RT_PTXAS_INFO=ON"]
    options.append("-DODISE_RT_KERNELS_LIBRARY=ON")
    configured = cmake("-S", str(ROOT), "-B", str(tmp_path), *options)
    assert configured.returncode == 0, configured.stderr
    built = cmake("--build", str(tmp_path), "--parallel", "2")
    output = built.stdout + built.stderr
    assert built.returncode == 0, output[-4000:]
    for name in NAMES:
        fatbin = (tmp_path / f"{name}.fatbin").read_bytes()
        assert len(fatbin) > 10_000
        assert str(ROOT).encode() not in fatbin, "wheels are not to tell where they were built"
    assert why_stale(tmp_path) is None
    ptx = (tmp_path / "mask_pooling.ptx").read_text(encoding="utf-8")
    entries = dict(re.findall(r"\.visible \.entry (\w+)\((.*?)\)", ptx, re.DOTALL))
    pointer, number = "u64", "u32"  # as the loader and the plugin pass them
    for name, wanted in {
        "odise_pool_sums_f16_8": [pointer] * 2 + [number] * 5 + [pointer] * 2,
        "odise_pool_finish_f16": [pointer] * 2 + [number] * 3 + [pointer] * 2,
        "odise_pool_finish_after_bf16": [pointer] * 3 + [number] * 3 + [pointer] * 2,
    }.items():
        assert re.findall(r"\.param \.(u\d+)", entries[name]) == wanted
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", output)
    assert len(spills) >= 31
    assert set(spills) == {("0", "0", "0")}
    library = next(tmp_path.glob("libodise_rt_kernels*"))
    symbols = library.read_bytes()
    for function in (
        "odise_mask_pool",
        "odise_panoptic_merge",
        "odise_deformable_attention",
        "odise_stitch_windows",
        "odise_text_cosines",
        "odise_paint_segments",
    ):
        assert function.encode() in symbols
