"""The web server around the page: what it takes, what it refuses, and that nothing reaches a disk or another host."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason="Requires: the extra demo")

from starlette.testclient import TestClient

from odise_rt import Segmenter
from odise_rt.demo import page, routes, server
from odise_rt.demo.examples import find_examples
from odise_rt.demo.pictures import PictureStore
from odise_rt.demo.session import Controls, Words, Workbench

Encode = Callable[..., bytes]
HOME = "http://127.0.0.1:7860"
HOSTS = ("localhost", "127.0.0.1", "demo.example")
SETTINGS: dict[str, Any] = {
    "words": "red; green; blue; stuff: white",
    "lists": [],
    "compare": False,
    "other_words": "",
    "other_lists": [],
    "mode": "panoptic",
    "object_mask_threshold": 0.0,
    "overlap_threshold": 0.8,
    "clip_weight_seen": 0.3,
    "clip_weight_unseen": 0.7,
    "unknown": 0.0,
    "least_score": 0.3,
}


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
    for side, name in (("?side=B", "Stra_e _.B.odise.json"), ("?side=../x", "Stra_e _.odise.json")):
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
    monkeypatch.setattr(routes, "MAX_UPLOAD_BYTES", 1 << 20)
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


# ---- masks and names -------------------------------------------------------------------------------------------------

NOTHING = {"places": [], "words": []}


def masks(client: TestClient, token: str, visitor: str = "visitor") -> Any:
    return client.post("/odise/masks", json={"visitor": visitor, "token": token})


def name(client: TestClient, token: str, by_hand: Any = (NOTHING, NOTHING), **settings: Any) -> Any:
    asked = {"visitor": "visitor", "token": token, "settings": SETTINGS | settings, "by_hand": by_hand}
    return client.post("/odise/names", json=asked)


def labels(answer: Any, index: int = 0) -> set[str]:
    assert answer.status_code == 200, answer.text
    return {region["label"] for region in answer.json()["views"][index]["regions"]}


def test_masks_then_names(client: TestClient, bench: Workbench, colours: np.ndarray, encode: Encode) -> None:
    token = send(client, encode(colours)).json()["token"]
    first = masks(client, token).json()
    assert first == {"picture": {"token": token, "name": "colours.png", "height": 64, "width": 96}, "ran": True}
    assert not masks(client, token).json()["ran"]
    assert bench.store.get(token).owner == "visitor"
    assert labels(name(client, token)) == {"red", "green", "blue", "white"}
    again = name(
        client, token, words="crimson", lists=["coco"], compare=True, other_words="sky", mode="semantic", least_score=1
    )
    assert [view["classes"] for view in again.json()["views"]] == [134, 1]
    assert bench.network_runs == 1


def test_examples(client: TestClient, bench: Workbench) -> None:
    answer = client.post("/odise/examples/0")
    assert answer.status_code == 201
    assert bench.store.get(answer.json()["token"]).name == bench.examples[0].path.name
    assert client.post("/odise/examples/99").status_code == 422
    assert client.post("/odise/examples/zero").status_code == 404


def test_corrections_come_with_the_question(
    client: TestClient, bench: Workbench, colours: np.ndarray, encode: Encode
) -> None:
    token = send(client, encode(colours)).json()["token"]
    regions = {r["label"]: r for r in name(client, token).json()["views"][0]["regions"]}
    places = [[*regions["red"]["place"], ""], [*regions["green"]["place"], "fire engine"]]
    answer = name(client, token, [{"places": places, "words": ["fire engine"]}, NOTHING])
    assert labels(answer) == {"fire engine", "blue", "white"}
    outside = name(client, token, [NOTHING, {"places": [[0.5, 1.0, "red"]], "words": []}])
    assert (outside.status_code, outside.json()["error"][:30]) == (422, "The place of a corrected segme")


def test_forgotten_pictures_are_told_apart(
    client: TestClient, bench: Workbench, colours: np.ndarray, encode: Encode
) -> None:
    kept, removed, left = (send(client, encode(colours)).json()["token"] for _ in range(3))
    for token, visitor in ((kept, "another"), (left, "visitor")):
        assert masks(client, token, visitor).status_code == 200
    assert client.delete(f"/odise/pictures/{removed}").status_code == 204
    assert client.delete("/odise/pictures/nobody").status_code == 204
    assert client.post("/odise/leave", json={"visitor": "visitor"}).status_code == 204
    for token in (removed, left):
        for gone in (name(client, token), masks(client, token)):
            assert gone.status_code == 404, "so that the page sends it again"
            assert gone.json()["error"] == "This picture is no longer in the server's memory: drop it again"
    assert labels(name(client, kept)) == {"red", "green", "blue", "white"}


def test_errors_are_answered_in_words(
    client: TestClient, bench: Workbench, colours: np.ndarray, encode: Encode, caplog: Any, monkeypatch: Any
) -> None:
    token = send(client, encode(colours)).json()["token"]
    empty = name(client, token, words="")
    assert (empty.status_code, empty.json()["error"][:23]) == (422, "The vocabulary is empty")
    listed = name(client, token, words="coco; dog").json()["error"]
    assert "tick the list below the field" in listed
    assert "--vocab" not in listed
    assert "Vocabulary.load" not in listed
    monkeypatch.setattr(bench.segmenter, "find_masks", lambda *_: 1 / 0)
    bench.store.get(token).proposals = None
    failed = masks(client, token)
    assert failed.status_code == 500
    assert "unexpected error" in failed.json()["error"]
    assert "division" not in failed.json()["error"], "what is inside stays inside"
    assert "ZeroDivisionError" in caplog.text


def test_questions_that_nobody_asked(client: TestClient, bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [b"", b"[]", b"{}", b"[" * 100_000, b"\xff"]
    wrong += [b'{"visitor": 1, "token": "x"}', b'{"visitor": "a", "token": "x", "more": 1}']
    for content in wrong:
        answer = client.post("/odise/masks", content=content)
        assert answer.status_code == 422, content[:20]
        assert "reload the page" in answer.json()["error"]
    for settings in (
        {"mode": "all"},
        {"unknown": float("inf")},
        {"lists": [1]},
        {"words": None},
        {"overlap_threshold": 2},
    ):
        body = json.dumps({"visitor": "v", "token": "x", "settings": SETTINGS | settings, "by_hand": [NOTHING] * 2})
        assert client.post("/odise/names", content=body).status_code == 422, settings
    monkeypatch.setattr(routes, "MAX_QUESTION_BYTES", 1 << 10)
    assert client.post("/odise/masks", content=b" " * 2000).status_code == 413


def test_comparison_waits_for_words(client: TestClient, bench: Workbench, colours: np.ndarray, encode: Encode) -> None:
    token = send(client, encode(colours)).json()["token"]
    answer = name(client, token, compare=True, other_words=" \n")
    assert len(answer.json()["views"]) == 1
    answer = name(client, token, compare=True, other_lists=["coco"])
    assert [view["classes"] for view in answer.json()["views"]] == [4, 133]


def test_only_so_many_wait_and_nobody_works_for_those_who_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_WAITING", 2)

    class Visit:
        def __init__(self, gone: bool = False) -> None:
            self.gone = gone

        async def is_disconnected(self) -> bool:
            return self.gone

    async def tried() -> None:
        turns, begun, done = routes.Turns(1), [], asyncio.Event()

        async def work(number: int, gone: bool = False) -> None:
            async with turns.one(Visit(gone)):  # type: ignore[arg-type]
                begun.append(number)
                await done.wait()

        tasks = [asyncio.create_task(work(number, gone=number == 1)) for number in range(4)]
        await asyncio.sleep(0.01)
        assert begun == [0]
        done.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert begun == [0, 2]
        assert [getattr(result, "status", None) for result in results] == [None, 400, None, 503]
        await work(4)
        assert begun[-1] == 4, "the room is free again"

    asyncio.run(tried())


def test_page_has_all_its_parts(client: TestClient) -> None:
    config = client.get("/config").json()
    (stage,) = [c for c in config["components"] if c["props"].get("elem_id") == "stage"]
    script = stage["props"]["js_on_load"]
    for part in page.SCRIPTS:
        assert (page.ASSETS / part).read_text(encoding="utf-8") in script
    assert sorted(page.SCRIPTS) == sorted(path.name for path in page.ASSETS.glob("*.js"))
    assert [d for d in config["dependencies"] if d["backend_fn"]] == [], "Gradio reloads a page that loses one"
