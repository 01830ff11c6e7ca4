"""Images in, network inputs out.

:func:`load_image` accepts what people have (a path, encoded bytes, a PIL image, a numpy array) and gives RGB uint8.
:func:`prepare` resizes it to the test size, scales to [0, 1] and pads. Decisions, made once:

* Files and bytes are turned upright by their EXIF orientation. A PIL image or array is taken as it is, so that the
  result fits the pixels that the caller holds.
* Transparent pixels are composited over white, as a viewer shows them. 16-bit images lose their low byte. Of an
  animation the first frame counts. Palette, grey, CMYK and the like are converted to RGB.
* The size is checked on the header, before anything is decoded; so is what could cost far more time than pixels do: the
  scans of a JPEG and the comments of a PPM. A TIFF's tiles, which are decoded whole, are checked
  like images. An AVIF whose header states less than its frame holds is decoded all the same: libavif's own bound of
  16,384 x 16,384 is the only one that Pillow lets it have.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, Union, cast

import numpy as np

from odise_rt.backends.device_arrays import is_on_device
from odise_rt.errors import ImageError, ImageTooLargeError, OdiseError, OutOfMemoryError, first_line
from odise_rt.files import given_path
from odise_rt.options import DEFAULT_MAX_PIXELS, MAX_IMAGE_EDGE

if TYPE_CHECKING:
    from PIL import Image
    from PIL.TiffImagePlugin import TiffImageFile

logger = logging.getLogger(__name__)


class CudaArray(Protocol):
    """An array on a GPU with ``__cuda_array_interface__``: of torch, CuPy, pycuda or numba."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


class DlpackArray(Protocol):
    """An array on a GPU that can be handed over by DLPack."""

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


ImageLike = Union[
    str, "os.PathLike[str]", bytes, bytearray, memoryview, IO[bytes], "Image.Image", np.ndarray, CudaArray, DlpackArray
]

# Raster formats that Pillow decodes itself. Left out are those that start other programs (EPS), are decoded while their
# header is read (ICO), or find little use. HEIF is a plugin's, of pi-heif or whatever the caller registered.
FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000"),
    *("TGA", "PCX"),
)
SUFFIXES = frozenset(
    f".{s}"
    for s in (
        *("jpg", "jpeg", "jpe", "mpo", "png", "webp", "avif", "heic", "heif", "bmp", "dib", "gif"),
        *("tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "tga", "pcx"),
    )
)
"""File name endings by which a folder's images are found."""
MAX_JPEG_SCANS = 100
"""Scans of a JPEG; progressive pictures have some ten."""
MAX_JPEG_SEGMENTS = 10_000
"""Segments of a JPEG; metadata comes in pieces of 64 KiB."""
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")  # not 0 after 255 in the data, nor restart marks
_SCAN, _ENDS = 0xDA, (0xD9, 0xD8)  # decoders refuse a second start
_PPM_KINDS = b"0123456fy"
_PIECE = 1 << 16
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@dataclass(frozen=True)
class PreparedImage:
    """One image at test size, ready for the graphs."""

    canvas: np.ndarray
    """float32 (1, 3, H, W), RGB in [0, 1], zero-padded right and below to a multiple of ``size_divisor``."""
    image: np.ndarray
    """float32 (1, 3, h, w), the same without padding; contiguous."""
    original_size: tuple[int, int]
    """Height and width of the image as given; results have this size."""

    @property
    def network_size(self) -> tuple[int, int]:
        """Height h and width w after the test-time resize."""
        return self.image.shape[2], self.image.shape[3]


def load_image(image: ImageLike, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Decode an image.

    Args:
        image: a path, encoded bytes, an open binary file, a PIL image, or an array of dtype uint8 and shape (h, w),
            (h, w, 1), (h, w, 3) RGB or (h, w, 4) RGBA.
        max_pixels: larger images are refused, and so are those with an edge above ``MAX_IMAGE_EDGE`` pixels.

    Returns:
        uint8 (h, w, 3) RGB. May share memory with the argument: do not write to it.

    Raises:
        ImageError: it is no image, is broken, has no pixels or too many.
        OutOfMemoryError: memory ran out while it was decoded.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, max_pixels)
    from PIL import Image

    if isinstance(image, Image.Image):
        check_size(image.width, image.height, max_pixels, "the PIL image")
        return _decode(image, "the PIL image", upright=False)
    if isinstance(image, bytes | bytearray | memoryview):
        try:
            data = bytes(image)
        except (BufferError, ValueError) as exc:
            raise ImageError(f"an image came as bytes that cannot be read ({exc}): pass them as they are") from exc
        return _from_file(io.BytesIO(data), f"the image of {len(data):,} bytes", max_pixels)
    if isinstance(image, str | os.PathLike):
        path = given_path(image, "an image", ImageError)
        try:
            with _opened(path) as file:
                return _from_file(file, str(path), max_pixels)
        except (OSError, ValueError) as exc:
            if isinstance(exc, OdiseError):
                raise
            if isinstance(exc, IsADirectoryError):
                raise ImageError(f"{path} is a folder, expected one image: pass its files one by one") from exc
            reason = getattr(exc, "strerror", None) or exc
            raise ImageError(f"cannot read the image {path} ({reason}): check the path") from exc
    if hasattr(image, "read"):
        name = getattr(image, "name", None)
        return _from_file(cast("IO[bytes]", image), name if isinstance(name, str) else "the open file", max_pixels)
    raise ImageError(
        f"an image came as {type(image).__name__}: expected a path, encoded bytes, a PIL image, or a numpy array of "
        "dtype uint8 and shape (h, w, 3)"
    )


def are_images(images: object) -> bool:
    """Whether this is something that gives images one after the other, and no image itself."""
    single = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray)
    if is_on_device(images) or isinstance(images, single):
        return False
    if hasattr(images, "read") or hasattr(images, "convert"):  # open files, PIL images
        return False
    return hasattr(images, "__iter__") or hasattr(images, "__getitem__")


