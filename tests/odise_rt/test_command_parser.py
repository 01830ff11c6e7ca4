"""What all commands refuse alike."""

from __future__ import annotations

import pytest

from odise_rt import cli


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["segment", "a.jpg", "--vocab", "dog", "--ray-address", ""], "--ray-address"),
        (["segment", "a.jpg", "--vocab", "dog", "--out="], "--out"),
        (["segment", "a.jpg", "--vocab", ""], "--vocab"),
        (["segment", "a.jpg", "", "--vocab", "dog"], "INPUT"),
        (["inspect", ""], "BUNDLE"),
        (["serve", "bundle", "--host", ""], "--host"),
        (["export-triton", "bundle", "--out", ""], "--out"),
    ],
)
def test_an_empty_value_is_no_value(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"odise-rt: error: argument {named}: its value is empty: give one, or leave it out"
