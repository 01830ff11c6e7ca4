"""Keep a server busy for some minutes and see whether its memory grows: 24 hours extrapolated from the slope.

    python -m benchmarks.soak BUNDLE --minutes 10
    python -m benchmarks.soak BUNDLE --minutes 10 --server-arguments="--replicas 2" --out soak.json

A fixed set of requests (several sizes, vocabularies and formats, one in a hundred broken) is sent over and over, and
every answer must be the same as the first one to that request. Memory is what belongs to the server's processes alone
(USS), sampled every few seconds. The first part is left out, since caches fill and allocators keep what they took. Of
every few samples the least counts, which is what stays when requests come and go; the slope is the median over all
pairs of these (Theil-Sen), which single jumps do not move, and is given for both halves, too: where they disagree, the
run was too short to say. The exit code is 1 when an answer was wrong or missing, or when
memory would grow by more than --max-growth in 24 hours.
"""

from __future__ import annotations

import http.client
import io
import json
import random
import shlex
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.running_server import RunningServer, form, running_server
from odise_rt.command_line import CommandParser, command, real_number, whole_number
from odise_rt.errors import OptionsError
from odise_rt.files import check_writable, write_json

VOCABULARIES = (
    "car; truck, pickup truck; tree; stuff: sky; stuff: road",
    "person; dog; cat; stuff: grass, lawn; stuff: wall",
    "red thing; blue thing; stuff: background",
)
FORMATS = ("json", "json", "png", "coco")
WARM_UP = 0.3
"""Share of the time that is left out of the slope."""
ENVELOPE = 5
"""Samples of which the least counts."""
HOUR = 3600.0


@dataclass
class Tally:
    """What came of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    """Answers that differ from the first one to the same request."""
    lost: int = 0
    """Connections that ended without an answer."""
    known: dict[int, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


def requests(count: int) -> list[tuple[bytes, dict[str, str]]]:
    """A fixed set of images with fields; one in a hundred, and at least one, is broken."""
    from PIL import Image

    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        height, width = (int(v) for v in rng.integers(48, 320, 2))
        pixels = np.zeros((height, width, 3), np.uint8)
        for _ in range(6):
            top, left = int(rng.integers(height)), int(rng.integers(width))
            pixels[top : top + height // 2, left : left + width // 2] = rng.integers(0, 255, 3)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=("PNG", "JPEG", "WEBP")[number % 3])
        image = buffer.getvalue()
        if number % 100 == 7:
            image = image[: len(image) // 3]
        made.append((image, {"vocabulary": VOCABULARIES[number % 3], "format": FORMATS[number % 4]}))
    return made


def client(server: RunningServer, work: Sequence[tuple[bytes, dict[str, str]]], until: float, tally: Tally) -> None:
    """Send requests in random order until the time is over."""
    order = random.Random(threading.get_ident())
    connection = server.connect()
    while time.monotonic() < until:
        number = order.randrange(len(work))
        try:
            connection.request("POST", "/v1/segment", *form(*work[number]))
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            connection = server.connect()
            with tally.lock:
                tally.lost += 1
            continue
        if response.status == 429:
            time.sleep(0.05)
        answer = essence(body, response.headers.get_content_type())
        with tally.lock:
            tally.statuses[response.status] += 1
            if response.status >= 400:
                tally.problems[answer] += 1
            if response.status in (200, 400) and tally.known.setdefault(number, answer) != answer:
                tally.wrong += 1
    connection.close()


def essence(body: bytes, media_type: str) -> Any:
    """What must be the same each time: all but the seconds and the request's id."""
    if media_type != "application/json":
        from PIL import Image

        with Image.open(io.BytesIO(body)) as picture:
            return hash(picture.tobytes())
    data = json.loads(body)
    if "error" in data:
        return data["error"]["type"]
    data.pop("facts", None)
    return json.dumps(data, sort_keys=True)


def slope(times: np.ndarray, values: np.ndarray) -> float:
    """Median slope over all pairs of points (Theil-Sen), values per second."""
    first, second = np.triu_indices(len(times), 1)
    return float(np.median((values[second] - values[first]) / (times[second] - times[first])))


