"""Options that all commands check alike."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from odise_rt.segmenter import Segmenter

REQUIRED = {
    "training.train": ["mini", "--data", "D", "--frozen", "F", "--out", "O"],
    "training.evaluate": ["M", "--data", "D", "--out", "O"],
    "training.diagnose": ["M", "--data", "D"],
    "training.ablation": ["--data", "D", "--frozen", "F", "--out", "O"],
    "training.reproduce": [],
    "training.checkpoints": ["inspect", "P"],
    "training.pretrain": [],
    "training.pretrain.clip": ["--scenes", "S", "--tokenizer", "T", "--out", "O"],
    "training.pretrain.diffusion": ["--scenes", "S", "--tokenizer", "T", "--out", "O"],
    "training.pretrain.vae": ["--scenes", "S", "--out", "O"],
    "training.pretrain.recognition": ["--diffusion", "D", "--checkpoint", "C"],
    "training.pretrain.text_encoder": ["--checkpoint", "C", "--scenes", "S", "--out", "O"],
    "training.data.sticker_world": ["O", "--images", "1", "--seed", "1"],
}
WRONG = {
    "--device": (
        ["foo", "cuda:x", "cuda", "cuda:1", ""],
        sorted(REQUIRED.keys() - {"training.data.sticker_world", "training.checkpoints"}),
    ),
    "--threads": (
        ["-1", "0", "2.5", "many", "100000"],
        ["training.train", "training.evaluate", "training.pretrain.vae"],
    ),
    "--data": ([""], ["training.train", "training.evaluate", "training.diagnose", "training.ablation"]),
    "--workers": (["-1"], ["training.train", "training.ablation", "training.data.sticker_world"]),
    "--until": (["0", "-5"], ["training.train"]),
    "--limit": (["0"], ["training.evaluate", "training.diagnose"]),
    "--pictures": (["-1"], ["training.evaluate"]),
    "--seeds": (["0"], ["training.ablation"]),
    "--iterations": (["0"], ["training.ablation"]),
    "--processes": (["0", "3"], ["training.reproduce"]),
    "--images": (["0"], ["training.data.sticker_world"]),
    "--seed": (["-1"], ["training.data.sticker_world", "training.pretrain.vae"]),
    "--rate": (["nan", "inf", "0", "-1"], ["training.pretrain.clip", "training.pretrain.vae"]),
    "--steps": (["0"], ["training.pretrain.clip", "training.pretrain.diffusion"]),
    "--batch": (["0"], ["training.pretrain.vae", "training.pretrain.text_encoder"]),
    "--evaluate-every": (["0"], ["training.pretrain.clip"]),
    "--small-share": (["1.5", "nan"], ["training.pretrain.diffusion"]),
    "--sampler-steps": (["0", "1000"], ["training.pretrain.diffusion", "training.pretrain.recognition"]),
    "--config": (["odise-sd1", "none"], ["training.pretrain.clip", "training.pretrain.vae"]),
}


def main_of(module: str) -> Callable[[list[str]], int]:
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    main: Callable[[list[str]], int] = found.main
    return main


@pytest.mark.parametrize("module", REQUIRED)
def test_every_command_has_help(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main_of(module)(["--help"])
    assert caught.value.code == 0
    assert f"python -m {module}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "module"),
    [(option, value, module) for option, (values, modules) in WRONG.items() for value in values for module in modules],
)
def test_a_wrong_option_is_refused_before_anything_else(
    option: str,
    value: str,
    module: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        main_of(module)([*REQUIRED[module], f"{option}={value}"])
    assert caught.value.code == 2
    assert f"argument {option}" in capsys.readouterr().err


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    (tmp_path / "bundle.json").touch()
    return str(tmp_path)


@pytest.mark.parametrize("module", ["training.evaluate", "training.diagnose"])
@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ([], ("auto", "onnxruntime")),
        (["--device", "cuda"], ("cuda", "onnxruntime")),
        (["--cpu-engine", "openvino"], ("cpu", "openvino")),
        (["--cpu-engine", "onnxruntime"], ("cpu", "onnxruntime")),
    ],
)
@pytest.mark.parametrize("gpus", [0, 2])
def test_the_runtime_chooses_the_device_of_a_bundle_not_pytorch(
    gpus: int,
    flags: list[str],
    asked: tuple[str, str],
    module: str,
    bundle: str,
    mini_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    loads: list[tuple[str, str]] = []

    def load(path: Path, device: str, threads: int | None, *, cpu_engine: str) -> Segmenter:
        loads.append((device, cpu_engine))
        raise KeyboardInterrupt

    monkeypatch.setattr(Segmenter, "load", load)
    out = str(Path(bundle) / "out" / "metrics")
    assert main_of(module)([bundle, "--data", str(mini_data), "--out", out, *flags]) == 130
    assert loads == [asked]


@pytest.mark.parametrize("module", ["training.evaluate", "training.diagnose"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda:1"], "argument --device: 'cuda:1' is for checkpoints"),
        (["--device", "cuda", "--cpu-engine", "openvino"], "does not go with --cpu-engine openvino"),
        (["--cpu-engine", "tensorrt"], "argument --cpu-engine: invalid choice: 'tensorrt'"),
    ],
)
def test_what_a_bundle_cannot_run_on_is_refused(
    flags: list[str],
    message: str,
    module: str,
    bundle: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main_of(module)([bundle, "--data", "D", "--out", "O", *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_has_no_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main_of("training.evaluate")([str(tmp_path), "--data", "D", "--out", "O", "--cpu-engine", "openvino"])
    assert caught.value.code == 2
    assert "is no bundle" in capsys.readouterr().err
