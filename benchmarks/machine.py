"""What a reader needs to place a number: code, versions, processor, clocks, GPU, and what the machine can do at best.

Nothing here names a person, a host or a folder: results are published.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = (
    *("odise_rt", "numpy", "torch", "diffusers", "open_clip_torch", "transformers", "onnx", "onnx-ir"),
    *("onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "cuda-core"),
)
_CODE = ("odise_rt", "export", "training", "benchmarks", "pyproject.toml", "constraints.txt", "CMakeLists.txt")
"""What decides what is measured; documents and earlier results do not."""
_GPU_FIELDS = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")


@dataclass(frozen=True)
class Rates:
    """The best that this machine did in a few tries of the simplest work: the two sides of the roofline."""

    matmul_gflops: dict[str, float]
    """Library to GFLOP/s of a float32 product of two 2048 x 2048 matrices."""
    copy_gbps: float
    """GB/s read plus written while copying 256 MB."""

    @property
    def peak_gflops(self) -> float:
        """The fastest library's matmul rate: stages are held against this one."""
        return max(self.matmul_gflops.values())

    def floor_seconds(self, flops: float, moved_bytes: float) -> float:
        """No stage with this work can take less, as far as these rates go."""
        return max(flops / (self.peak_gflops * 1e9), moved_bytes / (self.copy_gbps * 1e9))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def environment(threads: int) -> dict[str, Any]:
    """Code, versions, processor, memory, GPU and threads."""
    return {
        **code_state(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "cpu": _cpu_model(),
        "cpu_features": _cpu_features(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "gpus": gpu_facts(),
    }


def code_state() -> dict[str, Any]:
    """The commit (``None``: unknown), and whether code lies here that it does not hold, files that git does not know
    included. What is not known to be clean is dirty.
    """
    changes = _git("status", "--porcelain", "--", *_CODE)
    return {"commit": _git("rev-parse", "HEAD"), "dirty": changes is None or bool(changes)}


def package_versions() -> dict[str, str | None]:
    """What models, exports and engines come from; ``None`` for a package that is not installed."""
    return {name: _version(name) for name in PACKAGES}


def clocks() -> dict[str, Any]:
    """Clock rates as the system states them at this moment; a virtual machine may state a constant."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    cpu = [round(float(line.split(":", 1)[1])) for line in lines if line.startswith("cpu MHz")]
    gpu = [{key: g[key] for key in ("clocks.sm", "clocks.mem") if key in g} for g in gpu_facts()]
    try:
        load = round(os.getloadavg()[0], 2)
    except OSError:
        load = None
    return {"cpu_mhz": cpu, "gpu": gpu, "load_average_1min": load}


def gpu_facts() -> list[dict[str, str]]:
    """Name, driver, memory, clocks and power limit of each NVIDIA GPU; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(_GPU_FIELDS, row, strict=False)) for row in rows]


_CALIBRATION = """
import json, sys, time
import numpy as np
threads, size, repeats = int(sys.argv[1]), 2048, 5

def best(call):
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)

rates, copy = {}, None
a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
source, target = np.ones(32 << 20, np.float32), np.empty(32 << 20, np.float32)
seconds = {"numpy": best(lambda: a @ a)}
copies = [best(lambda: np.copyto(target, source))]
try:
    import torch
    torch.set_num_threads(threads)
    t, s, d = torch.from_numpy(a), torch.from_numpy(source), torch.from_numpy(target)
    seconds["torch"] = best(lambda: t @ t)
    copies.append(best(lambda: d.copy_(s)))
except ImportError:
    pass
try:
    import onnxruntime as ort
    from onnx import TensorProto, helper
    shape = [size, size]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "aby"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["y"])], "matmul", info[:2], info[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    seconds["onnxruntime"] = best(lambda: session.run(None, {"a": a, "b": a}))
except ImportError:
    pass
rates = {name: 2 * size**3 / value / 1e9 for name, value in seconds.items()}
print(json.dumps({"matmul_gflops": rates, "copy_gbps": 2 * source.nbytes / min(copies) / 1e9}))
"""


def measure_rates(threads: int) -> Rates:
    """Matmul rate of each library that is installed, and copy bandwidth, in a process of their own right now."""
    command = [sys.executable, "-c", _CALIBRATION, str(threads)]
    variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | variables)
    return Rates(**json.loads(done.stdout))


_GPU_CALIBRATION = """
import json, torch

def best(call, repeats=10):
    seconds = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return min(seconds)

size, rates = 8192, {}
for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
    a = torch.randn(size, size, device="cuda", dtype=dtype)
    rates[name] = 2 * size**3 / best(lambda: a @ a) / 1e9
source = torch.ones(1 << 28, device="cuda")
target = torch.empty_like(source)
print(json.dumps({"matmul_gflops": rates, "copy_gbps": 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9}))
"""


def measure_gpu_rates() -> Rates:
    """Matmul rate of PyTorch on the GPU by precision (float32 without TF32) and copy bandwidth in its memory.

    Raises:
        subprocess.CalledProcessError: PyTorch finds no CUDA device.
    """
    done = subprocess.run([sys.executable, "-c", _GPU_CALIBRATION], check=True, capture_output=True, text=True)
    return Rates(**json.loads(done.stdout))


def available_bytes() -> int | None:
    """Memory that a new process could use without swapping, the container's limit included; ``None`` if unknown."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        cached = re.search(r"^inactive_file (\d+)", Path("/sys/fs/cgroup/memory.stat").read_text("ascii"), re.M)
        if limit != "max":
            found.append(int(limit) - used + (int(cached.group(1)) if cached else 0))
    except (OSError, ValueError):
        pass
    return min(found) if found else None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _cpu_model() -> str:
    named = (line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def _cpu_features() -> list[str]:
    """The vector instructions that decide a matmul rate."""
    flags = next((set(line.split(":", 1)[1].split()) for line in _cpu_lines() if line.startswith("flags")), set())
    return [name for name in ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if name in flags]
