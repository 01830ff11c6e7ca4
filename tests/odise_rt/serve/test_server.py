"""The server's process: where it listens, how it ends, and how it says that it cannot start."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.running_server import ROOT, RunningServer, form, running_server
from odise_rt import Bundle, cli
from odise_rt.backends.select import open_backend
from odise_rt.errors import BackendError, MissingPackageError, OptionsError
from odise_rt.model_arguments import BUNDLE_VARIABLE
from odise_rt.serve.command import named_vocabulary, settings_from
from odise_rt.serve.server import ServerSettings, serve
from odise_rt.serve.worker import Worker, WorkerSettings
from tests.odise_rt.serve.conftest import WORDS, png, worker_settings

pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
pytest.importorskip("fastapi", reason="needs the extra 'serve'")

FIELDS = {"vocabulary_name": "colours", "masks": "none"}
IN_PROCESS = ["--in-process", "--device", "cpu", "--threads", "1", "--vocabulary", f"colours={WORDS}"]


@pytest.fixture
def server(label_bundle: Path, tmp_path: Path) -> Iterator[RunningServer]:
    with running_server(label_bundle, tmp_path, IN_PROCESS) as running:
        running.wait_for("ready")
        yield running


def test_it_serves_this_machine_only_and_finishes_what_it_accepted(server: RunningServer) -> None:
    """One start for several facts, as each costs seconds."""
    status, headers, body = server.post(png(), FIELDS)
    assert status == 200
    assert len(json.loads(body)["segments"]) == 4
    assert "server" not in headers

    listening = {
        c.laddr.ip for p in server.processes() for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}

    # A request whose upload has begun is accepted. It ends well although the server is told to stop meanwhile.
    body, headers = form(png(), FIELDS)
    half = len(body) // 2
    connection = server.connect()
    connection.putrequest("POST", "/v1/segment")
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        connection.putheader(name, value)
    connection.endheaders(body[:half])
    wait_until(lambda: b"odise_requests_inside 1.0" in server.get("/metrics")[1])
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("stopping")
    wait_until(lambda: refuses(server))
    connection.send(body[half:])
    response = connection.getresponse()
    assert response.status == 200
    assert len(json.loads(response.read())["segments"]) == 4
    connection.close()
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("again", "delay"), [(signal.SIGINT, "0"), (signal.SIGTERM, "0"), (signal.SIGINT, "60"), (signal.SIGTERM, "60")]
)
def test_a_second_signal_stops_at_once(label_bundle: Path, tmp_path: Path, again: signal.Signals, delay: str) -> None:
    with running_server(label_bundle, tmp_path, [*IN_PROCESS, "--shutdown-delay", delay]) as server:
        server.wait_for("ready")
        body, headers = form(png(), FIELDS)
        connection = server.connect()
        connection.putrequest("POST", "/v1/segment")
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            connection.putheader(name, value)
        connection.endheaders(body[:50])
        wait_until(lambda: b"odise_requests_inside 1.0" in server.get("/metrics")[1])
        server.process.send_signal(again)
        server.wait_for("stopping")
        server.process.send_signal(again)
        assert server.process.wait(10) == 0
        connection.close()
        assert "Traceback" not in server.log.read_text()


def test_requests_are_taken_for_the_delay_of_a_shutdown(label_bundle: Path, tmp_path: Path) -> None:
    with running_server(label_bundle, tmp_path, [*IN_PROCESS, "--shutdown-delay", "2"]) as server:
        server.wait_for("ready")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        status, body = server.get("/readyz")
        assert (status, json.loads(body)["error"]["type"]) == (503, "shutting_down")
        time.sleep(0.5)  # the event loop has seen the signal
        assert server.post(png(), FIELDS)[0] == 200
        assert server.process.wait(20) == 0


def test_idle_connections_are_kept_as_told_and_end_with_the_server(label_bundle: Path, tmp_path: Path) -> None:
    with running_server(label_bundle, tmp_path, [*IN_PROCESS, "--keep-alive", "30"]) as server:
        server.wait_for("ready")
        connection = server.connect()
        for _ in range(2):
            connection.request("GET", "/healthz")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            assert connection.sock is not None
            time.sleep(0.2)
        stopped = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert time.monotonic() - stopped < 15
        assert connection.sock.recv(1) == b""
        connection.close()


def test_keep_alive_is_given_to_the_listener(label_bundle: Path, tmp_path: Path) -> None:
    with running_server(label_bundle, tmp_path, [*IN_PROCESS, "--keep-alive", "0.5"]) as server:
        server.wait_for("ready")
        connection = server.connect()
        connection.request("GET", "/healthz")
        connection.getresponse().read()
        started = time.monotonic()
        assert connection.sock is not None
        assert connection.sock.recv(1) == b""
        assert time.monotonic() - started < 4
        connection.close()
    assert settings_from(cli.make_parser().parse_args(["serve", str(label_bundle), "--device", "cpu"])).keep_alive == 75


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def refuses(server: RunningServer) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", server.port or 0), timeout=2):
            return False
    except OSError:
        return True


def test_in_process_the_bundle_is_read_and_checked_once(label_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bool] = []
    given: list[Path | Bundle] = []
    open_it = Bundle.open

    def counted(path: Path, verify: bool = True) -> Bundle:
        opened.append(verify)
        return open_it(path, verify=verify)

    def load(settings: WorkerSettings) -> Worker:
        given.append(settings.bundle)
        raise BackendError("enough")

    monkeypatch.setattr(Bundle, "open", counted)
    monkeypatch.setattr("odise_rt.serve.dispatch.Worker", load)
    with pytest.raises(BackendError, match="enough"):
        serve(ServerSettings(worker_settings(label_bundle), in_process=True, port=0), lambda event, url: None)
    assert opened == [True]
    assert isinstance(given[0], Bundle)
    assert given[0].verified


def test_a_bug_while_loading_is_no_wrong_option(
    label_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(settings: WorkerSettings) -> Worker:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("odise_rt.serve.dispatch.Worker", load)
    settings = ServerSettings(worker_settings(label_bundle), in_process=True, port=0)
    with pytest.raises(BackendError, match="an unexpected ZeroDivisionError") as caught:
        serve(settings, lambda event, url: None)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    logged = [r.exc_info[1] for r in caplog.records if r.name == "odise_rt.serve.server" and r.exc_info]
    assert logged == [caught.value.__cause__]


def test_a_server_that_cannot_start_gives_its_port_back(label_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> None:
        raise MissingPackageError("no prometheus_client")

    listeners: list[socket.socket] = []

    def listen(host: str, port: int) -> socket.socket:
        listeners.append(socket.create_server((host, port)))
        return listeners[0]

    monkeypatch.setattr("odise_rt.serve.server.Context", missing)
    monkeypatch.setattr("odise_rt.serve.server.listen", listen)
    with pytest.raises(MissingPackageError, match="prometheus"):
        serve(ServerSettings(worker_settings(label_bundle), in_process=True, port=0), lambda event, url: None)
    assert listeners[0].fileno() == -1


def test_a_port_in_use_is_named(label_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(label_bundle), "--in-process", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port}" in error
    assert "Traceback" not in error


def test_an_altered_bundle_is_refused_before_anything_starts(
    new_bundle: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = new_bundle()
    graph = bundle / "onnx" / "unet_tap.onnx"
    graph.write_bytes(graph.read_bytes() + b"\xf8\x07\0")  # a field that no reader knows: it stays a graph
    assert cli.main(["serve", str(bundle), "--port", "0"]) == 1
    assert "was altered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--replicas", "0"], "replicas is 0"),
        (["--replicas", "99999999999"], "replicas is 99999999999: expected 1 to 1024"),
        (["--max-replicas", "1025"], "max_replicas is 1025: expected 1 to 1024"),
        (["--max-replicas", "0"], "max_replicas is 0"),
        (["--replicas", "3", "--max-replicas", "2"], "below replicas"),
        (["--in-process", "--replicas", "2"], "without Ray"),
        (["--queue", "-1"], "queue is -1"),
        (["--queue", "1025"], "queue is 1025: expected 0 to 1024"),
        (["--timeout", "0"], "timeout is 0"),
        (["--port", "70000", "--in-process"], "port is 70000"),
        (["--host", "256.1.1.1", "--in-process"], "cannot listen"),
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--concurrency", "1025"], "--concurrency is 1025"),
        (["--vocabulary", "red; green"], "has no name"),
        (["--vocabulary", "a/b=red"], "is no name"),
        (["--vocabulary", "a=nothing.txt"], "cannot read the vocabulary"),
        (["--token-file", "/does/not/exist"], "cannot read the token"),
        (["--batch-windows", "on", "--max-batch-windows", "0"], "max_windows is 0"),
    ],
)
def test_options_that_cannot_be_used(
    label_bundle: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert cli.main(["serve", str(label_bundle), *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "kernels", "asked", "batching", "concurrency"),
    [
        (["--batch-windows", "on"], True, False, True, 4),
        (["--batch-windows", "off"], True, False, False, 1),
        (["--device", "cuda"], False, False, True, 4),
        (["--device", "cuda"], True, False, False, 4),
        (["--device", "cpu"], True, False, False, 1),
        ([], False, True, True, 4),
        ([], True, True, False, 4),
        (["--concurrency", "2"], True, True, False, 2),
    ],
)
def test_a_gpu_is_looked_for_only_where_it_matters(
    label_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    kernels: bool,
    asked: bool,
    batching: bool,
    concurrency: int,
) -> None:
    looked: list[Path] = []

    def gpu_if_it_works(threads: int | None, bundle: Bundle | None) -> object:
        assert bundle is not None
        looked.append(bundle.root)
        return object()

    def working_provider(device: str) -> str | None:
        raise AssertionError("a session was started")

    monkeypatch.setattr("odise_rt.backends.select.gpu_if_it_works", gpu_if_it_works)
    monkeypatch.setattr("odise_rt.backends.ort.working_provider", working_provider)
    monkeypatch.setattr("odise_rt.serve.command.why_no_kernels", lambda: None if kernels else "none")
    args = cli.make_parser().parse_args(["serve", str(label_bundle), *arguments])
    worker = settings_from(args).worker
    assert (worker.batching is not None) == batching
    assert worker.concurrency == concurrency
    assert bool(looked) == asked


def test_no_bundle(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(BUNDLE_VARIABLE, raising=False)
    assert cli.main(["serve"]) == 1
    assert "no bundle was named" in capsys.readouterr().err
    monkeypatch.setenv(BUNDLE_VARIABLE, "/a/bundle")
    assert settings_from(cli.make_parser().parse_args(["serve", "--device", "cpu"])).worker.bundle == Path("/a/bundle")
    args = cli.make_parser().parse_args(["serve", "--device", "cpu", "/another"])
    assert settings_from(args).worker.bundle == Path("/another")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-request-mb", "nan"], "--max-request-mb is nan: expected a finite number"),
        (["--max-request-mb", "inf"], "finite"),
        (["--drain-seconds", "-5"], "--drain-seconds is -5.0"),
        (["--shutdown-delay", "inf"], "--shutdown-delay is inf: expected a finite number"),
        (["--drain-seconds", "nan"], "--drain-seconds is nan"),
        (["--keep-alive", "-1"], "--keep-alive is -1.0"),
        (["--cpus-per-replica", "nan"], "--cpus-per-replica is nan"),
        (["--object-store-mb", "-5"], "--object-store-mb is -5"),
        (["--max-batch-windows", "-3"], "max_windows is -3"),
        (["--batch-wait-ms", "-5"], "max_wait is -0.005"),
        (["--batch-windows", "off", "--max-batch-windows", "8"], "--batch-windows is off: leave out"),
        (["--batch-windows", "off", "--batch-wait-ms", "5"], "--batch-windows is off: leave out"),
        (["--vocabulary", "x=cat", "--vocabulary", "x=dog"], "two vocabularies have the name 'x'"),
        (["--threads", "1000000"], "threads is 1000000: expected a whole number from 1 to 1024"),
    ],
)
def test_options_out_of_range(label_bundle: Path, arguments: list[str], message: str) -> None:
    args = cli.make_parser().parse_args(["serve", str(label_bundle), "--device", "cpu", *arguments])
    with pytest.raises(OptionsError, match=message):
        open_backend("cpu", settings_from(args).worker.threads)


def test_tokens_of_both_sources_are_checked_alike(
    label_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token with a line's end or of other characters would be one that no request can match."""
    file = tmp_path / "token"

    def from_file(text: str) -> str | None:
        file.write_text(text, encoding="utf-8")
        monkeypatch.delenv("ODISE_RT_TOKEN", raising=False)
        return token(["--token-file", str(file)])

    def from_environment(text: str) -> str | None:
        monkeypatch.setenv("ODISE_RT_TOKEN", text)
        return token([])

    def token(arguments: list[str]) -> str | None:
        args = cli.make_parser().parse_args(["serve", str(label_bundle), "--device", "cpu", *arguments])
        found: str | None = settings_from(args).token
        return found

    for read in (from_file, from_environment):
        assert read("correct horse\n") == "correct horse"
        for bad in (" \n", "zwei\nZeilen", "geheimnisvoll\u00e4"):
            with pytest.raises(OptionsError, match="holds no token"):
                read(bad)
    assert from_environment("") is None


def test_names_of_vocabularies(tmp_path: Path) -> None:
    words = tmp_path / "mine.txt"
    words.write_text("red\ngreen\n")
    assert named_vocabulary("coco")[0] == "coco"
    assert named_vocabulary(str(words))[0] == "mine"
    name, vocabulary = named_vocabulary("a.b-c=red, crimson; stuff: sky")
    assert (name, vocabulary.names) == ("a.b-c", ("red", "sky"))


def test_starting_says_what_is_missing(label_bundle: Path) -> None:
    code = f"""
import sys
sys.modules["uvicorn"] = None
from odise_rt import cli
sys.exit(cli.main(["serve", {str(label_bundle)!r}, "--in-process", "--port", "0"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'odise_rt[serve]'" in done.stderr
