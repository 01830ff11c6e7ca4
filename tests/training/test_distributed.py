"""How a process of a training ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.distributed import leave

ROOT = Path(__file__).parents[2]
SCRIPT = """
import atexit
from training.distributed import leave
atexit.register(print, "finalised")
print("done")
leave(3)
"""


@pytest.mark.parametrize(("processes", "printed"), [("2", "done\n"), ("1", "done\nfinalised\n")])
def test_one_of_several_processes_ends_with_its_status_and_output_but_without_finalising(
    processes: str, printed: str
) -> None:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": processes}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=variables, stdout=subprocess.PIPE, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (3, printed)


def test_a_single_process_raises_system_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as ended:
        leave(2)
    assert ended.value.code == 2
