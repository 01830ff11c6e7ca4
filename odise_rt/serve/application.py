"""The Ray Serve application: replicas of the model on this machine or on a cluster.

The HTTP server stays a process of its own (``server.py``) and reaches the replicas by a Serve handle. So the queue, the
deadline and every error are ours to word, a request crosses one process boundary instead of two, and a replica that
dies takes only its own requests with it.

A Ray that is started here listens on the loopback interface only, asks every caller for a token made at the start, and
never spills objects to disk. On a cluster (``--ray-address``) these are the cluster's operator's to set; see
docs/serving.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import logging
import os
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odise_rt.bundle import Bundle
from odise_rt.cores import usable_cores
from odise_rt.errors import BackendError, MissingPackageError, OptionsError, last_line
from odise_rt.serve.dispatch import State
from odise_rt.serve.limits import MAX_CONNECTIONS
from odise_rt.serve.problems import RequestRefused
from odise_rt.serve.worker import Answer, SegmentRequest, Worker, WorkerSettings
from odise_rt.serve.worker_threads import WorkerThreads

logger = logging.getLogger(__name__)

APPLICATION = "odise_rt"
_MIN_OBJECT_STORE = 128 << 20
_STATUS_SECONDS = 1.0
_HEALTH_SECONDS = 2.0


@dataclass(frozen=True)
class ReplicaSettings:
    """How many replicas there are, and what each of them gets.

    Raises:
        OptionsError: a number is out of range.
    """

    replicas: int = 1
    """Copies of the model; the least of them when ``max_replicas`` is given."""
    max_replicas: int | None = None
    """Ray Serve adds copies up to this number while requests wait."""
    cpus: float = 1.0
    """CPUs that Ray sets aside for each."""
    gpus: float = 0.0
    """GPUs that Ray sets aside for each."""
    ray_address: str | None = None
    """A running cluster; ``None``: Ray is started on this machine."""
    object_store_bytes: int | None = None
    """Shared memory for requests and answers; ``None``: enough for a full queue."""

    def __post_init__(self) -> None:
        for name, value in (("replicas", self.replicas), ("max_replicas", self.max_replicas)):
            if value is not None and not 1 <= value <= MAX_CONNECTIONS:
                raise OptionsError(f"{name} is {value}: expected 1 to {MAX_CONNECTIONS}")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise OptionsError(f"max_replicas {self.max_replicas} is below replicas {self.replicas}: swap them")
        if self.cpus < 0 or self.gpus < 0:
            raise OptionsError(f"cpus {self.cpus} and gpus {self.gpus} of a replica: expected 0 or more")


class Replica:
    """One copy of the model; Ray Serve makes as many as it is told."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Load the model."""
        self._worker = Worker(settings)
        self._threads = WorkerThreads(settings.concurrency)

    async def segment(self, request: SegmentRequest) -> Answer:
        """Serve a request. When it is cancelled while it waits for a thread, it never runs."""
        return await self._threads.run(self._worker.run, request)


