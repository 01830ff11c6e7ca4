"""The help of every command: each option is described, and with its default in one form."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest

from odise_rt import cli
from odise_rt.command_line import CommandParser

ROOT = Path(__file__).parents[2]
FILES = [
    path for package in ("odise_rt", "training", "export", "benchmarks") for path in (ROOT / package).rglob("*.py")
]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in FILES
    if "= CommandParser(" in path.read_text(encoding="utf-8")
)
"""Those that are run with ``python -m``."""


class ParserFoundError(Exception):
    """Ends a command as soon as its parser is whole."""


def parser_of(module: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    found: list[argparse.ArgumentParser] = []

    def parse(self: argparse.ArgumentParser, *arguments: object) -> None:
        found.append(self)
        raise ParserFoundError

    monkeypatch.setattr(CommandParser, "parse_args", parse)
    with pytest.raises(ParserFoundError):
        importlib.import_module(module).main([])
    return found[0]


def check(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                check(command)
            continue
        if isinstance(action, argparse._HelpAction | argparse._VersionAction) or action.help == argparse.SUPPRESS:
            continue
        where = f"{parser.prog} {'/'.join(action.option_strings) or action.dest}"
        assert action.help, f"{where} is not described"
        assert action.help.endswith("."), f"{where}: {action.help!r} is no sentence"
        assert not re.search(r"\bdefault", action.help), (
            f"{where}: {action.help!r} does not say 'Default: …' at its end"
        )


def test_every_option_of_odise_rt_is_described() -> None:
    check(cli.make_parser())


@pytest.mark.parametrize("module", MODULES)
def test_every_option_is_described(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(parser_of(module, monkeypatch))


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"export.build_engines", "benchmarks.gpu_check"}))
def test_every_command_ends_with_one_line(module: str) -> None:
    """By the decorator ``command``; the others have more to say when they end."""
    assert hasattr(importlib.import_module(module).main, "__wrapped__")


def test_all_commands_share_the_parser() -> None:
    assert len(MODULES) > 20
    others = [path.name for path in FILES if "argparse.ArgumentParser(" in path.read_text(encoding="utf-8")]
    assert others == []


def test_defaults_are_shown_as_they_are() -> None:
    parser = CommandParser(prog="command")
    for name, default in {
        "--share": 0.5, "--zero": 0, "--pixels": 25_000_000, "--sides": [256, 128], "--folder": Path("50%"),
    }.items():  # fmt: skip
        parser.add_argument(name, default=default, help=f"Of {name}.")
    parser.add_argument("--flag", action="store_true", help="A flag.")
    parser.add_argument("--later", help="Worked out. Default: the model's.")
    printed = parser.format_help()
    assert re.findall(r"Default: (.*)\.", printed) == ["0.5", "0", "25,000,000", "256 128", "50%", "the model's"]
