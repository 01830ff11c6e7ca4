"""The HTTP interface: routes, limits and the form of every answer.

FastAPI is imported by :func:`create_app`, so that this module can be imported without it. The annotations of routes are
evaluated, hence no ``from __future__ import annotations`` here.
"""

import asyncio
import contextlib
import hmac
import importlib.util
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odise_rt.bundle import Bundle
from odise_rt.errors import MissingPackageError
from odise_rt.listening import WRONG_HOST, is_answered
from odise_rt.serve import MISSING_PACKAGES, openapi
from odise_rt.serve.dispatch import Dispatcher
from odise_rt.serve.fields import parse_fields
from odise_rt.serve.limits import Admission, Limits
from odise_rt.serve.metrics import Metrics
from odise_rt.serve.problems import STATUS_CLIENT_GONE, Problem, RequestRefused, problem_from
from odise_rt.serve.uploads import read_upload
from odise_rt.serve.worker import Answer, SegmentRequest
from odise_rt.version import __version__
from odise_rt.vocabulary import Vocabulary

if TYPE_CHECKING:
    from starlette.responses import Response

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BY_STATUS = {404: "not_found", 405: "method_not_allowed"}
_PIECE_BYTES = 256 << 10
_DOCS_FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}


@dataclass
class Context:
    """What the routes work with."""

    bundle: Bundle
    dispatcher: Dispatcher
    limits: Limits
    vocabularies: dict[str, Vocabulary] = field(default_factory=dict)
    token: str | None = None
    """If set, requests to /v1 must carry it as a bearer token."""
    hosts: tuple[str, ...] = ()
    """From :func:`odise_rt.listening.answered_hosts`."""
    stopping: bool = False
    """The server was told to stop: ``/readyz`` says so before requests are refused."""
    admission: Admission = field(init=False)
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.admission = Admission(self.limits.queue, self.dispatcher.workers)
        facts = self.bundle
        self.metrics = Metrics(
            {"version": __version__, "bundle": facts.name, "digest": facts.digest, "precision": facts.precision},
            {
                "odise_requests_inside": ("Requests with a place in the queue.", lambda: self.admission.inside),
                "odise_queue_capacity": ("Places in the queue.", lambda: self.admission.capacity),
                "odise_replicas": ("Copies of the model that are loaded.", lambda: self.dispatcher.state().replicas),
                "odise_ready": (
                    "1 when requests are served, as /readyz says.",
                    lambda: self.dispatcher.state().ready and not self.stopping,
                ),
            },
        )