def build(worker: WorkerSettings, replicas: ReplicaSettings) -> Any:
    """The Serve application: one deployment, bound to its settings."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    scaling: dict[str, Any]
    if replicas.max_replicas is None:
        scaling = {"num_replicas": replicas.replicas}
    else:
        scaling = {
            "autoscaling_config": {
                "min_replicas": replicas.replicas,
                "max_replicas": replicas.max_replicas,
                "target_ongoing_requests": worker.concurrency,
            }
        }
    decorate: Any = serve.deployment
    deployment = decorate(Replica).options(
        name="Segmenter",
        # One more than are in work, so that a replica never waits for its next request to be sent.
        max_ongoing_requests=worker.concurrency + 1,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        health_check_period_s=_HEALTH_SECONDS,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=worker.limits.timeout,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        **scaling,
    )
    return deployment.bind(worker)


class RayDispatcher:
    """Sends requests to Ray Serve replicas."""

    def __init__(self, worker: WorkerSettings, replicas: ReplicaSettings) -> None:
        """Prepare; :meth:`start` starts Ray and the replicas.

        Raises:
            MissingPackageError: Ray is not installed.
        """
        if importlib.util.find_spec("ray") is None:  # not imported yet: it reads its environment when it is
            raise MissingPackageError(
                "serving with replicas needs Ray: pip install 'odise_rt[serve]', or serve with --in-process"
            )
        folder = worker.bundle.root if isinstance(worker.bundle, Bundle) else Path(worker.bundle)
        self._worker = dataclasses.replace(worker, bundle=folder.resolve())  # to open it and compare its hashes there
        self._replicas = replicas
        self._handle: Any = None
        self._running = 0
        self._started = False
        self._watcher: asyncio.Task[None] | None = None

    @property
    def workers(self) -> int:
        """Those of all replicas that there may be."""
        return (self._replicas.max_replicas or self._replicas.replicas) * self._worker.concurrency

    async def start(self) -> None:
        """Start Ray and the replicas, and wait until one can serve."""
        await asyncio.to_thread(self._start)
        self._running = self._replicas.replicas
        self._watcher = asyncio.create_task(self._watch())

    def state(self) -> State:
        """As of the last look at Ray Serve, at most a second ago."""
        reason = (
            "" if self._running else "the model is being loaded" if self._handle is None else "no replica is running"
        )
        return State(self._running > 0, self._running, reason)

    async def segment(self, request: SegmentRequest) -> Answer:
        """Serve a request on a replica that Ray Serve picks."""
        from ray.exceptions import ObjectStoreFullError, RayActorError, RayError, TaskCancelledError
        from ray.serve.exceptions import BackPressureError, RayServeException

        if self._handle is None:
            raise RequestRefused("not_ready", "the model is being loaded: try again in a moment", 2.0)
        response = self._handle.segment.remote(request)
        try:
            answer: Answer = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (ObjectStoreFullError, BackPressureError) as exc:
            logger.warning("Ray is full: %s", exc)
            raise RequestRefused("overloaded", "the server's memory for requests is full: try again", 2.0) from exc
        except TaskCancelledError as exc:
            raise RequestRefused("replica_died", "the replica gave the request up: try again", 1.0) from exc
        except RayActorError as exc:
            logger.warning("a replica died with a request: %s", type(exc).__name__)
            raise RequestRefused("replica_died", "the replica that had this request died: try again", 1.0) from exc
        except (RayError, RayServeException) as exc:
            if getattr(exc, "cause", None) is not None:  # an exception of our own code on the replica
                raise
            logger.warning("Ray could not serve a request: %s: %s", type(exc).__name__, exc)
            raise RequestRefused("replica_died", "no replica could take the request: try again", 2.0) from exc
        return answer

    async def stop(self) -> None:
        """Stop the replicas, each when its requests are done, and Ray if it was started here."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        self._handle, self._running = None, 0
        if self._started:
            self._started = False
            await asyncio.to_thread(self._stop)

    # ---- in a thread: Ray's calls block ----------------------------------------------------------------------------

    def _start(self) -> None:
        self._environment()
        import ray
        from ray import serve

        logging.getLogger("ray.serve").setLevel(max(logging.WARNING, logging.getLogger().level))
        local = self._replicas.ray_address is None
        # Without an address, Ray would join a cluster that $RAY_ADDRESS or a file under /tmp names.
        options: dict[str, Any] = {"address": self._replicas.ray_address or "local"}
        if local:
            options |= {
                "num_cpus": max(usable_cores(), self._most_cpus()),
                "include_dashboard": False,
                "object_store_memory": self._object_store(),
                "_system_config": {"automatic_object_spilling_enabled": False},
            }
        try:
            ray.init(log_to_driver=True, configure_logging=False, logging_level=logging.WARNING, **options)
        except Exception as exc:  # Ray raises many kinds
            raise BackendError(f"Ray did not start: {last_line(exc)}; see its logs, or use --in-process") from exc
        self._started = True
        if local:  # a cluster may get more machines
            resources: Any = ray.cluster_resources  # Ray gives it no types
            self._check_gpus(resources().get("GPU", 0.0))
        try:
            serve.start(proxy_location="Disabled")
            self._handle = serve.run(build(self._worker, self._replicas), name=APPLICATION, route_prefix=None)
        except Exception as exc:
            raise BackendError(f"the replicas did not start: {last_line(exc)}; Ray's logs have the details") from exc

    def _environment(self) -> None:
        """What Ray's processes read. Only for a Ray that is started here; a cluster has settings of its own."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # it takes SIGTERM, which is no failure
        if self._replicas.ray_address is not None:
            return
        if "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token":
            raise BackendError(
                "Ray was imported before its environment was set: start the server in a process of its own"
            )
        # Ray's servers listen on every interface and run what they are sent. Its switch for desktop systems binds them
        # to the loopback interface; the token keeps other users of this machine out.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

    def _check_gpus(self, present: float) -> None:
        """Ray itself would wait for GPUs that never come."""
        each, wanted = self._replicas.gpus, self._replicas.replicas
        if not each:
            return
        room = int(present) * int(1 / each) if each <= 1 else int(present / each)
        if wanted > room:
            raise OptionsError(
                f"{wanted} replicas were asked for with {each:g} GPUs each, and Ray finds {present:g} GPUs on this "
                f"machine, room for {room}: lower --replicas or --gpus-per-replica, or name a cluster by --ray-address"
            )

    def _most_cpus(self) -> int:
        most = self._replicas.max_replicas or self._replicas.replicas
        return -int(-most * self._replicas.cpus // 1)

    def _object_store(self) -> int:
        """A full queue, with room for the answers; bounded by the shared memory that the system has."""
        if self._replicas.object_store_bytes is not None:
            return self._replicas.object_store_bytes
        limits = self._worker.limits
        places = limits.queue + self.workers
        wanted = max(_MIN_OBJECT_STORE, 2 * places * limits.max_request_bytes)
        with contextlib.suppress(OSError):
            wanted = min(wanted, max(_MIN_OBJECT_STORE, shutil.disk_usage("/dev/shm").free // 2))
        return wanted

    def _stop(self) -> None:
        import ray
        from ray import serve

        stop_serve: Any = serve.shutdown  # Ray gives it no types
        with contextlib.suppress(Exception):  # it may have died before us
            serve.delete(APPLICATION)
            if self._replicas.ray_address is None:
                stop_serve()
        ray.shutdown()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_STATUS_SECONDS)
            try:
                self._running = await asyncio.to_thread(_running_replicas)
            except Exception as exc:
                logger.warning("Ray Serve does not answer: %s", last_line(exc))
                self._running = 0


def _running_replicas() -> int:
    from ray import serve

    application: Any = serve.status().applications.get(APPLICATION)
    if application is None:
        return 0
    return sum(d.replica_states.get("RUNNING", 0) for d in application.deployments.values())
