"""Heads of requests and the reading of answers: bounded in size and time, whatever a client does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

import uvicorn
from uvicorn.server import ServerState

from odise_rt.serve import connections
from odise_rt.serve.connections import MAX_HEAD_BYTES, bounded_connections

PIECE = 64 << 10
HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


LARGE = 32 << 20
"""Bytes that the buffers of a loopback connection do not hold."""


async def length_of_body(
    scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[..., Awaitable[None]]
) -> None:
    size = 0
    while scope["path"] != "/refused":
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    answer = b"%d" % size if scope["path"] in ("/", "/refused") else bytes(LARGE)
    headers = [(b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if scope["path"] == "/pieces":
        for start in range(0, LARGE, PIECE):
            await send({"type": "http.response.body", "body": answer[start : start + PIECE], "more_body": True})
        answer = b""
    await send({"type": "http.response.body", "body": answer})


@asynccontextmanager
async def listening(state: ServerState | None = None) -> AsyncIterator[Callable[[], Awaitable[Stream]]]:
    """A server on a free port; gives connections to it."""
    protocol: Any = bounded_connections()
    config = uvicorn.Config(
        length_of_body, http=protocol, h11_max_incomplete_event_size=MAX_HEAD_BYTES, log_config=None, ws="none"
    )
    config.load()
    state = state or ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: protocol(config, state, {}), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    opened: list[asyncio.StreamWriter] = []

    async def connect() -> Stream:
        stream = await asyncio.open_connection("127.0.0.1", port)
        opened.append(stream[1])
        return stream

    async with server:
        yield connect
        for writer in opened:
            writer.close()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)


@pytest.mark.parametrize("pieces", [[b""], [HEAD[:20]], [HEAD + b"four", HEAD[:20]]])
def test_heads_that_do_not_end_are_given_up(pieces: list[bytes]) -> None:
    async def scenario() -> bytes:
        async with listening() as connect:
            reader, writer = await connect()
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.1)
            return await asyncio.wait_for(reader.read(), 3)  # to the end of the connection

    assert asyncio.run(scenario()).count(b"200 OK") == len(pieces) - 1


def test_dripping_does_not_help() -> None:
    async def scenario() -> None:
        async with listening() as connect:
            reader, writer = await connect()
            end = asyncio.create_task(reader.read())
            for number in range(200):
                writer.write(HEAD[:1] if not number else b"x")
                await asyncio.wait({end}, timeout=0.1)
                if end.done():
                    break
            assert end.done()
            assert number < 100

    asyncio.run(scenario())


def test_heads_of_any_size_are_not_kept() -> None:
    async def scenario() -> bytes:
        async with listening() as connect:
            reader, writer = await connect()
            writer.write(b"GET / HTTP/1.1\r\nX-Long: " + b"x" * (4 * MAX_HEAD_BYTES))
            return await asyncio.wait_for(reader.read(200), 20)

    assert asyncio.run(scenario()).startswith(b"HTTP/1.1 400 ")


def test_bodies_may_take_longer_and_connections_are_used_again() -> None:
    async def scenario() -> None:
        async with listening() as connect:
            reader, writer = await connect()
            for _ in range(2):
                writer.write(HEAD)
                for _ in b"four":
                    await asyncio.sleep(0.15)
                    writer.write(b"x")
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
                assert head.startswith(b"HTTP/1.1 200 ")
                assert await reader.readexactly(1) == b"4"

    asyncio.run(scenario())


@pytest.mark.parametrize("ends", [False, True])
def test_a_body_that_drips_on_after_its_answer_is_given_up(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    """uvicorn's own timer for idle connections starts anew with every byte."""
    monkeypatch.setattr(connections, "REST_SECONDS", 20.0 if ends else 0.3)

    async def scenario() -> bytes:
        async with listening() as connect:
            reader, writer = await connect()
            writer.write(HEAD.replace(b" / ", b" /refused ").replace(b": 4", b": 8"))
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n0"), 20)
            end = asyncio.create_task(reader.readuntil(b"\r\n\r\n4"))
            for _ in range(8 if ends else 7):
                writer.write(b"x")
                await asyncio.wait({end}, timeout=0.1)
            if ends:
                writer.write(HEAD + b"four")
            with contextlib.suppress(asyncio.IncompleteReadError):
                answer += await asyncio.wait_for(end, 3)
            return answer

    assert asyncio.run(scenario()).count(b"200 OK") == (2 if ends else 1)


@pytest.mark.parametrize("reads", [False, True])
def test_answers_that_nobody_reads_are_dropped(monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    monkeypatch.setattr(connections, "ANSWER_SECONDS", 10.0 if reads else 0.3)

    async def scenario() -> int:
        state = ServerState()
        async with listening(state) as connect:
            reader, writer = await connect()
            writer.write(b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            if reads:
                return len(await asyncio.wait_for(reader.read(), 20))
            for _ in range(200):
                await asyncio.sleep(0.05)
                if state.total_requests and not state.connections and not state.tasks:
                    return -1
            return 0

    assert asyncio.run(scenario()) > LARGE if reads else asyncio.run(scenario()) == -1


def test_reading_an_answer_bit_by_bit_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "ANSWER_SECONDS", 0.5)

    async def scenario() -> int:
        async with listening() as connect:
            reader, writer = await connect()
            writer.write(b"GET /pieces HTTP/1.1\r\nHost: localhost\r\n\r\n")
            got = 0
            with contextlib.suppress(ConnectionResetError):
                while got < LARGE and (piece := await asyncio.wait_for(reader.read(4 * PIECE), 3)):
                    got += len(piece)
                    await asyncio.sleep(0.02)
            return got

    assert asyncio.run(scenario()) < LARGE


LENGTHS = (b"Content-Length: 5", b"Transfer-Encoding: chunked")


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[::-1]])
def test_a_body_of_two_lengths_is_refused_and_nothing_behind_it_is_answered(lengths: tuple[bytes, bytes]) -> None:
    first = b"POST / HTTP/1.1\r\nHost: localhost\r\n%b\r\n%b\r\n\r\n0\r\n\r\n" % lengths

    async def scenario() -> bytes:
        async with listening() as connect:
            reader, writer = await connect()
            writer.write(first + HEAD + b"four")
            return await asyncio.wait_for(reader.read(), 5)  # to the end of the connection

    answers = asyncio.run(scenario())
    assert answers.startswith(b"HTTP/1.1 400 ")
    assert answers.count(b"HTTP/1.1") == 1
