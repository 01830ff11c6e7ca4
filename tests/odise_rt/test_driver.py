"""NVIDIA's driver, by stand-ins of its libraries; and what says that it is too old or missing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from odise_rt.backends import driver, machine, ort
from odise_rt.backends.driver import Driver, nvidia_driver, why_too_old
from odise_rt.cli import main


class Cuda:
    def __init__(self, version: int, status: int = 0) -> None:
        self.version, self.status = version, status

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = self.version
        return self.status


class Nvml:
    def __init__(self, status: int = 0) -> None:
        self.status, self.started = status, 0

    def nvmlInit_v2(self) -> int:
        self.started += not self.status
        return self.status

    def nvmlShutdown(self) -> None:
        self.started -= 1

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:
        assert self.started == 1
        assert len(text) == size
        text.value = b"580.65.06"
        return 0


def put(monkeypatch: pytest.MonkeyPatch, cuda: Cuda | None, nvml: Nvml | None = None) -> None:
    """These libraries in the place of the machine's."""
    monkeypatch.setattr(driver, "_load", {"cuda": cuda, "nvml": nvml}.get)


@pytest.mark.parametrize(
    ("cuda", "nvml", "found"),
    [
        (Cuda(13_000), Nvml(), Driver("580.65.06", (13, 0))),
        (Cuda(12_080), Nvml(999), Driver(None, (12, 8))),
        (Cuda(12_080), None, Driver(None, (12, 8))),
        (Cuda(0, 999), Nvml(), None),
        (None, None, None),
    ],
)
def test_the_driver_that_is_found(
    monkeypatch: pytest.MonkeyPatch, cuda: Cuda | None, nvml: Nvml | None, found: Driver | None
) -> None:
    put(monkeypatch, cuda, nvml)
    assert nvidia_driver() == found
    assert nvml is None or nvml.started == 0


def test_a_machine_without_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_LIBRARIES", dict.fromkeys(driver._LIBRARIES, "libnot-here.so.1"))
    monkeypatch.setattr("sys.platform", "linux")
    assert nvidia_driver() is None


@pytest.mark.parametrize(
    ("version", "needed", "message"),
    [
        (13_000, 13, None),
        (13_020, 12, None),
        (12_080, 13, "update it (CUDA 13 needs 580 or newer), or pip install 'odise_rt[gpu-cuda12]'"),
        (11_080, 13, "for CUDA up to 11.8: update it (CUDA 13 needs 580 or newer)"),
    ],
)
def test_a_driver_that_is_too_old(
    monkeypatch: pytest.MonkeyPatch, version: int, needed: int, message: str | None
) -> None:
    put(monkeypatch, Cuda(version))
    problem = why_too_old("engine 1.0", needed)
    assert problem is None if message is None else str(problem).endswith(message)


def test_no_engine_uses_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch, fresh_machine: None) -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core")
    monkeypatch.setattr(machine, "package_version", {"cuda-bindings": "13.5.0"}.get)
    put(monkeypatch, Cuda(12_080), Nvml())
    assert machine.this_machine().no_gpu == (
        "cuda-bindings 13.5.0 is made for CUDA 13, and NVIDIA's driver here is 580.65.06, for CUDA up to 12.8: update "
        "it (CUDA 13 needs 580 or newer), or pip install 'odise_rt[gpu-cuda12]'"
    )


class MadeForCuda(SimpleNamespace):
    """ONNX Runtime's CUDA build, which falls back to the CPU; it prints what it does not find."""

    def __init__(self, folder: str) -> None:
        super().__init__(
            __version__="1.31.1",
            __file__=f"{folder}/__init__.py",
            cuda_version="13.0",
            get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
            preload_dlls=lambda directory: print("Failed to load libcublas.so.13"),
            SessionOptions=SimpleNamespace,
            InferenceSession=lambda *arguments, **options: SimpleNamespace(
                run=lambda *arguments: None, get_providers=lambda: ["CPUExecutionProvider"]
            ),
        )

    __hash__ = object.__hash__


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [
        (None, "CUDAExecutionProvider cannot start: there is no NVIDIA driver here"),
        (Cuda(12_080), "CUDAExecutionProvider cannot start: onnxruntime-gpu 1.31.1 is made for CUDA 13"),
        (Cuda(13_000), "CUDAExecutionProvider did not start ("),
    ],
)
def test_why_onnxruntime_has_no_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str], cuda: Cuda | None, reason: str
) -> None:
    monkeypatch.setattr(ort, "import_onnxruntime", lambda: MadeForCuda(str(tmp_path)))
    put(monkeypatch, cuda)
    problem = ort.working_provider.__wrapped__("cuda")
    assert problem is not None
    assert problem.startswith(reason)
    assert ("libonnxruntime_providers_cuda" in problem) == reason.endswith("(")
    assert capsys.readouterr().out == ""


def test_cudas_libraries_are_found_beside_onnxruntime_and_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It looks beside itself alone; with ``pip install --target`` they are in another folder of the Python path."""
    packages, elsewhere = tmp_path / "packages", tmp_path / "elsewhere"
    for folder in (packages / "onnxruntime", elsewhere / "nvidia/cu13/lib", elsewhere / "nvidia/cudnn/lib"):
        folder.mkdir(parents=True)
    (elsewhere / "nvidia/cudnn/include").mkdir()
    spec = SimpleNamespace(submodule_search_locations=[str(elsewhere / "nvidia")])
    monkeypatch.setattr(ort.importlib.util, "find_spec", lambda name: spec if name == "nvidia" else None)
    fake, asked = MadeForCuda(str(packages / "onnxruntime")), []
    fake.preload_dlls = lambda directory: asked.append(directory)
    ort._load_cuda.__wrapped__(fake)
    assert asked == [str(elsewhere / "nvidia/cu13/lib"), str(elsewhere / "nvidia/cudnn/lib"), None]
    monkeypatch.setattr(ort.importlib.util, "find_spec", lambda name: None)
    assert ort._cuda_folders(packages) == [None]
    (packages / "nvidia").mkdir()
    monkeypatch.setattr(ort.importlib.util, "find_spec", lambda name: spec)
    assert ort._cuda_folders(packages) == [None]


@pytest.mark.parametrize(("cuda", "line"), [(Cuda(12_080), "580.65.06, for CUDA up to 12.8"), (None, "none")])
def test_doctor_names_the_driver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cuda: Cuda | None, line: str
) -> None:
    put(monkeypatch, cuda, Nvml())
    main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["driver"] == line
    main(["doctor"])
    assert f"NVIDIA driver                 {line}\n" in capsys.readouterr().out
