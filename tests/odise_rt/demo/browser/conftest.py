"""The real command with a real bundle in a real browser, for tests of what a visitor sees and when the network runs.

Needs Chromium (Debian: ``apt-get install chromium``), Playwright's Python package and Gradio. The bundle is the one
that ``ODISE_RT_TEST_BUNDLE`` names, else odise-tiny, exported once for all tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.odise_rt.demo.browser.page import CHECKPOINT, ROOT, Demo, visit

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
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


@pytest.fixture(scope="session")
def demo(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    demo = Demo(tiny_bundle, tmp_path_factory.mktemp("demo"))
    yield demo
    files = [p for p in demo.temporary.rglob("*") if p.is_file()]
    assert demo.stop() == 0
    assert files == [], "no picture, and nothing else, was ever written"
    assert list(demo.temporary.iterdir()) == [], "the server cleans up after itself"
    assert "Traceback" not in demo.log
    assert "error" not in demo.log.lower()


@pytest.fixture(scope="module")  # while Playwright runs, no test beside it can run an event loop
def browser() -> Iterator[Any]:
    pytest.importorskip("gradio", reason="Requires: the extra demo")
    sync_api = pytest.importorskip("playwright.sync_api", reason="Requires: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("Requires: Chromium (apt-get install chromium)")
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
