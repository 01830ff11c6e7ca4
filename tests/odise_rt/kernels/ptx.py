"""PTX, the assembly that nvcc makes of the kernels, read and run on the CPU.

A reader for what nvcc writes, and the machine of ``ptx_machine.cpp``, which says what is an error there. It is not a
GPU: what ptxas makes of PTX, the driver, and time are not seen. An instruction that is not known is an error.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OPERANDS = 16
FIELDS = (
    "op", "type", "from", "mode", "guard", "guard_negated", "target", "count", "registers", "negated", "line", "vector",
)  # fmt: skip
INSTRUCTION = np.dtype([(name, np.int32) for name in FIELDS] + [("operand", np.int64, OPERANDS)])
SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
BITS = {"b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64"}
BYTES = {"u8": 1, "u16": 2, "u32": 4, "s32": 4, "f32": 4, "u64": 8, "s64": 8, "f64": 8}
_ENTRY = re.compile(r"(\w+)\((.*?)\)(.*?)^\{(.*)^\}", re.DOTALL | re.MULTILINE)
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)")
_PLAIN = {"sync", "aligned", "lo", "uni", "cg", "L2::128B", "m8n8", "x4", "shared", "global", "to", "row", "col", "rn"}
"""Parts of a name that say no more than the rest does, or what the machine does anyway: round to the nearest."""


class PtxError(AssertionError):
    """A kernel did what it must not do, or PTX has something that is not written here."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A kernel."""

    name: str
    program: np.ndarray
    lines: tuple[str, ...]
    """Of the body: what ``program`` counts lines in, from 1."""
    registers: int
    parameters: tuple[tuple[int, int], ...]
    """Offset and bytes of each."""
    most_threads: int

    def changed(self, at: int, **fields: int) -> Entry:
        """The kernel with other fields of the instruction ``at``."""
        program = self.program.copy()
        for name, value in fields.items():
            program[at][name] = value
        return dataclasses.replace(self, program=program)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a launch did: the work of its warps."""

    instructions: dict[str, int]
    """By name; one of a whole warp counts once."""
    lanes: int
    """That did them."""
    requests: int
    """To global memory."""
    sectors: int
    """Of 32 bytes that those touched, each request by itself."""
    wavefronts: int
    """Times that shared memory was asked."""
    conflicts: int
    """Of those, the ones that bank conflicts cost."""
    executed: np.ndarray
    """How often warps did each instruction of the program."""

    @property
    def total(self) -> int:
        return sum(self.instructions.values())


class _Array(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("size", ctypes.c_uint64))


class _Options(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_int64 * 3), ("first_block", ctypes.c_int64), ("last_block", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("threads", "shared_bytes", "reversed", "watch", "approximate")),
    )  # fmt: skip


class Machine:
    """Runs kernels, one block after the other."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.ptx_op_name.restype = ctypes.c_char_p
        self._library.ptx_shared_base.restype = ctypes.c_uint64
        self.shared_base = int(self._library.ptx_shared_base())
        self.ops: list[str] = []
        while (name := self._library.ptx_op_name(len(self.ops))) is not None:
            self.ops.append(name.decode())

    def number(self, kind: str, name: str) -> int:
        """Of an ``op``, ``type`` or ``mode``.

        Raises:
            PtxError: the machine has none of this name.
        """
        found = int(getattr(self._library, f"ptx_{kind}")(name.encode()))
        if found < 0:
            raise PtxError(f"{kind} {name!r} is not written in ptx_machine.cpp")
        return found

    def run(
        self,
        entry: Entry,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Any],
        arrays: Sequence[np.ndarray],
        *,
        blocks: tuple[int, int] = (0, -1),
        backwards: bool = False,
        watch: bool = True,
        approximate: bool = True,
    ) -> Counts:
        """Launch a kernel.

        Args:
            entry: the kernel.
            grid: blocks along x, y and z.
            threads: of a block, along x.
            shared_bytes: of a block.
            arguments: pointers as int, numbers as numpy's.
            arrays: all the memory that it may touch.
            blocks: the first block to run and the one behind the last, counted along x, then y, then z.
            backwards: last block and last warp first.
            watch: look for races, which takes most of the time and 24 bytes of memory for each byte of an array.
            approximate: let approximate instructions be off by as much as they may be.

        Raises:
            PtxError: the launch does not fit the kernel, or the kernel did what it must not do.
        """
        if threads > entry.most_threads:
            raise PtxError(f"{entry.name} is launched with {threads} threads, and made for {entry.most_threads}")
        places = (_Array * len(arrays))(*((a.ctypes.data, a.nbytes) for a in arrays))
        options = _Options((ctypes.c_int64 * 3)(*grid), *blocks, threads, shared_bytes, backwards, watch, approximate)
        counted, report = (ctypes.c_int64 * (len(self.ops) + 5))(), ctypes.create_string_buffer(500)
        program, executed = np.ascontiguousarray(entry.program), np.zeros(len(entry.program), np.int64)
        problems = self._library.ptx_run(
            ctypes.c_void_p(program.ctypes.data), len(program), entry.registers, _packed(entry, arguments), places,
            len(arrays), ctypes.byref(options), counted, ctypes.c_void_p(executed.ctypes.data), report, len(report),
        )  # fmt: skip
        if problems:
            text = report.value.decode()
            line = int(text.removeprefix("line ").partition(":")[0])
            shown = entry.lines[line - 1].strip() if line else ""
            raise PtxError(f"{entry.name}, {text}\n    {shown}")
        by_name = {name: counted[i] for i, name in enumerate(self.ops) if counted[i]}
        return Counts(by_name, *counted[len(self.ops) :], executed)


