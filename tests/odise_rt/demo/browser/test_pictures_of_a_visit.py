"""Many pictures in one visit: how they come, wait, and are forgotten and sent again."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.odise_rt.demo.browser.page import (
    PICTURE,
    WORDS,
    Demo,
    after,
    names,
    picture,
    slide,
    states,
    type_words,
    upload,
    visited,
    wait_until_named,
)

pytestmark = [pytest.mark.slow, pytest.mark.browser]


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
