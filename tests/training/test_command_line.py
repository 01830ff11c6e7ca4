"""Options that all commands check alike."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch

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