def _packed(entry: Entry, arguments: Sequence[Any]) -> bytes:
    """Arguments as the kernel's parameters lie."""
    if len(arguments) != len(entry.parameters):
        raise PtxError(f"{entry.name} takes {len(entry.parameters)} arguments and was given {len(arguments)}")
    end = max(offset + size for offset, size in entry.parameters)
    packed = bytearray(end)
    for number, (value, (offset, size)) in enumerate(zip(arguments, entry.parameters, strict=True)):
        stored = np.uint64(value) if isinstance(value, int) else value
        if stored.dtype.itemsize != size:
            raise PtxError(f"argument {number} of {entry.name} has {size} bytes and was given as {value!r}")
        packed[offset : offset + size] = stored.tobytes()
    return bytes(packed)


class Reader:
    """Entries of a PTX file, each read when it is asked for."""

    def __init__(self, text: str, machine: Machine) -> None:
        self.machine = machine
        entries = (_ENTRY.match(part) for part in text.split(".visible .entry ")[1:])
        self._texts = {found[1]: found for found in entries if found}
        self._read: dict[str, Entry] = {}

    @property
    def names(self) -> list[str]:
        return list(self._texts)

    def entry(self, name: str) -> Entry:
        """A kernel by its name.

        Raises:
            PtxError: there is none, or something in it is not known here.
        """
        if name not in self._texts:
            raise PtxError(f"there is no kernel {name}, only {', '.join(self._texts)}")
        if name not in self._read:
            _, parameters, directives, body = self._texts[name].groups()
            self._read[name] = _Body(self.machine, name, parameters, directives, body).entry()
        return self._read[name]


