"""The server's process: it listens, loads, serves, and on SIGTERM finishes what it accepted."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from odise_rt.bundle import Bundle
from odise_rt.errors import BackendError, MissingPackageError, OdiseError
from odise_rt.listening import DEFAULT_HOST, answered_hosts, is_loopback, is_no_cut, listen, server_url
from odise_rt.serve import MISSING_PACKAGES
from odise_rt.serve.application import RayDispatcher, ReplicaSettings
from odise_rt.serve.connections import MAX_HEAD_BYTES, bounded_connections
from odise_rt.serve.dispatch import Dispatcher, LocalDispatcher
from odise_rt.serve.http import Context, create_app
from odise_rt.serve.limits import MAX_CONNECTIONS
from odise_rt.serve.worker import WorkerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerSettings:
    """Everything that ``odise-rt serve`` is told."""

    worker: WorkerSettings
    replicas: ReplicaSettings = field(default_factory=ReplicaSettings)
    in_process: bool = False
    """Threads of this process instead of Ray Serve replicas."""
    host: str = DEFAULT_HOST
    port: int = 8000
    """0: a free one."""
    token: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    """Further names that requests may use; on a loopback address only its own names are answered by default."""
    keep_alive: float = 75.0
    """Seconds for which an idle connection is kept: longer than a load balancer keeps its own, or that may send
    a request while this end closes."""
    shutdown_delay: float = 0.0
    """Seconds for which a server that was told to stop still takes requests, while ``/readyz`` says 503."""
    drain: float | None = None
    """Seconds that accepted requests have when the server is stopped; ``None``: their own timeout."""


def serve(settings: ServerSettings, say: Callable[[str, str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted.

    Args:
        settings: of the server.
        say: told of events: ``"listening"`` and ``"ready"`` with the URL, ``"stopping"``.

    Raises:
        OdiseError: the bundle, the port or the replicas cannot be used.
        MissingPackageError: a package of the extra ``serve`` is missing.
    """
    if importlib.util.find_spec("uvicorn") is None:
        raise MissingPackageError(MISSING_PACKAGES)
    worker = settings.worker
    # Here, so that a broken one is reported before anything is started. Replicas compare the hashes of what they read.
    bundle = worker.bundle if isinstance(worker.bundle, Bundle) else Bundle.open(worker.bundle, verify=worker.verify)
    dispatcher: Dispatcher
    if settings.in_process:
        dispatcher = LocalDispatcher(dataclasses.replace(worker, bundle=bundle))
    else:
        dispatcher = RayDispatcher(worker, settings.replicas)
    with listen(settings.host, settings.port) as listener:
        _serve(settings, bundle, dispatcher, listener, say)


def _serve(
    settings: ServerSettings,
    bundle: Bundle,
    dispatcher: Dispatcher,
    listener: socket.socket,
    say: Callable[[str, str], None],
) -> None:
    """Serve on a socket until the process is told to stop; see :func:`serve`."""
    import uvicorn

    worker = settings.worker
    hosts = answered_hosts(listener, settings.host, settings.allowed_hosts)
    context = Context(bundle, dispatcher, worker.limits, dict(worker.vocabularies), settings.token, hosts)
    failures: list[BaseException] = []

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            first = not context.stopping
            context.stopping = True
            super().handle_exit(sig, frame)
            if first:  # said last: who reads it may send the second signal before this handler has returned
                say("stopping", "")
            else:
                self.force_exit = True  # uvicorn would take a second SIGINT for that, but no SIGTERM

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if context.stopping:  # and not because the model could not be loaded
                delayed_until = time.monotonic() + settings.shutdown_delay
                while not self.force_exit and time.monotonic() < delayed_until:
                    await asyncio.sleep(0.1)
            context.admission.draining = True
            await super().shutdown(sockets)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async def load() -> None:
            try:
                await dispatcher.start()
            except Exception as exc:
                failures.append(exc)
                server.should_exit = True
            else:
                say("ready", url)

        loading = asyncio.create_task(load())
        yield
        if not loading.done() and not failures:
            loading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loading
        await dispatcher.stop()

    url = server_url(listener)
    config = uvicorn.Config(
        create_app(context, lifespan),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        http=bounded_connections(),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ws="none",
        timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]  # given to call_later, which takes parts
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=int(settings.drain if settings.drain is not None else worker.limits.timeout) + 1,
    )
    server = Server(config)
    logging.getLogger("uvicorn.error").addFilter(is_no_cut)
    if not is_loopback(listener) and settings.token is None:
        logger.warning("listening on %s without a token: everyone who reaches it can use it", url)
    say("listening", url)
    # uvicorn raises the signal again when it is done: by then it has been obeyed.
    before = {sig: signal.signal(sig, lambda *_: None) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
        asyncio.run(dispatcher.stop())  # nothing left to do unless the server was forced
    if failures:
        failure = failures[0]
        if isinstance(failure, OdiseError):
            raise failure
        logger.error("unexpected error while the model was loaded", exc_info=failure)
        raise BackendError(
            f"the model was not loaded: an unexpected {type(failure).__name__} ({failure}); the log has the details"
        ) from failure
