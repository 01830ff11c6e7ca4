"""The HTTP interface as clients meet it: right answers, and one clear problem for everything else."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from odise_rt import Bundle, Segmenter, Vocabulary
from odise_rt.errors import BackendError, OutOfMemoryError
from odise_rt.rle import decode
from odise_rt.serve.dispatch import LocalDispatcher, State
from odise_rt.serve.fields import FIELDS
from odise_rt.serve.http import Context, _dispatch, create_app
from odise_rt.serve.limits import Limits
from odise_rt.serve.problems import STATUS, Problem, RequestRefused
from odise_rt.serve.worker import Answer, SegmentRequest
from tests.odise_rt.fake_bundle import colour_image
from tests.odise_rt.serve.conftest import LIMITS, WORDS, StubDispatcher, png, worker_settings

COLOURS = {"vocabulary_name": "colours"}


def post(client: Any, image: bytes | None = None, **fields: str) -> Any:
    return client.post("/v1/segment", files={"image": ("photo.png", image or png())}, data=fields)


def problem(response: Any, status: int, kind: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body: dict[str, Any] = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert error["type"] == kind
    assert error["status"] == status == STATUS[kind]
    assert error["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    assert "\n" not in error["message"]
    return dict(error)


@pytest.fixture(scope="module")
def expected(label_bundle: Path) -> Any:
    with Segmenter.load(label_bundle, device="cpu", threads=1, disk_cache=False) as segmenter:
        return segmenter.segment(colour_image(), WORDS)


# ---- right answers -------------------------------------------------------------------------------------------------


def test_json_holds_what_the_segmenter_finds(client: Any, expected: Any) -> None:
    response = post(client, **COLOURS)
    assert response.status_code == 200
    data = response.json()
    assert (data["height"], data["width"]) == expected.size
    assert [s["label"] for s in data["segments"]] == [s.label for s in expected.segments]
    for segment in data["segments"]:
        np.testing.assert_array_equal(decode(segment["rle"]), expected.mask(segment["id"]))
    assert data["facts"]["bundle"] == "fake-label"


def test_words_and_names_give_the_same(client: Any) -> None:
    by_words, by_name = post(client, vocabulary=WORDS).json(), post(client, **COLOURS).json()
    assert by_words["segments"] == by_name["segments"]
    as_json = post(client, vocabulary=json.dumps({"things": ["red", "green", "blue", "white"]})).json()
    assert as_json["segments"] == by_name["segments"]


def test_raw_body_with_the_fields_in_the_query(client: Any) -> None:
    form = post(client, **COLOURS).json()
    for kind in ("image/png", "application/octet-stream", "image/jpeg; charset=x"):
        response = client.post("/v1/segment", params=COLOURS, content=png(), headers={"Content-Type": kind})
        assert response.status_code == 200, response.text
        assert response.json()["segments"] == form["segments"]


def test_png_is_the_segment_map_with_its_segments_inside(client: Any, expected: Any) -> None:
    response = post(client, format="png", **COLOURS)
    assert response.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(response.content)) as picture:
        rgb = np.asarray(picture).astype(np.int64)
        text = json.loads(picture.text["odise_rt"])  # type: ignore[attr-defined]
    np.testing.assert_array_equal(rgb @ [1, 256, 65536], expected.segment_map)
    assert [s["label"] for s in text["segments"]] == [s.label for s in expected.segments]


def test_overlay_is_a_picture(client: Any) -> None:
    response = post(client, format="overlay", **COLOURS)
    with Image.open(io.BytesIO(response.content)) as picture:
        assert picture.width > 96
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10


def test_coco_is_a_whole_file(client: Any, expected: Any) -> None:
    data = post(client, format="coco", **COLOURS).json()
    assert [c["name"] for c in data["categories"]] == ["red", "green", "blue", "white"]
    assert len(data["annotations"][0]["segments_info"]) == len(expected.segments)
    with Image.open(io.BytesIO(base64.b64decode(data["panoptic_png_base64"]))) as picture:
        np.testing.assert_array_equal(np.asarray(picture)[:, :, 0], expected.segment_map)


def test_options_reach_the_segmenter(client: Any) -> None:
    data = post(client, overlap_threshold="0.25", short_edge="32", outputs="instance", masks="none", **COLOURS).json()
    assert data["facts"]["options"]["overlap_threshold"] == 0.25
    assert data["facts"]["network_size"] == [32, 48]
    assert {i["label"] for i in data["instances"]} == {"red", "green", "blue", "white"}


@pytest.mark.parametrize("masks", ["rle", "none"])
def test_every_output_is_in_the_answer_with_or_without_masks(client: Any, masks: str) -> None:
    data = post(client, outputs="instance,semantic", masks=masks, **COLOURS).json()
    for key in ("segments", "instances", "semantic"):
        assert {entry["label"] for entry in data[key]} == {"red", "green", "blue", "white"}
        assert all(("rle" in entry) == (masks == "rle") for entry in data[key])


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "png", "masks": "none"},
        {"format": "coco", "outputs": "instance"},
        {"format": "overlay", "explain": "5"},
        {"instances_per_image": "5"},
        {"outputs": "semantic", "instances_per_image": "5"},
    ],
)
def test_fields_that_would_change_nothing(client: Any, fields: dict[str, str]) -> None:
    error = problem(post(client, **COLOURS, **fields), 422, "bad_options")
    assert "leave" in error["message"]


def test_candidates_and_unknown_on_request(client: Any) -> None:
    plain = post(client, **COLOURS).json()
    assert "candidates" not in plain["segments"][0]
    explained = post(client, explain="3", **COLOURS).json()
    assert [len(s["candidates"]) for s in explained["segments"]] == [3] * len(explained["segments"])
    assert all(s["candidates"][0]["label"] == s["label"] for s in explained["segments"])
    unsure = post(client, vocabulary="car; sky", unknown="0.99").json()
    assert {s["label"] for s in unsure["segments"]} <= {"unknown"}


# ---- the client's mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"not an image", b"\x89PNG\r\n\x1a\n and no more", png()[:150], b"\x00" * 100])
def test_broken_images(client: Any, content: bytes) -> None:
    assert not problem(post(client, content, **COLOURS), 400, "bad_image")["retryable"]


def test_too_many_pixels(client: Any) -> None:
    error = problem(post(client, png(np.zeros((200, 200, 3), np.uint8)), **COLOURS), 413, "image_too_large")
    assert "200 x 200" in error["message"]


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1)])
def test_decompression_bombs_are_refused_on_their_header(client: Any, width: int, height: int) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20), 9)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    started = time.monotonic()
    problem(post(client, bomb, **COLOURS), 413, "image_too_large")
    assert time.monotonic() - started < 5


def test_too_many_bytes_by_declaration_and_in_fact(client: Any) -> None:
    problem(post(client, b"x" * 300_000, **COLOURS), 413, "request_too_large")

    def pieces() -> Any:  # chunked: no Content-Length
        for _ in range(30):
            yield b"x" * 10_000

    headers = {"Content-Type": "image/png"}
    problem(client.post("/v1/segment", params=COLOURS, content=pieces(), headers=headers), 413, "request_too_large")


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({}, "bad_vocabulary", "one vocabulary"),
        ({"vocabulary": WORDS, "vocabulary_name": "colours"}, "bad_vocabulary", "one vocabulary"),
        ({"vocabulary": " ; "}, "bad_vocabulary", "empty"),
        ({"vocabulary": "thing:"}, "bad_vocabulary", "followed by no word"),
        ({"vocabulary": "{broken"}, "bad_vocabulary", "JSON"),
        ({"vocabulary": "[" * 100_000}, "bad_vocabulary", ""),
        ({"vocabulary": "; ".join(f"w{i}" for i in range(11))}, "bad_vocabulary", "11 words"),
        ({"vocabulary": "x" * 2000}, "bad_vocabulary", "2000 characters"),
        ({"vocabulary_name": "nothing"}, "unknown_vocabulary", "colours"),
        ({"vocabulary_name": "../../etc/passwd"}, "unknown_vocabulary", "colours"),
        (COLOURS | {"overlap_threshold": "2"}, "bad_options", "in [0, 1]"),
        (COLOURS | {"overlap_threshold": "nan"}, "bad_options", "in [0, 1]"),
        (COLOURS | {"overlap_threshold": "high"}, "bad_options", "expected a number"),
        (COLOURS | {"overlap_threshold": "0_1"}, "bad_options", "expected a number"),
        (COLOURS | {"overlap_threshold": "\u0661"}, "bad_options", "expected a number"),
        (COLOURS | {"short_edge": "1e9"}, "bad_options", "whole number"),
        (COLOURS | {"short_edge": "-5"}, "bad_options", "at least 1"),
        (COLOURS | {"short_edge": "--5"}, "bad_options", "expected a whole number"),
        (COLOURS | {"short_edge": "65"}, "bad_options", "at most 64"),
        (COLOURS | {"long_edge": "9999999999999"}, "bad_options", "whole number"),
        (COLOURS | {"long_edge": "161"}, "bad_options", "at most 160"),
        (COLOURS | {"outputs": "instance", "instances_per_image": "99999999999"}, "bad_options", "at most 100"),
        (COLOURS | {"explain": "101"}, "bad_options", "from 0 to 100"),
        (COLOURS | {"unknown": "1.5"}, "bad_options", "in [0, 1]"),
        (COLOURS | {"format": "gif"}, "bad_options", "json, png"),
        (COLOURS | {"outputs": "panoptic,depth"}, "bad_options", "depth"),
        (COLOURS | {"overlap_treshold": "0.1"}, "bad_options", "overlap_threshold"),
    ],
)
def test_fields_that_cannot_be_used(client: Any, fields: dict[str, str], kind: str, words: str) -> None:
    error = problem(post(client, **fields), 422, kind)
    assert words in error["message"]
    assert len(error["message"]) < 600


def test_a_vocabulary_never_names_a_file(client: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("red\n")
    for path in (secret, tmp_path / "absent.txt"):  # the answer does not tell which is there
        error = problem(post(client, vocabulary=str(path)), 422, "bad_vocabulary")
        assert f"{str(path)!r} would be a word" in error["message"]
    response = post(client, vocabulary=f"thing: {secret}")
    assert response.status_code == 200
    assert {s["label"] for s in response.json()["segments"]} <= {str(secret)}


def test_a_field_given_twice(client: Any) -> None:
    response = client.post(
        "/v1/segment", params=COLOURS, files={"image": ("a.png", png())}, data={"vocabulary_name": "colours"}
    )
    assert "more than once" in problem(response, 422, "bad_options")["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "name"),
    [
        (b"", "image/png", 400, "bad_request"),
        (b"{}", "application/json", 415, "unsupported_media_type"),
        (b"x", "", 415, "unsupported_media_type"),
        (b"--b\r\n", "multipart/form-data", 400, "bad_request"),
        (b"nonsense", "multipart/form-data; boundary=b", 400, "bad_request"),
        (b"--b\r\nContent-Disposition: form-data; name=image\r\n\r\nabc", "multipart/form-data; boundary=b", 400,
         "bad_request"),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--b--\r\n", "multipart/form-data; boundary=b", 400,
         "bad_request"),
        (b"--b\r\nContent-Disposition: form-data; name=vocabulary\r\n\r\nred\r\n--b--\r\n",
         "multipart/form-data; boundary=b", 400, "bad_request"),
        (b"--b\r\nContent-Disposition: form-data; name=vocabulary\r\n\r\n\xff\xfe\r\n--b--\r\n",
         "multipart/form-data; boundary=b", 400, "bad_request"),
        (b"--b\r\nContent-Disposition: form-data; name=x\r\n\r\n1\r\n" * 33 + b"--b--\r\n",
         "multipart/form-data; boundary=b", 400, "bad_request"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_upload(client: Any, content: bytes, kind: str, status: int, name: str) -> None:
    response = client.post("/v1/segment", params=COLOURS, content=content, headers={"Content-Type": kind})
    problem(response, status, name)


def test_unknown_paths_and_methods(client: Any) -> None:
    problem(client.get("/v2/segment"), 404, "not_found")
    wrong = client.get("/v1/segment")
    problem(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    problem(client.get("/docs/../secret"), 404, "not_found")
    problem(client.get("/docs/__init__.py"), 404, "not_found")
    problem(client.get("/v1/vocabularies/nothing"), 404, "not_found")


# ---- the server's troubles -----------------------------------------------------------------------------------------


def raising(exc: BaseException) -> StubDispatcher:
    async def segment(request: SegmentRequest) -> Answer:
        raise exc

    return StubDispatcher(segment)


def test_a_replica_that_dies_is_retryable(client_of: Callable[..., Any]) -> None:
    response = post(client_of(raising(RequestRefused("replica_died", "it died", 1.2))), **COLOURS)
    assert problem(response, 503, "replica_died")["retryable"]
    assert response.headers["retry-after"] == "2"


def test_unexpected_errors_tell_nothing(client_of: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        response = post(client_of(raising(RuntimeError("the secret of /etc/shadow"))), **COLOURS)
    error = problem(response, 500, "internal")
    assert "secret" not in response.text
    assert "the secret" in caplog.text  # the log has it
    assert "under this request's id" in error["message"]
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("odise_rt")]
    assert {error["request_id"]} == {line.split()[0] for line in ours}
    assert f"{error['request_id']} POST /v1/segment 500" in caplog.text


def test_every_failure_is_in_the_log_under_its_request(
    client_of: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    client = client_of(raising(RequestRefused("replica_died", "it died")))
    identity = problem(post(client, **COLOURS), 503, "replica_died")["request_id"]
    client.context.stopping = True
    problem(client.get("/readyz"), 503, "shutting_down")  # a probe's answer is no failure
    warned = [r.getMessage() for r in caplog.records if r.name.startswith("odise_rt") and r.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert warned[0].startswith(f"{identity} POST /v1/segment 503 ")


@pytest.mark.parametrize(
    ("exc", "kind"),
    [
        (OutOfMemoryError("cuda"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (BackendError("x"), "engine_failed"),
    ],
)
def test_failures_of_the_engine(client_of: Callable[..., Any], exc: Exception, kind: str) -> None:
    problem(post(client_of(raising(exc)), **COLOURS), 500, kind)


def test_not_ready(client_of: Callable[..., Any]) -> None:
    dispatcher = raising(AssertionError("must not be asked"))
    client = client_of(dispatcher)
    dispatcher.present = State(False, 0, "the model is being loaded")
    assert client.get("/healthz").status_code == 200
    for response in (client.get("/readyz"), post(client, **COLOURS)):
        assert problem(response, 503, "not_ready")["retryable"]
        assert "retry-after" in response.headers


def test_shutting_down(client_of: Callable[..., Any]) -> None:
    async def segment(request: SegmentRequest) -> Answer:
        return Answer(b"{}")

    client = client_of(StubDispatcher(segment))
    client.context.stopping = True
    problem(client.get("/readyz"), 503, "shutting_down")
    assert client.get("/healthz").status_code == 200
    assert post(client, **COLOURS).status_code == 200, "a load balancer has yet to turn away"
    client.context.admission.draining = True
    problem(post(client, **COLOURS), 503, "shutting_down")


def test_a_deadline_gives_the_request_up(client_of: Callable[..., Any]) -> None:
    cancelled = threading.Event()

    async def segment(request: SegmentRequest) -> Answer:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return Answer()

    client = client_of(StubDispatcher(segment), limits=Limits(timeout=0.2))
    assert problem(post(client, **COLOURS), 504, "timeout")["retryable"]
    assert cancelled.wait(5)
    assert client.context.admission.inside == 0


def test_a_full_queue_refuses_with_the_time_to_wait(client_of: Callable[..., Any]) -> None:
    release = threading.Event()

    async def segment(request: SegmentRequest) -> Answer:
        while not release.is_set():
            await asyncio.sleep(0.01)
        return Answer(b"{}")

    client = client_of(StubDispatcher(segment), limits=Limits(queue=2))
    with client:
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(post(client, **COLOURS).status_code)) for _ in "abc"]
        for thread in threads:
            thread.start()
        for _ in range(1000):
            if client.context.admission.inside == 3:
                break
            time.sleep(0.01)
        response = post(client, **COLOURS)
        error = problem(response, 429, "overloaded")
        assert error["retryable"]
        assert int(response.headers["retry-after"]) >= 1
        release.set()
        for thread in threads:
            thread.join(20)
    assert statuses == [200, 200, 200]
    assert client.context.admission.inside == 0


def test_a_request_keeps_its_place_until_its_answer_was_read(testclient: Any, label_bundle: Path) -> None:
    """uvicorn's ``send`` waits for the reader of the piece before; what it was given at once it buffers at once."""
    content = bytes(range(256)) * 4096

    async def segment(request: SegmentRequest) -> Answer:
        return Answer(content)

    context = Context(Bundle.open(label_bundle), StubDispatcher(segment), LIMITS)
    app = create_app(context)
    inside: list[int] = []
    got: list[bytes] = []

    async def send(message: Any) -> None:
        inside.append(context.admission.inside)
        got.append(message.get("body", b""))

    uploads = [png()]

    async def receive() -> dict[str, Any]:
        if not uploads:
            await asyncio.sleep(60)  # the client stays
        return {"type": "http.request", "body": uploads.pop(), "more_body": False}

    asyncio.run(app(scope_of_an_upload(), receive, send))
    assert b"".join(got) == content
    assert max(map(len, got)) <= 256 << 10
    assert got[-1] == b"", "it must wait for the reader of the last piece"
    assert set(inside) == {1}
    assert context.admission.inside == 0


