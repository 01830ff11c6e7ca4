"""Lines of the server's log have their time."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator

import pytest

from odise_rt.serve.log import log_with_time


@pytest.fixture
def handler() -> Iterator[logging.Handler]:
    added, root = logging.StreamHandler(sys.stderr), logging.getLogger()
    before = {known: known.formatter for known in root.handlers}
    root.addHandler(added)
    yield added
    root.removeHandler(added)
    for known, formatter in before.items():
        known.setFormatter(formatter)


def record() -> logging.LogRecord:
    try:
        raise ZeroDivisionError("boom")
    except ZeroDivisionError:
        made = logging.LogRecord("odise_rt", logging.ERROR, "", 1, "%s failed", ("ab12",), sys.exc_info())
    made.created = 1.25
    return made


def test_text(handler: logging.Handler) -> None:
    log_with_time(as_json=False)
    first, *rest = handler.format(record()).splitlines()
    assert first == "1970-01-01T00:00:01.250+00:00 ERROR odise_rt: ab12 failed"
    assert re.search("ZeroDivisionError: boom", rest[-1])


def test_json(handler: logging.Handler) -> None:
    log_with_time(as_json=True)
    (line,) = handler.format(record()).splitlines()
    data = json.loads(line)
    assert data.pop("traceback").endswith("ZeroDivisionError: boom")
    assert data == {
        "time": "1970-01-01T00:00:01.250+00:00", "level": "ERROR", "logger": "odise_rt", "message": "ab12 failed",
    }  # fmt: skip