def _opened(path: Path) -> IO[bytes]:
    """Open a file. A pipe that nobody writes to reads as empty: waiting for a writer could not be interrupted."""
    if not path.is_fifo():
        return path.open("rb")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb")


def _from_array(array: np.ndarray, max_pixels: int) -> np.ndarray:
    array = np.asarray(array)  # subclasses behave in ways of their own, and np.matrix crashes numpy below
    if array.dtype != np.uint8:
        hint = "; for values in [0, 1]: (255 * x).round().astype('uint8')" if array.dtype.kind == "f" else ""
        raise ImageError(f"the array has dtype {array.dtype}, expected uint8 with values 0 to 255{hint}")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        hint = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = "; channels come last: array.transpose(1, 2, 0)"
        elif array.ndim == 4:
            hint = "; pass the images of a batch as a list"
        raise ImageError(f"the array has shape {array.shape}, expected (h, w), (h, w, 3) RGB or (h, w, 4) RGBA{hint}")
    check_size(array.shape[1], array.shape[0], max_pixels, "the array")
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    elif array.shape[2] == 4:
        from PIL import Image

        array = np.asarray(_over_white(Image.fromarray(np.ascontiguousarray(array))))
    return np.ascontiguousarray(array)


def _from_file(file: IO[bytes], name: str, max_pixels: int) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    _register_plugins()
    try:
        file = _rewound(file)
        _check_head(file, name)
        opened = Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageTooLargeError(
            f"{name} has more pixels than Pillow accepts ({exc}): scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS "
            "as well as max_pixels"
        ) from exc
    except ImageError:
        raise
    except UnidentifiedImageError as exc:
        if "HEIF" not in Image.OPEN and _is_heif(file):
            raise ImageError(
                f"{name} is a HEIC picture, as phones take them, which Pillow does not read by itself: "
                "pip install 'odise_rt[heif]', or save it as JPEG"
            ) from exc
        raise ImageError(f"{name} is not an image, or of an unknown format: expected {_format_list()}") from exc
    except Exception as exc:  # Pillow's format plugins raise many kinds for files that are not what they seem
        raise ImageError(
            f"{name} is not an image that can be read ({first_line(exc)}): expected {_format_list()}"
        ) from exc
    with opened:
        check_size(opened.width, opened.height, max_pixels, name)
        if opened.format == "TIFF":
            _check_tiles(cast("TiffImageFile", opened), max_pixels, name)
        return _decode(opened, name, upright=True)


def _rewound(file: IO[bytes]) -> IO[bytes]:
    """The file at its start; what cannot go back, like a pipe, is read whole."""
    try:
        file.seek(0)
    except (AttributeError, io.UnsupportedOperation):
        return io.BytesIO(file.read())
    return file