def create_app(context: Context, lifespan: Any = None) -> Any:
    """The ASGI application.

    Args:
        context: what the routes work with.
        lifespan: FastAPI's lifespan, if the application starts and stops the dispatcher.

    Raises:
        MissingPackageError: FastAPI or python-multipart is not installed.
    """
    try:
        import python_multipart.multipart  # noqa: F401  (needed by the first form)
        from fastapi import FastAPI, Request
        from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect
    except ImportError as exc:
        raise MissingPackageError(MISSING_PACKAGES) from exc

    app = FastAPI(
        title="odise_rt",
        version=__version__,
        description=openapi.DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads its scripts from a CDN
        redoc_url=None,
    )

    @app.exception_handler(RequestRefused)
    async def refused(request: Request, exc: RequestRefused) -> Response:
        return _problem_response(exc.problem, request.scope, context.metrics)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, exc: HTTPException) -> Response:
        kind = _BY_STATUS.get(exc.status_code, "bad_request")
        problem = Problem(kind, f"{request.method} {request.url.path[:80]} is not served here: see /docs")
        return _problem_response(problem, request.scope, context.metrics, exc.headers)

    @app.post(
        "/v1/segment",
        summary="Segment an image by words",
        tags=["segmentation"],
        response_class=Response,
        responses=openapi.segment_responses(),
        openapi_extra=openapi.segment_operation(context.limits),
    )
    async def segment(request: Request) -> Response:
        request.state.until_sent.enter_context(context.admission.place())
        state = context.dispatcher.state()
        if not state.ready:
            raise RequestRefused("not_ready", f"{state.reason or 'no replica is running'}: try again", 2.0)
        headers = request.headers
        try:
            image, form = await read_upload(
                request.stream(), headers.get("content-type", ""), headers.get("content-length"), context.limits
            )
        except ClientDisconnect:  # in the middle of its upload
            return Response(status_code=STATUS_CLIENT_GONE)
        fields = parse_fields([*request.query_params.multi_items(), *form])
        answer = await _dispatch(context, SegmentRequest(image, fields, request.state.request_id), request.receive)
        if answer is None:
            return Response(status_code=STATUS_CLIENT_GONE)
        context.metrics.answer(answer)
        if answer.problem is not None:
            return _problem_response(answer.problem, request.scope, context.metrics)
        return Response(answer.content, media_type=answer.media_type)

    @app.get("/v1/vocabularies", summary="Vocabularies that requests may name", tags=["segmentation"])
    async def vocabularies() -> dict[str, Any]:
        return {
            name: {"classes": len(v), "words": len(v.words), "things": int(v.isthing.sum())}
            for name, v in context.vocabularies.items()
        }

    @app.get(
        "/v1/vocabularies/{name}",
        summary="The classes of one vocabulary",
        tags=["segmentation"],
        responses=openapi.problem_responses("not_found"),
    )
    async def vocabulary(name: str) -> dict[str, Any]:
        found = context.vocabularies.get(name)
        if found is None:
            raise RequestRefused("not_found", "there is no such vocabulary: see /v1/vocabularies")
        return found.to_dict()

    @app.get(
        "/v1/bundle", summary="The model that is served, its defaults and this server's limits", tags=["segmentation"]
    )
    async def bundle() -> dict[str, Any]:
        limits, opened = context.limits, context.bundle
        return {
            "name": opened.name,
            "digest": opened.digest,
            "precision": opened.precision,
            "model": opened.facts.to_dict(),
            "training_words": len(opened.training_vocabulary),
            "limits": {
                "max_request_bytes": limits.max_request_bytes,
                "max_pixels": limits.max_pixels,
                "max_words": limits.max_words,
                "max_short_edge": limits.max_short_edge or opened.facts.test_short_edge,
                "max_long_edge": limits.max_long_edge or opened.facts.test_long_edge,
                "timeout": limits.timeout,
                "queue": limits.queue,
            },
        }

    @app.head("/healthz", include_in_schema=False)  # what some balancers and uptime monitors ask with
    @app.get("/healthz", summary="Whether the server lives", tags=["operation"])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get(
        "/readyz",
        summary="Whether requests are served now",
        tags=["operation"],
        responses=openapi.problem_responses("not_ready", "shutting_down"),
    )
    async def readyz() -> dict[str, Any]:
        state = context.dispatcher.state()
        if context.stopping:
            raise RequestRefused("shutting_down", "the server is shutting down", 5.0)
        if not state.ready:
            raise RequestRefused("not_ready", state.reason or "no replica is running", 2.0)
        return {"status": "ready", "replicas": state.replicas}

    @app.get("/metrics", summary="Prometheus metrics", tags=["operation"], response_class=Response)
    async def metrics() -> Response:
        content, media_type = context.metrics.exposition()
        return Response(content, media_type=media_type)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(_docs_page())

    @app.get("/docs/{name}", include_in_schema=False)
    async def docs_file(name: str) -> Response:
        path = _docs_path(name)
        if path is None:
            raise RequestRefused("not_found", "there is no such file: see /docs")
        return FileResponse(path, media_type=_DOCS_FILES[name], headers={"cache-control": "public, max-age=86400"})

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return JSONResponse({"name": "odise_rt", "version": __version__, "docs": "/docs", "api": "/openapi.json"})

    generate = app.openapi

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            generated = generate()
            openapi.complete(generated)
            app.openapi_schema = generated
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]
    app.add_middleware(_Envelope, context=context)
    return app


async def _dispatch(context: Context, work: SegmentRequest, receive: Receive) -> Answer | None:
    """The answer, or ``None`` if the client left; gives up at the deadline."""
    started, inside = time.monotonic(), context.admission.inside
    task = asyncio.ensure_future(context.dispatcher.segment(work))
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, timeout=context.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            answer = task.result()
            if answer.problem is None:
                context.admission.learn(time.monotonic() - started, inside)
            return answer
        if gone.done():
            return None
        raise RequestRefused(
            "timeout",
            f"no answer within {context.limits.timeout:g} s: try again when the server is less busy, or send a "
            "smaller image",
        )
    finally:
        for pending in (task, gone):
            pending.cancel()
            pending.add_done_callback(_look_at)


