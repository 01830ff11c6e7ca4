"""Every kind of image works as a user would expect, or ends in one ImageError."""

from __future__ import annotations

import io
import os
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from odise_rt import ImageError, OutOfMemoryError, preprocessing
from odise_rt.errors import ImageTooLargeError
from odise_rt.preprocessing import FORMATS, _register_plugins, load_image, network_size, prepare
from tests.odise_rt.fake_bundle import colour_image

FIXTURES = Path(__file__).parents[1] / "fixtures"


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"\0" * 10)


# ---- what works ------------------------------------------------------------------------------------------------------


def test_rgb_array_is_taken_without_a_copy(colours: np.ndarray) -> None:
    assert np.shares_memory(load_image(colours), colours)


def test_grey_arrays_become_rgb() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for array in (grey, grey[:, :, None]):
        assert np.array_equal(load_image(array), np.stack([grey] * 3, axis=-1))


def test_strided_arrays_work(colours: np.ndarray) -> None:
    assert np.array_equal(load_image(colours[::2, ::-1]), colours[::2, ::-1])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_over_white(mode: str) -> None:
    image = Image.new(mode, (2, 1), (0,) * len(mode))
    image.putpixel((1, 0), (*([0] * (len(mode) - 1)), 255))
    for given_image in (image, encoded(image)):
        pixels = load_image(given_image)
        assert pixels[0, 0].tolist() == [255, 255, 255]
        assert pixels[0, 1].tolist() == [0, 0, 0]
    rgba = np.asarray(image.convert("RGBA"))
    assert np.array_equal(load_image(rgba), load_image(image))


def test_palette_images_work_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    image.putpixel((1, 0), 1)
    assert load_image(encoded(image, "GIF"))[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert load_image(encoded(image, "PNG", transparency=0))[0].tolist() == [[255, 255, 255], [0, 0, 255]]
    assert load_image(encoded(image.convert("RGB"), transparency=(255, 0, 0)))[0].tolist() == [[255] * 3, [0, 0, 255]]


def test_one_bit_and_cmyk_work() -> None:
    assert load_image(encoded(Image.new("1", (2, 2), 1))).min() == 255
    cyan = load_image(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG"))[4, 4]
    assert cyan[0] < 40
    assert min(cyan[1:]) > 120


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_loses_its_low_byte(kind: str) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    pixels = load_image(encoded(Image.fromarray(values), kind))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright_by_exif(orientation: int, tmp_path: Path) -> None:
    upright = colour_image(48, 96)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    Image.fromarray(np.ascontiguousarray(undo(upright))).save(path, exif=exif)
    assert np.array_equal(load_image(path), upright)
    # Not so for pixels that the caller already holds: the result must fit those.
    with Image.open(path) as opened:
        assert load_image(opened).shape[:2] == undo(upright).shape[:2]


def sloppy_exif(orientation: int) -> bytes:
    """An orientation beside a width that is text, which EXIF does not allow and Pillow does not write again."""
    entries = [(0x0100, 2, 4, b"abc\0"), (0x0112, 3, 1, struct.pack("<HH", orientation, 0))]
    packed = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("exif", "turned"), [(sloppy_exif(6), True), (sloppy_exif(0), False), (b"Exif\0\0garbage", False)]
)
def test_photos_with_sloppy_exif_are_sound(kind: str, exif: bytes, turned: bool) -> None:
    photo = Image.fromarray(colour_image(48, 96))
    assert load_image(encoded(photo, kind, exif=exif)).shape == ((96, 48, 3) if turned else (48, 96, 3))


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


class FakeHeif(ImageFile.ImageFile):
    """What a HEIF plugin does: the size is known from the header, pixels come with ``load``."""

    format = "HEIF"

    def _open(self) -> None:
        self._size, self._mode, self.tile = (96, 48), "RGB", []

    def load(self) -> Any:
        self.im = Image.new("RGB", self._size, (255, 0, 0)).im
        return super().load()


def test_heic_with_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Image.OPEN, "HEIF", (FakeHeif, lambda head: head[4:12] == b"ftypheic"))
    assert load_image(HEIC).shape == (48, 96, 3)
    with monkeypatch.context() as patch:
        patch.setattr(FakeHeif, "load", lambda self: pytest.fail("decoded before its size was checked"))
        with pytest.raises(ImageError, match="96 x 48"):
            load_image(HEIC, max_pixels=100)


