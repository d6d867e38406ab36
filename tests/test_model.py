"""Reading models: every source, external data, functions, and files that are none."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import CONVOLUTIONAL, NEWEST, float32, model
from onnx import TensorProto, helper, numpy_helper, parser

from rectgrad_ref.errors import InvalidModel
from rectgrad_ref.graph import freeze
from rectgrad_ref.model import OLDEST_OPSET, read_model
from rectgrad_ref.plan import make_plan

DENSE = "(float[N, 3] x) => (float[N, 4] y) { z = MatMul(x, W)  y = Softmax(z) }"
WEIGHTS = float32(3, 4)


def dense(opset: int = NEWEST) -> onnx.ModelProto:
    return model(DENSE, opset=opset, constants={"W": WEIGHTS})


def external(
    folder: Path,
    location: str,
    *,
    length: int = WEIGHTS.nbytes,
    offset: int = 0,
    where: str = "initializer",
) -> Path:
    """`dense`, with the weights in the file `location`; returns the model's path."""
    proto = dense()
    del proto.graph.initializer[:]
    tensor = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=WEIGHTS.shape)
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": location, "offset": str(offset), "length": str(length)}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    if where == "initializer":
        proto.graph.initializer.append(tensor)
    elif where == "constant":
        proto.graph.node.insert(0, helper.make_node("Constant", [], ["W"], value=tensor))
    else:
        body = [helper.make_node("Constant", [], ["w"], value=tensor)]
        opset = [helper.make_opsetid("", NEWEST)]
        proto.functions.append(helper.make_function("own", "weights", [], ["w"], body, opset))
        proto.opset_import.append(helper.make_opsetid("own", 1))
        proto.graph.node.insert(0, helper.make_node("weights", [], ["W"], domain="own"))
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_path_bytes_and_proto_are_read_alike(tmp_path: Path) -> None:
    proto, path = dense(), tmp_path / "model.onnx"
    data = proto.SerializeToString()
    path.write_bytes(data)
    for source, name in ((path, str(path)), (str(path), str(path)), (data, "<bytes>")):
        read = read_model(source)
        assert (read.proto, read.name, read.opset) == (proto, name, NEWEST)
        assert read.sha256 == hashlib.sha256(data).hexdigest()
    assert read_model(proto).name == "<ModelProto>"
    assert read_model(path).path == path


def test_a_given_proto_is_left_as_it_is() -> None:
    proto = dense()
    before = proto.SerializeToString()
    read_model(proto).proto.graph.node[0].name = "changed"
    assert proto.SerializeToString() == before


def test_metadata() -> None:
    proto = dense()
    helper.set_model_props(proto, {"labels": "a,b"})
    assert read_model(proto).metadata == {"labels": "a,b"}


@pytest.mark.parametrize("data", [b"", b"\x00" * 50, b"\x89PNG\r\n\x1a\n", b"not a model"])
def test_not_an_onnx_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(InvalidModel, match=r"model\.onnx"):
        read_model(path)


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"cannot read .*missing"):
        read_model(tmp_path / "missing.onnx")
    with pytest.raises(InvalidModel, match="cannot read"):
        read_model(tmp_path)


def test_what_is_no_source() -> None:
    with pytest.raises(TypeError, match="got int"):
        read_model(3)  # type: ignore[arg-type]


def convolutional() -> bytes:
    constants = {"W": float32(2, 3, 3, 3), "V": float32(4, 8), "b": float32(4)}
    return model(CONVOLUTIONAL, constants=constants).SerializeToString()


def test_truncated_at_every_length() -> None:
    data = convolutional()
    assert make_plan(freeze(read_model(data), (2, 3, 6, 6)), ()).steps
    for length in range(len(data)):
        with pytest.raises(InvalidModel):
            read_model(data[:length])


@pytest.mark.parametrize("opset", [1, OLDEST_OPSET - 1, NEWEST + 1])
def test_opsets_too_old_or_new(opset: int) -> None:
    with pytest.raises(InvalidModel, match=f"uses opset {opset}; supported are 7 to {NEWEST}"):
        read_model(dense(opset))


def test_no_opset_and_no_nodes() -> None:
    proto = dense()
    del proto.opset_import[:]
    with pytest.raises(InvalidModel, match="imports no version"):
        read_model(proto)
    with pytest.raises(InvalidModel, match="no nodes"):
        read_model(onnx.ModelProto())


