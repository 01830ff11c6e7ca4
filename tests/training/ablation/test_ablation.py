"""The command, end to end on the mini experiment: it trains, goes on after an interruption, and skips what is done."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from odise_rt.errors import CheckpointError
from training.ablation import __main__ as command
from training.run_log import StepReport
from training.trainer import Trainer


@pytest.fixture(autouse=True)
def mini(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mini experiment in place of a named one."""
    spec = spec_from_file_location("mini_conftest", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    conftest = module_from_spec(spec)
    spec.loader.exec_module(conftest)
    monkeypatch.setattr(command, "named_experiment", lambda name: conftest.mini_experiment())
    torch.set_num_threads(1)


def arguments(data: Path, frozen: Path, out: Path, only: str, *extra: str) -> list[str]:
    return [
        *("--data", str(data), "--frozen", str(frozen), "--out", str(out), "--only", only, "--device", "cpu"),
        *("--iterations", "2", "--scenes", "1", "--seeds", "1", "--workers", "0", *extra),
    ]


def row(out: Path, name: str) -> dict[str, object]:
    rows = json.loads((out / "ablation.json").read_text())["rows"]
    found: dict[str, object] = next(row for row in rows if row["id"] == name)
    return found


def test_an_interrupted_ablation_goes_on_and_finished_rows_are_skipped(
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    flags = arguments(mini_data, mini_frozen, out, "conditioning/caption,classification")
    after_step = Trainer.after_step

    def stop(self: Trainer, report: StepReport) -> None:
        after_step(self, report)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "after_step", stop)
        assert command.main(flags) == 130
    assert "stopped: the same command goes on" in capsys.readouterr().err
    assert row(out, "classification/both")["not_run"], "the table is there even so"
    assert command.main(flags) == 0
    for run in ("base", "true_caption"):
        folder = out / "runs" / run / "seed-42"
        steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
        assert steps == [0, 1], f"{run} repeated iterations that were saved"
        state = json.loads((folder / "states" / "000002" / "state.json").read_text())
        expected = "caption" if run == "true_caption" else "implicit"
        assert state["experiment"]["model"]["conditioning"] == expected
    for name in ("caption", "implicit"):
        (result,) = row(out, f"conditioning/{name}")["results"]  # type: ignore[misc]
        assert result["seed"] == 42
        assert result["training_seconds"] > 0
        assert result["environment"]["torch"] == torch.__version__
        assert "--only conditioning/caption,classification" in result["command"]
    hows = {path.stem for path in (out / "runs" / "base" / "seed-42").glob("evaluation-*.json")}
    assert hows == {"evaluation-published", "evaluation-diffusion", "evaluation-clip"}
    facts = (tmp_path / "feature_cache").glob("*/facts.json")
    shared = [json.loads(file.read_text())["network"] for file in facts]
    assert sorted(shared) == ["clip", "vae"], "both runs read one cache"

    monkeypatch.setattr(command, "prepare", lambda *_: pytest.fail("a finished row ran again"))
    assert command.main(flags) == 0
    assert command.main([*flags, "--scenes", "2"]) == 1
    assert "other scenes" in capsys.readouterr().err


def test_what_cannot_run_is_in_the_table_with_its_reason(
    mini_data: Path, mini_frozen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(mini_frozen, bare)
    description = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(description | {"sd_text": False}))
    from safetensors.torch import load_file, save_file

    tensors = load_file(bare / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if not k.startswith("sd_text.")}, bare / "model.safetensors")
    out = tmp_path / "out"
    flags = arguments(mini_data, bare, out, "conditioning/caption,features/clip")
    assert command.main(flags) == 1
    assert "training.checkpoints convert" in caplog.text
    (gap,) = row(out, "conditioning/caption")["not_run"]  # type: ignore[misc]
    assert "without the diffusion model's text encoder" in gap["reason"]
    assert row(out, "features/clip")["results"], "the other rows are measured all the same"
    assert "- the true caption, seed 42: the frozen checkpoint" in (out / "ablation.md").read_text()


@pytest.mark.parametrize("content", ["{", "[3]", "null"])
def test_a_damaged_setup_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "setup.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"setup.json cannot be read .*: name a new --out"):
        command.keep_setup(tmp_path, {"scenes": 1})


def test_two_at_a_time_in_one_folder_are_refused(
    mini_data: Path, mini_frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with command.sole_user(tmp_path / "out"):
        assert command.main(arguments(mini_data, mini_frozen, tmp_path / "out", "timestep")) == 1
    assert "another ablation runs" in capsys.readouterr().err


def test_a_file_system_without_locks_is_no_other_ablation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    caplog.set_level("WARNING")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with command.sole_user(tmp_path / "out"):
        assert "No locks available" in caplog.text
