"""Writes a bundle beside its final place and puts it there in one rename, or not at all.

::

    .NAME.k3v9.partial/      everything is written and verified in here
    NAME/                    appears whole, or stays as it was

However an export ends, nothing half done is left: a failure or an interrupt removes the partial folder, and what a
killed process left is removed by the next export, which can tell because nobody holds a lock on it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from export.weight_store import WeightStore
from odise_rt.bundle import CONSTANTS_NAME, MANIFEST_NAME, SCHEMA_VERSION, TOKENIZER_NAME, file_sha256
from odise_rt.engines import FOLDER as ENGINES
from odise_rt.errors import ExportError
from odise_rt.files import flush_folder, replace_folder
from odise_rt.partial_folder import partial_folder
from odise_rt.specs import ModelFacts, StageSpec

GRAPHS = "onnx"
REPORT_STEM = "export_report"
_OURS = frozenset(
    (
        *(MANIFEST_NAME, CONSTANTS_NAME, TOKENIZER_NAME, GRAPHS, ENGINES),
        *(f"{REPORT_STEM}.json", f"{REPORT_STEM}.md"),
    )
)
"""All that a bundle's folder holds."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The oldest time that a zip file can hold; it stands for no time."""


@dataclass
class StageFiles:
    """The files of one stage that were written."""

    spec: StageSpec
    weights: WeightStore
    parameters: int
    flops: Mapping[str, int]
    variants: list[str] = field(default_factory=list)
    """Keys of the variants, each in ``onnx/<stage>.<key>.onnx``."""

    def graph(self, variant: str | None = None) -> str:
        """File name of the portable graph or of a variant."""
        return f"{self.spec.name}.{variant}.onnx" if variant else f"{self.spec.name}.onnx"