def test_answers_of_workers_carry_problems(client_of: Callable[..., Any]) -> None:
    async def segment(request: SegmentRequest) -> Answer:
        return Answer(problem=Problem("bad_image", "it is broken"))

    problem(post(client_of(StubDispatcher(segment)), **COLOURS), 400, "bad_image")


# ---- clients that leave --------------------------------------------------------------------------------------------


def scope_of_an_upload() -> dict[str, Any]:
    headers = [(b"content-type", b"image/png"), (b"content-length", b"1000"), (b"host", b"localhost")]
    return {"type": "http", "method": "POST", "path": "/v1/segment", "query_string": b"vocabulary_name=colours",
            "headers": headers, "root_path": ""}  # fmt: skip


def leaves_after(pieces: list[bytes], dispatcher: Any, bundle: Path) -> tuple[Context, list[int]]:
    """Send a request of which these pieces arrive before the connection is gone; the context, and statuses sent."""
    context = Context(Bundle.open(bundle), dispatcher, LIMITS)
    sent: list[int] = []
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            sent.append(message["status"])

    asyncio.run(create_app(context)(scope_of_an_upload(), receive, send))
    return context, sent


def samples(context: Context, name: str) -> float:
    """The sum of a metric's samples."""
    lines = context.metrics.exposition()[0].decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " ")))