def test_the_default_domain_by_its_other_name() -> None:
    proto = dense()
    proto.opset_import[0].domain = proto.graph.node[0].domain = "ai.onnx"
    assert [node.op for node in freeze(read_model(proto), (2, 3)).nodes] == ["MatMul", "Softmax"]


@pytest.mark.parametrize("where", ["initializer", "constant", "function"])
@pytest.mark.parametrize("location", ["weights.bin", "sub/weights.bin", "./sub/../weights.bin"])
def test_external_data(tmp_path: Path, location: str, where: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / location).write_bytes(b"skip" + WEIGHTS.tobytes())
    graph = freeze(read_model(external(tmp_path, location, offset=4, where=where)), (2, 3))
    (constant,) = (c for c in graph.nodes[0].constants if c is not None)
    np.testing.assert_array_equal(constant, WEIGHTS)


@pytest.mark.parametrize("where", ["initializer", "constant", "function"])
def test_external_data_outside_the_folder_is_not_read(tmp_path: Path, where: str) -> None:
    folder, outside = tmp_path / "model", tmp_path / "weights.bin"
    folder.mkdir()
    outside.write_bytes(WEIGHTS.tobytes())
    (folder / "link.bin").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    for location in ("../weights.bin", str(outside), "link.bin", "up/weights.bin"):
        with pytest.raises(InvalidModel, match="outside the model's folder"):
            read_model(external(folder, location, where=where))


def test_external_data_missing_truncated_or_misdescribed(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"'weights\.bin' of 'W' is missing"):
        read_model(external(tmp_path, "weights.bin"))
    with pytest.raises(InvalidModel, match="is missing"):
        read_model(external(tmp_path, ""))
    (tmp_path / "weights.bin").write_bytes(WEIGHTS.tobytes()[:-1])
    with pytest.raises(InvalidModel, match="is truncated: 'W' ends at byte 48, the file at 47"):
        read_model(external(tmp_path, "weights.bin"))
    with pytest.raises(InvalidModel, match="damaged"):
        freeze(read_model(external(tmp_path, "weights.bin", length=44)), (2, 3))
    for bad in ({"length": -1}, {"offset": -4}, {"location": "a\0b"}):
        with pytest.raises(InvalidModel):
            read_model(external(tmp_path, **{"location": "weights.bin", **bad}))  # type: ignore[arg-type]


def test_external_data_that_many_weights_share(tmp_path: Path) -> None:
    """Two layers may share their weights; a file must not be multiplied by thousands of them."""
    (tmp_path / "weights.bin").write_bytes(WEIGHTS.tobytes())
    path = external(tmp_path, "weights.bin")
    proto = onnx.load(path, load_external_data=False)
    for copies in (1, 20):
        for i in range(copies):
            proto.graph.initializer.add().CopyFrom(proto.graph.initializer[0])
            proto.graph.initializer[-1].name = f"W{copies}/{i}"
        path.write_bytes(proto.SerializeToString())
        if copies == 1:
            assert len(read_model(path).initializers) == 2
    with pytest.raises(InvalidModel, match=r"many lie in the same place of 'weights\.bin'"):
        read_model(path)


def test_external_data_needs_a_path(tmp_path: Path) -> None:
    data = external(tmp_path, "weights.bin").read_bytes()
    for source in (data, onnx.load_model_from_string(data)):
        with pytest.raises(InvalidModel, match="only a model given by its path can have"):
            read_model(source)


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_functions_are_inlined(opset: int) -> None:
    """Also where they were written for another opset than the model."""
    text = f"""<ir_version: 8, opset_import: ["" : 18, "own" : 1]>
    g (float[N, 3] x) => (float[N, 3] y) {{ y = own.twice (x) }}
    <domain: "own", opset_import: ["" : {opset}]>
    twice (X) => (Y) {{ a = Relu (X)  Y = Add (a, a) }}"""
    graph = freeze(read_model(parser.parse_model(text)), (2, 3))
    assert [node.op for node in graph.nodes] == ["Relu", "Add"]


def test_a_damaged_constant() -> None:
    proto = model("(float[N, 3] x) => (float[N, 3] y) { y = Add (x, c) }")
    tensor = numpy_helper.from_array(float32(3))
    tensor.dims[0] = 4
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=tensor))
    with pytest.raises(InvalidModel, match="attribute of Constant 'c' is damaged"):
        freeze(read_model(proto), (2, 3))
