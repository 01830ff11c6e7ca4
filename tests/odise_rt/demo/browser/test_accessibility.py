"""Keyboards, phones, narrow windows, dark and forced colours."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.odise_rt.demo.browser.page import WORDS, after, legend, names, picture, upload, wait_until_named

pytestmark = [pytest.mark.slow, pytest.mark.browser]


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
