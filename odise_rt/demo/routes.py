"""The routes of the page: pictures in, masks, names, and files out. All of it stays in memory.

The page asks by plain requests of its own rather than through Gradio's events, whose page loads itself anew after a
connection was lost, and with that loses the visitor's pictures.
"""

from __future__ import annotations

import contextlib
import json
import logging
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import PurePath
from typing import TYPE_CHECKING, TypeVar

from odise_rt.demo.asked import Leave, Masks, Names
from odise_rt.demo.downloads import FORMATS
from odise_rt.demo.pictures import GoneError
from odise_rt.errors import ImageError, InputError, OdiseError
from odise_rt.typed_fields import FieldError, read_fields

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from odise_rt.demo.session import Workbench

logger = logging.getLogger(__name__)

MAX_UPLOAD_BYTES = 48 << 20
"""Largest file that may be sent."""
MAX_QUESTION_BYTES = 1 << 20
"""Largest question: words and corrections."""
MAX_WAITING = 64
"""Questions in line for the network, and as many for names."""
NAMING_AT_ONCE = 4
_NAME_HEADER = "x-odise-picture"

Kind = TypeVar("Kind")
Handler = Callable[["Request"], Awaitable["Response"]]


class _Refused(Exception):
    """An answer with a status of its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Turns:
    """So many requests at work, others in line, and no more than there is room for."""

    def __init__(self, at_once: int) -> None:
        import asyncio

        self._places = asyncio.Semaphore(at_once)
        self._room = at_once + MAX_WAITING
        self._inside = 0

    @contextlib.asynccontextmanager
    async def one(self, request: Request) -> AsyncIterator[None]:
        """A turn for a request, unless too many are in line, or the visitor has gone when it comes."""
        if self._inside >= self._room:
            raise _Refused(503, "The server has too much to do: try again in a moment")
        self._inside += 1
        try:
            async with self._places:
                if await request.is_disconnected():
                    raise _Refused(400, "")  # to nobody
                yield
        finally:
            self._inside -= 1


def picture_routes(bench: Workbench) -> list[Route]:
    """The routes for one workbench."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    finding, naming = Turns(1), Turns(NAMING_AT_ONCE)

    async def add_picture(request: Request) -> Response:
        name = request.headers.get(_NAME_HEADER)
        if name is None:
            raise _Refused(400, f"the header {_NAME_HEADER} is missing: it holds the file's name")
        data = await _body(request, MAX_UPLOAD_BYTES)
        picture = await run_in_threadpool(bench.add, data, urllib.parse.unquote(name))
        return JSONResponse({"token": picture.token}, 201)

    async def add_example(request: Request) -> Response:
        picture = await run_in_threadpool(bench.add_example, request.path_params["index"])
        return JSONResponse({"token": picture.token}, 201)

    async def forget_picture(request: Request) -> Response:
        bench.store.remove(request.path_params["token"])
        return Response(status_code=204)

    async def leave(request: Request) -> Response:
        bench.store.forget((await _question(request, Leave)).visitor)
        return Response(status_code=204)

    async def masks(request: Request) -> Response:
        asked = await _question(request, Masks)
        async with finding.one(request):
            picture = bench.store.get(asked.token, owner=asked.visitor)
            _, ran = await run_in_threadpool(bench.masks, picture)
        return JSONResponse({"picture": picture.described, "ran": ran})

    async def names(request: Request) -> Response:
        asked = await _question(request, Names)
        async with naming.one(request):
            picture = bench.store.get(asked.token, owner=asked.visitor)
            return JSONResponse(await run_in_threadpool(bench.show, picture, asked.controls()))

    async def shown(request: Request) -> Response:
        picture = bench.store.get(request.path_params["token"])
        content = await run_in_threadpool(lambda: picture.shown)
        return Response(content, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

    async def file(request: Request) -> Response:
        key, kind = request.path_params["key"], request.path_params["kind"]
        picture = bench.store.get(request.path_params["token"])
        try:
            content = await run_in_threadpool(bench.file, picture, key, kind)
        except InputError as exc:
            raise _Refused(404, _message(exc)) from exc
        # The two results of a comparison must not have one name.
        side = f".{request.query_params['side']}" if request.query_params.get("side") in ("A", "B") else ""
        name = f"{PurePath(picture.name).stem}{side}{FORMATS[kind].suffix}"
        headers = {"cache-control": "private, no-store", "content-disposition": attachment(name)}
        return Response(content, media_type=FORMATS[kind].media_type, headers=headers)

    return [
        Route("/odise/pictures", _answered(add_picture), methods=["POST"]),
        Route("/odise/examples/{index:int}", _answered(add_example), methods=["POST"]),
        Route("/odise/masks", _answered(masks), methods=["POST"]),
        Route("/odise/names", _answered(names), methods=["POST"]),
        Route("/odise/leave", _answered(leave), methods=["POST"]),
        Route("/odise/pictures/{token}", _answered(forget_picture), methods=["DELETE"]),
        Route("/odise/pictures/{token}/shown.jpg", _answered(shown)),
        Route("/odise/pictures/{token}/{key}/{kind}", _answered(file)),
    ]


def _answered(handler: Handler) -> Handler:
    """A handler whose errors become answers in words."""
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=400)  # to nobody
        except _Refused as exc:
            return JSONResponse({"error": str(exc)}, exc.status)
        except Exception as exc:
            status = 404 if isinstance(exc, GoneError) else 422 if isinstance(exc, InputError) else 500
            return JSONResponse({"error": _message(exc)}, status)

    return answer


async def _body(request: Request, limit: int) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise _Refused(413, f"The file is larger than {limit >> 20} MiB: scale the picture down")
    return bytes(data)


async def _question(request: Request, kind: type[Kind]) -> Kind:
    try:
        return read_fields(kind, json.loads(await _body(request, MAX_QUESTION_BYTES)))
    except (FieldError, ValueError, RecursionError) as exc:
        raise _Refused(422, f"The question cannot be read ({exc}): reload the page") from exc


def _message(error: Exception) -> str:
    """What the page says of an error. Only our own errors speak to visitors; others go to the log."""
    if isinstance(error, OdiseError):
        text = str(error)
        return text if isinstance(error, ImageError) else text[:1].upper() + text[1:]  # it begins with a file's name
    logger.error("a request of the page failed", exc_info=error)
    return "The server met an unexpected error; its log says more. Try another picture or other words."


def attachment(name: str) -> str:
    """A Content-Disposition header for a download, for names in any script (RFC 6266)."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._- ") else "_" for c in name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{urllib.parse.quote(name)}"