@pytest.mark.parametrize("pieces", [[], [b"a piece"], [b"a piece"] * 5])
def test_leaving_in_the_middle_of_an_upload_is_no_error(
    testclient: Any, label_bundle: Path, caplog: pytest.LogCaptureFixture, pieces: list[bytes]
) -> None:
    caplog.set_level(logging.INFO)
    context, sent = leaves_after(pieces, raising(AssertionError("must not be asked")), label_bundle)
    assert sent == [499]
    assert [r for r in caplog.records if r.levelno > logging.INFO or r.exc_info] == []
    assert 'odise_requests_total{route="/v1/segment",status="499"} 1.0' in context.metrics.exposition()[0].decode()
    assert samples(context, "odise_problems_total") == 0
    assert samples(context, "odise_request_seconds_count") == 0, (
        "nothing was answered, so there is no time to an answer"
    )
    assert context.admission.inside == 0


@pytest.mark.parametrize(("wait", "answer"), [(60.0, Answer()), (0.0, Answer(problem=Problem("bad_image", "broken")))])
def test_only_what_was_segmented_counts_for_the_wait(
    testclient: Any, label_bundle: Path, wait: float, answer: Answer
) -> None:
    async def segment(request: SegmentRequest) -> Answer:
        await asyncio.sleep(wait)
        return answer

    async def leave() -> dict[str, Any]:
        await asyncio.sleep(0.01 if wait else 60)
        return {"type": "http.disconnect"}

    context = Context(Bundle.open(label_bundle), StubDispatcher(segment), LIMITS)
    before = context.admission._seconds
    asyncio.run(_dispatch(context, SegmentRequest(b"x", {}), leave))
    assert context.admission._seconds == before
    wait, answer = 0.0, Answer(b"{}")
    asyncio.run(_dispatch(context, SegmentRequest(b"x", {}), leave))
    assert context.admission._seconds < before


