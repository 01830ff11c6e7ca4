"""Files of tensors from elsewhere: what is read, what is refused, and that nothing in them is run."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from odise_rt.errors import CheckpointError
from training.checkpoints.tensor_files import read_tensors


class _Executes:
    """Pickles into a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"model": {"w": torch.ones(2)}, "hook": _Executes(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"mkdir|cannot be read as tensors"):
        read_tensors(path)
    assert not trace.exists()


def test_refused_code_is_named(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"model": _Executes(tmp_path / "trace")}, path)
    with pytest.raises(CheckpointError, match=r"asks to run Python code \(posix.mkdir\).*refused"):
        read_tensors(path)


def test_lightnings_callbacks_are_left_as_placeholders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sd-v1-*.ckpt hold a Lightning class as a dictionary key; Lightning need not be installed."""
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    callback = type("ModelCheckpoint", (), {"__module__": names[-1]})
    sys.modules[names[-1]].ModelCheckpoint = callback  # type: ignore[attr-defined]
    path = tmp_path / "sd.ckpt"
    torch.save({"callbacks": {callback: {"best": callback()}}, "state_dict": {"w": torch.ones(2)}}, path)
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    file = read_tensors(path)
    assert list(file.tensors) == ["w"]
    assert not any(name in sys.modules for name in names)


def test_torchscript_archive_is_read_without_its_code(tmp_path: Path) -> None:
    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
            self.register_buffer("input_resolution", torch.tensor(336))
            self.sizes = [1, 2]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x)

    tower = Tower().half()
    path = tmp_path / "scripted.pt"
    torch.jit.script(tower).save(path)
    file = read_tensors(path)
    assert file.container == "torchscript"
    assert set(file.tensors) == set(tower.state_dict())
    for key, tensor in tower.state_dict().items():
        assert torch.equal(file.tensors[key], tensor)
        assert file.tensors[key].dtype == tensor.dtype


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0, 7, 200, 0.5, 0.99])
def test_truncated(tmp_path: Path, suffix: str, kept: float) -> None:
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    tensors = {f"w{i}": torch.randn(40, 40) for i in range(4)}
    if suffix == ".pth":
        torch.save(tensors, whole)
    else:
        save_file(tensors, whole)
    data = whole.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match="get the file again"):
        read_tensors(path)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing: expected a file of tensors"):
        read_tensors(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="is a directory"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["picture.pth", "picture.safetensors", "picture.ckpt"])
def test_not_a_checkpoint(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    with pytest.raises(CheckpointError, match="get the file again"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "note": "x"}, "a dictionary without tensors.*epoch, note"),
        ([1, 2], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        ({"model": {"epoch": 1}}, "without tensors"),
    ],
)
def test_no_dictionary_of_tensors(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(path)


def test_legacy_files_and_kinds(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"visual.conv1.weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert read_tensors(path).kind == "a CLIP checkpoint"
    torch.save({"foo": torch.ones(2), "bar": torch.ones(1)}, path)
    assert read_tensors(path).kind == "an unknown set of 2 tensors (bar, foo)"
