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
from typing import TYPE_CHECKING, Any

from odise_rt.demo.routes import picture_routes
from odise_rt.errors import MissingPackageError, OdiseError
from odise_rt.files import json_bytes
from odise_rt.listening import WRONG_HOST, is_answered, is_no_cut, server_url

if TYPE_CHECKING:
    import fastapi

    from odise_rt.demo.session import Workbench

logger = logging.getLogger(__name__)

GRACE_SECONDS = 2
"""How long running requests may take to finish when the server stops."""
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
        app.router.routes += picture_routes(bench)
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