def envelope(times: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least of every :data:`ENVELOPE` values, with its time; what is left over at the end is left out."""
    count = len(values) // ENVELOPE
    grouped = values[: count * ENVELOPE].reshape(count, ENVELOPE)
    least = grouped.argmin(axis=1)
    rows = np.arange(count)
    return times[: count * ENVELOPE].reshape(count, ENVELOPE)[rows, least], grouped[rows, least]


def soak(
    bundle: Path,
    minutes: float,
    concurrency: int,
    arguments: Sequence[str],
    every: float,
    fields: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run the soak; plain JSON types. ``fields`` are added to every request."""
    work = [(image, {**given, **(fields or {})}) for image, given in requests(200)]
    tally = Tally()
    samples: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder, running_server(bundle, Path(folder), arguments) as server:
        server.wait_for("ready", 300)
        started = time.monotonic()
        until = started + 60 * minutes
        threads = [threading.Thread(target=client, args=(server, work, until, tally)) for _ in range(concurrency)]
        for thread in threads:
            thread.start()
        while time.monotonic() < until:
            samples.append((time.monotonic() - started, sum(server.resident().values())))
            time.sleep(every)
        for thread in threads:
            thread.join()
        code = server.terminate()
    times = np.array([t for t, _ in samples])
    sizes = np.array([s for _, s in samples], float)
    late = times >= 60 * minutes * WARM_UP
    times, sizes = envelope(times[late], sizes[late])
    if len(times) < 4:
        raise OptionsError(f"too few samples ({len(samples)}) for a slope: use more --minutes or a smaller --every")
    half = len(times) // 2
    rate = slope(times, sizes)
    halves = [slope(times[:half], sizes[:half]), slope(times[half:], sizes[half:])]
    base = float(np.median(sizes))
    total = sum(tally.statuses.values())
    return {
        "bundle": bundle.name,
        "arguments": list(arguments),
        "minutes": minutes,
        "concurrency": concurrency,
        "requests": total,
        "requests_per_second": total / (60 * minutes),
        "statuses": {str(k): v for k, v in sorted(tally.statuses.items())},
        "problems": dict(tally.problems),
        "wrong": tally.wrong,
        "lost": tally.lost,
        "exit_code": code,
        "samples": len(samples),
        "memory_mib": {"median": base / 2**20, "first": samples[0][1] / 2**20, "last": samples[-1][1] / 2**20},
        "slope_mib_per_hour": rate * HOUR / 2**20,
        "slope_of_halves_mib_per_hour": [h * HOUR / 2**20 for h in halves],
        "growth_24h": rate * 24 * HOUR / base,
        "growth_24h_of_halves": [h * 24 * HOUR / base for h in halves],
    }


def report(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    memory, halves = result["memory_mib"], result["growth_24h_of_halves"]
    return "\n".join(
        [
            f"{result['minutes']:g} min, {result['requests']} requests ({result['requests_per_second']:.1f}/s) at "
            f"concurrency {result['concurrency']}: statuses {result['statuses']}, problems {result['problems']}",
            f"answers that differ from the first: {result['wrong']}; lost: {result['lost']}; exit code "
            f"{result['exit_code']}",
            f"memory {memory['first']:.0f} MiB at first, {memory['median']:.1f} in the median after the warm-up, "
            f"{memory['last']:.1f} at last ({result['samples']} samples)",
            f"slope {result['slope_mib_per_hour']:+.2f} MiB/h: {result['growth_24h']:+.1%} in 24 h (halves "
            f"{halves[0]:+.1%} and {halves[1]:+.1%})",
        ]
    )


@command("nothing was written")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = CommandParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("bundle", type=Path, help="The bundle's folder.")
    parser.add_argument("--minutes", type=real_number(0, above=True), default=10.0, help="Minutes of requests.")
    parser.add_argument("--concurrency", type=whole_number(1), default=4, help="Clients at a time.")
    parser.add_argument(
        "--every", type=real_number(0, above=True), default=2.0, help="Seconds between samples of memory."
    )
    parser.add_argument("--server-arguments", default="--in-process", help="Options of odise-rt serve.")
    parser.add_argument(
        "--short-edge",
        type=whole_number(1),
        help="Pixels, sent with every request: smaller is faster. Default: the model's.",
    )
    parser.add_argument(
        "--max-growth",
        type=real_number(0),
        default=0.5,
        help="Growth of memory that is accepted, as a share of it in 24 hours.",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result. Default: only printed.")
    args = parser.parse_args(argv)
    if args.out is not None:
        check_writable(args.out)
    fields = {} if args.short_edge is None else {"short_edge": str(args.short_edge)}
    server = shlex.split(args.server_arguments)
    result = soak(args.bundle, args.minutes, args.concurrency, server, args.every, fields)
    print(report(result))
    if args.out is not None:
        write_json(args.out, result)
    sound = result["wrong"] == 0 and result["lost"] == 0 and result["exit_code"] == 0
    served = not [s for s in result["statuses"] if int(s) >= 500]
    return 0 if sound and served and result["growth_24h"] <= args.max_growth else 1


if __name__ == "__main__":
    sys.exit(main())
