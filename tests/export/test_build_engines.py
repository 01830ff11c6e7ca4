"""The command: what it says of what it did."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.table import Table

from export import build_engines, exporter, sources
from export.build_engines import main
from export.bundle_writer import BundleWriter
from export.exporter import ExportOptions
from export.progress import ExportProgress, export_console
from odise_rt.engine_facts import Machine
from odise_rt.errors import ExportError
from training.checkpoints import LoadedCheckpoint

ODD = "a[bold]b[/]c:smile:[/red]" + "x" * 150


@pytest.fixture
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is there; nobody reads it."""
    return tmp_path_factory.mktemp("checkpoint")


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console = export_console()
    with ExportProgress(1, console) as progress, progress.step(ODD):
        progress.note(ODD)
    console.print(f"bundle: {ODD}")
    table = Table(title=ODD[:30])
    table.add_column(ODD[:30])
    table.add_row(ODD[:30])
    console.print(table, soft_wrap=False)
    out = capsys.readouterr().out
    assert out.startswith(f"  {ODD}\n✓ {ODD} 0.0 s\nbundle: {ODD}\n")
    assert out.count(ODD[:30]) == 3 + 3


def with_cause(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ExportError("no GPU"), 1, "error: no GPU; the bundle is whole and in place: OUT\n"),
        (OSError(28, "No space left"), 1, "No space left: free space or choose another folder; the bundle is whole"),
        (KeyboardInterrupt(), 130, "stopped: the bundle is whole and in place: OUT\n"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            1,
            "error: memory ran out (DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes): free "
            "some, or export on a machine with more; the bundle is whole and in place: OUT\n",
        ),
        (with_cause(ExportError("a size that branches"), MemoryError()), 1, "error: memory ran out (MemoryError): "),
    ],
)
def test_an_error_after_the_bundle_is_in_place_says_so(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small: LoadedCheckpoint,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*args: Any) -> None:
        raise error

    source = SimpleNamespace(loaded=small)
    monkeypatch.setattr(build_engines, "from_checkpoint", lambda path: source)
    monkeypatch.setattr(build_engines, "build_bundle", lambda *args: SimpleNamespace(show=lambda console: None))
    monkeypatch.setattr(build_engines.Bundle, "open", lambda path: None)
    monkeypatch.setattr(build_engines, "engine_references", fail)
    out = str(tmp_path / "bundle")
    arguments = ["--checkpoint", str(checkpoint), "--out", out, "--engine", "ort-cuda", "--unverified"]
    assert main(arguments) == code
    assert message.replace("OUT", out) in capsys.readouterr().err


def test_our_own_mistakes_keep_their_traceback(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(build_engines, "from_checkpoint", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "bundle")])


@pytest.mark.parametrize("size", ["16x16", "64x20000"])
def test_a_size_for_engines_is_refused_before_the_export(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small: LoadedCheckpoint,
    size: str,
) -> None:
    here = Machine("linux-x86_64", None, None, "there is no GPU", {"tensorrt-rtx": "1.7"})
    monkeypatch.setattr(build_engines, "this_machine", lambda: here)
    monkeypatch.setattr(build_engines, "from_checkpoint", lambda path: SimpleNamespace(loaded=small))
    monkeypatch.setattr(build_engines, "build_bundle", lambda *args: pytest.fail("work was done"))
    engines = ["--engine", "tensorrt-rtx", "--unverified", "--size", size]
    assert main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "bundle"), *engines]) == 1
    assert f"size {size}: expected edges from 64 to 16384 pixels" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_export_without_onnxruntime_ends_before_any_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(build_engines, "from_checkpoint", lambda path: pytest.fail("work was done"))
    assert main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "bundle")]) == 1
    assert "ONNX Runtime, which is not installed: pip install" in capsys.readouterr().err


def test_an_error_before_says_that_nothing_is_in_place(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_engines, "from_checkpoint", stop)
    assert main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "bundle")]) == 130
    assert capsys.readouterr().err == "stopped: nothing was put in place\n"


def test_stages_are_checked_without_a_place(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Exporter:
        def __init__(self, source: Any, writer: BundleWriter, options: ExportOptions, progress: Any) -> None:
            assert options.stages == ("clip_text",)
            (writer.graphs / "clip_text.onnx").write_bytes(b"checked")

        def run(self) -> Any:
            return SimpleNamespace(show=lambda console: None)

    monkeypatch.setattr(build_engines, "from_checkpoint", lambda path: None)
    monkeypatch.setattr(exporter, "Exporter", Exporter)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["--checkpoint", str(checkpoint), "--stages", "clip_text"]) == 0
    assert capsys.readouterr().out == "only clip_text checked: no bundle was put in place\n"
    assert list(tmp_path.iterdir()) == []


def test_files_of_one_name_keep_their_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ("vae", "unet", "text_encoder")
    for folder in ("odise", "clip", *(f"sd/{part}" for part in parts)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.bin").write_text(folder)
    (tmp_path / "sd/.cache").mkdir()
    for name in (".cache/model.bin.metadata", "unet/config.json", "README.md"):  # what no weight depends on
        (tmp_path / "sd" / name).write_text("today")
    monkeypatch.setattr(sources, "load_released", lambda *args, **options: options["training_vocabulary"])
    labels = tmp_path / "labels.txt"
    labels.write_text("0:invalid_class_id\n1:person,child\n2:sky\n")
    released = ("odise-sd1", tmp_path / "odise/model.bin", tmp_path / "sd", tmp_path / "clip/model.bin")
    plain, labelled = sources.from_released(*released), sources.from_released(*released, labels)
    files = ["clip/model.bin", "odise/model.bin", *(f"stable_diffusion/{part}/model.bin" for part in parts)]
    assert sorted(plain.created_from["files"]) == sorted(files)
    assert len(set(plain.created_from["files"].values())) == 5
    assert sorted(labelled.created_from["files"]) == sorted([*files, "training_labels/labels.txt"])
    assert (plain.loaded, labelled.loaded) == (None, ("person", "child", "sky"))
