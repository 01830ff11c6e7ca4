"""Settings shared by every test: two threads and fixed seeds, so that results do not depend on the machine."""

from __future__ import annotations

import functools
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.odise_rt.fake_gpu import Calls
    from tests.odise_rt.kernels.compiled import Compiled
    from tests.odise_rt.kernels.emulated import Emulation

# Before any library reads them: the tests must behave on two cores, and nothing may try to reach a model hub.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Started in the background by a script, this process ignores Ctrl-C, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes depends on who else uses the machine; what it finds must not.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


@pytest.fixture
def fresh_machine() -> Iterator[None]:
    """The runtime looks anew for GPUs and engines, and so does the next test."""
    from odise_rt.backends.machine import this_machine

    this_machine.cache_clear()
    yield
    this_machine.cache_clear()


@pytest.fixture
def install_gpu(monkeypatch: pytest.MonkeyPatch, fresh_machine: None) -> Iterator[Callable[..., Calls]]:
    """Puts a GPU made of host memory into this machine; see :func:`tests.odise_rt.fake_gpu.install`."""
    from tests.odise_rt import fake_gpu

    yield functools.partial(fake_gpu.install, monkeypatch)
    fake_gpu.check_driver()


@pytest.fixture(scope="session")
def kernel_builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what tests compile of the kernels lies, and is reused while the sources stay the same."""
    from tests.odise_rt.kernels.builds import compiler

    if compiler() is None:
        pytest.skip("needs a C++ compiler: c++, g++ or clang++ (or $CXX)")
    folder = Path(__file__).resolve().parents[1] / "build" / "emulation"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:  # a read-only checkout
        return tmp_path_factory.mktemp("emulation")


@pytest.fixture(scope="session")
def emulation(kernel_builds: Path) -> Emulation:
    """The CUDA kernels' bodies on the CPU."""
    from tests.odise_rt.kernels.emulated import Emulation, build

    return Emulation(build(kernel_builds))


@pytest.fixture(scope="session")
def compiled_for(kernel_builds: Path) -> Callable[[int], Compiled]:
    """The CUDA kernels as nvcc compiles them for a compute capability, run on the CPU."""
    from tests.odise_rt.kernels.compiled import Compiled, PtxKernels, nvcc

    if nvcc() is None:
        pytest.skip("needs nvcc")
    return functools.cache(lambda capability: Compiled(PtxKernels(kernel_builds, capability)))