# ---- around it -----------------------------------------------------------------------------------------------------


def test_a_token_guards_the_api_but_not_the_probes(client_of: Callable[..., Any]) -> None:
    async def segment(request: SegmentRequest) -> Answer:
        return Answer(b"{}")

    client = client_of(StubDispatcher(segment), token="correct horse")
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic correct horse"}):
        response = client.get("/v1/bundle", headers=header)
        problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/bundle", headers={"Authorization": "Bearer correct horse"}).status_code == 200
    assert all(client.get(path).status_code == 200 for path in ("/healthz", "/readyz", "/metrics"))
    counted = client.get("/metrics").text
    assert 'odise_requests_total{route="/v1/bundle",status="401"} 3.0' in counted
    client.get("/v1/vocabularies/of-a-scanner")
    client.get("/v1/nothing")
    counted = client.get("/metrics").text
    assert 'odise_requests_total{route="/v1/vocabularies/{name}",status="401"} 1.0' in counted
    assert 'odise_requests_total{route="other",status="401"} 1.0' in counted
    assert "scanner" not in counted


def test_probes_may_ask_for_the_head_alone(client_of: Callable[..., Any]) -> None:
    client = client_of(raising(AssertionError()))
    for path in ("/healthz", "/readyz"):
        assert client.head(path).status_code == client.get(path).status_code == 200
        assert client.post(path).status_code == 405
    client.context.stopping = True
    assert client.head("/readyz").status_code == 503