def _look_at(task: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more; asyncio would log an error that nobody looked at."""
    if not task.cancelled() and task.exception() is not None:
        logger.debug("a request that was given up failed", exc_info=task.exception())


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _problem_response(
    problem: Problem, scope: MutableMapping[str, Any], metrics: Metrics, more: Mapping[str, str] | None = None
) -> "Response":
    from starlette.responses import JSONResponse

    metrics.problem(problem.type)
    headers = dict(more or {})
    if problem.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(problem.retry_after))
    if problem.type == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    body = problem.to_dict(scope.get("state", {}).get("request_id"))
    return JSONResponse(body, problem.status, headers)


class _Envelope:
    """Around every request: an id, the token, the Host header, the log, the metrics, and no traceback to the client."""

    def __init__(self, app: Any, context: Context) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context, started = self._context, time.monotonic()
        headers = {k: v.decode("latin-1") for k, v in reversed(scope["headers"])}
        given = headers.get(b"x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given_headers = list(message.get("headers", ()))
                if status >= 400 or not any(key == b"cache-control" for key, _ in given_headers):
                    given_headers.append((b"cache-control", b"no-store"))
                message["headers"] = [
                    *given_headers,
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await _send_in_pieces(send, message)

        try:
            with contextlib.ExitStack() as until_sent:
                scope["state"]["until_sent"] = until_sent
                problem = self._gate(scope["path"], headers)
                if problem is not None:
                    scope["route"] = _route(scope)
                    await _problem_response(problem, scope, context.metrics)(scope, receive, send_with_headers)
                else:
                    await self._app(scope, receive, send_with_headers)
        except Exception as exc:  # the outermost boundary
            problem = problem_from(exc, request_id)
            if status == 0:
                await _problem_response(problem, scope, context.metrics)(scope, receive, send_with_headers)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - started
            context.metrics.request(route, status, seconds)
            failed = status >= 500 and route != "/readyz"  # whose 503 is an answer, and comes every few seconds
            level = logging.WARNING if failed else logging.INFO
            logger.log(level, "%s %s %s %d %.3f s", request_id, scope["method"], route, status, seconds)

    def _gate(self, path: str, headers: dict[bytes, str]) -> Problem | None:
        context = self._context
        if not is_answered(headers.get(b"host", ""), context.hosts):
            return Problem("wrong_host", WRONG_HOST)
        if context.token is not None and path.startswith("/v1/"):
            scheme, _, value = headers.get(b"authorization", "").partition(" ")
            expected = context.token.encode()
            if scheme.lower() != "bearer" or not hmac.compare_digest(value.strip().encode(), expected):
                return Problem(
                    "unauthorized", "expected the header 'Authorization: Bearer TOKEN' with this server's token"
                )
        return None


def _route(scope: MutableMapping[str, Any]) -> Any:
    """The route of a request that the router has not seen; ``None`` if there is none."""
    matches = (route.matches(scope) for route in scope["app"].routes)
    return next((child["route"] for match, child in matches if match.value and "route" in child), None)


async def _send_in_pieces(send: Send, message: Message) -> None:
    """Send a message of an answer; returns when the reader has nearly all of it.

    uvicorn takes a body of any size into its buffers without waiting, but nothing more before they are nearly empty.
    """
    body = message.get("body", b"")
    for start in range(0, len(body), _PIECE_BYTES):
        await send({**message, "body": body[start : start + _PIECE_BYTES], "more_body": True})
    await send({**message, "body": b""} if body else message)


def _docs_page() -> str:
    if _docs_path("swagger-ui-bundle.js") is None:
        return (
            "<!doctype html><title>odise_rt</title><p>The API is described in <a href='/openapi.json'>/openapi.json</a>"
            ". For a page to try it on: <code>pip install 'odise_rt[serve-local]'</code>"
        )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>odise_rt</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<link rel='stylesheet' href='/docs/swagger-ui.css'></head><body><div id='ui'></div>"
        "<script src='/docs/swagger-ui-bundle.js'></script>"
        "<script>SwaggerUIBundle({url: '/openapi.json', dom_id: '#ui', deepLinking: true})</script></body></html>"
    )


def _docs_path(name: str) -> Path | None:
    """A file of Swagger UI as the package fastapi-swagger carries it; the names are fixed."""
    if name not in _DOCS_FILES:
        return None
    spec = importlib.util.find_spec("fastapi_swagger")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "resources" / name
    return path if path.is_file() else None
