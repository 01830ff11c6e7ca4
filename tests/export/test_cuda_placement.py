"""ONNX Runtime's own CUDA build places every node of the graphs for it on the GPU, with no copy in between.

That needs its package, which cannot be installed beside the one for CPUs, and a C compiler, but no GPU: CUDA's
libraries are ``cuda_stand_in.c``. What a kernel computes, and how fast, only a GPU can tell::

    pip install --no-deps --target build/onnxruntime-gpu onnxruntime-gpu==1.31.1
    pytest -m onnxruntime_gpu
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from export.engine_builds import add_engines
from export.engine_options import EngineOptions
from export.exporter import ExportOptions, build_bundle
from export.sources import from_checkpoint
from odise_rt.backends.machine import engine_platform
from odise_rt.bundle import Bundle
from odise_rt.engine_facts import Machine
from odise_rt.specs import STAGES

ROOT = Path(__file__).parents[2]
PACKAGE = Path(os.environ.get("ODISE_RT_ORT_GPU", ROOT / "build" / "onnxruntime-gpu"))
COMPILER = shutil.which(os.environ.get("CC", "cc"))
SOURCE = Path(__file__).with_name("cuda_stand_in.c")
LIBRARIES = ("cudart.so.13", "cublas.so.13", "cublasLt.so.13", "curand.so.10", "cufft.so.12", "cudnn.so.9", "cuda.so.1")
_NAMES = re.compile(rb"\b(?:__cuda|cuda|cudnn|cublas|curand|cufft|cu)[A-Z]\w+")

pytestmark = [
    pytest.mark.onnxruntime_gpu,
    pytest.mark.skipif(not PACKAGE.is_dir(), reason=f"Requires onnxruntime-gpu in {PACKAGE} (or $ODISE_RT_ORT_GPU)"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler: cc (or $CC)"),
    pytest.mark.timeout(900),
]

_PROGRAM = """
import json, os, sys
import onnxruntime
from odise_rt.backends.ort import CUDA_OPTIONS
found = {}
for path, turn in json.loads(sys.argv[1]):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # It refuses to capture graphs in which something is copied between GPU and CPU.
    cuda = CUDA_OPTIONS | {"enable_cuda_graph": "1", "prefer_nhwc": turn}
    try:
        session = onnxruntime.InferenceSession(
            path, options, providers=[("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
        )
        found[path] = session.get_providers()[0]
    except Exception as exc:
        found[path] = str(exc)
print(json.dumps([onnxruntime.__version__, found]), flush=True)
os._exit(0)  # the stand-in cannot be taken down in order
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CUDA's libraries, as the package asks for them."""
    assert COMPILER is not None
    folder = tmp_path_factory.mktemp("cuda")
    provider = next((PACKAGE / "onnxruntime" / "capi").glob("libonnxruntime_providers_cuda.so"))
    names = sorted({name.decode() for name in _NAMES.findall(provider.read_bytes())})
    empty = folder / "empty.c"
    empty.write_text("\n".join(f"__attribute__((weak)) int {name}(void) {{ return 0; }}" for name in names))
    whole = folder / "libcuda-stand-in.so"
    for source, output in ((SOURCE, "stand_in.o"), (empty, "empty.o")):
        command = [COMPILER, "-c", "-fPIC", "-w", "-fno-builtin", "-o", str(folder / output), str(source)]
        subprocess.run(command, check=True)
    objects = [str(folder / name) for name in ("stand_in.o", "empty.o")]
    subprocess.run([COMPILER, "-shared", "-o", str(whole), *objects], check=True)
    for library in LIBRARIES:
        (folder / f"lib{library}").symlink_to(whole)
    return folder


def _placed(graphs: Mapping[Path, bool], stand_in: Path) -> dict[Path, str]:
    """For each graph the provider, or why it was refused; True: let ONNX Runtime put channels last."""
    asked = json.dumps([(str(path), str(int(turn))) for path, turn in graphs.items()])
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(stand_in),
        "PYTHONPATH": f"{PACKAGE}{os.pathsep}{ROOT}",
        "ORT_DISABLE_TELEMETRY": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, asked], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    version, found = json.loads(run.stdout.splitlines()[-1])
    assert version in str(list(PACKAGE.glob("onnxruntime_gpu-*")))
    return {Path(path): outcome for path, outcome in found.items()}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """odise-tiny with engines for ONNX Runtime CUDA: of the bundle that `make demo` exported, or of a new one."""
    folder = tmp_path_factory.mktemp("placement") / "odise-tiny"
    made = Path(os.environ.get("ODISE_RT_BUNDLE", ROOT / "out" / "odise-tiny"))
    if (made / "bundle.json").is_file():
        shutil.copytree(made, folder, ignore=shutil.ignore_patterns("engines"))
    else:
        checkpoint = ROOT / "training" / "pretrained" / "odise-tiny"
        build_bundle(from_checkpoint(checkpoint), folder, ExportOptions(threads=2), Console(quiet=True))
    return Bundle.open(folder)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_graphs_are_placed_without_copies(bundle: Bundle, precision: str, stand_in: Path) -> None:
    options = EngineOptions(("ort-cuda",), precision, unverified=True, rebuild=True, threads=2)  # type: ignore[arg-type]
    # Said, not looked up: earlier tests may have put a GPU into this process (tests/odise_rt/fake_driver.py).
    nothing = Machine(engine_platform(), None, None, "none is needed", {}, {})
    built = add_engines(bundle, options, Console(quiet=True), machine=nothing).built
    assert [engine.facts.stage for engine in built] == list(STAGES)
    found = _placed({engine.path: False for engine in built}, stand_in)
    assert found == {engine.path: "CUDAExecutionProvider" for engine in built}


def test_the_check_finds_copies(bundle: Bundle, stand_in: Path) -> None:
    """In portable graphs there are some, as ``OrtBackend`` says."""
    decoder = bundle.stages["mask_decoder"].file.path
    assert "graph capture" in _placed({decoder: True}, stand_in)[decoder]


_LOAD = """
import os
from odise_rt.backends.ort import working_provider
print(working_provider("cuda"), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("driver", "missing", "message"),
    [
        (True, None, "None"),
        (True, "curand.so.10", "CUDAExecutionProvider did not start (libcurand.so.10: cannot open shared object file"),
        (False, None, "CUDAExecutionProvider cannot start: there is no NVIDIA driver here"),
    ],
)
def test_cudas_libraries_are_found_where_pip_puts_them(
    stand_in: Path, tmp_path: Path, driver: bool, missing: str | None, message: str
) -> None:
    """And what is missing is named, and nothing is printed beside it."""
    assert COMPILER is not None
    (tmp_path / "system").mkdir()
    if driver:
        (tmp_path / "system" / "libcuda.so.1").symlink_to(stand_in / "libcuda.so.1")
    site = tmp_path / "site-packages"
    for library in set(LIBRARIES) - {"cuda.so.1", missing}:
        folder = site / "nvidia" / ("cudnn" if library.startswith("cudnn") else "cu13") / "lib"
        folder.mkdir(parents=True, exist_ok=True)
        # Found again by the name that it has inside, as the real one is.
        named = ["-Wl,--no-as-needed", f"-Wl,-soname,lib{library}", "-o", str(folder / f"lib{library}")]
        subprocess.run([COMPILER, "-shared", *named, str(stand_in / "libcuda-stand-in.so")], check=True)
    (site / "onnxruntime").symlink_to(PACKAGE / "onnxruntime")
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path / "system"), "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    run = subprocess.run([sys.executable, "-c", _LOAD], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(message)
    assert run.stdout.count("\n") == 1