def test_the_gauge_says_what_readyz_says(client_of: Callable[..., Any]) -> None:
    client = client_of(raising(AssertionError()))
    assert "odise_ready 1.0" in client.get("/metrics").text
    client.context.stopping = True
    assert client.get("/readyz").status_code == 503
    assert "odise_ready 0.0" in client.get("/metrics").text


def test_other_names_of_the_host_are_not_answered(client_of: Callable[..., Any]) -> None:
    client = client_of(raising(AssertionError()), hosts=("localhost", "127.0.0.1"))
    assert client.get("/healthz", headers={"Host": "localhost:8000"}).status_code == 200
    problem(client.get("/healthz", headers={"Host": "evil.example"}), 421, "wrong_host")


def test_request_ids_are_kept_when_they_are_harmless(client: Any) -> None:
    assert client.get("/healthz", headers={"X-Request-Id": "job-7.a_b"}).headers["x-request-id"] == "job-7.a_b"
    for bad in ("x" * 65, "a b", "a\tb", ""):
        assert client.get("/healthz", headers={"X-Request-Id": bad}).headers["x-request-id"] != bad


def test_vocabularies_and_bundle(client: Any) -> None:
    assert client.get("/v1/vocabularies").json() == {"colours": {"classes": 4, "words": 4, "things": 4}}
    listed = client.get("/v1/vocabularies/colours").json()
    assert Vocabulary.from_dict(listed) == Vocabulary.parse(WORDS)
    bundle = client.get("/v1/bundle").json()
    assert bundle["name"] == "fake-label"
    assert bundle["limits"]["max_pixels"] == 20_000
    assert bundle["limits"]["max_short_edge"] == 64


