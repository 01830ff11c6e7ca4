"""The real command with a real bundle in a real browser: what a visitor sees, and that the network runs when it must.

Needs Chromium (Debian: ``apt-get install chromium``), Playwright's Python package and Gradio. The bundle is the one
that ``ODISE_RT_TEST_BUNDLE`` names, else odise-tiny, exported once for all tests.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from odise_rt import Vocabulary, rle

ROOT = Path(__file__).parents[3]
CHECKPOINT = ROOT / "training" / "pretrained" / "odise-tiny"
PICTURE = CHECKPOINT / "example.jpg"
WORDS = (CHECKPOINT / "example_vocabulary.txt").read_text()
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PATIENCE = 60_000  # milliseconds; the machine may be busy

pytest.importorskip("gradio", reason="Requires: the extra demo")
sync_api = pytest.importorskip("playwright.sync_api", reason="Requires: pip install playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Requires: Chromium (apt-get install chromium)"),
]


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("ODISE_RT_TEST_BUNDLE")
    if given:
        return Path(given)
    pytest.importorskip("torch", reason="Requires: PyTorch, to export odise-tiny, or ODISE_RT_TEST_BUNDLE")
    out = tmp_path_factory.mktemp("exported") / "odise-tiny"
    command = [sys.executable, "-m", "export.build_engines", "--checkpoint", str(CHECKPOINT), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


class Demo:
    """A running ``odise-rt demo``."""

    def __init__(self, bundle: Path, folder: Path, *options: str) -> None:
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self._log = folder / "log"
        arguments = [
            "demo",
            "--bundle",
            str(bundle),
            "--port",
            "0",
            "--json",
            "-v",
            "--device",
            "cpu",
            "--threads",
            "1",
            *options,
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "odise_rt", *arguments], env=environment, stdout=subprocess.PIPE, stderr=log
            )
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], 120)[0]
        line = self.process.stdout.readline() if ready else b""
        assert line, self.log
        self.url: str = json.loads(line)["url"]

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def network_runs(self) -> int:
        """Counted where the network runs, not from what the page says."""
        return len(re.findall(r"^INFO odise_rt\.demo\.session: network run", self.log, re.MULTILINE))

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(how)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()
        return self.process.returncode


def visit(page: Any, url: str) -> None:
    """Open a demo, and wait until it can be used."""
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.wait_for_selector(".stage .drop")


@contextlib.contextmanager
def visited(browser: Any, demo: Demo) -> Iterator[tuple[Demo, Any]]:
    """A demo and a page on which it is open; both are closed at the end."""
    context = browser.new_context()
    try:
        page = context.new_page()
        visit(page, demo.url)
        yield demo, page
    finally:
        context.close()
        if demo.process.poll() is None:
            demo.stop()


@pytest.fixture(scope="module")
def demo(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    demo = Demo(tiny_bundle, tmp_path_factory.mktemp("demo"))
    yield demo
    files = [p for p in demo.temporary.rglob("*") if p.is_file()]
    assert demo.stop() == 0
    assert files == [], "no picture, and nothing else, was ever written"
    assert list(demo.temporary.iterdir()) == [], "the server cleans up after itself"
    assert "Traceback" not in demo.log
    assert "error" not in demo.log.lower()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, demo: Demo) -> Iterator[Callable[..., Any]]:
    """Opens the page as a new visitor; afterwards no script may have failed and no other host been asked."""
    contexts: list[Any] = []
    hosts: set[str] = set()
    failures: list[str] = []

    def note(message: Any) -> None:
        # A refused upload is an error to the browser's console as well.
        if message.type == "error" and "/odise/" not in message.location["url"]:
            failures.append(message.text)

    def opened(
        width: int = 1400, height: int = 950, dark: bool = False, phone: bool = False, forced: bool = False
    ) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            forced_colors="active" if forced else "none",
            has_touch=phone,
            is_mobile=phone,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: hosts.add(urllib.parse.urlsplit(request.url).netloc))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", note)
        visit(page, demo.url)
        return page

    opened.failures = failures  # type: ignore[attr-defined]
    yield opened
    for context in contexts:
        context.close()
    assert failures == []
    assert hosts - {""} == {urllib.parse.urlsplit(demo.url).netloc}


def serial(page: Any) -> str:
    """Changes with every answer that the stage shows."""
    return str(page.evaluate("document.querySelector('.stage').dataset.answer || ''"))


def after(page: Any, act: Callable[[], Any]) -> None:
    """Do something and wait until the stage shows the answer, and no later one is under way."""
    before = serial(page)
    act()
    page.wait_for_function("before => (document.querySelector('.stage').dataset.answer || '') !== before", arg=before)
    while True:
        before = serial(page)
        page.wait_for_timeout(300)
        if serial(page) == before and page.get_attribute(".stage", "aria-busy") == "false":
            return


def upload(page: Any, path: Path | dict[str, Any] = PICTURE) -> None:
    after(page, lambda: page.set_input_files(".stage .file", path))


def type_words(page: Any, words: str, field: str = "#words-a") -> None:
    page.fill(f"{field} textarea", words)
    after(page, lambda: page.click("#apply"))


def slide(page: Any, identifier: str, value: float) -> None:
    """Set a slider as the keyboard does: on its number."""
    page.fill(f"{identifier} input[type=number]", str(value))
    after(page, lambda: page.press(f"{identifier} input[type=number]", "Enter"))


def legend(page: Any, view: int = 0) -> list[tuple[str, str, str]]:
    """Label, score and share of each row, as they are read on the screen."""
    rows = page.locator(".stage .view").nth(view).locator(".legend .row")
    return [
        tuple(row.locator(f".{part}").inner_text() for part in ("name", "score", "share"))  # type: ignore[misc]
        for row in rows.all()
    ]


def names(page: Any, view: int = 0) -> set[str]:
    return {label for label, _, _ in legend(page, view)}


def test_upload_words_and_overlay(open_page: Callable[..., Any], demo: Demo) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    runs = demo.network_runs
    upload(page)
    assert demo.network_runs == runs + 1
    assert page.inner_text(".picture-name") == "example.jpg"
    assert page.inner_text(".picture-size") == "256 × 256"
    assert {"sky", "stone", "peacock"} <= names(page)
    assert names(page) <= set(Vocabulary.parse(WORDS).names)
    for _, score, share in legend(page):
        assert 0 < float(score) <= 1
        assert share.endswith("%")
    assert "network" in page.inner_text(".times")
    # What is on the screen: the picture under colours of the legend, where the labels stand.
    assert page.evaluate("document.querySelector('.photo').naturalWidth") == 256
    seen = page.evaluate(
        """() => Array.from(document.querySelectorAll('.view .label')).map(tag => {
            const canvas = document.querySelector('.fill');
            const x = Math.floor(parseFloat(tag.style.left) / 100 * canvas.width);
            const y = Math.floor(parseFloat(tag.style.top) / 100 * canvas.height);
            const [r, g, b, a] = canvas.getContext('2d').getImageData(x, y, 1, 1).data;
            return [tag.textContent, `rgb(${r}, ${g}, ${b})`, a, tag.style.background];
        })"""
    )
    assert {label for label, *_ in seen} == names(page)
    for _, colour, alpha, expected in seen:
        assert (colour, alpha) == (expected, 255)


def test_example_brings_its_words(open_page: Callable[..., Any]) -> None:
    page = open_page()
    after(page, lambda: page.click(".stage .example >> nth=0"))
    assert {"sky", "stone"} <= names(page)
    assert "peacock" in page.input_value("#words-a textarea")


def test_hover_and_click_show_label_score_and_best_names(open_page: Callable[..., Any]) -> None:
    page = open_page()
    upload(page)
    type_words(page, WORDS)
    for label, score, _ in [row for row in legend(page) if row[0] in ("sky", "stone", "peacock")]:
        tag = page.locator(".view .label", has_text=label).first
        box = tag.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_selector(".tip:visible")
        assert page.inner_text(".tip-label") == label
        assert page.inner_text(".tip-score") == score
        assert page.inner_text(".details-label") == label
        assert page.inner_text(".details-score") == f"score {score}"
        rows = page.locator(".names tr").all()[1:]
        assert len(rows) == 5
        assert rows[0].locator(".candidate").inner_text() == label
        scores = [[float(cell.inner_text()) for cell in row.locator("td").all()] for row in rows]
        assert all(len(row) == 3 and all(0 <= value <= 1 for value in row) for row in scores)
        assert [row[0] for row in scores] == sorted((row[0] for row in scores), reverse=True)
        assert f"{scores[0][0]:.2f}" == score
        assert page.locator(".legend .row.active .name").inner_text() == label
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(5, 5)
    assert page.inner_text(".details-label") == label, "a click keeps it"
    assert not page.is_visible(".tip")
    assert page.get_attribute(".legend .row[aria-selected=true]", "data-id")


def test_name_is_replaced_by_another_of_the_five(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    upload(page)
    rows = legend(page)
    page.locator(".legend .row", has_text="peacock").click()
    choices = page.locator(".choice").all_inner_texts()
    other = next(choice for choice in choices[1:] if f"thing: {choice}" in WORDS)
    after(page, lambda: page.locator(".choice", has_text=other).click())
    assert page.inner_text(".legend .row[aria-selected=true] .name") == other
    assert page.inner_text(".choice[aria-pressed=true]:focus") == other
    slide(page, "#overlap", 0.7)
    assert page.inner_text(".legend .row[aria-selected=true] .name") == other, "whatever is set later"
    page.select_option(".format", "json")
    with page.expect_download() as started:
        page.click(".download")
    segments = json.loads(Path(started.value.path()).read_text())["segments"]
    assert {segment["label"] for segment in segments} == names(page)
    assert "peacock" not in names(page)
    slide(page, "#overlap", 0.8)
    after(page, lambda: page.locator(".choice").nth(0).click())
    assert legend(page) == rows


def test_thresholds_change_the_result_without_the_network(open_page: Callable[..., Any], demo: Demo) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    upload(page)
    runs, before = demo.network_runs, legend(page)
    slide(page, "#overlap", 0.1)
    assert len(legend(page)) > len(before)
    frame = page.locator(".frame").bounding_box()
    for box in [tag.bounding_box() for tag in page.locator(".view .label").all()]:
        assert frame["x"] <= box["x"] + 0.5, "a small segment at the edge, too, has its label in the picture"
        assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 0.5
    assert "network not run again" in page.inner_text(".times")
    slide(page, "#object-mask", 0.9)
    assert {label for label, *_ in legend(page)} == {label for label, score, _ in before if float(score) > 0.9}
    after(page, lambda: page.click("#reset"))
    assert legend(page) == before
    slide(page, "#clip-seen", 1.0)
    assert legend(page) != before
    after(page, lambda: page.click("#reset"))
    slide(page, "#unknown", 0.6)
    assert "unknown" in names(page)
    assert {"sky", "stone"} <= names(page)
    # By the keyboard and the slider itself, too.
    after(page, lambda: page.click("#reset"))
    page.focus("#overlap input[type=range]")
    after(page, lambda: page.keyboard.press("Home"))
    assert len(legend(page)) > len(before)
    assert demo.network_runs == runs


def test_chosen_segment_stays_chosen_among_others_of_its_name(open_page: Callable[..., Any]) -> None:
    page = open_page()
    things = ", ".join(line.removeprefix("thing: ") for line in WORDS.splitlines() if line.startswith("thing:"))
    page.fill("#words-a textarea", f"thing: sticker, {things}\nstuff: sky\nstuff: stone")
    upload(page)
    rows = [row for row in legend(page) if row[0] == "sticker"]
    assert len(rows) > 2
    page.locator(".legend .row", has_text="sticker").nth(1).click()
    slide(page, "#overlap", 0.0)
    assert page.inner_text(".legend .row[aria-selected=true] .share") == rows[1][2] != rows[0][2]


def test_settings_survive_a_reload(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    page.check("#compare input")
    page.fill("#words-b textarea", "stuff: heaven, sky")
    page.check("#mode input[value=instance]")
    page.fill("#overlap input[type=number]", "0.15")
    page.press("#overlap input[type=number]", "Enter")
    page.wait_for_timeout(300)
    page.reload()
    page.wait_for_selector("#words-b textarea")
    page.wait_for_selector("#least-score:visible")
    assert page.input_value("#words-a textarea") == WORDS
    assert page.input_value("#words-b textarea") == "stuff: heaven, sky"
    assert page.is_checked("#mode input[value=instance]")
    assert page.input_value("#overlap input[type=number]") == "0.15"
    upload(page)
    assert page.locator(".stage .view").count() == 2
    after(page, lambda: page.click(".stage .example >> nth=0"))
    assert page.input_value("#words-a textarea") == WORDS, "an example leaves them alone"


def test_modes(open_page: Callable[..., Any], demo: Demo) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    upload(page)
    runs = demo.network_runs
    after(page, lambda: page.check("#mode input[value=semantic]"))
    rows = legend(page)
    assert len({label for label, *_ in rows}) == len(rows), "one row a class"
    assert all(score == "" for _, score, _ in rows)
    assert "classes" in page.inner_text(".side-note")
    assert not page.is_visible("#least-score")
    after(page, lambda: page.check("#mode input[value=instance]"))
    assert "sky" not in names(page), "stuff has no instances"
    assert all(float(score) >= 0.3 for _, score, _ in legend(page))
    page.wait_for_selector("#least-score:visible")
    few = len(legend(page))
    slide(page, "#least-score", 0.1)
    assert len(legend(page)) > few
    page.hover(".legend .row >> nth=0")
    assert page.locator(".names tr").count() == 6
    assert demo.network_runs == runs


def test_two_vocabularies_side_by_side(open_page: Callable[..., Any], demo: Demo) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    upload(page)
    runs = demo.network_runs
    after(page, lambda: page.check("#compare input"))
    assert not page.is_visible(".banner"), "no complaint before there was a chance to type"
    page.wait_for_selector("#words-b textarea")
    type_words(page, "bird\nstuff: wall\nstuff: heaven, sky", "#words-b")
    assert page.locator(".stage .view").count() == 2
    assert {"sky", "stone"} <= names(page, 0)
    assert names(page, 1) <= {"bird", "wall", "heaven"}
    frames = [frame.bounding_box() for frame in page.locator(".frame").all()]
    assert frames[0]["y"] == frames[1]["y"], "side by side"
    assert frames[0]["x"] + frames[0]["width"] <= frames[1]["x"]
    page.mouse.move(frames[0]["x"] + 20, frames[0]["y"] + 20)
    page.wait_for_selector(".tip:visible")
    tips = [tip.inner_text() for tip in page.locator(".tip-label").all()]
    assert tips[0] == "sky"
    assert len(tips) == 2, "the same place in both pictures"
    assert demo.network_runs == runs
    for index, letter in enumerate("AB"):
        with page.expect_download() as started:
            page.click(f".download >> nth={index}")
        assert started.value.suggested_filename == f"example.{letter}.overlay.png"
    after(page, lambda: page.uncheck("#compare input"))
    assert page.locator(".stage .view").count() == 1


@pytest.mark.parametrize("mode", ["panoptic", "semantic", "instance"])
def test_downloads_are_what_is_shown(open_page: Callable[..., Any], mode: str) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    upload(page)
    if mode != "panoptic":
        after(page, lambda: page.check(f"#mode input[value={mode}]"))
    with page.expect_download() as started:
        page.click(".download")
    assert started.value.suggested_filename == "example.overlay.png"
    with Image.open(io.BytesIO(Path(started.value.path()).read_bytes())) as png:
        png.load()
        assert (png.format, png.height) == ("PNG", 768)
    with page.expect_download() as started:
        page.select_option(".format", "json")
        page.click(".download")
    assert started.value.suggested_filename == "example.odise.json"
    document = json.loads(Path(started.value.path()).read_text())
    assert (document["mode"], document["height"], document["width"]) == (mode, 256, 256)
    assert {segment["label"] for segment in document["segments"]} >= names(page) - small(page)
    masks = [rle.decode(segment["rle"]) for segment in document["segments"]]
    assert all(mask.shape == (256, 256) and mask.any() for mask in masks)
    if mode != "instance":
        assert np.sum(masks, axis=0).max() == 1, "no pixel belongs to two"


def small(page: Any) -> set[str]:
    """Labels of specks, which the page's size may show and the picture's own size not, or the other way round."""
    return {label for label, _, share in legend(page) if "<" in share}


def test_errors_are_one_message_and_the_page_survives(open_page: Callable[..., Any], demo: Demo) -> None:
    page = open_page()
    runs = demo.network_runs
    for file, message in (
        ({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"}, "notes.txt is not an image"),
        ({"name": "cut.jpg", "mimeType": "image/jpeg", "buffer": PICTURE.read_bytes()[:9000]}, "cut.jpg is truncated"),
        ({"name": "huge.png", "mimeType": "image/png", "buffer": huge_png()}, "megapixels"),
    ):
        page.set_input_files(".stage .file", file)
        page.wait_for_function("text => document.querySelector('.banner').innerText.includes(text)", arg=message)
        assert page.locator(".banner:visible").count() == 1
        assert page.get_attribute(".banner", "role") == "alert"
    assert demo.network_runs == runs
    page.fill("#words-a textarea", "")
    upload(page)
    assert page.inner_text(".banner-text").startswith("The vocabulary is empty")
    type_words(page, WORDS)
    assert not page.is_visible(".banner")
    assert {"sky", "stone"} <= names(page), "the picture was kept, so words alone mend it"
    type_words(page, " ;; ")
    assert page.is_visible(".banner")
    assert {"sky", "stone"} <= names(page), "the last result stays"
    page.click(".banner-close")
    assert not page.is_visible(".banner")


def picture(name: str, side: int = 256) -> dict[str, Any]:
    """The example under another name and at another size."""
    buffer = io.BytesIO()
    Image.open(PICTURE).resize((side, side)).save(buffer, format="PNG")
    return {"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()}


def give(page: Any, event: str, *files: dict[str, Any], onto: str = ".stage") -> None:
    """Drop or paste files."""
    page.evaluate(
        """([event, files, onto]) => {
            const data = new DataTransfer();
            for (const [name, type, bytes] of files) data.items.add(new File([new Uint8Array(bytes)], name, { type }));
            const options = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
            const made = event === "drop" ? new DragEvent(event, options) : new ClipboardEvent(event, options);
            document.querySelector(onto).dispatchEvent(made);
        }""",
        [event, [[file["name"], file["mimeType"], list(file["buffer"])] for file in files], onto],
    )


def states(page: Any) -> list[str]:
    return [item.get_attribute("data-state") for item in page.locator(".pictures-list .picture").all()]


def wait_until_named(page: Any, name: str) -> None:
    page.wait_for_function(
        "name => document.querySelector('.picture-name').textContent === name"
        " && document.querySelector('.stage').getAttribute('aria-busy') === 'false'",
        arg=name,
    )


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_picture_that_comes_while_another_is_in_work_is_not_lost(
    open_page: Callable[..., Any], demo: Demo, event: str
) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    runs = demo.network_runs
    page.set_input_files(".stage .file", picture("first.png"))
    page.wait_for_function("document.querySelector('.busy-text').textContent.startsWith('Finding')")
    give(page, event, picture("second.png", 240))
    wait_until_named(page, "second.png")
    assert page.inner_text(".picture-size") == "240 × 240", "what came last is shown"
    assert states(page) == ["ready", "ready"]
    after(page, lambda: page.click(".previous"))
    assert page.inner_text(".picture-name") == "first.png"
    assert page.is_disabled(".previous")
    assert demo.network_runs == runs + 2


def test_several_pictures_at_once(open_page: Callable[..., Any], demo: Demo) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    runs = demo.network_runs
    notes = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"}
    page.set_input_files(".stage .file", [picture("a.png"), notes, picture("c.png", 200)])
    wait_until_named(page, "a.png")
    page.wait_for_function("!document.querySelector('.pictures-place').textContent.includes('work')")
    assert page.inner_text(".picture-name") == "a.png", "others do not push aside what is looked at"
    assert states(page) == ["ready", "failed", "ready"]
    assert page.inner_text(".pictures-place") == "1 of 3, 1 failed"
    page.click(".picture >> nth=1")
    page.wait_for_selector(".banner:visible")
    assert "notes.txt is not an image" in page.inner_text(".banner-text")
    assert page.inner_text(".picture-name") == "a.png"
    after(page, lambda: page.click(".next"))
    assert page.inner_text(".picture-name") == "c.png", "not the one that failed"
    assert not page.is_visible(".banner")
    assert demo.network_runs == runs + 2


def test_words_typed_while_the_network_runs_count(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.set_input_files(".stage .file", PICTURE)
    page.wait_for_function("document.querySelector('.busy-text').textContent.startsWith('Finding')")
    page.fill("#words-a textarea", WORDS)
    page.click("#apply")
    wait_until_named(page, "example.jpg")
    assert {"sky", "stone", "peacock"} <= names(page)


def test_picture_that_the_server_forgot_is_sent_again(browser: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    with visited(browser, Demo(tiny_bundle, tmp_path, "--memory", "1")) as (small, page):
        for name in ("a.png", "b.png"):
            page.set_input_files(".stage .file", picture(name))
            wait_until_named(page, name)
        page.click(".previous")
        wait_until_named(page, "a.png")
        assert small.network_runs == 3


def downloaded(page: Any, act: Callable[[], Any]) -> tuple[str, bytes]:
    """The name and content of the file that something downloads."""
    with page.expect_download() as started:
        act()
    return started.value.suggested_filename, Path(started.value.path()).read_bytes()


def forget(page: Any) -> None:
    """Let the server forget every picture of the page, as it does of one that was not looked at for an hour."""
    page.evaluate(
        """() => Promise.all(Array.from(document.querySelectorAll('.photo'), (photo) =>
            fetch(photo.src.replace('/shown.jpg', ''), { method: 'DELETE' })))"""
    )


def test_network_works_near_the_chosen_picture_alone(open_page: Callable[..., Any], demo: Demo) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    runs = demo.network_runs
    page.set_input_files(".stage .file", [picture(f"{number:02}.png", 32) for number in range(40)])
    wait_until_named(page, "00.png")
    page.wait_for_function("document.querySelector('.pictures-place').textContent === '1 of 40'")
    assert states(page) == ["ready"] * 21 + ["waiting"] * 19
    assert demo.network_runs == runs + 21
    for number in range(1, 40):
        after(page, lambda: page.click(".next"))
        assert page.inner_text(".picture-name") == f"{number:02}.png"
    assert demo.network_runs == runs + 40, "once for every picture"
    page.wait_for_function("document.querySelector('.pictures-place').textContent === '40 of 40'")
    assert 20 <= states(page).count("ready") <= 28, "and the server keeps those that are near"


def test_download_of_a_forgotten_picture(open_page: Callable[..., Any], demo: Demo) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    upload(page)
    runs = demo.network_runs
    forget(page)
    name, content = downloaded(page, lambda: page.click(".download"))
    assert name == "example.overlay.png"
    assert content.startswith(b"\x89PNG")
    assert demo.network_runs == runs + 1
    page.route("**/overlay", lambda route: route.fulfill(status=500, body=json.dumps({"error": "No."})))
    page.click(".download")
    page.wait_for_selector(".banner:visible")
    assert page.inner_text(".banner-text") == "No."


def test_all_pictures_in_one_file(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    notes = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"}
    page.set_input_files(
        ".stage .file", [picture("a.png"), picture("000139.jpg"), notes, picture("Ünï.png", 200), picture("a.png", 64)]
    )
    wait_until_named(page, "a.png")
    page.wait_for_function("!document.querySelector('.pictures-place').textContent.includes('work')")
    page.locator(".legend .row", has_text="peacock").click()
    page.fill(".other-name", "fire engine")
    after(page, lambda: page.press(".other-name", "Enter"))
    page.select_option(".format", "coco")
    name, content = downloaded(page, lambda: page.click(".download-all"))
    assert name == "odise_rt.coco.zip"
    assert page.inner_text(".banner-text") == "1 of 5 pictures failed and are not in the file."
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        coco = json.loads(archive.read("panoptic.json"))
        assert [(i["id"], i["file_name"], i["width"]) for i in coco["images"]] == [
            (1, "a.png", 256),
            (139, "000139.jpg", 256),
            (2, "Ünï.png", 200),
            (3, "a.png", 64),
        ]
        assert [a["image_id"] for a in coco["annotations"]] == [1, 139, 2, 3]
        assert [a["file_name"] for a in coco["annotations"]] == ["a.png", "000139.png", "Ünï.png", "a (2).png"]
        names = {c["id"]: c["name"] for c in coco["categories"]}
        found = [{names[s["category_id"]] for s in a["segments_info"]} for a in coco["annotations"]]
        assert "fire engine" in found[0] - found[1]
        for annotation in coco["annotations"]:
            ids = np.asarray(Image.open(io.BytesIO(archive.read(f"panoptic/{annotation['file_name']}")))).astype(int)
            found_ids = np.unique(ids @ [1, 256, 65536], return_counts=True)
            areas = {i: n for i, n in zip(*map(np.ndarray.tolist, found_ids), strict=True) if i}
            assert {s["id"]: s["area"] for s in annotation["segments_info"]} == areas
    page.select_option(".format", "cvat")
    with zipfile.ZipFile(io.BytesIO(downloaded(page, lambda: page.click(".download-all"))[1])) as archive:
        images = ElementTree.fromstring(archive.read("cvat.xml")).findall("image")
        assert [(i.get("id"), i.get("name")) for i in images][:2] == [("0", "a.png"), ("1", "000139.jpg")]
        assert len(images) == 4
    page.select_option(".format", "labelme")
    with zipfile.ZipFile(io.BytesIO(downloaded(page, lambda: page.click(".download-all"))[1])) as archive:
        assert archive.namelist() == ["a.json", "000139.json", "Ünï.json", "a (2).json"]


def test_names_and_pictures_outlast_the_server(browser: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    port = free_port()
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    with visited(browser, Demo(tiny_bundle, folders[0], "--port", str(port))) as (first, page):
        page.fill("#words-a textarea", WORDS)
        upload(page)
        page.locator(".legend .row", has_text="peacock").click()
        after(page, lambda: page.locator(".choice", has_text="umbrella").click())
        first.stop(signal.SIGKILL)
        page.fill("#overlap input[type=number]", "0.7")
        page.press("#overlap input[type=number]", "Enter")
        page.wait_for_selector(".banner:visible")
        assert "cannot be reached" in page.inner_text(".banner-text")
        second = Demo(tiny_bundle, folders[1], "--port", str(port))
        try:
            after(page, lambda: page.click("#apply"))
            assert "umbrella" in names(page)
            assert page.inner_text(".picture-name") == "example.jpg"
            assert not page.is_visible(".banner")
        finally:
            second.stop()


def test_lost_connection_fails_no_picture_that_nobody_looks_at(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    upload(page, picture("a.png", 64))
    page.context.set_offline(True)
    page.set_input_files(".stage .file", [picture(f"{name}.png", 64) for name in "bcd"])
    page.wait_for_selector(".banner:visible")
    page.wait_for_timeout(300)
    assert page.inner_text(".picture-name") == "a.png"
    assert "failed" not in states(page)[2:]
    page.context.set_offline(False)
    page.wait_for_function("document.querySelectorAll('.picture[data-state=ready]').length === 3")
    assert states(page) == ["ready", "failed", "ready", "ready"]
    page.click(".picture >> nth=1")
    wait_until_named(page, "b.png")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_leaving_with_pictures_asks_first(open_page: Callable[..., Any]) -> None:
    page = open_page()
    asked: list[str] = []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    after(page, lambda: page.click(".stage .example >> nth=0"))
    page.reload()
    page.wait_for_selector(".stage .drop")
    assert asked == [], "an example is at hand again"
    page.click(".drop-title", trial=True)
    upload(page)
    page.click(".picture-name")  # browsers ask only of who has touched the page
    page.reload()
    assert asked == ["beforeunload"]


def test_corrections_belong_to_one_side_of_a_comparison(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    page.fill("#words-b textarea", WORDS) if page.is_visible("#words-b") else None
    upload(page)
    after(page, lambda: page.check("#compare input"))
    type_words(page, WORDS, "#words-b")
    for side, name in ((0, "umbrella"), (1, "robot")):
        view = page.locator(".view").nth(side)
        view.locator(".legend .row", has_text="peacock").click()
        view.locator(".other-name").fill(name)
        after(page, lambda view=view: view.locator(".other-name").press("Enter"))  # type: ignore[misc]
    assert "umbrella" in names(page, 0) - names(page, 1)
    assert "robot" in names(page, 1) - names(page, 0)


def test_segment_gets_a_typed_name_is_left_out_and_put_back(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    upload(page)
    rows = legend(page)
    page.locator(".legend .row", has_text="peacock").click()
    page.fill(".other-name", "  fire engine ")
    page.mouse.move(*centre(page.locator(".frame")))
    assert page.input_value(".other-name") == "  fire engine ", "the pointer does not take it away"
    after(page, lambda: page.press(".other-name", "Enter"))
    assert ("fire engine", "✎") in [row[:2] for row in legend(page)]
    assert page.inner_text(".row:focus .name") == "fire engine"
    type_words(page, WORDS + "\nstuff: snow")
    assert "fire engine" in names(page), "whatever words there are"
    assert page.inner_text(".legend .row[aria-selected=true] .name") == "fire engine"
    after(page, lambda: page.click(".leave-out"))
    assert "fire engine" not in names(page)
    assert len(legend(page)) == len(rows) - 1
    page.select_option(".format", "json")
    content = json.loads(downloaded(page, lambda: page.click(".download"))[1])
    assert {s["label"] for s in content["segments"]} == names(page)
    after(page, lambda: page.click(".put-back"))
    assert "peacock" in names(page), "with the name that the network gave it"
    assert not page.is_visible(".put-back")


def centre(locator: Any) -> tuple[float, float]:
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_keys_name_leave_out_undo_and_walk(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    page.set_input_files(".stage .file", [picture("a.png"), picture("b.png", 200)])
    wait_until_named(page, "a.png")
    rows = legend(page)
    page.focus(".legend .row >> nth=2")
    other = page.locator(".choice").nth(2).inner_text()
    after(page, lambda: page.keyboard.press("3"))
    assert other in names(page)
    after(page, lambda: page.keyboard.press("z"))
    assert legend(page) == rows
    assert page.inner_text(".row:focus .name") == rows[2][0]
    after(page, lambda: page.keyboard.press("Delete"))
    assert [row[0] for row in legend(page)] == [row[0] for row in rows[:2] + rows[3:]]
    assert page.inner_text(".row:focus .name") == rows[3][0], "the focus stays in the list"
    after(page, lambda: page.keyboard.press("n"))
    assert page.inner_text(".picture-name") == "b.png"
    assert page.inner_text(".row:focus .name") == legend(page)[0][0]
    assert downloaded(page, lambda: page.keyboard.press("d"))[0] == "b.overlay.png"
    after(page, lambda: page.keyboard.press("ArrowLeft"))
    assert page.inner_text(".picture-name") == "a.png"
    page.focus(".other-name") if page.is_visible(".other-name") else page.focus("#words-a textarea")
    page.keyboard.press("n")
    page.wait_for_timeout(300)
    assert page.inner_text(".picture-name") == "a.png", "fields take letters as such"


def test_tab_leads_from_a_row_to_its_names_and_the_list_is_one_stop(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    page.set_input_files(".stage .file", [picture(f"{name}.png", 64) for name in "abc"])
    wait_until_named(page, "a.png")
    page.wait_for_function("document.querySelector('.pictures-place').textContent === '1 of 3'")
    page.focus(".legend .row >> nth=0")
    row = page.inner_text(".row:focus .name")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "choice"
    assert page.inner_text(".legend .row[aria-selected=true] .name") == row
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.className").startswith("row")
    assert page.locator(".picture[tabindex='0']").count() == 1
    page.focus(".picture >> nth=0")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    assert page.get_attribute(".picture:focus", "aria-label") == "c.png, ready"
    assert page.inner_text(".picture-name") == "a.png", "only looked at"
    page.keyboard.press("Enter")
    wait_until_named(page, "c.png")
    page.focus(".next")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.className") == "step next", "the focus does not fall off"
    assert page.get_attribute(".next", "aria-disabled") == "true"


def test_files_dropped_anywhere_and_folders(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    give(page, "drop", picture("a.png", 64), onto=".controls")
    wait_until_named(page, "a.png")
    page.evaluate(
        """() => {
            const photo = () => fetch(document.querySelector('.photo').src).then((answer) => answer.blob());
            const file = (name, type) => ({
                name, isDirectory: false,
                file: (done) => photo().then((blob) => done(new File([blob], name, { type }))),
            });
            const folder = (name, entries) => ({ name, isDirectory: true, createReader: () => {
                const parts = [entries.slice(0, 1), entries.slice(1), []];
                return { readEntries: (done) => done(parts.shift()) };
            } });
            const pictures = ['10.jpg', '9.jpg'].map((name) => file(name, 'image/jpeg'));
            const more = folder('more', [file('z.jpg', 'image/jpeg')]);
            const inside = [more, ...pictures, file('notes.txt', 'text/plain')];
            DataTransferItem.prototype.webkitGetAsEntry = () => folder('shots', inside);
        }"""
    )
    give(page, "drop", picture("shots", 64))
    wait_until_named(page, "9.jpg")
    labels = [item.get_attribute("title") for item in page.locator(".picture").all()]
    assert labels == ["a.png", "9.jpg", "10.jpg", "z.jpg"]


def test_file_that_cannot_be_read_is_no_dead_server(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.evaluate("() => { File.prototype.arrayBuffer = () => Promise.reject(new DOMException('', 'NotFoundError')); }")
    page.set_input_files(".stage .file", [picture("shots", 64), picture("b.png", 64)])
    page.wait_for_function("document.querySelector('.pictures-place').textContent.includes('2 failed')")
    assert "cannot be read: it may be a folder" in page.inner_text(".banner-text")
    assert "shots cannot be read" in page.get_attribute(".picture >> nth=0", "aria-label")


def test_picture_is_shown_without_names_if_the_words_cannot_be_used(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.fill("#words-a textarea", "coco; dog")
    upload(page)
    assert "tick the list below the field" in page.inner_text(".banner-text")
    assert page.inner_text(".picture-name") == "example.jpg"
    assert page.evaluate("document.querySelector('.photo').naturalWidth") == 256
    type_words(page, WORDS)
    assert {"sky", "stone"} <= names(page)


def test_phone(open_page: Callable[..., Any]) -> None:
    page = open_page(390, 844, phone=True)
    page.fill("#words-a textarea", WORDS)
    assert page.inner_text(".drop-title").strip() == "Choose pictures"
    upload(page)
    order = page.evaluate(
        "document.querySelector('.stage-column').compareDocumentPosition(document.querySelector('.controls'))"
    )
    assert order == 4, "the controls follow, for the eye and the keyboard"
    assert page.locator(".details").bounding_box()["height"] < 100
    page.evaluate("document.querySelector('#apply').scrollIntoView()")
    after(page, lambda: page.tap("#apply"))
    page.wait_for_timeout(300)
    assert 0 <= page.locator(".picture-name").bounding_box()["y"] < 200
    page.fill("#words-a textarea", "")
    after(page, lambda: page.tap("#apply"))
    page.wait_for_timeout(300)
    assert 0 <= page.locator(".banner").bounding_box()["y"] < 200


def test_label_of_the_chosen_segment_is_plain(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    upload(page)
    page.locator(".legend .row", has_text="peacock").click()
    page.mouse.move(5, 5)
    shown = {
        tag.inner_text(): float(tag.evaluate("tag => getComputedStyle(tag).opacity"))
        for tag in page.locator(".view .label").all()
    }
    assert {opacity for name, opacity in shown.items() if name == "peacock"} == {1}
    assert {opacity for name, opacity in shown.items() if name != "peacock"} == {0.25}


def test_targets_are_large_enough_and_seen_in_forced_colours(open_page: Callable[..., Any]) -> None:
    page = open_page(forced=True)
    page.fill("#words-a textarea", WORDS)
    page.set_input_files(".stage .file", [picture("a.png", 64), picture("b.png", 64)])
    wait_until_named(page, "a.png")
    page.click(".legend .row >> nth=1")
    for selector in (".choice", ".thresholds input[type=number]", ".thresholds button", ".keys summary", ".leave-out"):
        for target in page.locator(selector).all():
            box = target.bounding_box()
            assert box is None or min(box["width"], box["height"]) >= 24, selector
    style = "(element, name) => getComputedStyle(element)[name]"
    swatches = page.locator(".legend .swatch").evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)")
    assert len(set(swatches)) == len(swatches) > 2
    for selector in (".legend .row[aria-selected=true]", ".picture[aria-current=true]", "#mode label:has(:checked)"):
        assert page.locator(selector).evaluate(style, "outlineStyle") == "solid", selector


def test_theme_is_remembered(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.click(".theme")
    page.reload()
    page.wait_for_selector(".stage .drop")
    page.wait_for_function("document.body.classList.contains('dark')")


def huge_png() -> bytes:
    """49 megapixels in a few kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (7000, 7000)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_names_from_outside_are_text_not_markup(open_page: Callable[..., Any]) -> None:
    page = open_page()
    markup = "<img src=x onerror=alert(1)> sky"
    page.fill("#words-a textarea", f"stuff: {markup}, sky\nstuff: stone")
    hostile = {"name": "<b>x</b>.jpg", "mimeType": "image/jpeg", "buffer": PICTURE.read_bytes()}
    upload(page, hostile)
    assert markup in names(page)
    assert page.locator(".stage img[src='x'], .stage b").count() == 0
    assert page.inner_text(".picture-name") == "b>.jpg"


