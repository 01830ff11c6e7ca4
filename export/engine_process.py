"""Runs :mod:`export.engine_from_onnx` in a process of its own, and turns whatever becomes of it into an answer."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.engine_from_onnx import RESULT_NAME, BuildJob, BuildResult
from odise_rt.engine_facts import TITLES
from odise_rt.errors import ExportError

logger = logging.getLogger(__name__)

_JOB_NAME = "job.json"
_LOG_NAME = "build.log"
_REPORT_SECONDS = 30.0
_POLL_SECONDS = 0.1
_LOG_LINES = 5


def build_in_process(job: BuildJob, folder: Path, note: Callable[[str], None] = lambda text: None) -> BuildResult:
    """Build an engine in a child process.

    Args:
        job: what to build; its plan may lie in ``folder``.
        folder: for the job, its result and its log; they are removed in the end.
        note: called every half minute with how long it has taken.

    Raises:
        ExportError: the build failed, or its process died; the message names the stage and holds what it said last.
    """
    paths = [folder / name for name in (_JOB_NAME, RESULT_NAME, _LOG_NAME)]
    job_file, result_file, log_file = paths
    job_file.write_text(json.dumps(job.to_dict()), encoding="utf-8")
    command = [sys.executable, "-m", "export.engine_from_onnx", str(job_file)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        with (
            log_file.open("wb") as log,
            # The child reads its input to notice that this process has died.
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment) as process,
        ):
            try:
                code = _wait(process, job.stage, note)
            except BaseException:
                process.kill()
                process.wait()
                raise
        outcome = _outcome(result_file)
        if code == 0 and isinstance(outcome.get("result"), dict) and job.plan.is_file():
            result = BuildResult(**outcome["result"])
            if result.warning is not None:
                logger.warning("stage %s: %s", job.stage, result.warning)
            return result
        raise ExportError(outcome.get("error") or _obituary(job, code, log_file))
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _outcome(file: Path) -> dict[str, Any]:
    """What the process wrote as its result; empty if it could not write, say on a full disk."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _wait(process: subprocess.Popen[bytes], stage: str, note: Callable[[str], None]) -> int:
    started = time.monotonic()
    reported = started
    while (code := process.poll()) is None:
        time.sleep(_POLL_SECONDS)
        if time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            note(f"{stage}: still building after {reported - started:.0f} s")
    return code


def _obituary(job: BuildJob, code: int, log_file: Path) -> str:
    """How a build ended that left no result, and the last lines of its log."""
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += ", as when memory runs out"
    else:
        how = f"ended with code {code}"
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    words = [line.strip() for line in lines if line.strip()][-_LOG_LINES:]
    said = f"its last words: {' | '.join(words)[:600]}" if words else "it said nothing"
    return (
        f"stage {job.stage}: the process that built the {TITLES[job.engine]} engine {how} while it worked on "
        f"{job.graph.name}; {said}"
    )
