"""The emulation library, built once a session and reused while its sources stay the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.odise_rt.kernels.emulated import Emulation, build, compiler


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    if compiler() is None:
        pytest.skip("needs a C++ compiler: c++, g++ or clang++ (or $CXX)")
    folder = Path(__file__).resolve().parents[3] / "build" / "emulation"
    try:
        return Emulation(build(folder))
    except OSError:  # a read-only checkout
        return Emulation(build(tmp_path_factory.mktemp("emulation")))
