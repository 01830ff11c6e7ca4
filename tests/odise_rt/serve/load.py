"""Many requests at a time against a running server, each answer compared with what is known to be right.

The requests come from a fixed set of images and vocabularies, so that every answer can be checked byte for byte against
results computed beforehand; some images are broken on purpose.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.running_server import RunningServer, form
from odise_rt import Segmenter
from odise_rt.rle import encode
from tests.odise_rt.fake_bundle import colour_image
from tests.odise_rt.serve.conftest import png

VOCABULARIES = ("red; green; blue; white", "red, crimson; stuff: sky; blue", "white; car; green, blue")
SIZES = ((64, 96), (64, 64), (48, 160), (96, 64))
BROKEN = (b"not an image", png()[:120], b"", b"\x89PNG\r\n\x1a\n" + bytes(50))


@dataclass(frozen=True)
class Job:
    """One request and the right answer to it."""

    image: bytes
    fields: Mapping[str, str]
    status: int
    segments: Any
    """``None`` for a broken image."""


@dataclass
class Outcome:
    """What came of a load."""

    statuses: Counter[int] = field(default_factory=Counter)
    types: Counter[str] = field(default_factory=Counter)
    """Types of problems."""
    wrong: list[str] = field(default_factory=list)
    """Answers that were not the right ones."""
    lost: list[str] = field(default_factory=list)
    """Connections that broke without an answer."""
    seconds: list[float] = field(default_factory=list)


def jobs(bundle: Path, count: int, broken_share: float, seed: int = 0) -> Iterator[Job]:
    """A fixed sequence of requests over a small set of images and vocabularies."""
    rng = np.random.default_rng(seed)
    images = [np.roll(colour_image(*size), shift, axis=1) for size in SIZES for shift in (0, 7)]
    encoded = [png(image) for image in images]
    right: dict[tuple[int, int], Any] = {}
    with Segmenter.load(bundle, device="cpu", threads=1, disk_cache=False) as segmenter:
        for i, image in enumerate(images):
            for k, words in enumerate(VOCABULARIES):
                result = segmenter.segment(image, words)
                right[i, k] = [
                    {"label": s.label, "score": round(s.score, 6), "rle": encode(result.mask(s))}
                    for s in result.segments
                ]
    for _ in range(count):
        words = int(rng.integers(len(VOCABULARIES)))
        fields = {"vocabulary": VOCABULARIES[words]}
        if rng.random() < broken_share:
            yield Job(BROKEN[int(rng.integers(len(BROKEN)))], fields, 400, None)
        else:
            image = int(rng.integers(len(images)))
            yield Job(encoded[image], fields, 200, right[image, words])


def run(server: RunningServer, work: Sequence[Job], concurrency: int, retry_busy: bool = True) -> Outcome:
    """Send all requests; a 429 or retryable problem is tried again if ``retry_busy``, as a client would."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in work:
        waiting.put(job)
    outcome, lock = Outcome(), threading.Lock()

    def client() -> None:
        connection = server.connect()
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                connection.close()
                return
            for _ in range(200):
                started = time.monotonic()
                try:
                    connection.request("POST", "/v1/segment", *form(job.image, dict(job.fields)))
                    response = connection.getresponse()
                    body = response.read()
                except (OSError, http.client.HTTPException) as exc:
                    connection.close()
                    connection = server.connect()
                    with lock:
                        outcome.lost.append(f"{type(exc).__name__}: {exc}")
                    break
                with lock:
                    outcome.statuses[response.status] += 1
                    outcome.seconds.append(time.monotonic() - started)
                if response.status >= 400:
                    kind = json.loads(body)["error"]["type"]
                    with lock:
                        outcome.types[kind] += 1
                if retry_busy and response.status == 429:
                    time.sleep(0.05)
                    continue
                problem = difference(job, response.status, body)
                if problem:
                    with lock:
                        outcome.wrong.append(problem)
                break

    threads = [threading.Thread(target=client) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def difference(job: Job, status: int, body: bytes) -> str | None:
    """Why an answer is not the right one, or ``None``."""
    if status != job.status:
        return f"status {status}, expected {job.status}: {body[:200]!r}"
    if job.segments is None:
        return None
    found = json.loads(body)["segments"]
    if [(s["label"], s["rle"]) for s in found] != [(s["label"], s["rle"]) for s in job.segments]:
        return "segments differ"
    if any(abs(a["score"] - b["score"]) > 1e-4 for a, b in zip(found, job.segments, strict=True)):
        return "scores differ"
    return None
