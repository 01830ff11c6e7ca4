"""Training as a user runs it: it learns, survives a kill, and splits over processes without changing."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import training.run_state
import training.train
import training.trainer
from odise_rt.errors import CheckpointError
from tests.training.conftest import mini_experiment
from training.batches import CachedBatches
from training.checkpoints.own_format import load_checkpoint
from training.experiment import Experiment, experiment
from training.optimizer import build_optimizer
from training.run_setup import starting_model
from training.run_state import load_state, save_state, saved_states, trainer_state
from training.training_step import StepInput, TrainingStep

SCRIPT = Path(__file__).with_name("mini_run.py")
ROOT = Path(__file__).parents[2]


def arguments(data: Path, frozen: Path, run: Path, *extra: str) -> list[str]:
    return [
        *("mini", "--data", str(data), "--frozen", str(frozen), "--out", str(run)),
        *("--workers", "0", "--device", "cpu", "--cache", str(run.parent / "cache"), *extra),
    ]


def start(variant: str, kill_after: int, flags: list[str], **environment: str) -> subprocess.Popen[bytes]:
    # Of a process that crashes, its log then says where each of its threads was.
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        **environment,
    }
    command = [sys.executable, str(SCRIPT), variant, str(kill_after), *flags]
    return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def log(run: Path) -> dict[int, dict[str, float]]:
    """The line of each iteration."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == list(range(len(steps))), "each iteration once"
    return {line["step"]: {k: v for k, v in line.items() if "seconds" not in k} for line in lines}


