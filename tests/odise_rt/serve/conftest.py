"""An application over the colour bundle, and dispatchers that do what a test needs."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from odise_rt import Bundle, Vocabulary
from odise_rt.serve.dispatch import LocalDispatcher, State
from odise_rt.serve.http import Context, create_app
from odise_rt.serve.limits import Limits
from odise_rt.serve.worker import Answer, SegmentRequest, WorkerSettings
from tests.odise_rt.fake_bundle import colour_image

WORDS = "red; green; blue; white"
LIMITS = Limits(max_request_bytes=200_000, max_pixels=20_000, max_words=10, queue=2, timeout=20, upload_timeout=5)


def png(image: np.ndarray | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(colour_image() if image is None else image).save(buffer, format="PNG")
    return buffer.getvalue()


class StubDispatcher:
    """Answers with what a test gives it."""

    def __init__(self, segment: Callable[[SegmentRequest], Awaitable[Answer]], workers: int = 1) -> None:
        self._segment = segment
        self.workers = workers
        self.present = State(True, 1)

    async def start(self) -> None:
        pass

    def state(self) -> State:
        return self.present

    async def segment(self, request: SegmentRequest) -> Answer:
        return await self._segment(request)

    async def stop(self) -> None:
        pass


def worker_settings(bundle: Path, **changes: Any) -> WorkerSettings:
    values: dict[str, Any] = {
        "bundle": bundle,
        "device": "cpu",
        "threads": 1,
        "vocabularies": {"colours": Vocabulary.parse(WORDS)},
        "limits": LIMITS,
    }
    return WorkerSettings(**(values | changes))


@pytest.fixture(scope="session")
def testclient() -> Any:
    """Starlette's module of that name; without the packages of the extra the test is skipped."""
    for package in ("fastapi", "prometheus_client", "python_multipart"):
        pytest.importorskip(package, reason="needs the extra 'serve'")
    return pytest.importorskip("starlette.testclient", reason="needs the extra 'serve'")


@pytest.fixture(scope="session")
def served(label_bundle: Path, testclient: Any) -> Iterator[Context]:
    """A context whose dispatcher really segments."""
    settings = worker_settings(label_bundle)
    dispatcher = LocalDispatcher(settings)
    asyncio.run(dispatcher.start())
    yield Context(Bundle.open(label_bundle), dispatcher, LIMITS, dict(settings.vocabularies))
    asyncio.run(dispatcher.stop())


@pytest.fixture(scope="session")
def client(served: Context, testclient: Any) -> Iterator[Any]:
    with testclient.TestClient(create_app(served)) as opened:
        yield opened


@pytest.fixture
def client_of(label_bundle: Path, testclient: Any) -> Iterator[Callable[..., Any]]:
    """Makes clients of applications over a dispatcher of the test's own."""
    opened = []

    def make(dispatcher: Any, **changes: Any) -> Any:
        context = Context(Bundle.open(label_bundle), dispatcher, changes.pop("limits", LIMITS), **changes)
        client = testclient.TestClient(create_app(context), raise_server_exceptions=False)
        client.context = context
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.close()
