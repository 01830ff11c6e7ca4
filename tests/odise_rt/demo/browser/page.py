"""A running ``odise-rt demo``, and what a visitor does on its page."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[4]
CHECKPOINT = ROOT / "training" / "pretrained" / "odise-tiny"
PICTURE = CHECKPOINT / "example.jpg"
WORDS = (CHECKPOINT / "example_vocabulary.txt").read_text()
PATIENCE = 60_000  # milliseconds; the machine may be busy


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


def small(page: Any) -> set[str]:
    """Labels of specks, which the page's size may show and the picture's own size not, or the other way round."""
    return {label for label, _, share in legend(page) if "<" in share}


def picture(name: str, side: int = 256) -> dict[str, Any]:
    """The example under another name and at another size."""
    buffer = io.BytesIO()
    Image.open(PICTURE).resize((side, side)).save(buffer, format="PNG")
    return {"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()}


def states(page: Any) -> list[str]:
    return [item.get_attribute("data-state") for item in page.locator(".pictures-list .picture").all()]


def wait_until_named(page: Any, name: str) -> None:
    page.wait_for_function(
        "name => document.querySelector('.picture-name').textContent === name"
        " && document.querySelector('.stage').getAttribute('aria-busy') === 'false'",
        arg=name,
    )


def downloaded(page: Any, act: Callable[[], Any]) -> tuple[str, bytes]:
    """The name and content of the file that something downloads."""
    with page.expect_download() as started:
        act()
    return started.value.suggested_filename, Path(started.value.path()).read_bytes()
