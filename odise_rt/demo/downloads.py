"""The files of a view that visitors can download: made in memory at the picture's own size."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from odise_rt.demo.views import colours, download, on_top, shown_as
from odise_rt.files import json_bytes
from odise_rt.interchange import cvat_document
from odise_rt.result_files import COCO_FILE, coco_image_ids
from odise_rt.results import coco_categories
from odise_rt.visualize import overlay

if TYPE_CHECKING:
    from PIL import Image

    from odise_rt.demo.pictures import Picture
    from odise_rt.demo.session import Controls
    from odise_rt.results import PanopticResult
    from odise_rt.vocabulary import Vocabulary


@dataclass(frozen=True)
class Drawn:
    """What a file is made from."""

    picture: Picture
    result: PanopticResult
    """At the picture's own size."""
    controls: Controls
    beside: Vocabulary | None
    """The first vocabulary of a comparison, for the second's colours."""

    @property
    def shown(self) -> PanopticResult:
        """The result with what is to be seen of each segment, made anew on each access."""
        controls = self.controls
        return on_top(shown_as(self.result, controls.mode, controls.least_score, controls.corrections))


@dataclass(frozen=True)
class Format:
    """One kind of file."""

    title: str
    """For people."""
    suffix: str
    """In place of that of the picture's file."""
    media_type: str
    make: Callable[[Drawn], bytes]
    in_menu: bool = True
    """Others are parts from which the page makes files of several pictures."""


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _json(data: Any) -> bytes:
    return json_bytes(data, indent=1) + b"\n"


def _overlay(drawn: Drawn) -> bytes:
    shown = drawn.shown
    return _png(overlay(drawn.picture.pixels, shown, colours=colours(shown, drawn.beside)))


def _result(drawn: Drawn) -> bytes:
    controls = drawn.controls
    name = drawn.picture.name
    return _json(download(drawn.result, controls.mode, controls.least_score, name, controls.corrections))


def _coco(drawn: Drawn) -> bytes:
    """``panoptic.json`` and its PNG as `odise-rt segment --format coco` lays them out, in one archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(COCO_FILE, _coco_document(drawn))
        archive.writestr(f"panoptic/{PurePath(drawn.picture.name).stem}.png", _ids(drawn))
    return buffer.getvalue()


def _coco_document(drawn: Drawn) -> bytes:
    name = PurePath(drawn.picture.name).stem
    (number,) = coco_image_ids([name]).values()
    result = drawn.shown
    annotation = result.coco_annotation(number, f"{name}.png")
    size = {"height": result.size[0], "width": result.size[1]}
    images = [{"id": number, "file_name": drawn.picture.name, **size}]
    return _json({"images": images, "annotations": [annotation], "categories": coco_categories(result.vocabulary)})


def _ids(drawn: Drawn) -> bytes:
    return _png(drawn.shown.to_png())


def _labelme(drawn: Drawn) -> bytes:
    return _json(drawn.shown.to_labelme(drawn.picture.name))


def _cvat(drawn: Drawn) -> bytes:
    shown = drawn.shown
    image = shown.to_cvat(drawn.picture.name)
    return "".join(cvat_document([image], shown.vocabulary)).encode()


FORMATS = {
    "overlay": Format("Overlay (PNG)", ".overlay.png", "image/png", _overlay),
    "json": Format("All of it (JSON)", ".odise.json", "application/json", _result),
    "coco": Format("COCO panoptic (ZIP)", ".coco.zip", "application/zip", _coco),
    "labelme": Format("LabelMe (JSON)", ".json", "application/json", _labelme),
    "cvat": Format("CVAT (XML)", ".cvat.xml", "application/xml", _cvat),
    "png": Format("Segment ids (PNG)", ".panoptic.png", "image/png", _ids),
    "coco-document": Format("COCO panoptic (JSON)", ".coco.json", "application/json", _coco_document, in_menu=False),
}
"""By their names in addresses; in the menu's order. LabelMe looks for the annotations of ``a.jpg`` in ``a.json``."""
