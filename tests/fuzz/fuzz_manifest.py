"""Coverage-guided fuzzing of manifests, where atheris is installed.

    python -m tests.fuzz.fuzz_manifest -runs=10000 -rss_limit_mb=2048 -timeout=10

Anything but a bundle or a BundleError is a finding, and so is a path outside of the bundle's folder.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["odise_rt"]):
    from odise_rt.bundle import Bundle
    from odise_rt.errors import BundleError

from tests.odise_rt.fake_bundle import write_bundle


def main() -> None:
    """Fuzz from a sound manifest on."""
    with tempfile.TemporaryDirectory() as folder:
        root = write_bundle(Path(folder) / "bundle")
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        (corpus / "sound").write_bytes((root / "bundle.json").read_bytes())

        def one_input(data: bytes) -> None:
            (root / "bundle.json").write_bytes(data)
            with contextlib.suppress(BundleError):
                for entry in Bundle.open(root, verify=False).stages.values():
                    assert entry.file.path.resolve().is_relative_to(root.resolve())

        atheris.Setup([*sys.argv, str(corpus)], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