@pytest.fixture
def mini(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Experiment:
    """The mini experiment in place of a named one; parametrize indirectly by variant."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("mini_conftest", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    conftest = module_from_spec(spec)
    spec.loader.exec_module(conftest)
    found: Experiment = conftest.mini_experiment(getattr(request, "param", "label"))
    monkeypatch.setattr(training.train, "experiment", lambda name: found)
    scaler = functools.partial(torch.amp.GradScaler, init_scale=conftest.FP16_SCALE)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    torch.set_num_threads(1)
    return found


def test_kill_and_resume_equal_an_unbroken_run(
    mini: Experiment, mini_data: Path, mini_frozen: Path, tmp_path: Path
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert training.train.main(arguments(mini_data, mini_frozen, unbroken, "--tensorboard")) == 0
    killed = start("label", 3, arguments(mini_data, mini_frozen, broken))
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in saved_states(broken)] == ["000002"]
    assert sorted(log(broken)) == [0, 1, 2], "a line more than the state"
    left = broken / "states" / ".000004.partial"  # by a kill while it saved
    left.mkdir()
    (left / "trained.safetensors").write_bytes(b"half")
    with (broken / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # cut off by a kill
    assert training.train.main(arguments(mini_data, mini_frozen, broken)) == 1, "a run is not overwritten by mistake"
    assert training.train.main(arguments(mini_data, mini_frozen, broken, "--resume")) == 0
    assert log(broken) == log(unbroken)
    assert list((unbroken / "tensorboard").glob("events.*"))
    assert not left.exists()
    assert sorted(log(unbroken)) == list(range(mini.iterations))
    first, second = (load_checkpoint(run / "checkpoint") for run in (unbroken, broken))
    assert first.training_vocabulary == ("sky", "grass", "lawn", "ball"), "a category without a segment stays unseen"
    weights = second.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.model.state_dict().items())


def run_two_processes(kind: str, flags: list[str]) -> list[str]:
    """The mini experiment on two processes over gloo, both of which must succeed; returns what each logged."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(kind, 0, flags, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    logs = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    return logs


def assert_same_course(
    single: dict[int, dict[str, float]], double: dict[int, dict[str, float]], tolerance: float
) -> None:
    """Equal losses and gradients at the start; later iterations add up rounding through AdamW."""
    assert single.keys() == double.keys()
    names = [name for name in single[0] if name not in ("step", "lr")]
    assert "gradient_norm" in names
    for name in names:
        assert double[0][name] == pytest.approx(single[0][name], rel=tolerance, abs=tolerance), name
    for step in single:
        assert double[step]["loss"] == pytest.approx(single[step]["loss"], rel=100 * tolerance)


@pytest.mark.parametrize(
    ("mini", "parallel"),
    [
        ("label", "ddp"),
        pytest.param("caption", "ddp", marks=pytest.mark.slow),
        ("label", "fsdp"),
        pytest.param("caption", "fsdp", marks=pytest.mark.slow),
        pytest.param("label-bf16", "fsdp", marks=pytest.mark.slow),
        pytest.param("label-fp16", "fsdp", marks=pytest.mark.slow),
    ],
    indirect=["mini"],
)
def test_two_processes_equal_one(
    mini: Experiment, parallel: str, mini_data: Path, mini_frozen: Path, tmp_path: Path
) -> None:
    kind = mini.model.variant + ("" if mini.precision == "fp32" else f"-{mini.precision}")
    one, two = tmp_path / "one", tmp_path / "two"
    assert training.train.main(arguments(mini_data, mini_frozen, one)) == 0
    logs = run_two_processes(kind, arguments(mini_data, mini_frozen, two, "--parallel", parallel))
    assert_same_course(log(one), log(two), 2e-5 if mini.precision == "fp32" else 2e-3)
    assert ("word" in log(one)[0]) == (mini.model.variant == "caption")
    assert list((two / "pictures").glob("*.jpg"))
    first, second = (load_checkpoint(run / "checkpoint").model for run in (one, two))
    weights = second.state_dict()
    for name, tensor in first.state_dict().items():
        # AdamW moves a weight whose gradient is all rounding by its whole rate, 1e-3, either way.
        assert torch.allclose(tensor, weights[name], atol=1e-2), name
        if name not in first.trained_parameters():
            assert torch.equal(tensor, weights[name]), name
    if parallel == "fsdp":
        for text in logs:
            found = re.search(r"keeps ([\d.]+) of ([\d.]+) M parameters", text)
            assert found is not None
            assert float(found[1]) < 0.65 * float(found[2]), "half of all but the text tower"
        # What sharded processes saved at iteration 4, a single one takes up.
        shutil.rmtree(two / "states" / "000005")
        assert training.train.main(arguments(mini_data, mini_frozen, two, "--resume")) == 0
        resumed, unbroken = log(two)[4], log(one)[4]
        assert resumed["loss"] == pytest.approx(unbroken["loss"], rel=2e-3 if mini.precision == "fp32" else 0.1)


@pytest.mark.parametrize("mini", ["label-fp32-4"], indirect=True)
@pytest.mark.parametrize("parallel", [None, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ddp", "fsdp"))])
def test_micro_batches_change_memory_not_the_course(
    mini: Experiment, parallel: str | None, mini_data: Path, mini_frozen: Path, tmp_path: Path
) -> None:
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert training.train.main(arguments(mini_data, mini_frozen, whole, "--until", "4")) == 0
    flags = arguments(mini_data, mini_frozen, split, "--until", "4", "--micro-batches", "2")
    if parallel is None:
        assert training.train.main(flags) == 0
    else:
        run_two_processes("label-fp32-4", [*flags, "--parallel", parallel])
    assert_same_course(log(whole), log(split), 2e-5)


@pytest.mark.parametrize(
    ("mini", "parts", "message"),
    [
        ("label", "3", "gives each process 2 pictures a step, which cannot be divided into 3 equal micro-batches"),
        ("caption", "2", "each of which is compared with all pictures of the batch"),
    ],
    indirect=["mini"],
)
def test_a_batch_that_cannot_be_divided_is_refused(
    mini: Experiment,
    parts: str,
    message: str,
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert training.train.main(arguments(mini_data, mini_frozen, run, "--micro-batches", parts)) == 1
    assert message in capsys.readouterr().err
    assert not run.exists()


def test_resuming_with_another_config_is_refused(
    mini: Experiment, mini_data: Path, mini_frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert training.train.main(arguments(mini_data, mini_frozen, run, "--until", "2")) == 0
    state = saved_states(run)[0] / "state.json"
    content = json.loads(state.read_text())
    content["experiment"]["seed"] = 1
    state.write_text(json.dumps(content))
    assert training.train.main(arguments(mini_data, mini_frozen, run, "--resume")) == 1
    assert "another experiment" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        *("coco_label", "coco_caption", "sticker_tiny_label", "sticker_tiny_caption", "sticker_tiny_refine"),
        *("sticker_tiny_ablation", "finetune_label"),
    ],
)
def test_experiments_are_consistent(name: str) -> None:
    found = experiment(name)
    assert found.name == name
    full_size = name in ("coco_label", "coco_caption", "finetune_label")
    assert found.cropped_out_targets == full_size, "as published; what ships was trained without"
    assert all(phase.jitter.diagonal_crops == full_size for phase in found.phases)
    rates = [found.learning_rate(step) for step in range(found.iterations)]
    peak = found.optimizer.learning_rate
    assert rates[0] == pytest.approx(peak * 0.067)
    assert max(rates) == pytest.approx(peak)
    last_linear = peak / found.iterations / (1 - found.optimizer.warmup)
    assert rates[-1] == pytest.approx(peak / 100 if found.optimizer.decay == "steps" else last_linear)
    assert found.phase_at(found.iterations - 1)[0] == len(found.phases) - 1


def test_published_schedule() -> None:
    found = experiment("coco_label")
    assert found.iterations == 92_188
    assert found.phases[0].batch == 64
    drops = [s for s in range(1, found.iterations) if found.learning_rate(s) < 0.5 * found.learning_rate(s - 1)]
    assert drops == [81_945, 88_774]
    assert found.learning_rate(251) == found.optimizer.learning_rate == 1e-4


def test_a_full_disk_keeps_the_earlier_state(
    mini: Experiment,
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    assert training.train.main(arguments(mini_data, mini_frozen, run, "--until", "3")) == 0

    def no_space(tensors: object, path: str) -> None:
        Path(path).write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.run_state, "save_file", no_space)
    assert training.train.main(arguments(mini_data, mini_frozen, run, "--resume")) == 1
    assert "No space left" in capsys.readouterr().err
    assert {path.name for path in (run / "states").iterdir()} == {"000002", "000003"}, "nothing half written is left"


def test_muon_resumes_too_and_refuses_to_be_sharded(
    mini: Experiment,
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = dataclasses.replace(mini.optimizer, matrix_rate=2e-3, decay="linear")
    with_muon = dataclasses.replace(mini, optimizer=options)
    monkeypatch.setattr(training.train, "experiment", lambda name: with_muon)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert training.train.main(arguments(mini_data, mini_frozen, unbroken)) == 0
    assert training.train.main(arguments(mini_data, mini_frozen, broken, "--until", "3")) == 0
    assert training.train.main(arguments(mini_data, mini_frozen, broken, "--resume")) == 0
    assert log(broken) == log(unbroken)
    monkeypatch.setattr(training.trainer, "world_size", lambda: 2)  # which the batches are shared by
    assert training.train.main(arguments(mini_data, mini_frozen, tmp_path / "two", "--parallel", "fsdp")) == 1
    assert "Muon needs whole matrices" in capsys.readouterr().err


def test_a_run_that_is_stopped_between_states_keeps_what_it_did(
    mini: Experiment, mini_data: Path, mini_frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = dataclasses.replace(mini, save_every=1000)
    monkeypatch.setattr(training.train, "experiment", lambda name: rare)
    assert training.train.main(arguments(mini_data, mini_frozen, tmp_path / "run", "--until", "1")) == 0
    assert [state.name for state in saved_states(tmp_path / "run")] == ["000001"]


def test_a_run_goes_on_with_what_it_began_with(
    mini: Experiment, mini_data: Path, mini_frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert training.train.main(arguments(mini_data, mini_frozen, run, "--until", "1")) == 0
    state = saved_states(run)[-1] / "state.json"
    content = json.loads(state.read_text())
    assert set(content["origin"]) == {
        *("frozen networks", "training vocabulary", "division of words into classes", "split", "annotation file")
    }
    for what in content["origin"].keys() - {"annotation file"}:
        changed = {**content, "origin": {**content["origin"], what: "other"}}
        state.write_text(json.dumps(changed))
        for flag in ("--resume", "--finish"):
            assert training.train.main(arguments(mini_data, mini_frozen, run, flag)) == 1
            assert f"was trained with another {what}" in capsys.readouterr().err
    state.write_text(
        json.dumps({key: value for key, value in content.items() if key != "origin"})
    )  # of an older version
    assert training.train.main(arguments(mini_data, mini_frozen, run, "--finish")) == 0


def test_other_words_are_learnt_and_kept(
    mini: Experiment,
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words, run, shown = tmp_path / "words.txt", tmp_path / "run", []
    words.write_text("0:heaven,sky\n1:turf\n2:sphere\n3:horse\n")
    draw = training.train.ExamplePictures.__call__
    monkeypatch.setattr(
        training.train.ExamplePictures, "__call__", lambda self, step: shown.append(self.vocabulary) or draw(self, step)
    )
    classes = ("--classes", str(words))
    assert training.train.main(arguments(mini_data, mini_frozen, run, *classes, "--until", "4")) == 0
    assert training.train.main(arguments(mini_data, mini_frozen, run, "--resume")) == 1
    error = capsys.readouterr().err
    assert "another training vocabulary and another division of words into classes: resume with the same" in error
    assert "--data, --split, --classes" in error
    assert training.train.main(arguments(mini_data, mini_frozen, run, *classes, "--resume")) == 0
    assert load_checkpoint(run / "checkpoint").training_vocabulary == ("heaven", "sky", "turf", "sphere")
    assert {vocabulary.words for vocabulary in shown} == {("heaven", "sky", "turf", "sphere", "horse")}
    words.write_text("0:sky\n1:turf\n2:sphere\n")
    assert training.train.main(arguments(mini_data, mini_frozen, tmp_path / "new", *classes)) == 1
    assert "3 classes were given for a data set of 4" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_word_that_moved_to_another_class_is_noticed(
    mini: Experiment, mini_data: Path, mini_frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words.txt"
    flags = arguments(mini_data, mini_frozen, tmp_path / "run", "--classes", str(words), "--until", "1")
    words.write_text("0:heaven,sky\n1:turf\n2:sphere\n3:horse\n")
    assert training.train.main(flags) == 0
    words.write_text("0:heaven\n1:sky,turf\n2:sphere\n3:horse\n")
    assert training.train.main([*flags, "--resume"]) == 1
    assert "was trained with another division of words into classes: resume with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mini", "read"),
    [("label", {"panoptic": "annotation file"}), ("caption", {"captions": "caption file"})],
    indirect=["mini"],
)
def test_a_run_goes_on_with_the_annotations_that_it_began_with(
    mini: Experiment,
    read: dict[str, str],
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = Path(shutil.copytree(mini_data, tmp_path / "data"))
    assert training.train.main(arguments(data, mini_frozen, tmp_path / "run", "--until", "1")) == 0
    for kind in ("captions", "panoptic"):
        with (data / "annotations" / f"{kind}_train.json").open("a") as file:
            file.write("\n")
        # To where the run is already, so that nothing is trained.
        status = training.train.main(arguments(data, mini_frozen, tmp_path / "run", "--resume", "--until", "1"))
        error = capsys.readouterr().err
        assert status == (kind in read)
        if kind in read:
            assert f"was trained with another {read[kind]}: resume with the same --data" in error
            break
    assert training.train.main(arguments(data, mini_frozen, tmp_path / "run", "--finish")) == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.pt", b"cut off"),
        ("optimizer.pt", b""),
        ("optimizer.pt", None),
        ("trained.safetensors", b"cut off"),
        ("state.json", b"[]"),
        ("state.json", b"{}"),
        ("state.json", b'{"step": "many", "experiment": {}}'),
    ],
)
def test_a_damaged_state_is_named(name: str, content: bytes | None, mini_frozen: Path, tmp_path: Path) -> None:
    config = mini_experiment()
    model, _ = starting_model(config, mini_frozen)
    optimizer = build_optimizer(model, config.optimizer)
    shapes = {name: parameter.shape for name, parameter in model.trained_parameters().items()}
    state = save_state(tmp_path, 1, trainer_state(model, optimizer, None, shapes), config)
    assert load_state(state, model, optimizer, None, config) == 1
    path = state / name
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(CheckpointError, match=f"{state} cannot be read .*: delete it to use the one before"):
        load_state(state, model, optimizer, None, config)


@pytest.mark.parametrize("when", ["save", "step"])
def test_ctrl_c_is_one_line_and_keeps_the_last_state(
    when: str,
    mini: Experiment,
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert training.train.main(arguments(mini_data, mini_frozen, run, "--until", "1")) == 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if when == "save":
        monkeypatch.setattr(training.run_state, "save_file", interrupt)
    else:
        monkeypatch.setattr(training.trainer.Trainer, "one_step", interrupt)
    capsys.readouterr()
    assert training.train.main(arguments(mini_data, mini_frozen, run, "--resume")) == 130
    last = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert last.startswith("stopped: the same command with --resume goes on from the last saved state")
    assert [path.name for path in (run / "states").iterdir()] == ["000001"]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_picture_is_one_line_in_workers_too(
    workers: str,
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training.train, "experiment", lambda name: mini_experiment(cached=False))
    data = tmp_path / "data"
    shutil.copytree(mini_data, data)
    for picture in (data / "train").iterdir():
        picture.write_bytes(b"no picture")
    assert training.train.main(arguments(data, mini_frozen, tmp_path / "run", "--workers", workers)) == 1
    message = capsys.readouterr().err
    assert "cannot be read as a picture" in message
    assert "Traceback" not in message


def test_batches_must_split_over_the_processes(
    mini: Experiment,
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training.trainer, "world_size", lambda: 3)
    assert training.train.main(arguments(mini_data, mini_frozen, tmp_path / "run")) == 1
    assert "batches of 2, which 3 processes cannot share evenly" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mini", ["label", "caption"], indirect=True)
def test_captions_are_needed_by_caption_supervision_only(
    mini: Experiment, mini_data: Path, mini_frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(mini_data, data)
    (data / "annotations" / "captions_train.json").unlink()
    status = training.train.main(arguments(data, mini_frozen, tmp_path / "run", "--until", "1"))
    assert status == (0 if mini.model.variant == "label" else 1)
    assert ("captions_train.json does not exist" in capsys.readouterr().err) == (status == 1)


@pytest.mark.parametrize("split", ["val", "val2017", None])
def test_example_pictures_are_of_the_part_that_is_there(
    split: str | None, mini_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    shutil.copytree(mini_data, data)
    for path in [data / "val", data / "panoptic_val", data / "annotations" / "panoptic_val.json"]:
        path.rename(path.with_name(path.name.replace("val", split or "test")))
    caplog.set_level("INFO", "training")
    found = training.train.open_examples(data, None)
    assert (None if found is None else found[0].images_path) == (None if split is None else data / split)
    assert ("has no part val, val2017, validation; name one by --examples" in caplog.text) == (split is None)
    named = training.train.open_examples(data, split or "test")
    assert named is not None
    assert len(named[1]) == 3


@pytest.mark.parametrize("lost", ["val/1.png", "panoptic_val/2.png", "annotations/panoptic_val.json"])
def test_a_part_whose_pictures_are_missing_is_done_without(
    lost: str,
    mini: Experiment,
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", "training")
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(mini_data, data)
    (data / lost).write_bytes(b"cut off")
    assert training.train.main(arguments(data, mini_frozen, run, "--examples", "val")) == 1
    assert lost in capsys.readouterr().err
    assert not run.exists()
    assert training.train.main(arguments(data, mini_frozen, run)) == 0
    assert lost in caplog.text
    assert "no example predictions will be drawn" in caplog.text
    assert (run / "checkpoint" / "config.json").exists()
    assert not (run / "pictures").exists()


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), OSError(28, "No space left on device")])
def test_a_failure_of_drawing_ends_no_training(
    error: Exception,
    mini: Experiment,
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", "training")

    def fail(self: object, step: int) -> None:
        self.model.eval()  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(training.train.ExamplePictures, "__call__", fail)
    often = dataclasses.replace(mini, picture_every=1)
    monkeypatch.setattr(training.train, "experiment", lambda name: often)
    assert training.train.main(arguments(mini_data, mini_frozen, tmp_path / "run")) == 0
    assert f"iteration 1: no example predictions were drawn: {error}" in caplog.text
    assert sorted(log(tmp_path / "run")) == list(range(5))


def test_a_part_that_is_named_for_examples_must_be_there(
    mini: Experiment, mini_data: Path, mini_frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.train.main(arguments(mini_data, mini_frozen, tmp_path / "run", "--examples", "test")) == 1
    assert "panoptic_test.json does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mini", ["label-fp16"], indirect=True)
def test_an_update_that_overflows_fp16_is_skipped_and_told(
    mini: Experiment,
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "training")
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**127)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    run = tmp_path / "run"
    assert training.train.main(arguments(mini_data, mini_frozen, run, "--until", "1", "--tensorboard")) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((run / "log.jsonl").read_text(), parse_constant=refuse)
    assert (line["gradient_norm"], line["loss_scale"], line["skipped"]) == (None, 2.0**127, True)
    assert "iteration 0: a gradient overflowed fp16" in caplog.text


@pytest.mark.parametrize("mini", ["label-fp16"], indirect=True)
def test_a_run_of_which_every_update_overflows_fp16_ends(
    mini: Experiment,
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forward = TrainingStep.forward

    def steep(self: TrainingStep, batch: StepInput) -> dict[str, torch.Tensor]:
        return {name: 1e20 * loss for name, loss in forward(self, batch).items()}

    monkeypatch.setattr(TrainingStep, "forward", steep)
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=4.0))
    run = tmp_path / "run"
    assert training.train.main(arguments(mini_data, mini_frozen, run)) == 1
    error = capsys.readouterr().err
    assert "at iteration 2 a gradient overflows fp16 although the loss is not scaled up (1); image ids [" in error
    assert "precision bf16 or fp32" in error
    assert [line["loss_scale"] for line in log(run).values()] == [4.0, 2.0]
    assert [path.name for path in saved_states(run)] == ["000002"]


def test_waiting_for_data_is_logged_apart(
    mini: Experiment, mini_data: Path, mini_frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    batches, forward = CachedBatches.batches, TrainingStep.forward

    def slow_batches(self: CachedBatches, draws: Sequence[Sequence[int]]) -> Iterator[StepInput]:
        nonlocal now
        for batch in batches(self, draws):
            now += 5
            yield batch

    def slow_forward(self: TrainingStep, batch: StepInput) -> dict[str, torch.Tensor]:
        nonlocal now
        now += 3
        return forward(self, batch)

    monkeypatch.setattr(CachedBatches, "batches", slow_batches)
    monkeypatch.setattr(TrainingStep, "forward", slow_forward)
    monkeypatch.setattr(training.trainer, "time", SimpleNamespace(perf_counter=lambda: now))
    run = tmp_path / "run"
    assert training.train.main(arguments(mini_data, mini_frozen, run, "--until", "2")) == 0
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(line["data_seconds"], line["seconds"]) for line in lines] == [(5, 3), (5, 3)]


def test_a_run_that_begins_anew_begins_its_log_anew(
    mini: Experiment, mini_data: Path, mini_frozen: Path, tmp_path: Path
) -> None:
    """Killed before its first state, it left lines."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text('{"step": 0, "seconds": 1}\n')
    assert training.train.main(arguments(mini_data, mini_frozen, run, "--until", "1", "--tensorboard")) == 0
    assert sorted(log(run)) == [0]


def test_states_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("999900", "1000000", "²", ".000009.1"):
        (tmp_path / "states" / name).mkdir(parents=True)
    (tmp_path / "states" / "000009").touch()
    assert [state.name for state in saved_states(tmp_path)] == ["999900", "1000000"]