class _Body:
    """Reads one kernel."""

    def __init__(self, machine: Machine, name: str, parameters: str, directives: str, body: str) -> None:
        self._machine, self._name = machine, name
        self._registers: dict[str, int] = {}
        self._declared: set[str] = set()
        """Registers of inline assembly, whose names have no percent sign."""
        self._lines = tuple(body.splitlines())
        self._symbols: dict[str, int] = {"shared_memory": machine.shared_base}
        self._parameters: list[tuple[int, int]] = []
        offset = 0
        for kind, symbol in re.findall(r"\.param \.(\w+).*?(\w+_param_\d+)", parameters):
            size = BYTES[kind]
            offset = -(-offset // size) * size
            self._parameters.append((offset, size))
            self._symbols[symbol] = offset
            offset += size
        limit = re.search(r"\.maxntid (\d+)", directives)
        self._most_threads = int(limit[1]) if limit else 1024

    def entry(self) -> Entry:
        """What the text says."""
        statements = list(self._statements())
        labels = {text: at for at, text, _ in statements if text.endswith(":")}
        count = 0
        for label in labels:  # a label's place is that of the instruction after it
            labels[label] = sum(1 for at, text, _ in statements if at < labels[label] and not text.endswith(":"))
        program = []
        for _, text, line in statements:
            if not text.endswith(":"):
                count += 1
                try:
                    program.append(self._instruction(text, line, labels))
                except (PtxError, KeyError, ValueError) as exc:
                    raise PtxError(f"{self._name}, line {line}: {text!r} is not understood: {exc}") from exc
        rows = np.zeros(len(program), INSTRUCTION)
        for row, fields in zip(rows, program, strict=True):
            for name, value in fields.items():
                if name != "operand":
                    row[name] = value
            row["operand"][: len(fields["operand"])] = fields["operand"]
        return Entry(self._name, rows, self._lines, len(self._registers), tuple(self._parameters), self._most_threads)

    def _statements(self) -> Iterator[tuple[int, str, int]]:
        """Number, text and line of every label and instruction. Braces of scopes mean nothing: names differ."""
        number = 0
        for line, text in enumerate(self._lines, 1):
            text = text.partition("//")[0].strip()
            text = re.sub(r"^\{\s*(?=[a-z.])|(?<=;)\s*\}$", "", text)
            for part in filter(None, (part.strip() for part in text.split(";"))):
                if part[0] == ".":
                    self._declared.update(re.findall(r"^\.reg \.\w+ (\w+)$", part))
                elif part not in "{}":
                    yield number, part, line
                    number += 1

    def _instruction(self, text: str, line: int, labels: dict[str, int]) -> dict[str, Any]:
        found = _STATEMENT.fullmatch(text)
        if found is None:
            raise PtxError("it has no form that is known")
        negated, guard, name, rest = found.groups()
        machine = self._machine
        fields: dict[str, Any] = {"guard": -1, "vector": 1, "line": line, "operand": []}
        if guard:
            fields |= {"guard": self._register(guard), "guard_negated": negated == "!"}
        parts = name.split(".")
        if parts[0] == "bra":
            return fields | {"op": machine.number("op", "bra"), "target": labels[f"{rest}:"]}
        operands = list(_split(rest))
        op, types, mode = _meaning(parts, operands)
        if (vector := next((p for p in parts if re.fullmatch(r"v\d", p)), None)) is not None:
            fields["vector"] = int(vector[1:])
        fields["op"], fields["mode"] = machine.number("op", op), machine.number("mode", mode)
        for field, kind in zip(("type", "from"), types, strict=False):
            fields[field] = machine.number("type", BITS.get(kind, kind))
        registers = inverted = 0
        for i, operand in enumerate(self._flat(operands, op)):
            kind, value = operand
            registers |= (kind != "number") << i
            inverted |= (kind == "not") << i
            fields["operand"].append(value)
        return fields | {"count": len(fields["operand"]), "registers": registers, "negated": inverted}

    def _flat(self, operands: list[str], op: str) -> Iterator[tuple[str, int]]:
        """Operands one by one; an address is a base and an offset."""
        for text in operands:
            if text[0] == "{":
                yield from self._flat(list(_split(text[1:-1])), op)
            elif text[0] == "[":
                base, _, offset = text[1:-1].partition("+")
                if op == "ld.param":
                    yield "number", self._symbols[base]
                else:
                    yield self._operand(base)
                    yield "number", int(offset or 0)
            elif "|" in text:
                yield from (self._operand(part) for part in text.split("|"))
            elif op == "special" and text in SPECIAL:
                yield "number", SPECIAL.index(text)
            else:
                yield self._operand(text)

    def _operand(self, text: str) -> tuple[str, int]:
        if text == "_":
            return "register", -1
        if text[0] == "!":
            return "not", self._register(text[1:])
        if text[0] == "%" or text in self._declared:
            return "register", self._register(text)
        if text in self._symbols:
            return "number", self._symbols[text]
        if text[:2] in ("0f", "0F", "0d", "0D"):
            value = int(text[2:], 16)
            return "number", value - (1 << 64) if value >> 63 else value
        return "number", int(text, 0)

    def _register(self, name: str) -> int:
        return self._registers.setdefault(name, len(self._registers))


def _split(text: str) -> Iterator[str]:
    """Operands between commas; those in braces stay together."""
    yield from (part.strip() for part in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,{}\[\]]+", text) if part.strip())


def _meaning(parts: list[str], operands: list[str]) -> tuple[str, list[str], str]:
    """What the machine calls an instruction, its types, and what more there is to say about it."""
    head, rest = parts[0], [p for p in parts[1:] if p not in _PLAIN and not re.fullmatch(r"v\d", p)]
    if head == "mov":
        if operands[0][0] == "{":
            return "unpack", rest, ""
        if operands[1][0] == "{":
            return "pack", rest, ""
        return ("special" if operands[1] in SPECIAL else "mov"), rest, ""
    if head == "cvta":
        return "mov", rest, ""
    if head in ("ld", "st", "atom"):
        space = ".".join(p for p in parts[1:] if p in ("param", "global", "shared", "nc"))
        kinds = [p for p in rest if p not in ("param", "nc")]
        return f"{head}.{space}", kinds[-1:], kinds[0] if head == "atom" else ""
    if head == "mul" and "wide" in rest:
        return "mul.wide", rest[1:], ""
    if head in ("mul", "mad"):
        return f"{head}.lo", rest, ""
    if head in ("setp", "set"):
        return head, rest[1:], rest[0]
    if head == "mma":
        shape, _, kind, *_ = rest
        return "mma", ["f32", kind], {"m16n8k16": "k16", "m16n8k8": "k8"}[shape]
    if head == "shfl":
        return "shfl.sync", rest[1:], rest[0]
    if head == "redux":
        return "redux.sync", rest[1:], rest[0]
    if head == "cp":
        return ".".join(["cp", "async", *(p for p in rest if p != "async")]), [], ""
    named = {"vote": "vote.sync.ballot", "bar": "bar.sync", "bfind": "bfind.shiftamt", "ex2": "ex2.approx"}
    kinds = [p for p in rest if BITS.get(p, p) in BYTES or p in ("pred", "s8", "s16", "f16", "bf16")]
    modes = [p for p in rest if p not in kinds and p not in ("ballot", "shiftamt", "approx")]
    if len(modes) > 1:
        raise PtxError(f"{' and '.join(modes)} together are not written here")
    return named.get(head, head), kinds, modes[0] if modes else ""
