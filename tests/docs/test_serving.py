"""docs/serving.md against the commands that it describes: every option is there, and with its default."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from odise_rt import cli
from odise_rt.serve.openapi import DESCRIPTION

PAGE = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
OF_OTHERS = {"--data-binary", "--form-string", "--model-repository", "--preload"}
"""Options of curl, tritonserver and gunicorn."""


def options(command: str) -> dict[str, argparse.Action]:
    """Long options of a command, without --help."""
    parsers = next(a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = parsers.choices[command]._actions
    return {o: a for a in actions for o in a.option_strings if o.startswith("--") and o != "--help"}


@pytest.fixture
def known() -> dict[str, argparse.Action]:
    return options("export-triton") | options("serve")


def test_every_option_is_described(known: dict[str, argparse.Action]) -> None:
    described = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    assert sorted(set(known) - described) == []


def test_no_option_is_described_that_does_not_exist(known: dict[str, argparse.Action]) -> None:
    described = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    assert sorted(described - set(known) - OF_OTHERS) == []


def test_curl_is_given_whole_vocabularies() -> None:
    """Its -F ends a value at a semicolon, and the server sees one class where three were meant."""
    for text in (PAGE, DESCRIPTION):
        assert "--form-string vocabulary='" in text
        assert re.findall(r"-F vocabulary='[^']*;", text) == []


def test_defaults_are_those_of_the_command() -> None:
    """Numbers in the second column of a table whose first one names options."""
    known = options("serve")
    compared = 0
    for names, values in re.findall(r"^\| (`--[^|]+) \| ([^|]*) \|", PAGE, re.MULTILINE):
        flags = re.findall(r"--[a-z][a-z-]+", names)
        defaults = [d.removesuffix(" s") for d in values.split(", ")] if len(flags) > 1 else [values.removesuffix(" s")]
        for flag, default in zip(flags, defaults, strict=False):
            number = default.replace(",", "")
            if flag in known and re.fullmatch(r"\d+(\.\d+)?", number):
                assert float(number) == float(known[flag].default), flag
                compared += 1
    assert compared >= 9, "the table is read"


@pytest.mark.parametrize("command", ["serve", "export-triton"])
def test_help_names_every_option_and_says_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for option, action in options(command).items():
        assert option in printed
        assert action.help, option