def _check_head(file: IO[bytes], name: str) -> None:
    """Refuse files that are made to cost far more time than their bytes and pixels do."""
    start = file.read(3)
    if start == b"\xff\xd8\xff":
        _check_jpeg(file, name)
    elif start[:1] == b"P" and start[1:2] in _PPM_KINDS:
        _check_ppm(file, name)


def _check_jpeg(file: IO[bytes], name: str) -> None:
    """Count the scans of a JPEG: each one costs a pass over the whole picture, however few bytes it has."""
    scans = 0
    for segments, marker in enumerate(_jpeg_markers(file), 1):
        scans += marker == _SCAN
        if scans > MAX_JPEG_SCANS or segments > MAX_JPEG_SEGMENTS:
            raise ImageError(
                f"{name} is a JPEG of more than {MAX_JPEG_SCANS} scans or {MAX_JPEG_SEGMENTS:,} segments, far more "
                "than pictures have: save it again"
            )


def _jpeg_markers(file: IO[bytes]) -> Iterator[int]:
    """Second bytes of the markers with a length up to the end of the first picture, as a decoder meets them."""
    start, at = 2, 0  # of the piece in the file, behind the mark of the start, and in the piece
    file.seek(start)
    piece = file.read(_PIECE)
    while len(piece) >= 4:
        found = _JPEG_MARKER.search(piece, at)
        if found is None or found.end() + 2 > len(piece):
            start += found.start() if found else max(at, len(piece) - 1)  # the last byte may begin a marker
            at = 0
            file.seek(start)
            piece = file.read(_PIECE)
            continue
        marker, length = piece[found.end() - 1], int.from_bytes(piece[found.end() : found.end() + 2], "big")
        if marker in _ENDS or length < 2:
            return
        yield marker
        at = found.end() + length


def _check_ppm(file: IO[bytes], name: str) -> None:
    """Bound the header of a PPM, which may hold comments of any length, and which Pillow reads byte by byte."""
    file.seek(0)
    head = file.read(_PIECE)
    if len(head) < _PIECE:
        return
    text = re.sub(rb"#[^\r\n]*[\r\n]?", b"", head)
    numbers = 2 if head[1:2] in b"14" else 3
    if not re.match(rb"\S+(?:\s+\S+){%d}\s" % numbers, text):
        raise ImageError(f"{name} is a PPM whose header has more than {_PIECE >> 10} KiB: take the comments out of it")


@functools.cache
def _register_plugins() -> None:
    """Register Pillow's own formats, and HEIF if its package is there and nobody has registered another one."""
    from PIL import Image

    Image.init()
    if "HEIF" not in Image.OPEN:
        with contextlib.suppress(ImportError):
            from pi_heif import register_heif_opener

            register_heif_opener()


def _is_heif(file: IO[bytes]) -> bool:
    with contextlib.suppress(OSError, ValueError):
        file.seek(0)
        head = file.read(12)
        return head[4:8] == b"ftyp" and head[8:] in _HEIF_BRANDS
    return False


def _decode(image: Image.Image, name: str, upright: bool) -> np.ndarray:
    """Pixels of an opened image as RGB uint8."""
    try:
        image.load()
        if upright:
            image = _upright(image)
        return np.ascontiguousarray(np.asarray(_to_rgb(image, name)))
    except ImageError:
        raise
    except MemoryError as exc:
        raise OutOfMemoryError(
            f"memory ran out while {name} ({image.width} x {image.height}) was decoded: scale it down, or free memory"
        ) from exc
    except Exception as exc:  # as above: truncated or corrupt data surfaces as many kinds of exception
        raise ImageError(f"{name} is truncated or broken ({first_line(exc)}): save or download it again") from exc


def _upright(image: Image.Image) -> Image.Image:
    """The image turned by its EXIF orientation. No more of EXIF is read: cameras write much that breaks its rules."""
    from PIL import ExifTags, Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as exc:  # of many kinds, like those of image data
        logger.info("the EXIF data cannot be read (%s): the image is taken as upright", first_line(exc))
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError(f"{name} holds floating point values: save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # I;16 and its byte orders; plain I where Pillow widens 16-bit files
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65_535:
            raise ImageError(f"{name} holds 32-bit values: save it with 8 or 16 bits a channel")
        grey = (values >> 8).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255  # over white, as the others
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _over_white(image.convert("RGBA"))
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    background = Image.new("RGBA", image.size, (255, 255, 255, 255))
    background.alpha_composite(image)
    return background.convert("RGB")


def check_size(width: int, height: int, max_pixels: int, name: str) -> None:
    """Check the size of an image, called ``name`` in errors, before work is done for it.

    Raises:
        ImageError: it has no pixels.
        ImageTooLargeError: it has more than ``max_pixels`` pixels, or more than ``MAX_IMAGE_EDGE`` along an edge.
    """
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height}): expected at least 1 x 1")
    if max(width, height) > MAX_IMAGE_EDGE:
        raise ImageTooLargeError(
            f"{name} has {width} x {height} pixels, at most {MAX_IMAGE_EDGE:,} are accepted along an edge: scale it "
            "down, or cut it into parts"
        )
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{name} has {width} x {height} = {width * height / 1e6:.1f} megapixels, at most {max_pixels / 1e6:.1f} "
            "are accepted: scale it down, or raise max_pixels (SegmentOptions, --max-pixels)"
        )


