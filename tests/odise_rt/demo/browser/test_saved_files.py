"""Files that a visitor saves."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from odise_rt import rle
from tests.odise_rt.demo.browser.page import (
    WORDS,
    Demo,
    after,
    downloaded,
    names,
    picture,
    small,
    upload,
    wait_until_named,
)

pytestmark = [pytest.mark.slow, pytest.mark.browser]


def forget(page: Any) -> None:
    """Let the server forget every picture of the page, as it does of one that was not looked at for an hour."""
    page.evaluate(
        """() => Promise.all(Array.from(document.querySelectorAll('.photo'), (photo) =>
            fetch(photo.src.replace('/shown.jpg', ''), { method: 'DELETE' })))"""
    )


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
