"""The Ray Serve application on this machine: right answers under load, deaths of replicas, and who can reach it."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks.running_server import RunningServer, running_server
from odise_rt.errors import OptionsError
from odise_rt.serve import application
from odise_rt.serve.application import RayDispatcher, ReplicaSettings
from odise_rt.serve.problems import RETRYABLE
from tests.odise_rt.serve import load
from tests.odise_rt.serve.conftest import png, worker_settings

pytest.importorskip("ray", reason="needs the extra 'serve'")
grpc = pytest.importorskip("grpc", reason="needs grpcio")

REPLICAS = ["--device", "cpu", "--threads", "1", "--object-store-mb", "200", "--cpus-per-replica", "0.5"]
FIELDS = {"vocabulary": load.VOCABULARIES[0], "masks": "none"}


def test_numbers_of_replicas_must_make_sense() -> None:
    for number in (0, 1025):
        with pytest.raises(OptionsError, match=f"replicas is {number}: expected 1 to 1024"):
            ReplicaSettings(replicas=number)
    with pytest.raises(OptionsError, match="below"):
        ReplicaSettings(replicas=2, max_replicas=1)
    with pytest.raises(OptionsError):
        ReplicaSettings(gpus=-1)


class FakeRay(SimpleNamespace):
    """Ray as far as a start goes."""

    def __init__(self, gpus: float) -> None:
        super().__init__(
            serve=SimpleNamespace(start=lambda **options: None, run=lambda application, **options: application),
            asked=[],
            init=lambda **options: self.asked.append(options),
            cluster_resources=lambda: {"CPU": 2.0} | ({"GPU": gpus} if gpus else {}),
        )


def start(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, replicas: ReplicaSettings, gpus: float = 0.0
) -> dict[str, Any]:
    """Start replicas on a fake Ray; gives what ``ray.init`` was told."""
    dispatcher = RayDispatcher(worker_settings(bundle), replicas)
    ray = FakeRay(gpus)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", ray)
        patch.setattr(application, "build", lambda worker, replicas: worker)
        for name in ("RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
            patch.setenv(name, "")  # so that what the start sets is undone
        patch.setenv("RAY_AUTH_MODE", "token")
        dispatcher._start()
    told: dict[str, Any] = ray.asked[0]
    return told


@pytest.mark.parametrize(("address", "told"), [(None, "local"), ("auto", "auto"), ("10.0.0.1:6379", "10.0.0.1:6379")])
def test_a_ray_here_is_a_new_one(
    label_bundle: Path, monkeypatch: pytest.MonkeyPatch, address: str | None, told: str
) -> None:
    """Without an address Ray would join the cluster of $RAY_ADDRESS."""
    options = start(monkeypatch, label_bundle, ReplicaSettings(ray_address=address))
    assert options["address"] == told
    assert ("num_cpus" in options) == (address is None)


@pytest.mark.parametrize(
    ("replicas", "each", "present", "room"),
    [(1, 5, 0, 0), (3, 1, 2, 2), (1, 2, 1, 0), (3, 0.6, 2, 2), (2, 1, 2, None), (4, 0.5, 2, None), (2, 2, 5, None)],
)
def test_gpus_that_a_ray_here_lacks(
    label_bundle: Path, monkeypatch: pytest.MonkeyPatch, replicas: int, each: float, present: float, room: int | None
) -> None:
    settings = ReplicaSettings(replicas=replicas, gpus=each)
    if room is None:
        start(monkeypatch, label_bundle, settings, present)
        return
    with pytest.raises(OptionsError, match=f"{present} GPUs on this machine, room for {room}: lower"):
        start(monkeypatch, label_bundle, settings, present)
    start(monkeypatch, label_bundle, dataclasses.replace(settings, ray_address="auto"), present)  # it may grow


@pytest.fixture(scope="module")
def server(label_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    arguments = [*REPLICAS, "--replicas", "2", "--queue", "32"]
    with running_server(label_bundle, tmp_path_factory.mktemp("ray"), arguments) as running:
        running.wait_for("ready", 180)
        yield running


@pytest.mark.slow
def test_nothing_listens_beyond_loopback_without_a_token(server: RunningServer) -> None:
    """Everything is bound to 127.0.0.1 but Ray Serve's server between deployments, and that one asks for the token."""
    outside = {
        (process.name(), connection.laddr.port)
        for process in server.processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    }
    assert {name.partition(":")[0] for name, _ in outside} <= {"ray"}, outside
    assert len(outside) <= 2  # one a replica
    for _, port in outside:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=10)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED, caught.value