def test_keyboard(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.fill("#words-a textarea", WORDS)
    upload(page)
    page.focus(".drop")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "one sees where one is"
    rows = [label for label, *_ in legend(page)]
    # A new answer leaves the focus where it was.
    page.focus(".legend .row >> nth=1")
    after(page, lambda: page.evaluate("document.querySelector('#compare input').click()"))
    assert page.evaluate("document.activeElement.querySelector('.name').textContent") == rows[1]
    after(page, lambda: page.evaluate("document.querySelector('#compare input').click()"))
    page.focus(".legend .row >> nth=0")
    assert page.inner_text(".details-label") == rows[0]
    page.keyboard.press("ArrowDown")
    assert page.inner_text(".details-label") == rows[1]
    page.keyboard.press("End")
    assert page.inner_text(".details-label") == rows[-1]
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert page.locator(".legend .row[aria-selected=true] .name").inner_text() == rows[0]
    page.keyboard.press("Escape")
    assert page.locator(".legend .row[aria-selected=true]").count() == 0
    page.focus("#words-a textarea")
    page.fill("#words-a textarea", "stuff: sky\nstuff: stone")
    after(page, lambda: page.keyboard.press("Shift+Enter"))
    assert names(page) == {"sky", "stone"}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [420, 1400])
def test_fits_the_window_and_can_be_read(open_page: Callable[..., Any], width: int, dark: bool) -> None:
    page = open_page(width=width, dark=dark)
    page.fill("#words-a textarea", WORDS)
    upload(page)
    page.click(".legend .row >> nth=1")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "no sideways scrolling"
    frame = page.locator(".frame").bounding_box()
    assert frame["width"] >= (340 if width == 420 else 500)
    assert frame["width"] == pytest.approx(frame["height"], abs=1), "the picture keeps its shape"
    assert page.evaluate("document.body.classList.contains('dark')") == dark
    texts = (
        ".picture-size",
        ".side-note",
        ".legend .share",
        ".details-facts",
        ".names th",
        ".headline h1",
        ".subtitle p",
    )
    for selector in texts:
        assert contrast(page, selector) >= 4.5, selector


