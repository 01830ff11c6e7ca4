"""The one command that makes everything frozen: order, settings, what is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.pretrain import __main__ as chain
from training.pretrain.__main__ import main, plan


def test_the_stages_come_in_the_order_of_their_needs(tmp_path: Path) -> None:
    stages = plan(tmp_path, font=Path("some.ttf"))
    assert [stage.command for stage in stages] == ["draw", "draw", "draw", "tokenizer", "clip", "vae", "diffusion"]
    assert all("some.ttf" in stage.arguments for stage in stages if stage.command != "tokenizer")
    for stage in stages[3:]:
        assert str(tmp_path / "frozen") in " ".join(stage.arguments), "the frozen models learn from scenes of all nouns"


def test_only_the_scenes_of_the_heads_leave_unseen_nouns_out(tmp_path: Path) -> None:
    classes = {
        stage.arguments[0]: stage.arguments[stage.arguments.index("--classes") + 1]
        for stage in plan(tmp_path)
        if stage.command == "draw" and "train" in stage.arguments
    }
    assert classes == {str(tmp_path / "frozen"): "all", str(tmp_path / "sticker"): "seen"}


def test_finished_stages_are_skipped_and_a_failure_stops_the_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = plan(tmp_path)
    for stage in stages[:4]:
        stage.done.parent.mkdir(parents=True, exist_ok=True)
        stage.done.write_text("{}")
    calls: list[str] = []

    def record(name: str, status: int) -> object:
        return lambda arguments: calls.append(name) or status

    monkeypatch.setattr(chain, "draw", record("draw", 0))
    monkeypatch.setattr(chain.tokenizer, "main", record("tokenizer", 0))
    monkeypatch.setattr(chain.clip, "main", record("clip", 0))
    monkeypatch.setattr(chain.vae, "main", record("vae", 3))
    monkeypatch.setattr(chain.diffusion, "main", record("diffusion", 0))
    assert main(["--runs", str(tmp_path)]) == 3
    assert calls == ["clip", "vae"]
    assert capsys.readouterr().out.count("[done]") == 4
    calls.clear()
    assert main(["--runs", str(tmp_path), "--dry-run"]) == 0
    assert calls == []