def _check_tiles(image: TiffImageFile, max_pixels: int, name: str) -> None:
    """Check the tiles of a TIFF: libtiff unpacks whole ones, however small the image is."""
    from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH

    tags = _tiff_tags(image)
    if TILEWIDTH not in tags and TILELENGTH not in tags:
        return
    width, length = image.tag_v2.get(TILEWIDTH), image.tag_v2.get(TILELENGTH)
    # Of a tag that is there twice libtiff takes the first one, Pillow the last.
    if len(set(tags)) < len(tags) or not isinstance(width, int) or not isinstance(length, int):
        raise ImageError(f"{name} is broken (its tiles have no certain size): save or download it again")
    check_size(width, length, max_pixels, f"a tile of {name}")


def _tiff_tags(image: TiffImageFile) -> list[int]:
    """The numbers of the tags of its first image, as they lie in the file; Pillow leaves some out."""
    file = image.fp
    assert file is not None
    order: Literal["little", "big"] = "little" if image.tag_v2.prefix == b"II" else "big"
    file.seek(2)
    count_size, entry_size = (8, 20) if int.from_bytes(file.read(2), order) == 43 else (2, 12)  # 43: BigTIFF
    file.seek(image.tag_v2.offset)
    tags: list[int] = []
    for _ in range(int.from_bytes(file.read(count_size), order)):
        entry = file.read(entry_size)
        if len(entry) < entry_size:
            break
        tags.append(int.from_bytes(entry[:2], order))
    return tags


def _format_list() -> str:
    return "JPEG, PNG, WebP, AVIF, TIFF, GIF, BMP, PPM or JPEG 2000"


def network_size(height: int, width: int, short_edge: int, long_edge: int) -> tuple[int, int]:
    """Height and width at which the network sees an image.

    The shorter edge becomes ``short_edge``, unless the longer one would then exceed ``long_edge``; fractions are
    rounded by ``int(x + 0.5)``, and no edge becomes less than one pixel.
    """
    scale = short_edge / min(height, width)
    new_h, new_w = (short_edge, scale * width) if height < width else (scale * height, short_edge)
    if max(new_h, new_w) > long_edge:
        scale = long_edge / max(new_h, new_w)
        new_h, new_w = new_h * scale, new_w * scale
    return max(1, int(new_h + 0.5)), max(1, int(new_w + 0.5))


def padded_size(size: tuple[int, int], size_divisor: int) -> tuple[int, int]:
    """Height and width of the canvas that an image of ``size`` is padded to."""
    return -(-size[0] // size_divisor) * size_divisor, -(-size[1] // size_divisor) * size_divisor


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A uint8 (h, w, 3) image at the test size by PIL's bilinear filter; the image itself if it has that size."""
    if pixels.shape[:2] == size:
        return pixels
    from PIL import Image

    return np.array(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def prepare(pixels: np.ndarray, size: tuple[int, int], size_divisor: int) -> PreparedImage:
    """Resize, scale to [0, 1] and pad.

    Args:
        pixels: uint8 (h, w, 3) RGB.
        size: height and width of the test size.
        size_divisor: the padded edges are multiples of it.
    """
    original = pixels.shape[:2]
    pixels = resize(pixels, size)
    height, width = size
    padded_h, padded_w = padded_size(size, size_divisor)
    canvas = np.zeros((1, 3, padded_h, padded_w), np.float32)
    inside = canvas[:, :, :height, :width]
    np.divide(pixels.transpose(2, 0, 1)[None], np.float32(255), out=inside, dtype=np.float32)
    image = canvas if (padded_h, padded_w) == size else np.ascontiguousarray(inside)
    return PreparedImage(canvas, image, (original[0], original[1]))
