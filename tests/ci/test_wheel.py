"""hatch_build.py: compiled kernels go into the wheel, and none of other sources."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from odise_rt.kernels.sources import HERE, STAMP
from tests.odise_rt.fake_gpu import write_fatbins

ROOT = Path(__file__).resolve().parents[2]
INTERFACE = "hatchling.builders.hooks.plugin.interface"


class App:
    """What hatchling gives hooks to speak with."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def display_info(self, message: str) -> None:
        self.said.append(message)

    def abort(self, message: str) -> None:
        raise SystemExit(message)


class Hook:
    """The base class, as far as it is used."""

    def __init__(self, root: Path) -> None:
        self.root, self.app = str(root), App()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Sources of kernels, and as much as compiled ones."""
    (tmp_path / "odise_rt").mkdir()
    shutil.copytree(HERE, tmp_path / "odise_rt" / "kernels")
    (tmp_path / "build" / "kernels").mkdir(parents=True)
    write_fatbins(tmp_path / "build" / "kernels")
    return tmp_path


@pytest.fixture
def hook(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    interface = types.ModuleType(INTERFACE)
    interface.BuildHookInterface = Hook  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, INTERFACE, interface)
    for end in (n for n, letter in enumerate(INTERFACE) if letter == "."):
        monkeypatch.setitem(sys.modules, INTERFACE[:end], types.ModuleType(INTERFACE[:end]))
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.KernelsHook(checkout)


def included(hook: Any, version: str = "standard") -> dict[str, str]:
    build_data: dict[str, Any] = {"force_include": {}}
    hook.initialize(version, build_data)
    return build_data["force_include"]


def test_compiled_kernels_are_in_the_wheel(hook: Any, checkout: Path) -> None:
    files = included(hook)
    assert files[str(checkout / "build" / "kernels" / STAMP)] == f"odise_rt/kernels/{STAMP}"
    assert len(files) == 6
    assert not included(hook, "editable"), "they are found where they lie"


def test_without_them_the_wheel_has_none_and_the_build_says_so(hook: Any, checkout: Path) -> None:
    shutil.rmtree(checkout / "build")
    assert not included(hook)
    assert "make kernels" in hook.app.said[0]


def test_those_of_other_sources_end_the_build(hook: Any, checkout: Path) -> None:
    (checkout / "odise_rt" / "kernels" / "naming.cuh").write_text("// changed")
    with pytest.raises(SystemExit, match=r"compiled from other sources.*Run `make kernels`"):
        included(hook)
