"""``odise-rt demo``: the page behind a web server of its own.

Pictures come in by a route of our own and stay in memory; Gradio's upload, which writes to a disk, is refused. Every
answer forbids the browser to fetch anything from elsewhere. The server listens on the loopback interface unless told
otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import tempfile
import urllib.parse
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from odise_rt.demo.downloads import FORMATS
from odise_rt.errors import ImageError, InputError, MissingPackageError, OdiseError
from odise_rt.files import json_bytes
from odise_rt.listening import WRONG_HOST, is_answered, is_no_cut, server_url

if TYPE_CHECKING:
    import fastapi

    from odise_rt.demo.pictures import Picture
    from odise_rt.demo.session import Workbench

logger = logging.getLogger(__name__)

MAX_UPLOAD_BYTES = 48 << 20
"""Largest file that may be sent."""
GRACE_SECONDS = 2
"""How long running requests may take to finish when the server stops."""
_NAME_HEADER = "x-odise-picture"
# Gradio compiles its templates in the browser ('unsafe-eval') and starts from inline scripts; all else is ours alone.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
_HEADERS = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
# Routes of Gradio that write what they are sent to a disk, read files, or fetch from elsewhere; the page needs none.
_REFUSED = re.compile(r"/(gradio_api/)?(upload|upload_progress|proxy=|file=|file/|process_recording|stream/)")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def create_app(bench: Workbench, port: int, hosts: Collection[str] = ()) -> fastapi.FastAPI:
    """The web application: the page and the routes for its pictures.

    Args:
        bench: what it shows.
        port: where it will listen; Gradio wants to know.
        hosts: from :func:`odise_rt.listening.answered_hosts`.

    Raises:
        MissingPackageError: Gradio is not installed.
    """
    _prepare_environment()
    try:
        import fastapi
        import gradio
    except ImportError as exc:
        raise MissingPackageError(
            f"the page needs Gradio ({exc}): install it with: pip install 'odise_rt[demo]'"
        ) from exc
    from odise_rt.demo.page import build_page, page_settings

    async def build() -> fastapi.FastAPI:
        app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        _add_routes(app, bench)
        app.add_middleware(_Guard, hosts=hosts)
        mounted: fastapi.FastAPI = gradio.mount_gradio_app(
            app,
            build_page(bench),
            path="/",
            server_port=port,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            show_error=False,
            max_file_size=1,
            **page_settings(),
        )
        return mounted

    # Outside of a running loop, Gradio makes loops of its own for its locks and never closes them.
    return asyncio.run(build())


def _prepare_environment() -> None:
    """Keep Gradio from calling home and from a shared folder; must come before it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"


def _add_routes(app: fastapi.FastAPI, bench: Workbench) -> None:
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def add_picture(request: Request) -> Response:
        name = request.headers.get(_NAME_HEADER)
        if name is None:
            return JSONResponse({"error": f"the header {_NAME_HEADER} is missing: it holds the file's name"}, 400)
        data = bytearray()
        try:
            async for chunk in request.stream():
                data += chunk
                if len(data) > MAX_UPLOAD_BYTES:
                    message = f"The file is larger than {MAX_UPLOAD_BYTES >> 20} MiB: scale the picture down"
                    return JSONResponse({"error": message}, 413)
        except ClientDisconnect:
            return Response(status_code=400)  # to nobody
        try:
            picture = await run_in_threadpool(bench.add, bytes(data), urllib.parse.unquote(name))
        except ImageError as exc:
            return JSONResponse({"error": str(exc)}, 422)
        return JSONResponse({"token": picture.token}, 201)

    def send(request: Request, make: Callable[[Picture], Response]) -> Response:
        try:
            return make(bench.store.get(request.path_params["token"]))
        except InputError as exc:
            return JSONResponse({"error": str(exc)}, 404)

    # Not coroutines: the server runs them in threads, so that drawing a large picture holds up nobody.
    def shown(request: Request) -> Response:
        headers = {"cache-control": "private, max-age=3600"}
        return send(request, lambda picture: Response(picture.shown, media_type="image/jpeg", headers=headers))

    def download(request: Request) -> Response:
        key, kind = request.path_params["key"], request.path_params["kind"]

        def file(picture: Picture) -> Response:
            content = bench.file(picture, key, kind)
            # The two results of a comparison must not have one name.
            side = f".{request.query_params['side']}" if request.query_params.get("side") in ("A", "B") else ""
            name = f"{PurePath(picture.name).stem}{side}{FORMATS[kind].suffix}"
            headers = {"cache-control": "private, no-store", "content-disposition": attachment(name)}
            return Response(content, media_type=FORMATS[kind].media_type, headers=headers)

        return send(request, file)

    app.router.routes += [
        Route("/odise/pictures", add_picture, methods=["POST"]),
        Route("/odise/pictures/{token}/shown.jpg", shown),
        Route("/odise/pictures/{token}/{key}/{kind}", download),
    ]


def attachment(name: str) -> str:
    """A Content-Disposition header for a download, for names in any script (RFC 6266)."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._- ") else "_" for c in name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{urllib.parse.quote(name)}"


class _Guard:
    """Adds the headers of this module to every answer, refuses the routes that the page must not have, and answers
    nobody but the page."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        refusal, status = None, 403
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if not is_answered(headers.get(b"host", ""), self._hosts):
            refusal, status = WRONG_HOST, 421
        elif _REFUSED.match(scope["path"]):
            refusal = "this server takes pictures in memory only"
        elif _comes_from_elsewhere(headers):
            refusal = "this server answers its own page only; a proxy before it must pass Host or X-Forwarded-Host"
        if refusal:
            body = json_bytes({"error": refusal})
            described = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send_with_headers({"type": "http.response.start", "status": status, "headers": described})
            await send({"type": "http.response.body", "body": body})
            return
        await self._app(scope, receive, send_with_headers)


def _comes_from_elsewhere(headers: Mapping[bytes, str]) -> bool:
    """Whether the page of another site sent a request: browsers then name that site, and nothing else sets Origin."""
    origin = headers.get(b"origin")
    if origin is None:
        return False
    hosts = {headers.get(b"host"), headers.get(b"x-forwarded-host")}
    return urllib.parse.urlsplit(origin).netloc not in hosts - {None}


def _is_no_goodbye(record: logging.LogRecord) -> bool:
    """Leave out of the log that streams of open pages were cut when the server stopped."""
    return is_no_cut(record) and not str(record.msg).startswith("Cancel ")


def serve(bench: Workbench, listener: socket.socket, hosts: Collection[str], ready: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Args:
        bench: what it shows.
        listener: from :func:`odise_rt.listening.listen`; closed at the end.
        hosts: from :func:`odise_rt.listening.answered_hosts`.
        ready: called with the page's address when it can be opened.
    """
    # Nothing should ever be in it (uploads are refused); what a library puts there all the same goes with the server.
    with listener, tempfile.TemporaryDirectory(prefix="odise-rt-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        app = create_app(bench, listener.getsockname()[1], hosts)
        import uvicorn

        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        address = server_url(listener)

        class Announcing(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    ready(address)

        logging.getLogger("uvicorn.error").addFilter(_is_no_goodbye)
        # uvicorn stops at either signal, then sends it again; SIGTERM alone would end the process without tidying up.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        server = Announcing(config)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            logger.info("stopped")
        finally:
            signal.signal(signal.SIGTERM, before)
        if not server.started:
            raise OdiseError("the web server could not start: run it with -v to see why")
