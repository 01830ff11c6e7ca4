"""Request bodies, read into memory piece by piece and never further than allowed.

Frameworks spool large parts of a form to temporary files; here nothing of a request touches the disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from odise_rt.serve.fields import IMAGE
from odise_rt.serve.limits import Limits
from odise_rt.serve.problems import RequestRefused

MAX_PARTS = 32
_RAW_TYPES = ("image/", "application/octet-stream")


async def read_upload(
    body: AsyncIterator[bytes], content_type: str, content_length: str | None, limits: Limits
) -> tuple[bytes, list[tuple[str, str]]]:
    """Read the body of a request.

    Args:
        body: its pieces as they come.
        content_type: value of the header.
        content_length: value of the header, if there was one.
        limits: of the server.

    Returns:
        The encoded image, and the other fields of a form.

    Raises:
        RequestRefused: it is too large, too slow, of another type or malformed.
    """
    kind = content_type.split(";")[0].strip().lower()
    form = _Form(content_type) if kind == "multipart/form-data" else None
    if form is None and not kind.startswith(_RAW_TYPES):
        raise RequestRefused(
            "unsupported_media_type",
            f"the body is {kind[:60] or 'of no type'!r}: expected multipart/form-data with a part '{IMAGE}', or an "
            "image/* or application/octet-stream body with the other fields in the query",
        )
    if content_length is not None and content_length.isdecimal() and int(content_length) > limits.max_request_bytes:
        raise _too_large(limits)
    try:
        raw = await asyncio.wait_for(_collect(body, form, limits), limits.upload_timeout)
    except asyncio.TimeoutError:
        raise RequestRefused(
            "slow_upload", f"the upload took more than {limits.upload_timeout:g} s: send it faster, or a smaller image"
        ) from None
    if form is None:
        if not raw:
            raise RequestRefused("bad_request", "the body is empty: expected an encoded image")
        return raw, []
    return form.finish()


async def _collect(body: AsyncIterator[bytes], form: _Form | None, limits: Limits) -> bytes:
    raw, size = bytearray(), 0
    async for piece in body:
        size += len(piece)
        if size > limits.max_request_bytes:
            raise _too_large(limits)
        if form is None:
            raw += piece
        else:
            form.feed(piece)
    return bytes(raw)


def _too_large(limits: Limits) -> RequestRefused:
    return RequestRefused(
        "request_too_large", f"the request has more than {limits.max_request_bytes:,} bytes: send a smaller image"
    )


class _Form:
    """A multipart form, parsed as it comes in."""

    def __init__(self, content_type: str) -> None:
        from python_multipart.multipart import FormParserError, MultipartParser, parse_options_header

        self._error = FormParserError
        _, parameters = parse_options_header(content_type)
        boundary = parameters.get(b"boundary")
        if not boundary or len(boundary) > 200:
            raise RequestRefused("bad_request", "the form has no boundary: let your HTTP client set Content-Type")
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_end": self._finished,
        }
        self._parser = MultipartParser(boundary, callbacks)
        self._parse_options = parse_options_header
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._name = ""
        self._content = bytearray()
        self._image: bytes | None = None
        self._fields: list[tuple[str, str]] = []
        self._parts = 0
        self._complete = False

    def feed(self, piece: bytes) -> None:
        """Parse the next piece of the body."""
        try:
            self._parser.write(piece)
        except self._error as exc:
            raise _malformed(str(exc)) from exc

    def finish(self) -> tuple[bytes, list[tuple[str, str]]]:
        """Image and fields, once the body has ended."""
        try:
            self._parser.finalize()
        except self._error as exc:
            raise _malformed(str(exc)) from exc
        if not self._complete:
            raise _malformed("it ends before its closing boundary")
        if not self._image:
            raise RequestRefused("bad_request", f"the form has no part '{IMAGE}', or an empty one: attach an image")
        return self._image, self._fields

    # ---- what the parser calls -------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise RequestRefused("bad_request", f"the form has more than {MAX_PARTS} parts")
        self._disposition, self._content = b"", bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _header_end(self) -> None:
        if bytes(self._header[0]).lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        _, parameters = self._parse_options(self._disposition)
        self._name = parameters.get(b"name", b"").decode("utf-8", "replace")
        if not self._name:
            raise _malformed("a part has no name")

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._content += data[start:end]

    def _end(self) -> None:
        if self._name == IMAGE:
            if self._image is not None:
                raise RequestRefused("bad_request", f"the form has several parts '{IMAGE}': send one image a request")
            self._image = bytes(self._content)
            return
        try:
            self._fields.append((self._name, self._content.decode("utf-8")))
        except UnicodeDecodeError as exc:
            raise _malformed(f"the part {self._name[:40]!r} is not UTF-8 text") from exc

    def _finished(self) -> None:
        self._complete = True


def _malformed(reason: str) -> RequestRefused:
    return RequestRefused("bad_request", f"the form is malformed ({reason}): let your HTTP client build it")