def test_heic_without_a_plugin_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    load_image(encoded(Image.new("RGB", (2, 2))))  # plugins are registered once
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(ImageError, match=r"pip install 'odise_rt\[heif\]'"):
        load_image(HEIC)
    for other in (b"\0\0\0\x18ftypisom", b"\0\0\0\x18junkheic"):
        with pytest.raises(ImageError, match="unknown format"):
            load_image(other)


def test_heic_that_its_plugin_does_not_know_is_of_an_unknown_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Image.OPEN, "HEIF", (FakeHeif, lambda head: False))
    with pytest.raises(ImageError, match="unknown format"):
        load_image(HEIC)


def test_heic_photo() -> None:
    """Red, green, blue and white quarters; a size that the header does not tell as it is, is an error."""
    pytest.importorskip("pi_heif", reason="Requires: the package pi-heif (extra 'heif')")
    path = FIXTURES / "quarters.heic"
    pixels = load_image(path)
    assert pixels.shape == (64, 96, 3)
    corners = [pixels[y, x].astype(int) for y in (8, 56) for x in (8, 88)]
    for found, expected in zip(corners, [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)], strict=True):
        assert np.abs(found - expected).max() < 24
    data = bytearray(path.read_bytes())
    size = data.index(b"ispe") + 8
    for claimed in ((16, 16), (4096, 4096)):
        data[size : size + 8] = struct.pack(">II", *claimed)
        with pytest.raises(ImageError, match="broken"):
            load_image(bytes(data))


def test_lack_of_memory_is_not_called_a_broken_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(OutOfMemoryError, match=r"96 x 48.*scale it down"):
        load_image(encoded(Image.fromarray(colour_image(48, 96))))


@pytest.mark.parametrize(
    ("error", "reason"), [(OSError("no such chunk\nin 12"), "no such chunk"), (OSError(), "OSError")]
)
def test_why_a_file_is_broken_is_told(monkeypatch: pytest.MonkeyPatch, error: OSError, reason: str) -> None:
    def fail(image: Image.Image) -> None:
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ImageError, match=rf"broken \({reason}\)"):
        load_image(encoded(Image.fromarray(colour_image(48, 96))))


def test_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data)[0, 0].tolist() == [255, 0, 0]


def test_images_come_from_anywhere(colours: np.ndarray, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(colours))
    (tmp_path / "ima ge.png").write_bytes(data)
    sources: list[Any] = [data, bytearray(data), memoryview(data), io.BytesIO(data), tmp_path / "ima ge.png"]
    for source in [*sources, str(tmp_path / "ima ge.png"), Image.fromarray(colours)]:
        assert np.array_equal(load_image(source), colours)


# ---- what does not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff\xe0", b"%PDF-1.4", b"<svg/>", b"GIF89a"])
def test_not_an_image(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"expected JPEG|truncated or broken"):
        load_image(data)


def test_formats_that_start_other_programs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="unknown format"):
        load_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_image(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(ImageError, match=r"truncated or broken|cannot be read|not an image|can be read"):
        load_image(data[: int(len(data) * share)])


def test_huge_image_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ImageError, match=r"72\.0 megapixels.*max_pixels"):
        load_image(png_header(8_000, 9_000))
    with warnings.catch_warnings():  # Pillow itself warns from 89 megapixels on
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=r"100\.0 megapixels.*max_pixels"):
            load_image(png_header(10_000, 10_000))


