"""The server's log: lines with their time, so that what a client saw is found again, or JSON objects."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone


def log_with_time(as_json: bool) -> None:
    """Give every handler of the root logger the server's form: text, or with ``as_json`` one JSON object a line."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_JsonLine() if as_json else _Line("%(asctime)s %(levelname)s %(name)s: %(message)s"))


class _Line(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """The time in UTC as ISO 8601 has it, with milliseconds."""
        return datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")


class _JsonLine(_Line):
    def format(self, record: logging.LogRecord) -> str:
        """The record with its traceback, if it has one."""
        line = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