def contrast(page: Any, selector: str) -> float:
    """Contrast ratio of WCAG 2 between a text and what is behind it."""
    colours = page.evaluate(
        """selector => {
            let element = document.querySelector(selector);
            const text = getComputedStyle(element).color;
            let behind = 'rgba(0, 0, 0, 0)';
            for (; element && behind.endsWith(', 0)'); element = element.parentElement)
                behind = getComputedStyle(element).backgroundColor;
            return [text, behind];
        }""",
        selector,
    )
    light = []
    for colour in colours:
        values = [float(v) / 255 for v in re.findall(r"[\d.]+", colour)[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_visitors_do_not_see_each_other_s_pictures(open_page: Callable[..., Any], demo: Demo) -> None:
    first, second = open_page(), open_page()
    mirrored = io.BytesIO()
    Image.open(PICTURE).transpose(Image.Transpose.FLIP_TOP_BOTTOM).crop((0, 0, 200, 256)).save(mirrored, format="PNG")
    for page in (first, second):
        page.fill("#words-a textarea", WORDS)
    first.set_input_files(".stage .file", PICTURE)
    second.set_input_files(
        ".stage .file", {"name": "other.png", "mimeType": "image/png", "buffer": mirrored.getvalue()}
    )
    for page, name, size in ((first, "example.jpg", "256 × 256"), (second, "other.png", "200 × 256")):
        page.wait_for_selector(".legend .row")
        assert (page.inner_text(".picture-name"), page.inner_text(".picture-size")) == (name, size)
    slide(first, "#overlap", 0.1)
    slide(second, "#overlap", 0.2)
    assert first.inner_text(".picture-name") == "example.jpg"
    assert second.inner_text(".picture-name") == "other.png"


def test_server_that_is_gone_is_reported(browser: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    with visited(browser, Demo(tiny_bundle, tmp_path)) as (other, page):
        page.fill("#words-a textarea", WORDS)
        upload(page)
        assert other.stop(signal.SIGTERM) == 0, other.log
        assert "Traceback" not in other.log
        page.set_input_files(".stage .file", PICTURE)
        page.wait_for_selector(".banner:visible")
        assert "cannot be reached" in page.inner_text(".banner-text")
        assert not page.is_visible(".busy")
        assert {"sky", "stone"} <= names(page)
