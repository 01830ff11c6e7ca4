"""The one command that makes the shipped checkpoint: its stages fit the commands they call, and each other."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from training import reproduce
from training.reproduce import main, plan


def test_every_stage_reads_what_earlier_ones_write(tmp_path: Path) -> None:
    made = {tmp_path}
    for stage in plan(tmp_path, 2):
        if stage.command != "training.pretrain":  # it makes the data, the tokenizer and the first networks
            written = stage.done.parent if stage.command != "training.train" else stage.done.parents[1]
            read = [Path(word) for word in stage.arguments if word.startswith(str(tmp_path)) and Path(word) != written]
            first = {tmp_path / name for name in ("frozen", "sticker", "tokenizer.json", "diffusion", "clip")}
            for path in read:
                assert any(path.is_relative_to(folder) for folder in made - {tmp_path} | first), path
            made.add(written)


def test_every_stage_is_a_command_with_such_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in plan(tmp_path, 2):
        name = stage.command
        try:
            module = importlib.import_module(f"{name}.__main__")
        except ModuleNotFoundError:
            module = importlib.import_module(name)
        more = ["--dry-run"] if name == "training.pretrain" else []
        # Nothing is there yet, so that all but the dry run end with an error of their own: not with one of argparse.
        status = module.main([*stage.arguments, *more])
        assert (status == 0) == bool(more), capsys.readouterr()


def test_heads_are_trained_by_several_processes(tmp_path: Path) -> None:
    commands = [[sys.executable, *stage.words()] for stage in plan(tmp_path, 2) if stage.command == "training.train"]
    assert len(commands) == 2
    for command in commands:
        assert command[:5] == [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    assert "torch.distributed.run" not in next(s for s in plan(tmp_path, 1) if s.command == "training.train").words()


def test_finished_stages_are_skipped_and_a_failure_stops_the_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = plan(tmp_path, 2)
    stages[0].done.parent.mkdir(parents=True)
    stages[0].done.touch()
    calls: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 3 if len(calls) == 2 else 0)

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    assert main(["--runs", str(tmp_path), "--processes", "2"]) == 3
    assert calls == [[sys.executable, *stage.words()] for stage in stages[1:3]]
    assert "goes on from here" in capsys.readouterr().err
    assert main(["--runs", str(tmp_path), "--processes", "2", "--dry-run"]) == 0
    assert len(calls) == 2
