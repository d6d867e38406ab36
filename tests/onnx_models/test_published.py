"""The registry of models, and getting and building them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from rectgrad_ref.errors import InvalidModel, OutputError
from rectgrad_ref.onnx_models import inception_v4, published
from rectgrad_ref.onnx_models.published import MODELS, build, find, get
from rectgrad_ref.preprocess import PRESETS


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server of `tmp_path / "server"`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "server").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "server"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def half_weights() -> dict[str, NDArray[np.float16]]:
    """Weights as a publisher might store them."""
    rng = np.random.default_rng(0)
    return {
        name: rng.uniform(0.5, 1, shape).astype(np.float16)
        for name, shape in inception_v4.parameter_shapes().items()
    }


def write_safetensors(path: Path, arrays: dict[str, NDArray[np.float16]]) -> Path:
    header: dict[str, Any] = {}
    offset = 0
    for name, array in arrays.items():
        place = [offset, offset := offset + array.nbytes]
        header[name] = {"dtype": "F16", "shape": array.shape, "data_offsets": place}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(array.tobytes() for array in arrays.values())
    return path


def test_entries_are_complete() -> None:
    assert len({model.name for model in MODELS}) == len(MODELS)
    for model in MODELS:
        assert model.preprocessing in PRESETS
        assert (model.download is not None) == (model.kind in ("published", "weights"))
        if model.download:
            assert len(bytes.fromhex(model.download.sha256)) == 32
            assert all(url.startswith("https://") for url in model.download.urls)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InvalidModel, match=r"'inception_v5'; there are cifar10_cnn, .*Opset16"):
        find("inception_v5")


@pytest.mark.parametrize("name", [model.name for model in MODELS if model.kind == "committed"])
def test_committed_models_come_with_the_package(name: str) -> None:
    path = get(name)
    assert path.stem == name
    assert onnx.load(path).graph.output[0].name == "logits"


def test_downloads_into_the_users_cache(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server" / "some.onnx").write_bytes(b"content")
    entry = find("inception_v4_Opset16")
    assert entry.download is not None
    download = dataclasses.replace(
        entry.download,
        urls=(f"{server}/some.onnx",),
        sha256=hashlib.sha256(b"content").hexdigest(),
    )
    monkeypatch.setattr(published, "MODELS", (dataclasses.replace(entry, download=download),))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in (None, tmp_path / "elsewhere"):
        path = get("inception_v4_Opset16", folder=folder)
        assert path == (folder or published.cache_folder()) / "inception_v4_Opset16.onnx"
        assert path.read_bytes() == b"content"


def test_what_is_built_cannot_be_got() -> None:
    with pytest.raises(InvalidModel, match="build it"):
        get("inception_v4")


@pytest.mark.parametrize("name", ["cifar10_cnn", "inception_v4.tf_in1k", "inception_v4_Opset16"])
def test_what_is_got_cannot_be_built(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="get it"):
        build(name, tmp_path / "model.onnx")


def test_builds_from_a_weights_file(
    tmp_path: Path, half_weights: dict[str, NDArray[np.float16]]
) -> None:
    weights = write_safetensors(tmp_path / "published.safetensors", half_weights)
    path = build("inception_v4", tmp_path / "model.onnx", weights=weights)
    assert path == tmp_path / "model.onnx"
    model = onnx.load(path)
    assert model.doc_string == "Weights from published.safetensors."
    arrays = {array.name: numpy_helper.to_array(array) for array in model.graph.initializer}
    assert np.array_equal(
        arrays["last_linear.weight"], half_weights["last_linear.weight"].astype(np.float32)
    )
    name = "features.21.branch2_3b"
    gamma, beta, mean, variance = (
        half_weights[f"{name}.bn.{part}"].astype(np.float64)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    bias = beta - gamma * mean / np.sqrt(variance + 0.001)
    np.testing.assert_allclose(arrays[f"{name}.conv.bias"], bias, rtol=1e-6, atol=1e-7)


def test_other_weights_leave_no_file(
    tmp_path: Path, half_weights: dict[str, NDArray[np.float16]]
) -> None:
    few = {name: half_weights[name] for name in ("last_linear.weight", "last_linear.bias")}
    weights = write_safetensors(tmp_path / "few.safetensors", few)
    with pytest.raises(InvalidModel, match="745 missing"):
        build("inception_v4", tmp_path / "model.onnx", weights=weights)
    assert [path.name for path in tmp_path.iterdir()] == ["few.safetensors"]


def test_random_weights_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(seed: int) -> dict[str, NDArray[np.float32]]:
        shapes = inception_v4.parameter_shapes()
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}

    monkeypatch.setattr(inception_v4, "random_state_dict", zeros)
    path = build("inception_v4", tmp_path / "model.onnx", seed=3)
    assert onnx.load(path).doc_string == "Calibrated random weights, seed 3."
    with pytest.raises(OutputError, match="cannot write"):
        build("inception_v4", tmp_path / "missing" / "model.onnx")
