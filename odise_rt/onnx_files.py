"""Which weight files an ONNX graph names, without the package onnx: an engine reads whatever its graph names.

A graph is a protobuf message. Only messages that can hold a tensor are entered, and everything else, weights above all,
is skipped by its length, so that the time for a graph grows with its nodes and not with its weights. Where readers of
protobuf differ in what they take, this one refuses, or takes all.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from odise_rt.errors import BundleError

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5

# Message to its fields that lead to tensors, by their numbers in onnx.proto3. All of them are messages themselves.
_TENSOR, _ENTRY = "TensorProto", "StringStringEntryProto"
_LEADING: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: _TENSOR, 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: _TENSOR, 6: "GraphProto", 10: _TENSOR, 11: "GraphProto", 22: "SparseTensorProto", 23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: _TENSOR, 2: _TENSOR},
    _TENSOR: {13: _ENTRY},
}  # fmt: skip
_KEY, _VALUE = 1, 2
Bytes = bytes | mmap.mmap


def external_files(path: Path) -> set[str]:
    """The locations of external data in an ONNX file, relative to its folder, as they are written in it.

    Tensors are looked for wherever a graph may hold them: initializers, sparse ones as well, attributes, subgraphs,
    functions and training graphs.

    Raises:
        BundleError: the file is no ONNX graph.
    """
    with path.open("rb") as file:
        if path.stat().st_size == 0:  # which cannot be mapped
            return set()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _locations(content)
            except ValueError as exc:
                raise BundleError(
                    f"{path} is no ONNX graph ({exc}): copy the bundle again, or export it again"
                ) from exc


def _locations(content: Bytes) -> set[str]:
    """Walk a ModelProto; raises :class:`ValueError` for what is none."""
    found: set[str] = set()
    pending = [("ModelProto", 0, len(content))]
    while pending:
        message, start, end = pending.pop()
        if message == _ENTRY:
            texts: dict[int, list[bytes]] = {_KEY: [], _VALUE: []}
            for number, begin, stop in _fields(content, start, end):
                texts.get(number, []).append(content[begin:stop])
            if b"location" in texts[_KEY]:  # parsers take the last of several; all of them are taken here
                found.update(value.decode() for value in texts[_VALUE])
            continue
        leading = _LEADING[message]
        for number, begin, stop in _fields(content, start, end):
            if number in leading:
                pending.append((leading[number], begin, stop))
    return found


def _fields(content: Bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that have a length: number, and where their content starts and ends."""
    place = start
    while place < end:
        tag = content[place]
        place += 1
        if tag >= 0x80:
            tag, place = _varint(content, place - 1, end)
        number, kind = tag >> 3, tag & 7
        if number == 0 or tag >= 1 << 32:  # other readers would take the lower 32 bits of such a tag
            raise ValueError(f"a field of number {number} at byte {place}")
        if kind == _LENGTH:
            size = content[place] if place < end else 0x80
            place += 1
            if size >= 0x80:
                size, place = _varint(content, place - 1, end)
            if size > end - place:
                raise ValueError(f"a field at byte {place} that is longer than what it lies in")
            yield number, place, place + size
            place += size
        elif kind == _VARINT:
            _, place = _varint(content, place, end)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            place += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of kind {kind} at byte {place}")
    if place != end:
        raise ValueError(f"a field that ends behind byte {end}")


def _varint(content: Bytes, place: int, end: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            break
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError(f"a number without an end at byte {place}")
