"""The web server around the page: what it takes, what it refuses, and that nothing reaches a disk or another host."""

from __future__ import annotations

import asyncio
import re
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason="Requires: the extra demo")

from starlette.testclient import TestClient

from odise_rt import Segmenter
from odise_rt.demo import page, server
from odise_rt.demo.examples import find_examples
from odise_rt.demo.pictures import PictureStore
from odise_rt.demo.session import Controls, Words, Workbench

Encode = Callable[..., bytes]
HOME = "http://127.0.0.1:7860"
HOSTS = ("localhost", "127.0.0.1", "demo.example")
SETTINGS = ("red; green; blue; stuff: white", [], False, "", [], "panoptic", 0.0, 0.8, 0.3, 0.7, 0.0, 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where Gradio would write; no test may leave anything in it."""
    folder = tmp_path_factory.mktemp("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def served(label_bundle: Path, folder: Path) -> Iterator[tuple[TestClient, Workbench]]:
    """The application, which takes a second to make."""
    with Segmenter.load(label_bundle, device="cpu", threads=1, disk_cache=False) as segmenter:
        bench = Workbench(segmenter, examples=find_examples(None))
        with TestClient(server.create_app(bench, 7860, HOSTS), base_url=HOME) as client:
            yield client, bench


@pytest.fixture
def client(served: tuple[TestClient, Workbench]) -> TestClient:
    return served[0]


@pytest.fixture
def bench(served: tuple[TestClient, Workbench], monkeypatch: pytest.MonkeyPatch) -> Workbench:
    bench = served[1]
    monkeypatch.setattr(bench, "store", PictureStore())
    monkeypatch.setattr(bench, "network_runs", 0)
    return bench


def send(client: TestClient, data: bytes, name: str = "colours.png") -> Any:
    return client.post("/odise/pictures", content=data, headers={"X-Odise-Picture": urllib.parse.quote(name)})


def test_pictures_in_and_results_out(
    client: TestClient, bench: Workbench, colours: np.ndarray, encode: Encode, folder: Path
) -> None:
    answer = send(client, encode(colours), "Straße 猫.png")
    assert answer.status_code == 201
    token = answer.json()["token"]
    picture = bench.store.get(token)
    assert picture.name == "Straße 猫.png"
    np.testing.assert_array_equal(picture.pixels, colours)
    shown = client.get(f"/odise/pictures/{token}/shown.jpg")
    assert (shown.status_code, shown.headers["content-type"]) == (200, "image/jpeg")
    assert shown.content.startswith(b"\xff\xd8")
    key = bench.show(picture, Controls(Words("red; blue")))["views"][0]["key"]
    png = client.get(f"/odise/pictures/{token}/{key}/overlay")
    assert (png.status_code, png.headers["content-type"]) == (200, "image/png")
    assert png.content.startswith(b"\x89PNG")
    assert png.headers["content-disposition"] == (
        "attachment; filename=\"Stra_e _.overlay.png\"; filename*=UTF-8''Stra%C3%9Fe%20%E7%8C%AB.overlay.png"
    )
    assert png.headers["cache-control"] == "private, no-store"
    result = client.get(f"/odise/pictures/{token}/{key}/json")
    assert {s["label"] for s in result.json()["segments"]} == {"red", "blue"}
    for side, name in (("?side=B", "Stra_e _.B.json"), ("?side=../x", "Stra_e _.json")):
        named = client.get(f"/odise/pictures/{token}/{key}/json{side}").headers["content-disposition"]
        assert f'filename="{name}"' in named
    assert client.get(f"/odise/pictures/{token}/{key}/gif").status_code == 404
    assert list(folder.iterdir()) == [], "nothing was written"


def test_files_that_are_no_pictures(client: TestClient, bench: Workbench, colours: np.ndarray, encode: Encode) -> None:
    for data, name, message in (
        (b"hello", "notes.txt", "notes.txt is not an image"),
        (encode(colours)[:-60], "cut.png", "cut.png is truncated"),
        (b"", "none.png", "none.png is empty"),
    ):
        answer = send(client, data, name)
        assert answer.status_code == 422
        assert answer.json()["error"].startswith(message)
    assert len(bench.store) == 0


def test_large_uploads_are_cut_off(client: TestClient, bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_UPLOAD_BYTES", 1 << 20)
    pulled = []

    def endless() -> Iterator[bytes]:
        for number in range(64):
            pulled.append(number)
            yield bytes(1 << 18)

    answer = client.post("/odise/pictures", content=endless(), headers={"X-Odise-Picture": "a.png"})
    assert answer.status_code == 413
    assert "larger than 1 MiB" in answer.json()["error"]
    assert len(bench.store) == 0


def test_leaving_in_the_middle_of_an_upload_is_no_error(client: TestClient, bench: Workbench) -> None:
    """An exception out of the application would be a traceback in the server's log."""
    messages = [{"type": "http.request", "body": b"a piece", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/odise/pictures", "query_string": b"", "root_path": "",
             "headers": [(b"host", b"localhost"), (b"x-odise-picture", b"a.png")]}  # fmt: skip
    asyncio.run(client.app(scope, receive, send))  # type: ignore[arg-type]
    assert [m["status"] for m in sent if m["type"] == "http.response.start"] == [400]
    assert messages == []
    assert len(bench.store) == 0


def test_large_pixels_are_refused(
    client: TestClient, bench: Workbench, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "max_pixels", 100)
    answer = send(client, encode(np.zeros((20, 20, 3), np.uint8)), "large.png")
    assert answer.status_code == 422
    assert "20 x 20" in answer.json()["error"]


def test_other_sites_are_refused(client: TestClient, colours: np.ndarray, encode: Encode) -> None:
    elsewhere = "https://elsewhere.example"
    asking = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-odise-picture",
    }
    named = {"X-Odise-Picture": "a.png"}
    for origin in (elsewhere, "null", "http://127.0.0.1:7861", "http://127.0.0.1.elsewhere.example:7860"):
        for path in ("/odise/pictures", "/gradio_api/queue/join"):
            asked = client.options(path, headers={"Origin": origin, **asking})
            assert asked.status_code == 403
            assert "access-control-allow-origin" not in asked.headers
            assert client.post(path, content=encode(colours), headers={"Origin": origin, **named}).status_code == 403
    forged = {"Origin": elsewhere, "X-Forwarded-Host": "another.example", **named}
    assert client.post("/odise/pictures", content=encode(colours), headers=forged).status_code == 403


def test_other_names_of_the_host_are_not_answered(client: TestClient, colours: np.ndarray, encode: Encode) -> None:
    """A page of elsewhere whose name leads here is of one origin with us: Origin and X-Forwarded-Host prove nothing."""
    rebound = {"Host": "elsewhere.example:7860", "Origin": "http://elsewhere.example:7860"}
    for headers in (rebound, rebound | {"X-Forwarded-Host": "127.0.0.1:7860"}):
        for path in ("/", "/config", "/odise/pictures/x/shown.jpg"):
            answer = client.get(path, headers=headers)
            assert answer.status_code == 421
            assert "--allow-host" in answer.json()["error"]
        named = {"X-Odise-Picture": "a.png", **headers}
        assert client.post("/odise/pictures", content=encode(colours), headers=named).status_code == 421


def test_own_page_and_proxies_are_answered(client: TestClient, colours: np.ndarray, encode: Encode) -> None:
    for headers in (
        {},
        {"Origin": HOME},
        {"Origin": "https://demo.example", "X-Forwarded-Host": "demo.example"},
        {"Origin": "https://demo.example", "Host": "demo.example"},
    ):
        sent = client.post("/odise/pictures", content=encode(colours), headers={"X-Odise-Picture": "a.png", **headers})
        assert sent.status_code == 201, headers
    assert client.post("/odise/pictures", content=encode(colours)).status_code == 400, "a name is needed"


def test_unknown_tokens_and_results(client: TestClient, bench: Workbench, colours: np.ndarray, encode: Encode) -> None:
    token = send(client, encode(colours)).json()["token"]
    for path in ("nobody/shown.jpg", f"{token}/0/overlay", f"{token}/0/json", "nobody/0/json"):
        answer = client.get(f"/odise/pictures/{path}")
        assert answer.status_code == 404
        assert "no longer in the server's memory" in answer.json()["error"]


@pytest.mark.parametrize(
    "path",
    ["upload", "upload?upload_id=1", "file=/etc/passwd", "proxy=http://127.0.0.1/", "process_recording", "stream/a"],
)
def test_gradio_s_ways_to_the_disk_are_shut(client: TestClient, folder: Path, path: str) -> None:
    for prefix in ("/gradio_api/", "/"):
        files = {"files": ("a.png", b"x", "image/png")}
        assert client.post(f"{prefix}{path}", files=files).status_code == 403
        assert client.get(f"{prefix}{path}").status_code == 403
    assert list(folder.iterdir()) == []


def test_every_answer_keeps_the_browser_at_home(client: TestClient) -> None:
    for path in ("/", "/config", "/odise/pictures/x/shown.jpg", "/gradio_api/upload", "/nothing"):
        headers = client.get(path).headers
        assert headers["content-security-policy"] == server.CONTENT_SECURITY_POLICY, path
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_page_names_no_other_host_to_load_from(client: TestClient) -> None:
    html = client.get("/").text
    loaded = re.findall(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']([^"']+)|<link[^>]*\shref=["']([^"']+)""", html)
    assert loaded
    assert [a or b for a, b in loaded if (a or b).startswith(("http", "//"))] == []
    assert '"analytics_enabled":false' in html.replace(" ", "")
    assert "fonts.googleapis" not in html
    assert "fonts.googleapis" not in client.get("/theme.css").text


def test_page_offers_no_api(client: TestClient) -> None:
    info = client.get("/gradio_api/info").json()
    assert info["named_endpoints"] == {}
    assert info["unnamed_endpoints"] == {}


# ---- what the events of the page do ----------------------------------------------------------------------------------


def event(**data: Any) -> Any:
    return SimpleNamespace(_data=data)


VISITOR: Any = SimpleNamespace(session_hash="visitor")


def find(bench: Workbench, **data: Any) -> Any:
    return page._on_find(bench)(event(**data), VISITOR).props["found"]


def name(bench: Workbench, token: str, *settings: Any, **data: Any) -> tuple[Any, Any]:
    """What the page is told, and what its field for words gets."""
    return page._on_name(bench)(event(token=token, **data), VISITOR, *settings)


@pytest.mark.parametrize("words", ["", page.STARTING_WORDS])
def test_example_brings_its_words(bench: Workbench, words: str) -> None:
    token = find(bench, example=0)["token"]
    assert bench.store.get(token).owner == "visitor"
    state, brought = name(bench, token, words, *SETTINGS[1:], example=0)
    assert brought == bench.examples[0].words
    assert state["picture"]["name"] == bench.examples[0].path.name
    assert state["views"][0]["classes"] == len(brought.splitlines())


def test_example_leaves_words_of_the_visitor(bench: Workbench) -> None:
    state, brought = name(bench, find(bench, example=0)["token"], *SETTINGS, example=0)
    assert state["views"][0]["classes"] == 4
    assert brought == {"__type__": "update"}


def test_masks_then_names(bench: Workbench, colours: np.ndarray, encode: Encode) -> None:
    token = bench.add(encode(colours), "a.png").token
    assert find(bench, token=token)["ran"]
    assert not find(bench, token=token)["ran"]
    state, _ = name(bench, token, *SETTINGS)
    assert {r["label"] for r in state["views"][0]["regions"]} == {"red", "green", "blue", "white"}
    again, _ = name(bench, token, "crimson", ["coco"], True, "sky", [], "semantic", *SETTINGS[6:])
    assert [v["classes"] for v in again["views"]] == [134, 1]
    assert bench.network_runs == 1


def test_forgotten_picture_is_told(bench: Workbench, colours: np.ndarray, encode: Encode) -> None:
    token = bench.add(encode(colours), "a.png").token
    find(bench, token=token)
    page._on_unload(bench)(VISITOR)
    gone, _ = name(bench, token, *SETTINGS)
    assert gone["error"] == "This picture is no longer in the server's memory: drop it again"
    assert gone["gone"], "so that the page sends it again when it is chosen"


def test_events_answer_errors_in_words(
    bench: Workbench, colours: np.ndarray, encode: Encode, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    token = bench.add(encode(colours), "a.png").token
    state, _ = name(bench, token, "", *SETTINGS[1:])
    assert state["error"].startswith("The vocabulary is empty")
    assert "gone" not in state, "words alone mend it"
    for chosen in ({}, {"token": "x"}, {"example": 99}, {"example": "zero"}):
        assert "error" in find(bench, **chosen)
    monkeypatch.setattr(bench.segmenter, "find_masks", lambda *_: 1 / 0)
    state = find(bench, token=token)
    assert "unexpected error" in state["error"]
    assert "division" not in state["error"], "what is inside stays inside"
    assert "ZeroDivisionError" in caplog.text


def test_comparison_waits_for_words(bench: Workbench, colours: np.ndarray, encode: Encode) -> None:
    token = bench.add(encode(colours), "a.png").token
    state, _ = name(bench, token, "red", [], True, " \n", [], *SETTINGS[5:])
    assert len(state["views"]) == 1
    assert "error" not in state
    state, _ = name(bench, token, "red", [], True, "", ["coco"], *SETTINGS[5:])
    assert [view["classes"] for view in state["views"]] == [1, 133]


def test_same_answer_twice_still_differs(bench: Workbench, colours: np.ndarray, encode: Encode) -> None:
    token = bench.add(encode(colours), "a.png").token
    first, second = (name(bench, token, "", *SETTINGS[1:])[0] for _ in range(2))
    assert first["error"] == second["error"]
    assert first != second, "Gradio passes on what changed, and the page waits for an answer"
