"""The models of ONNX's own backend tests that PyTorch exported, with their stored outputs.

Most were written for opset 6, before NumPy's broadcasting; ONNX's version converter brings them to
7, as the error for such a model advises.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
from node_cases import NodeCase
from onnx.backend.test.loader import load_model_tests
from onnx.version_converter import convert_version

from rectgrad_ref.model import OLDEST_OPSET

FOLDERS = {
    case.name: (Path(case.model_dir), case)
    for kind in ("pytorch-converted", "pytorch-operator")
    for case in load_model_tests(kind=kind)
}


@dataclass(frozen=True, eq=False)
class ModelCase(NodeCase):
    """A model instead of one node; every floating-point input is varied."""

    @cached_property
    def varied(self) -> tuple[str, ...]:
        return tuple(name for name, a in self.operands.items() if a.dtype.kind == "f" and a.size)


def stored(folder: Path, kind: str) -> list[Any]:
    files = sorted((folder / "test_data_set_0").glob(f"{kind}_*.pb"))
    return [onnx.load_tensor(file) for file in files]


def read(name: str) -> ModelCase:
    folder, case = FOLDERS[name]
    model = onnx.load(folder / "model.onnx")
    if model.opset_import[0].version < OLDEST_OPSET:
        model = convert_version(model, OLDEST_OPSET)
        _give_slopes_axes(model)
    # Every weight is an input as well in files of that age.
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    data = [(stored(folder, "input"), stored(folder, "output"))]
    return ModelCase(
        SimpleNamespace(name=name, model=model, data_sets=data, rtol=case.rtol, atol=case.atol)
    )


def _give_slopes_axes(model: onnx.ModelProto) -> None:
    """Of a PRelu, what the converter forgets: before opset 7, slopes lay along the channels."""
    slopes = {node.input[1] for node in model.graph.node if node.op_type == "PRelu"}
    rank = len(model.graph.input[0].type.tensor_type.shape.dim)
    for tensor in model.graph.initializer:
        if tensor.name in slopes and tensor.dims[0] > 1:
            tensor.dims.extend([1] * (rank - 2))
