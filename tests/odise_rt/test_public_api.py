"""What `import odise_rt` offers, what it needs, and what it must never pull in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import odise_rt
import odise_rt.errors

ROOT = Path(odise_rt.__file__).parent.parent

PUBLIC = [
    "BackendError",
    "Bundle",
    "BundleError",
    "Candidate",
    "Classification",
    "ImageError",
    "ImageTooLargeError",
    "InputError",
    "Instance",
    "MaskProposals",
    "MissingPackageError",
    "ModelFacts",
    "OdiseError",
    "OptionsError",
    "OutOfMemoryError",
    "PanopticResult",
    "RunFacts",
    "Segment",
    "SegmentOptions",
    "Segmenter",
    "VideoError",
    "Vocabulary",
    "VocabularyClass",
    "VocabularyError",
    "WindowBatching",
    "__version__",
    "pipeline",
]

IMPORT_ALL = """
import importlib, pkgutil, sys
import odise_rt
for module in pkgutil.walk_packages(odise_rt.__path__, "odise_rt."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""

# Stands for an environment with the hard dependencies alone: anything else is as if it were not installed.
MINIMAL = """
import importlib.abc, sys
ALLOWED = {"numpy", "PIL", "tokenizers", "tqdm", "odise_rt"} | set(sys.stdlib_module_names)
class OnlyDependencies(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if path is None and name.partition(".")[0] not in ALLOWED and not name.startswith("_"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, OnlyDependencies())
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names_are_locked() -> None:
    assert odise_rt.__all__ == PUBLIC
    for name in PUBLIC:
        assert hasattr(odise_rt, name)


def test_every_error_has_one_root() -> None:
    errors = [e for e in vars(odise_rt.errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(errors) > 10
    assert all(issubclass(e, odise_rt.OdiseError) for e in errors)


def test_no_module_imports_torch_or_the_other_packages() -> None:
    report = "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'training', 'export', 'benchmarks'}))"
    assert python(IMPORT_ALL + report).strip() == "[]"


def test_every_module_imports_with_the_hard_dependencies_alone() -> None:
    assert python(MINIMAL + IMPORT_ALL + "print('fine')").strip() == "fine"


def test_missing_engine_is_named_with_its_command(label_bundle: Path) -> None:
    code = f"""
import odise_rt
try:
    odise_rt.Segmenter.load({str(label_bundle)!r}, device="cpu")
except odise_rt.MissingPackageError as exc:
    print(exc)
"""
    assert "pip install 'odise_rt[cpu]'" in python(MINIMAL + code)


NO_PATHS: list[Any] = [None, 3, 1.5, b"bytes", [], {}, np.zeros(3), "nul\0l", "x" * 5000, "/no/such/place"]


@pytest.mark.parametrize("given", NO_PATHS, ids=lambda value: repr(value)[:12])
def test_what_is_no_path_is_a_typed_error(given: Any) -> None:
    for call in (odise_rt.Bundle.open, odise_rt.Segmenter.load):
        with pytest.raises(odise_rt.BundleError, match=r"the bundle came as|no bundle at"):
            call(given)
    for call in (odise_rt.Vocabulary.from_json, odise_rt.Vocabulary.from_openseg):
        with pytest.raises(odise_rt.VocabularyError, match="the vocabulary"):
            call(given)
    if not isinstance(given, str):
        with pytest.raises(odise_rt.VocabularyError, match="the vocabulary"):
            odise_rt.Vocabulary.load(given)


def test_import_is_light() -> None:
    """The target is 0.3 s of wall clock on an idle machine; CPU time with slack keeps the test honest on a busy one."""
    code = "import time; start = time.process_time(); from odise_rt import *; print(time.process_time() - start)"
    assert min(float(python(code)) for _ in range(3)) < 0.6
    heavy = "print(sorted({'onnxruntime', 'tokenizers', 'PIL', 'tqdm'} & set(sys.modules)))"
    assert python(f"from odise_rt import *; import sys; {heavy}").strip() == "[]"


def test_types_are_shipped() -> None:
    assert (Path(odise_rt.__file__).parent / "py.typed").is_file()
