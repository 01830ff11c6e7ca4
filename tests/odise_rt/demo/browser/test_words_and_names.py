"""What a visitor sees of words, names, thresholds and modes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from odise_rt import Vocabulary
from tests.odise_rt.demo.browser.page import (
    PICTURE,
    WORDS,
    Demo,
    after,
    legend,
    names,
    slide,
    type_words,
    upload,
)

pytestmark = [pytest.mark.slow, pytest.mark.browser]


def huge_png() -> bytes:
    """49 megapixels in a few kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (7000, 7000)).save(buffer, format="PNG")
    return buffer.getvalue()


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


def test_names_from_outside_are_text_not_markup(open_page: Callable[..., Any]) -> None:
    page = open_page()
    markup = "<img src=x onerror=alert(1)> sky"
    page.fill("#words-a textarea", f"stuff: {markup}, sky\nstuff: stone")
    hostile = {"name": "<b>x</b>.jpg", "mimeType": "image/jpeg", "buffer": PICTURE.read_bytes()}
    upload(page, hostile)
    assert markup in names(page)
    assert page.locator(".stage img[src='x'], .stage b").count() == 0
    assert page.inner_text(".picture-name") == "b>.jpg"