@pytest.mark.parametrize(("width", "height"), [(1, 65_536), (65_536, 1), (25_000_000, 1)])
def test_edges_are_bounded(width: int, height: int) -> None:
    array = np.zeros((height, width), np.uint8)
    for image in (png_header(width, height), array, Image.fromarray(array)):
        with pytest.raises(ImageTooLargeError, match=rf"{width} x {height} pixels, at most 65,535 .* along an edge"):
            load_image(image)


def test_longest_edges_are_accepted() -> None:
    for shape in ((65_535, 1), (1, 65_535)):
        array = np.zeros(shape, np.uint8)
        assert load_image(encoded(Image.fromarray(array))).shape[:2] == shape
        assert load_image(array).shape[:2] == shape


def many_scans(count: int) -> bytes:
    """A progressive JPEG of 10 scans, whose last one is repeated until there are ``count``."""
    data = encoded(Image.fromarray(colour_image(48, 96)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (count - data.count(b"\xff\xda")) + data[-2:]


def test_scans_of_a_jpeg_are_bounded(tmp_path: Path) -> None:
    image = load_image(many_scans(10))
    assert np.array_equal(load_image(many_scans(100)), image)
    path = tmp_path / "scans.jpg"
    for count in (101, 6_000):
        path.write_bytes(many_scans(count))
        for source in (many_scans(count), path, io.BytesIO(many_scans(count))):
            with pytest.raises(ImageError, match=r"more than 100 scans.*save it again"):
                load_image(source)


@pytest.mark.parametrize("piece", [4, 5, 7, 64, 1 << 16])
def test_scans_are_counted_as_a_decoder_meets_them(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those in metadata, in the data of a scan, where 255 is followed by 0 or a restart, or behind the end."""
    monkeypatch.setattr(preprocessing, "_PIECE", piece)
    comment = b"\xff\xfe\x00\x0c" + b"\xff\xda\x00\x02" * 2 + b"\xff\xff"
    scan = b"\xff\xff\xda\x00\x03\x01" + b"\x11\xff\x00\xda\x00\x02\xff\xd0\xff\xd7\xda\xff\xff\x00"
    data = b"\xff\xd8" + comment + scan * 3 + b"\xff\xd9" + scan
    assert list(preprocessing._jpeg_markers(io.BytesIO(data))) == [0xFE, 0xDA, 0xDA, 0xDA]
    for end in range(len(data)):
        assert len(list(preprocessing._jpeg_markers(io.BytesIO(data[:end])))) <= 4
    assert list(preprocessing._jpeg_markers(io.BytesIO(b"\xff\xd8\xff\xe0\x00\x01" + scan))) == []


def test_segments_of_a_jpeg_are_bounded() -> None:
    data = encoded(Image.fromarray(colour_image(48, 96)), "JPEG")
    assert load_image(data[:2] + b"\xff\xfe\x00\x02" * 9_000 + data[2:]).shape == (48, 96, 3)
    with pytest.raises(ImageError, match="10,000 segments"):
        load_image(data[:2] + b"\xff\xfe\x00\x02" * 10_001 + data[2:])


@pytest.mark.parametrize("kind", [b"P6", b"P5", b"P4"])
@pytest.mark.parametrize("place", [b"# \n2 2 255\n", b"2 # \n2 255\n", b"2 2#\n 255\n", b"2 2 25#\n5\n"])
def test_comments_of_a_ppm_are_bounded(kind: bytes, place: bytes) -> None:
    pixels = bytes(range(200, 212))
    if kind == b"P4":
        place = place.replace(b" 255", b"").replace(b" 25#\n5", b"#\n")
    for comment in (b"", b"made by hand", b"x" * 60_000):
        image = load_image(kind + b"\n" + place.replace(b"#", b"#" + comment) + pixels)
        assert image.shape == (2, 2, 3)
    with pytest.raises(ImageError, match="64 KiB"):
        load_image(kind + b"\n" + place.replace(b"#", b"#" + b"x" * 70_000) + pixels)
    assert load_image(kind + b"\n" + place + pixels + b"#" * 70_000).shape == (2, 2, 3)


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bomb_by_pillows_measure_is_refused(side: int) -> None:
    with pytest.raises(ImageError, match="MAX_IMAGE_PIXELS"):
        load_image(png_header(side, side))


@pytest.mark.parametrize("kind", FORMATS)
def test_no_format_decodes_before_its_size_is_checked(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    _register_plugins()
    if kind == "HEIF" and kind not in Image.OPEN:
        pytest.skip("Requires: the package pi-heif (extra 'heif')")
    # No plugin here writes HEIF.
    data = (FIXTURES / "quarters.heic").read_bytes() if kind == "HEIF" else encoded(Image.new("RGB", (64, 64)), kind)
    with Image.open(io.BytesIO(data)) as opened:
        plugin = type(opened)
    decoded: list[str] = []
    for image_class in (plugin, ImageFile.ImageFile):
        monkeypatch.setattr(image_class, "load", lambda self: decoded.append(kind))
    with pytest.raises(ImageTooLargeError):
        load_image(data, max_pixels=1000)
    assert not decoded


def test_icons_are_refused() -> None:
    """Pillow decodes them while it reads their header, which need not tell the size of the PNG inside."""
    inside = encoded(Image.new("RGB", (2500, 2500)))
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22)
    with pytest.raises(ImageError, match="unknown format"):
        load_image(struct.pack("<HHH", 0, 1, 1) + entry + inside, max_pixels=1000)


class Layout(NamedTuple):
    """How the numbers of a TIFF are stored."""

    order: str
    big: bool


LAYOUTS = [Layout("<", False), Layout(">", False), Layout("<", True)]
"""Not BigTIFF with the high byte first, which Pillow does not open."""


def tiled_tiff(
    sides: list[tuple[int, int]],
    layout: Layout,
    kinds: tuple[int, int] = (4, 4),
    tags: int | None = None,
    less: int = 0,
) -> bytes:
    """16 x 16 pixels in one zipped tile, whose width and length are stated as often as given.

    ``tags`` takes the place of their number, and ``less`` is a tag that is left out.
    """
    order, big = layout
    data = zlib.compress(bytes(max(w * h for w, h in sides)), 9)
    start = 16 if big else 8
    numbers = [(256, 4, 16), (257, 4, 16), (258, 4, 8), (259, 4, 8), (262, 4, 1), (277, 4, 1)]
    numbers += [(322, kinds[0], w) for w, _ in sides] + [(323, kinds[1], h) for _, h in sides]
    numbers += [(324, 4, start), (325, 4, len(data))]
    numbers = [entry for entry in numbers if entry[0] != less]
    entry = f"{order}HHQI4x" if big else f"{order}HHII"
    entries = b"".join(struct.pack(entry, tag, kind, 1, number) for tag, kind, number in numbers)
    mark, end = {"<": b"II", ">": b"MM"}[order], start + len(data)
    head = struct.pack(f"{order}HHHQ", 43, 8, 0, end) if big else struct.pack(f"{order}HI", 42, end)
    count = struct.pack(order + ("Q" if big else "H"), len(numbers) if tags is None else tags)
    return mark + head + data + count + entries + bytes(8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_a_tiff_are_decoded(layout: Layout) -> None:
    assert load_image(tiled_tiff([(16, 16)], layout), max_pixels=1000).shape == (16, 16, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("sides", "kinds", "words"),
    [
        ([(2048, 2048)], (4, 4), "a tile of .* has 2048 x 2048"),
        ([(2048, 2048), (16, 16)], (4, 4), "its tiles have no certain size"),
        ([(16, 16), (2048, 2048)], (4, 4), "its tiles have no certain size"),
        ([(2048, 2048)], (17, 4), "its tiles have no certain size"),
        ([(2048, 2048)], (4, 17), "its tiles have no certain size"),
    ],
)
def test_tiles_of_a_tiff_are_bounded(
    layout: Layout, sides: list[tuple[int, int]], kinds: tuple[int, int], words: str
) -> None:
    with pytest.raises(ImageError, match=words):
        load_image(tiled_tiff(sides, layout, kinds), max_pixels=1000)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("less", [322, 323])
def test_tiles_of_a_tiff_have_two_sides(layout: Layout, less: int) -> None:
    with pytest.raises(ImageError, match="its tiles have no certain size"):
        load_image(tiled_tiff([(16, 16)], layout, less=less), max_pixels=1000)


@pytest.mark.timeout(20)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(("layout", "tags"), [(LAYOUTS[1], (1 << 16) - 1), (LAYOUTS[2], 1 << 62)])
def test_tags_that_a_tiff_claims_are_not_looked_for_behind_its_end(layout: Layout, tags: int) -> None:
    with pytest.raises(ImageError, match="truncated or broken"):
        load_image(tiled_tiff([(16, 16)], layout, tags=tags), max_pixels=1000)


def test_max_pixels_holds_for_every_source(colours: np.ndarray, tmp_path: Path) -> None:
    picture = Image.fromarray(colours)
    picture.save(tmp_path / "image.png")
    sources: list[Any] = [colours, picture, encoded(picture), tmp_path / "image.png"]
    for source in sources:
        assert load_image(source, max_pixels=colours.shape[0] * colours.shape[1]).size
        with pytest.raises(ImageTooLargeError, match="megapixels"):
            load_image(source, max_pixels=100)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0)])
def test_image_without_pixels(shape: tuple[int, ...]) -> None:
    assert load_image(np.zeros((1, 1, 3), np.uint8)).shape == (1, 1, 3)
    with pytest.raises(ImageError, match="no pixels"):
        load_image(np.zeros(shape, np.uint8))


def test_pil_image_without_pixels() -> None:
    with pytest.raises(ImageError, match="no pixels"):
        load_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(
    ("array", "hint"),
    [
        (np.zeros((4, 4, 3), np.float32), "round"),
        (np.zeros((4, 4, 3), np.uint16), "expected uint8 with values 0 to 255$"),
        (np.zeros((4, 4, 3), bool), "expected uint8 with values 0 to 255$"),
        (np.zeros((3, 40, 40), np.uint8), "transpose"),
        (np.zeros((1, 40, 40), np.uint8), "transpose"),
        (np.zeros((4, 40, 40), np.uint8), "transpose"),
        (np.zeros((40, 40, 2), np.uint8), "RGBA$"),
        (np.zeros((2, 4, 4, 3), np.uint8), "as a list"),
        (np.zeros((4, 4, 2), np.uint8), "RGBA"),
        (np.zeros(3, np.uint8), "RGBA$"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, hint: str) -> None:
    with pytest.raises(ImageError, match=hint):
        load_image(array)


def released_memory() -> memoryview:
    view = memoryview(b"1234")
    view.release()
    return view


def test_a_view_of_encoded_bytes_may_have_steps() -> None:
    encoded = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(encoded, "PNG")
    doubled = bytes(value for value in encoded.getvalue() for _ in range(2))
    assert load_image(memoryview(doubled)[::2]).shape == (2, 3, 3)


def test_transparent_grey_of_16_bits_is_white(tmp_path: Path) -> None:
    """As that of 8 bits is."""
    values = np.array([[40_000, 0], [20_000, 40_000]], np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png", transparency=40_000)
    assert load_image(tmp_path / "grey.png")[..., 0].tolist() == [[255, 0], [20_000 >> 8, 255]]
    Image.fromarray(values).save(tmp_path / "solid.png")
    assert load_image(tmp_path / "solid.png")[..., 0].tolist() == [[156, 0], [78, 156]]


def test_other_things(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nothing\.jpg \(No such file or directory\): check the path"):
        load_image(tmp_path / "nothing.jpg")
    with pytest.raises(ImageError, match="folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="came as int"):
        load_image(3)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="expected a path"):
        load_image("a\0b")
    with os.scandir(os.fsencode(Path(__file__).parent)) as entries, pytest.raises(ImageError, match="expected a path"):
        load_image(next(entries))  # a path of bytes

    class NoPath(os.PathLike[str]):
        def __fspath__(self) -> str:
            return 3  # type: ignore[return-value]

    with pytest.raises(ImageError, match="expected a path"):
        load_image(NoPath())
    with pytest.raises(ImageError, match="bytes that cannot be read"):
        load_image(released_memory())
    with pytest.raises(ImageError, match="floating point"):
        load_image(Image.new("F", (2, 2)))
    for values in ([0, 65_536], [-1, 0]):
        with pytest.raises(ImageError, match="32-bit"):
            load_image(Image.fromarray(np.array([values], np.int32)))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files_decode_or_are_refused(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"]))
    content = bytearray(encoded(Image.fromarray(colour_image(16, 24)), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = load_image(bytes(content), max_pixels=10_000)
    except ImageError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3


# ---- to the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (1024, 1365)),
        ((640, 480), (1365, 1024)),
        ((1024, 1024), (1024, 1024)),
        ((427, 640), (1024, 1535)),  # 1534.8 rounds up
        ((640, 427), (1535, 1024)),
        ((500, 2000), (640, 2560)),  # the longer edge is capped
        ((2000, 500), (2560, 640)),
        ((1, 10_000), (1, 2560)),  # never less than a pixel
        ((10_000, 1), (2560, 1)),
        ((1, 1), (1024, 1024)),
    ],
)
def test_network_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert network_size(*size, 1024, 2560) == expected


def test_prepare_scales_and_pads_with_black() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    prepared = prepare(pixels, (50, 70), 32)
    assert prepared.canvas.shape == (1, 3, 64, 96)
    expected = pixels.astype(np.float32).transpose(2, 0, 1)[None] / np.float32(255)
    assert np.array_equal(prepared.image, expected)
    assert np.array_equal(prepared.canvas[:, :, :50, :70], expected)
    assert not prepared.canvas[:, :, 50:].any()
    assert not prepared.canvas[:, :, :, 70:].any()
    assert prepared.image.flags.c_contiguous
    assert prepared.network_size == (50, 70)


def test_prepare_resizes_with_pils_bilinear_filter_on_bytes() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
    prepared = prepare(pixels, (64, 96), 32)
    resized = np.asarray(Image.fromarray(pixels).resize((96, 64), Image.Resampling.BILINEAR))
    assert np.array_equal(np.rint(prepared.image[0] * 255).astype(np.uint8), resized.transpose(2, 0, 1))
    assert prepared.image is prepared.canvas, "no copy where nothing is padded"
    assert prepared.original_size == (40, 60)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_that_nobody_writes_to_is_no_image(tmp_path: Path) -> None:
    """And nothing waits for a writer, which could not be interrupted."""
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match=r"pipe\.jpg is not an image"):
        load_image(tmp_path / "pipe.jpg")


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="this system does not name open files")
def test_a_pipe_is_read_to_its_end(colours: np.ndarray) -> None:
    """As a shell's ``<(…)`` gives them, however slow the other side is."""
    data = encoded(Image.fromarray(colours))
    reading, writing = os.pipe()

    def write_the_rest() -> None:
        time.sleep(0.1)
        os.write(writing, data[100:])
        os.close(writing)

    os.write(writing, data[:100])
    other_side = threading.Thread(target=write_the_rest)
    other_side.start()
    try:
        assert np.array_equal(load_image(f"/dev/fd/{reading}"), colours)
    finally:
        other_side.join()
        os.close(reading)


def test_subclasses_of_arrays_are_arrays() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's own, of the class
        matrix = np.matrix(np.full((3, 4), 7, np.uint8))
    found = load_image(matrix)
    assert type(found) is np.ndarray
    assert found.shape == (3, 4, 3)
