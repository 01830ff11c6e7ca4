"""A real ``odise-rt serve`` on the loopback interface, for the soak and for tests."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from odise_rt.errors import BackendError

ROOT = Path(__file__).parents[1]
BOUNDARY = "odise-boundary"


class RunningServer:
    """A server's process and how to talk to it."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log = log
        self.url = self.wait_for("listening")["url"]
        self.port = urllib.parse.urlsplit(self.url).port

    def wait_for(self, event: str, seconds: float = 120) -> dict[str, str]:
        """The next event of a kind that the server prints.

        Raises:
            BackendError: it ended, cannot start, or says nothing of that kind.
        """
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not select.select([self.process.stdout], [], [], 0.5)[0]:
                if self.process.poll() is not None:
                    raise self._ended("the server ended")
                continue
            line = self.process.stdout.readline()
            if not line:
                raise self._ended("the server ended")
            if not line.startswith("{"):
                continue
            said: dict[str, str] = json.loads(line)
            if "error" in said:
                raise BackendError(f"the server could not start: {line}")
            if said.get("event") == event:
                return said
        raise self._ended(f"no {event!r} within {seconds} s")

    def _ended(self, what: str) -> BackendError:
        return BackendError(f"{what}: {self.log.read_text()[-3000:]}")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port or 0, timeout=60)

    def post(
        self, image: bytes, fields: dict[str, str], connection: http.client.HTTPConnection | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """POST /v1/segment: status, headers and body."""
        opened = connection or self.connect()
        try:
            opened.request("POST", "/v1/segment", *form(image, fields))
            response = opened.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            if connection is None:
                opened.close()

    def get(self, path: str) -> tuple[int, bytes]:
        opened = self.connect()
        try:
            opened.request("GET", path)
            response = opened.getresponse()
            return response.status, response.read()
        finally:
            opened.close()

    def processes(self) -> list[psutil.Process]:
        """The server and all that it started."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def resident(self) -> dict[str, int]:
        """Bytes of memory that are each process's own, by name and id."""
        found = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                found[f"{process.name()}-{process.pid}"] = process.memory_full_info().uss
        return found

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def form(image: bytes, fields: dict[str, str]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a multipart form."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()
    ]
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'.encode()
    body = b"".join([*parts, head, image, f"\r\n--{BOUNDARY}--\r\n".encode()])
    return body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


@contextlib.contextmanager
def running_server(bundle: Path, folder: Path, arguments: Sequence[str] = ()) -> Iterator[RunningServer]:
    """Start a server on a free port; at the end it and all its processes are gone."""
    log = folder / "server.log"
    environment = os.environ | {"ODISE_RT_CACHE": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # The server runs in that folder, so a path from here must not depend on where "here" is.
    place = str(bundle.resolve())
    command = [sys.executable, "-m", "odise_rt", "serve", place, "--port", "0", "--json", *arguments]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=folder
        )
    server = None
    try:
        server = RunningServer(process, log)
        yield server
    finally:
        left = []
        with contextlib.suppress(psutil.Error):
            left = psutil.Process(process.pid).children(recursive=True)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()
        _, alive = psutil.wait_procs(left, timeout=10)
        for orphan in alive:
            with contextlib.suppress(psutil.Error):
                orphan.kill()
