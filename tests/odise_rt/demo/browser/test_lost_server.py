"""Servers that end, and connections that are lost."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.odise_rt.demo.browser.page import (
    PICTURE,
    WORDS,
    Demo,
    after,
    names,
    picture,
    states,
    upload,
    visited,
    wait_until_named,
)

pytestmark = [pytest.mark.slow, pytest.mark.browser]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


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