class BundleWriter:
    """One bundle in the making. Use it as a context manager; without :meth:`publish` it leaves nothing."""

    def __init__(self, out: Path, force: bool = False) -> None:
        """Check that ``out`` may be written.

        Args:
            out: the bundle's folder.
            force: replace a bundle that is there already.

        Raises:
            ExportError: something is in the way.
        """
        self.out = out
        self.force = force
        self.stages: dict[str, StageFiles] = {}
        self._stores: dict[str, WeightStore] = {}
        self._check_place()

    def __enter__(self) -> BundleWriter:
        with contextlib.ExitStack() as undo:
            try:
                undo.enter_context(_parents(self.out))
                self.folder = undo.enter_context(partial_folder(self.out))
                self._check_place()
                (self.folder / GRAPHS).mkdir()
            except OSError as exc:
                raise ExportError(
                    f"cannot write beside {self.out} ({exc.strerror}): free space, make the folder writable, or choose "
                    "another --out"
                ) from exc
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for store in self._stores.values():
            # What a full disk refused stays in the buffer, and closing tries once more; all of it is removed below.
            with contextlib.suppress(OSError):
                store.close()
        self._undo.close()

    @property
    def graphs(self) -> Path:
        """Where graph and weight files are written."""
        return self.folder / GRAPHS

    def weights(self, stem: str) -> WeightStore:
        """The weight file ``onnx/STEM.data``, made when first asked for."""
        if stem not in self._stores:
            self._stores[stem] = WeightStore(self.graphs / f"{stem}.data")
        return self._stores[stem]

    def write_constants(self, constants: Mapping[str, np.ndarray]) -> None:
        """Write constants.npz; unlike :func:`numpy.savez` without the time of day."""
        with zipfile.ZipFile(self.folder / CONSTANTS_NAME, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in sorted(constants.items()):
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, np.ascontiguousarray(array, np.float32), allow_pickle=False)
                entry = zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, buffer.getvalue())

    def write_tokenizer(self, tokenizer_json: str) -> None:
        """Write tokenizer.json."""
        (self.folder / TOKENIZER_NAME).write_text(tokenizer_json, encoding="utf-8")

    def write_manifest(self, facts: ModelFacts, description: Mapping[str, Any]) -> None:
        """Write bundle.json over all that was added so far.

        Args:
            facts: of the model.
            description: name, producer, precision, created_from, training_vocabulary and config.
        """
        for store in self._stores.values():
            store.flush()
        weight_hashes = {store.path: file_sha256(store.path) for store in self._stores.values()}
        stages = {}
        for name, files in self.stages.items():
            extra = {f"{GRAPHS}/{files.weights.path.name}": weight_hashes[files.weights.path]}
            stages[name] = {
                **self._file(files.graph(), extra),
                "variants": {key: self._file(files.graph(key), extra) for key in files.variants},
                **files.spec.to_dict(),
                "parameters": files.parameters,
                "flops": dict(files.flops),
            }
        manifest = {
            "schema_version": SCHEMA_VERSION,
            **description,
            "model": facts.to_dict(),
            "stages": stages,
            "files": {name: file_sha256(self.folder / name) for name in (CONSTANTS_NAME, TOKENIZER_NAME)},
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
        (self.folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")

    def _file(self, name: str, extra: Mapping[str, str]) -> dict[str, Any]:
        return {
            "file": f"{GRAPHS}/{name}",
            "sha256": file_sha256(self.graphs / name),
            "extra_files": dict(extra),
        }

    def write_report(self, report: Mapping[str, Any], markdown: str) -> None:
        """Write export_report.json and .md; the manifest does not list them, as they hold seconds."""
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        (self.folder / f"{REPORT_STEM}.json").write_text(text, encoding="utf-8")
        (self.folder / f"{REPORT_STEM}.md").write_text(markdown, encoding="utf-8")

    def size(self) -> int:
        """Bytes written so far."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def publish(self) -> Path:
        """Put the bundle in place.

        Of several exports into one place one wins whole: without ``force`` the first, with it the last.

        Returns:
            The bundle's folder.

        Raises:
            ExportError: another export was first, or the disk is full.
        """
        try:
            for store in self._stores.values():
                store.close()
            flush_folder(self.folder)
            self._rename()
        except OSError as exc:
            raise ExportError(
                f"cannot put the bundle at {self.out} ({exc}): free space or choose another --out"
            ) from exc
        return self.out

    def _rename(self) -> None:
        while True:
            self._check_place()
            try:
                if self.force:
                    replace_folder(self.folder, self.out)
                else:
                    # A folder takes the place of an empty one or of none; one with a bundle refuses it.
                    self.folder.rename(self.out)
            except OSError as exc:
                if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                return

    def _check_place(self) -> None:
        out = self.out
        if out.name in ("", ".."):
            raise ExportError(f"{out} has no name that a bundle could take: give a folder inside it as --out")
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise ExportError(f"{out} is a file or a link: a bundle is a folder; choose another --out")
        if out.is_mount():
            raise ExportError(f"{out} is a mount point, which cannot be replaced: give a folder inside it as --out")
        if not out.exists() or not any(out.iterdir()):
            return
        if not (out / MANIFEST_NAME).is_file():
            raise ExportError(f"{out} holds something that is no bundle: refused to replace it; choose another --out")
        # Hidden files are those of file managers; a hidden folder may be a repository.
        others = sorted(
            entry.name
            for entry in out.iterdir()
            if entry.name not in _OURS and (entry.name[0] != "." or entry.is_dir())
        )
        if others:
            raise ExportError(
                f"{out} holds {', '.join(others[:3])} beside a bundle: refused to replace it; choose another --out"
            )
        if not self.force:
            raise ExportError(
                f"there is a bundle at {out} already: pass --force to replace it, or choose another --out"
            )


@contextlib.contextmanager
def _parents(place: Path) -> Iterator[None]:
    """The folders above a place, made where they are missing; those that were made and stay empty go in the end."""
    missing = [folder for folder in place.absolute().parents if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # somebody's work lies in it
                folder.rmdir()
