"""Segments that a visitor renames, leaves out and puts back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.odise_rt.demo.browser.page import (
    WORDS,
    after,
    downloaded,
    legend,
    names,
    picture,
    slide,
    type_words,
    upload,
    wait_until_named,
)

pytestmark = [pytest.mark.slow, pytest.mark.browser]


def centre(locator: Any) -> tuple[float, float]:
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


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