@pytest.mark.slow
def test_right_answers_on_two_replicas(server: RunningServer, label_bundle: Path) -> None:
    work = list(load.jobs(label_bundle, 200, broken_share=0.05))
    outcome = load.run(server, work, concurrency=8)
    assert outcome.wrong == []
    assert outcome.lost == []
    assert outcome.statuses[200] == sum(j.status == 200 for j in work)


@pytest.mark.slow
def test_a_replica_that_is_killed_takes_only_its_own_requests(server: RunningServer, label_bundle: Path) -> None:
    work = list(load.jobs(label_bundle, 600, broken_share=0.0))
    killed = threading.Event()

    def kill() -> None:
        time.sleep(2)
        replicas = [p for p in server.processes() if "ServeReplica" in p.name() + " ".join(p.cmdline())]
        assert len(replicas) == 2, [p.name() for p in server.processes()]
        replicas[0].send_signal(signal.SIGKILL)
        killed.set()

    thread = threading.Thread(target=kill)
    thread.start()
    outcome = load.run(server, work, concurrency=8)
    thread.join()
    assert killed.is_set()
    assert outcome.lost == []
    failed = sum(outcome.types[t] for t in RETRYABLE if t != "overloaded")
    print(f"statuses {dict(outcome.statuses)}, problems {dict(outcome.types)}")
    # At most what the replica had in work or was about to take, each with a status that says "try again".
    assert failed <= 2
    assert set(outcome.types) <= RETRYABLE
    assert outcome.statuses[200] == len(work) - failed
    assert [w for w in outcome.wrong if not w.startswith("status 503")] == []
    deadline = time.monotonic() + 60
    while json.loads(server.get("/readyz")[1]).get("replicas") != 2:
        assert time.monotonic() < deadline, "no replica came in the place of the killed one"
        time.sleep(0.5)
    again = load.run(server, work[:50], concurrency=4)
    assert again.statuses[200] == 50
    assert again.wrong == []


@pytest.mark.slow
def test_no_replica_left_is_retryable_too(label_bundle: Path, tmp_path: Path) -> None:
    with running_server(label_bundle, tmp_path, REPLICAS) as server:
        server.wait_for("ready", 180)
        assert server.post(png(), FIELDS)[0] == 200
        for process in server.processes():
            if "ServeReplica" in process.name() + " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
        seen = set()
        deadline = time.monotonic() + 90
        while True:
            status, headers, body = server.post(png(), FIELDS)
            if status == 200 and seen:
                break
            if status != 200:
                assert json.loads(body)["error"]["retryable"], body
                assert "retry-after" in headers
                seen.add(status)
            assert time.monotonic() < deadline, seen
            time.sleep(0.1)
        assert seen <= {503, 504}
        assert server.terminate() == 0
    assert not [p for p in psutil.process_iter(["ppid", "name"]) if p.info["ppid"] == server.process.pid]


@pytest.mark.slow
def test_stopping_finishes_what_replicas_have_in_work(label_bundle: Path, tmp_path: Path) -> None:
    with running_server(label_bundle, tmp_path, [*REPLICAS, "--queue", "64"]) as server:
        server.wait_for("ready", 180)
        work = list(load.jobs(label_bundle, 40, broken_share=0.0))
        results: list[int | str] = []

        def client(job: load.Job) -> None:
            try:
                results.append(server.post(job.image, dict(job.fields))[0])
            except OSError as exc:
                results.append(type(exc).__name__)

        threads = [threading.Thread(target=client, args=(job,)) for job in work]
        for thread in threads:
            thread.start()
        while b"odise_requests_inside 0.0" in server.get("/metrics")[1]:
            time.sleep(0.01)
        assert server.terminate() == 0
        for thread in threads:
            thread.join()
    # Whoever was accepted got an answer; whoever came later was refused at the door.
    assert set(results) <= {200, 503, "ConnectionRefusedError", "ConnectionResetError", "RemoteDisconnected"}, results
    assert results.count(200) > 0