def test_metrics_count_requests_steps_and_problems(client: Any) -> None:
    def value(name: str) -> float:
        for line in client.get("/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        return 0.0

    ok, bad = 'odise_requests_total{route="/v1/segment",status="200"}', 'odise_problems_total{type="bad_image"}'
    unet = 'odise_step_seconds_count{step="unet_tap"}'
    before = value(ok), value(bad), value(unet), value("odise_windows_total")
    post(client, **COLOURS)
    post(client, b"broken", **COLOURS)
    assert value(ok) == before[0] + 1
    assert value(bad) == before[1] + 1
    assert value(unet) == before[2] + 1
    assert value("odise_windows_total") == before[3] + 2
    assert value("odise_requests_inside") == 0
    client.get("/some/path/of/a/scanner")
    assert "scanner" not in client.get("/metrics").text  # label values are not the client's


def test_openapi_describes_every_field_and_problem(client: Any) -> None:
    schema = client.get("/openapi.json").json()
    operation = schema["paths"]["/v1/segment"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {"image", *FIELDS}
    assert {p["name"] for p in operation["parameters"]} == set(FIELDS)
    assert {int(code) for code in operation["responses"]} == {200, *STATUS.values()} - {404, 405}
    assert set(schema["components"]["schemas"]["Error"]["properties"]["error"]["properties"]["type"]["enum"]) == set(
        STATUS
    )
    for path in ("/healthz", "/readyz", "/metrics", "/v1/vocabularies", "/v1/bundle"):
        assert path in schema["paths"]


def test_documentation_needs_no_other_host(client: Any) -> None:
    page = client.get("/docs").text
    assert "http://" not in page
    assert "https://" not in page
    if "swagger-ui-bundle.js" in page:
        assert client.get("/docs/swagger-ui-bundle.js").status_code == 200
        assert client.get("/docs/swagger-ui.css").headers["content-type"].startswith("text/css")


def test_only_what_never_changes_may_be_kept_by_browsers(client: Any) -> None:
    for path in ("/docs", "/openapi.json", "/healthz", "/v1/bundle", "/docs/nothing.js"):
        assert client.get(path).headers.get_list("cache-control") == ["no-store"], path
    pytest.importorskip("fastapi_swagger", reason="needs the extra 'serve'")
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):  # 1.5 MB, the same at every visit
        headers = client.get(f"/docs/{name}").headers
        assert headers.get_list("cache-control") == ["public, max-age=86400"]
        assert headers["etag"]
        assert headers["x-content-type-options"] == "nosniff"


def test_uploads_never_touch_the_disk(client_of: Callable[..., Any], label_bundle: Path) -> None:
    """Nothing is opened for writing while a form of 2 MB is served: frameworks spool from 1 MB on."""
    limits = Limits(max_request_bytes=4 << 20)
    dispatcher = LocalDispatcher(worker_settings(label_bundle, limits=limits))
    asyncio.run(dispatcher.start())
    client = client_of(dispatcher, limits=limits)
    opened: list[Any] = []
    watching = True

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(args[1], str) and any(c in args[1] for c in "wax+"):
            opened.append(args)
        elif watching and event.startswith("tempfile."):
            opened.append((event, args))

    sys.addaudithook(audit)
    big = png(np.random.default_rng(0).integers(0, 255, (800, 800, 3)).astype(np.uint8))
    assert len(big) > 1_500_000
    try:
        for form in ("json", "png"):
            assert post(client, big, vocabulary="red; a word never seen before " + form, format=form).status_code == 200
    finally:
        watching = False
        asyncio.run(dispatcher.stop())
    assert opened == []
