"""``python -m training.checkpoints``: convert and inspect."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.training.checkpoints.published import Published
from training import config as presets
from training.checkpoints import load_checkpoint
from training.checkpoints.__main__ import main


@pytest.fixture
def wide(published: Published, monkeypatch: pytest.MonkeyPatch, byte_tokenizer: str) -> list[str]:
    """The smallest model as a preset, with the byte tokenizer in place of CLIP's, and the command that converts it."""
    monkeypatch.setitem(presets.PRESETS, "smallest", dataclasses.replace(published.config))
    monkeypatch.setattr("training.checkpoints.released.openai_clip_tokenizer_json", lambda: byte_tokenizer)
    sources = ["--stable-diffusion", str(published.compvis), "--clip", str(published.clip)]
    return ["convert", "--config", "smallest", "--odise", str(published.odise), *sources]


def test_convert_and_inspect(
    wide: list[str], published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("1:owl,night bird\n2:sky\n")
    out = tmp_path / "out"
    options = ["--training-labels", str(labels), "--storage", "fp16", "--without-sd-text"]
    assert main([*wide, "--out", str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert "unet: 684 tensors" in printed
    assert "1 ignored: class weights of the training loss" in printed
    assert f"wrote {out}" in printed
    loaded = load_checkpoint(out)
    assert loaded.training_vocabulary == ("owl", "night bird", "sky")
    assert torch.equal(loaded.model.unet.conv_in.bias, published.model.unet.conv_in.bias)

    assert main(["inspect", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "config smallest, label supervision, window 64" in printed
    assert "training vocabulary of 3 names" in printed
    assert "text encoder left out" in printed
    assert "together" in printed

    assert main(["inspect", str(published.clip), "--tensors"]) == 0
    printed = capsys.readouterr().out
    assert "a CLIP checkpoint (torch file)" in printed
    assert "visual.conv1.weight\t32x3x8x8\tfloat32" in printed
    assert "logit_scale\tscalar\tfloat32" in printed


def test_compact_leaves_the_model_the_same(wide: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, small = tmp_path / "whole", tmp_path / "small"
    assert main([*wide, "--out", str(whole)]) == 0
    assert main(["compact", str(whole), "--out", str(small)]) == 0
    assert f"wrote {small}" in capsys.readouterr().out
    assert (small / "model.safetensors").stat().st_size < 0.6 * (whole / "model.safetensors").stat().st_size
    before, after = load_checkpoint(whole), load_checkpoint(small)
    assert after.model.sd_text is None
    assert (after.config, after.training_vocabulary) == (before.config, before.training_vocabulary)
    for name, parameter in after.model.named_parameters():
        torch.testing.assert_close(parameter, before.model.get_parameter(name), rtol=1e-3, atol=1e-6)

    assert main(["compact", str(small), "--out", str(small)]) == 1
    assert "is the checkpoint itself" in capsys.readouterr().err


def test_errors_end_in_one_line(wide: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [*wide, "--out", str(tmp_path / "out")]
    wrong[wrong.index("--clip") + 1] = str(tmp_path / "none.pt")
    for command in (wrong, ["inspect", str(tmp_path / "none")]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (PermissionError(13, "denied", "x"), 1)])
def test_what_ends_it_is_one_line(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(path: Path) -> None:
        raise error

    monkeypatch.setattr("training.checkpoints.__main__.read_tensors", read)
    assert main(["inspect", "some.pth"]) == status
    assert capsys.readouterr().err.count("\n") == 1


def test_runs_as_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["checkpoints", "inspect", str(tmp_path / "none")])
    # As ``python -m`` does; the copy that is already imported is out of its way.
    monkeypatch.delitem(sys.modules, "training.checkpoints.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("training.checkpoints", run_name="__main__", alter_sys=False)
    assert ended.value.code == 1
    assert "is missing" in capsys.readouterr().err
