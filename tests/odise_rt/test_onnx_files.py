"""The weight files that a graph names are found wherever a graph may name them, on graphs of the package onnx."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from odise_rt import onnx_files
from odise_rt.errors import BundleError
from odise_rt.onnx_files import external_files


def outside(location: str) -> TensorProto:
    """A tensor whose values lie in another file."""
    tensor = TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[2, 3])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "4096"), ("length", "24")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def sparse(location: str) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=outside(location), indices=outside(f"{location}.indices"), dims=[9])


def graph(*nodes: onnx.NodeProto, initializers: tuple[TensorProto, ...] = ()) -> onnx.GraphProto:
    return helper.make_graph(nodes, "g", [], [], list(initializers))


def constant(location: str) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=outside(location))


def model() -> onnx.ModelProto:
    return helper.make_model(graph(constant("constant.bin"), initializers=(outside("weights.data"),)))


def in_sparse_initializer(m: onnx.ModelProto) -> None:
    m.graph.sparse_initializer.append(sparse("new"))


def in_sparse_attribute(m: onnx.ModelProto) -> None:
    m.graph.node.append(helper.make_node("Constant", [], ["c"], sparse_value=sparse("new")))


def in_lists_of_tensors(m: onnx.ModelProto) -> None:
    m.graph.node.append(helper.make_node("Mine", [], ["c"], tensors=[outside("other"), outside("new")]))


def in_lists_of_graphs(m: onnx.ModelProto) -> None:
    m.graph.node.append(helper.make_node("Mine", [], ["c"], graphs=[graph(), graph(constant("new"))]))


def in_branches(m: onnx.ModelProto) -> None:
    loop = helper.make_node("Loop", ["n", "t"], ["x"], body=graph(initializers=(outside("new"),)))
    m.graph.node.append(helper.make_node("If", ["c"], ["x"], then_branch=graph(loop), else_branch=graph()))


def in_a_function(m: onnx.ModelProto) -> None:
    m.functions.append(helper.make_function("d", "f", [], ["c"], [constant("new")], []))


def in_a_default_of_a_function(m: onnx.ModelProto) -> None:
    default = helper.make_attribute("value", outside("new"))
    m.functions.append(helper.make_function("d", "f", [], [], [], [], attribute_protos=[default]))


def in_training(m: onnx.ModelProto) -> None:
    m.training_info.add(algorithm=graph(constant("other")), initialization=graph(constant("new")))


PLACES = [
    in_sparse_initializer, in_sparse_attribute, in_lists_of_tensors, in_lists_of_graphs, in_branches, in_a_function,
    in_a_default_of_a_function, in_training,
]  # fmt: skip


def locations(tmp_path: Path, content: bytes) -> set[str]:
    path = tmp_path / "graph.onnx"
    path.write_bytes(content)
    return external_files(path)


@pytest.mark.parametrize("put", PLACES)
def test_weights_are_found_wherever_a_graph_names_them(tmp_path: Path, put: Callable[[onnx.ModelProto], None]) -> None:
    made = model()
    assert locations(tmp_path, made.SerializeToString()) == {"constant.bin", "weights.data"}
    put(made)
    found = locations(tmp_path, made.SerializeToString())
    assert {"constant.bin", "weights.data", "new"} <= found <= {
        "constant.bin", "weights.data", "new", "new.indices", "other",
    }  # fmt: skip


def test_no_field_that_leads_to_a_tensor_is_left_out() -> None:
    """What onnx may add to its messages, and a newer ONNX Runtime read, must not be missed here."""
    known = onnx_files._LEADING
    for message, leading in known.items():
        fields = getattr(onnx, message).DESCRIPTOR.fields
        expected = {f.number: f.message_type.name for f in fields if f.message_type and f.message_type.name in known}
        if message == "TensorProto":
            expected[13] = "StringStringEntryProto"  # elsewhere those are metadata
        assert leading == expected, message


def test_weights_inside_the_graph_are_not_read(tmp_path: Path) -> None:
    made = model()
    large = made.graph.initializer.add(name="large", data_type=TensorProto.FLOAT, dims=[12_000_000])
    large.raw_data = bytes(48 << 20)
    path = tmp_path / "graph.onnx"
    path.write_bytes(made.SerializeToString())
    started = time.perf_counter()
    assert external_files(path) == {"constant.bin", "weights.data"}
    assert time.perf_counter() - started < 1.0


def test_a_second_location_of_a_tensor_is_found(tmp_path: Path) -> None:
    """Parsers take the last value of a field that comes twice, and merge messages that do."""
    made = model()
    entry = made.graph.initializer[0].external_data.add(key="location", value="second")
    assert entry.SerializeToString() == b"\x0a\x08location\x12\x06second"
    content = made.SerializeToString()
    twice = content + helper.make_model(graph(constant("merged"))).SerializeToString()
    assert locations(tmp_path, twice) == {"constant.bin", "weights.data", "second", "merged"}


@pytest.mark.parametrize(
    "content",
    [
        b"no graph",
        b"\x3a",  # a graph without a length
        b"\x3a\x05ab",  # shorter than its length
        b"\x3a\x80",
        b"\x3a\x03\x0a\x02a",  # a node longer than its graph
        b"\x08" + b"\xff" * 11,
        b"\x00\x01",
        b"\x0b\x0c",  # a group
        b"\x0d\x01",
        # A tag beyond 32 bits, of which other readers see the lower ones: field 7.
        b"\xba\x80\x80\x80\x10\x00",
        b"\x3a\x0e\x2a\x0c\x6a\x0a\x0a\x08location"[:-1],
        model().SerializeToString().replace(b"location\x12\x0cconstant.bin", b"location\x12\x0cconstant.\xff\xfe\xfd"),
    ],
)
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BundleError, match=r"graph\.onnx is no ONNX graph"):
        locations(tmp_path, content)


def test_an_empty_file_names_nothing(tmp_path: Path) -> None:
    assert locations(tmp_path, b"") == set()


@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
def test_altered_graphs_name_at_least_what_protobuf_reads(place: int, value: int) -> None:
    made = model()
    in_branches(made)
    content = bytearray(made.SerializeToString())
    content[place % len(content)] = value
    try:
        read = onnx.ModelProto.FromString(bytes(content))
    except Exception:
        return
    expected = {
        entry.value
        for tensor in onnx.external_data_helper._get_all_tensors(read)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    try:
        found = onnx_files._locations(bytes(content))
    except ValueError:
        return
    assert expected <= found
