"""Bodies in any pieces, at any speed; and clients that leave."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.running_server import form
from odise_rt import Bundle
from odise_rt.serve.http import Context, _dispatch
from odise_rt.serve.limits import Limits
from odise_rt.serve.problems import RequestRefused
from odise_rt.serve.uploads import read_upload
from odise_rt.serve.worker import Answer, SegmentRequest
from tests.odise_rt.serve.conftest import StubDispatcher

pytest.importorskip("python_multipart", reason="needs the extra 'serve'")


async def pieces(body: bytes, size: int, pause: float = 0.0) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        await asyncio.sleep(pause)
        yield body[start : start + size]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100_000])
def test_a_form_may_come_in_any_pieces(size: int) -> None:
    image = b"\r\n--odise-bound almost\r\n-" + bytes(range(256))
    fields = {"vocabulary": "stuff: sky; naïve café", "format": "png"}
    body, headers = form(image, fields)
    found, others = asyncio.run(read_upload(pieces(body, size), headers["Content-Type"], None, Limits()))
    assert found == image
    assert dict(others) == fields


def test_a_slow_upload_ends() -> None:
    body, headers = form(b"x" * 1000, {})
    limits = Limits(upload_timeout=0.1)
    with pytest.raises(RequestRefused) as caught:
        asyncio.run(read_upload(pieces(body, 10, pause=0.05), headers["Content-Type"], str(len(body)), limits))
    assert caught.value.problem.type == "slow_upload"
    assert caught.value.problem.retryable


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=odise-boundary", "image/png"])
def test_an_endless_upload_ends_at_the_bound(kind: str) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        yield form(b"", {})[0].partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        while True:
            taken += 1
            yield b"y" * 1000

    with pytest.raises(RequestRefused) as caught:
        asyncio.run(read_upload(endless(), kind, None, Limits(max_request_bytes=50_000)))
    assert caught.value.problem.type == "request_too_large"
    assert taken <= 51


def test_what_fails_after_its_client_left_is_no_error_of_the_server(
    label_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def segment(request: SegmentRequest) -> Answer:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise RequestRefused("replica_died", "it died of being cancelled") from None
        return Answer()

    async def leave() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def run() -> None:
        context = Context(Bundle.open(label_bundle), StubDispatcher(segment), Limits())
        assert await _dispatch(context, SegmentRequest(b"x", {}), leave) is None
        await asyncio.sleep(0.05)
        gc.collect()

    asyncio.run(run())
    assert [r for r in caplog.records if r.levelname == "ERROR"] == []


def test_a_client_that_leaves_gives_its_request_up(label_bundle: Path) -> None:
    cancelled: list[bool] = []

    async def segment(request: SegmentRequest) -> Answer:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return Answer()

    async def leave() -> dict[str, Any]:
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def run(receive: Callable[[], Awaitable[dict[str, Any]]]) -> Answer | None:
        context = Context(Bundle.open(label_bundle), StubDispatcher(segment), Limits())
        answer = await _dispatch(context, SegmentRequest(b"x", {}), receive)
        await asyncio.sleep(0.05)
        return answer

    assert asyncio.run(run(leave)) is None
    assert cancelled == [True]
