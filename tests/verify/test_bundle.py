"""Bundles: what is in the file, and every way in which a file is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import peer
import pytest
from onnx import external_data_helper

from rectgrad_ref import Explainer
from rectgrad_ref.errors import OutputError
from rectgrad_ref.methods import METHODS
from rectgrad_ref.onnx_models.cifar10_cnn import network_path
from rectgrad_ref.verify import Bundle, InvalidBundle, compare, load, make
from rectgrad_ref.verify.bundle import FORMAT, VERSION, read_arrays
from rectgrad_ref.verify.conformance import plain, smooth

Arrays = dict[str, np.ndarray]


@pytest.fixture
def saved(bundle: Bundle, tmp_path: Path) -> Path:
    return bundle.save(tmp_path / "bundle.npz")


def rewritten(path: Path, change: Callable[[Arrays], Any]) -> Path:
    """The file with its arrays changed."""
    arrays = read_arrays(path)
    change(arrays)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def provenance(**changes: Any) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        found = json.loads(str(arrays["provenance"]))
        arrays["provenance"] = np.array(json.dumps(found | changes))

    return change


# --- what is in it --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "options",
    [{}, {"q": 10.0}, {"q": 10.0, "strict_relu": True}, {"tau": -np.inf}, {"scope": "batch"}],
    ids=str,
)
def test_round_trip(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    made = peer.reference(dtype=dtype, **options)
    found = load(made.save(tmp_path / "b.npz"))
    assert found.dtype == dtype
    assert found.name == "b.npz"
    assert found.method == made.method
    assert found.provenance == made.provenance
    for key in ("inputs", "target", "values"):
        np.testing.assert_array_equal(getattr(found, key), getattr(made, key))
    assert list(found.layers) == list(made.layers) == list(peer.RELUS)
    for name, layer in made.layers.items():
        for key in ("a", "R_out", "R_in", "tau", "mask"):
            np.testing.assert_array_equal(getattr(found.layers[name], key), getattr(layer, key))


def test_it_says_how_it_was_made(bundle: Bundle) -> None:
    said = bundle.provenance
    assert said["format"] == FORMAT and said["version"] == VERSION
    assert said["options"] == {k: v for k, v in bundle.method.options().items()}
    assert said["options"]["q"] == peer.Q
    assert bundle.model is not None
    assert said["sha256"] == bundle.sha256 == hashlib.sha256(bundle.model).hexdigest()
    assert [layer["reads"] for layer in said["layers"]] == ["conv1", "conv2", "dense1"]


@pytest.mark.parametrize("name", ["b.npz", "b.NPZ", "b.c.Npz"])
def test_the_file_has_the_name_that_was_given(bundle: Bundle, tmp_path: Path, name: str) -> None:
    bundle.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    np.testing.assert_array_equal(load(tmp_path / name).values, bundle.values)


def test_masks_are_packed(saved: Path, bundle: Bundle) -> None:
    arrays = read_arrays(saved)
    layer = bundle.layers["conv1.relu"]
    assert arrays["layers/conv1.relu/mask"].nbytes == layer.a.size // 8
    assert layer.mask is not None
    np.testing.assert_array_equal(arrays["layers/conv1.relu/mask"], np.packbits(layer.mask))
    assert "layers/conv1.relu/R_in" not in arrays


def test_R_in_of_other_activations_is_not_known(tmp_path: Path) -> None:
    made = make(smooth(), peer.images(), q=80.0, backend="reference", dtype="float32")
    found = load(made.save(tmp_path / "b.npz"))
    assert all(np.isnan(layer.R_in).all() for layer in found.layers.values())
    assert all(layer.mask is not None for layer in found.layers.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, tmp_path: Path) -> None:
    made = make(plain(), peer.images(), method=method, backend="reference")
    found = load(made.save(tmp_path / "b.npz"))
    assert bool(found.layers) == found.method.walks_once
    assert compare(found, found.values).agrees


def test_a_method_without_layers() -> None:
    with pytest.raises(InvalidBundle, match="smoothgrad keeps none"):
        make(plain(), peer.images(), method="smoothgrad", layers=["conv1.relu"])


def test_chosen_layers(tmp_path: Path) -> None:
    made = peer.reference(layers=["dense1.relu"])
    assert list(load(made.save(tmp_path / "b.npz")).layers) == ["dense1.relu"]
    with pytest.raises(InvalidBundle, match=r"'conv9'; there are conv1.relu, conv2.relu, dense1"):
        peer.reference(layers=["conv9"])


def test_model_in_a_file(tmp_path: Path) -> None:
    onnx.save(plain(), tmp_path / "net.onnx")
    made = make(tmp_path / "net.onnx", peer.images(), q=peer.Q)
    assert made.model == (tmp_path / "net.onnx").read_bytes()
    assert made.provenance["model"] == "net.onnx"


def test_a_large_model_is_not_in_it() -> None:
    made = make(network_path(), np.zeros((1, 3, 32, 32), np.float32), layers=["relu5"])
    assert made.model is None
    opened = made.open_model()  # but the package has it
    assert opened is not None and opened.path == network_path()


def test_a_model_with_external_data_is_not_in_it(tmp_path: Path) -> None:
    proto = plain()
    external_data_helper.convert_model_to_external_data(proto, location="w.bin", size_threshold=0)
    onnx.save(proto, tmp_path / "net.onnx")
    made = make(tmp_path / "net.onnx", peer.images(), q=peer.Q)
    assert made.model is None
    assert made.open_model() is None
    opened = made.open_model(tmp_path / "net.onnx")
    assert opened is not None


def test_another_model(bundle: Bundle) -> None:
    other = nets.plain(nets.Weights(0)).onnx()
    with pytest.raises(InvalidBundle, match="made from another model"):
        bundle.open_model(other)
    with pytest.raises(InvalidBundle, match="made from another model"):
        bundle.open_model(other.SerializeToString())
    with pytest.raises(InvalidBundle, match="made from another model"):
        compare(bundle, bundle.values, other)


def test_the_reference_of_a_bundle_is_that_of_explain(bundle: Bundle) -> None:
    explainer = Explainer(plain(), backend="reference", dtype="float32")
    result = explainer.explain(peer.images(), q=peer.Q, trace=True)
    np.testing.assert_array_equal(bundle.values, result.values)
    np.testing.assert_array_equal(bundle.target, result.target)


# --- what is refused ------------------------------------------------------------------------------


def test_another_suffix(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"give an \.npz file"):
        bundle.save(tmp_path / "bundle.zip")
    with pytest.raises(OutputError):
        bundle.save(tmp_path / "nowhere" / "bundle.npz")
    assert not list(tmp_path.iterdir())


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidBundle, match=r"cannot read .*none.npz: there is no such file"):
        load(tmp_path / "none.npz")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_truncated(saved: Path, share: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InvalidBundle, match=r"not an \.npz file, or is truncated"):
        load(saved)


def test_a_flipped_bit(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 1
    saved.write_bytes(bytes(data))
    with pytest.raises(InvalidBundle):
        load(saved)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04", b"\x93NUMPY"])
def test_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "b.npz").write_bytes(content)
    with pytest.raises(InvalidBundle, match=r"b\.npz"):
        load(tmp_path / "b.npz")


class Trap:
    """Loading this pickle leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickles_in_an_archive_are_never_loaded(saved: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    arrays = {**read_arrays(saved), "values": np.array([Trap(sprung)], object)}
    np.savez(saved, allow_pickle=True, **arrays)
    with pytest.raises(InvalidBundle, match="pickles are never loaded"):
        load(saved)
    with pytest.raises(InvalidBundle, match="pickles are never loaded"):
        compare(peer.reference(1), saved)
    assert not sprung.exists()


def test_a_bare_pickle_is_never_loaded(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(InvalidBundle, match="pickles are never loaded"):
        load(tmp_path / "b.npz")
    assert not sprung.exists()


def test_a_single_array(tmp_path: Path) -> None:
    with (tmp_path / "b.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InvalidBundle, match="is a single array"):
        load(tmp_path / "b.npz")


def test_no_bundle(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", values=np.zeros(3))
    with pytest.raises(InvalidBundle, match="no conformance bundle; make one with"):
        load(tmp_path / "b.npz")


def test_a_newer_version(saved: Path) -> None:
    rewritten(saved, provenance(version=VERSION + 1))
    with pytest.raises(InvalidBundle, match=r"has version 2 .* install a newer rectgrad-ref"):
        load(saved)


LAYER = {"name": "a", "operator": "Relu", "reads": "z", "shape": [3, 5], "tau": [3]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sha256": None}, "no 'sha256'"),
        ({"method": "rectgrad2"}, "unknown method 'rectgrad2'"),
        ({"dtype": "float16"}, "dtype 'float16'"),
        ({"options": {"q": 150}}, "conventions are not known: rectgrad: q must lie between"),
        ({"options": {"quantile": 1}}, "conventions are not known: rectgrad has no option"),
        ({"shape": [3, -3, 8, 8]}, "no 'shape'"),
        ({"shape": []}, "no 'shape'"),
        ({"layout": "CHWN"}, "unknown layout 'CHWN'"),
        ({"layers": [{"name": "conv1.relu"}]}, "is no layer"),
        ({"layers": [{**LAYER, "shape": 3}]}, "is no layer"),
        ({"layers": [{**LAYER, "tau": 0}]}, "is no layer"),
        ({"layers": "conv1.relu"}, "no 'layers'"),
        ({"sha256": "0" * 64}, "model inside is not the one"),
    ],
    ids=str,
)
def test_provenance(saved: Path, changes: dict[str, Any], said: str) -> None:
    rewritten(saved, provenance(**changes))
    with pytest.raises(InvalidBundle, match=said):
        load(saved)


def test_provenance_is_no_json(saved: Path) -> None:
    rewritten(saved, lambda arrays: arrays.update(provenance=np.array("{")))
    with pytest.raises(InvalidBundle, match="not JSON"):
        load(saved)


KEYS = [
    "inputs", "target", "values",
    "layers/conv2.relu/a", "layers/conv2.relu/R_out", "layers/conv2.relu/tau",
    "layers/conv2.relu/mask",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_missing_arrays(saved: Path, key: str) -> None:
    rewritten(saved, lambda arrays: arrays.pop(key))
    with pytest.raises(InvalidBundle, match=f"'{key}' is missing; the bundle is incomplete"):
        load(saved)


@pytest.mark.parametrize("key", KEYS)
def test_wrong_shapes(saved: Path, key: str) -> None:
    rewritten(saved, lambda arrays: arrays.update({key: arrays[key][1:]}))
    with pytest.raises(InvalidBundle, match=f"'{key}' must have shape"):
        load(saved)


@pytest.mark.parametrize("key", KEYS)
def test_wrong_dtypes(saved: Path, key: str) -> None:
    rewritten(saved, lambda arrays: arrays.update({key: arrays[key].astype(np.float16)}))
    with pytest.raises(InvalidBundle, match=r"must be|is not integer"):
        load(saved)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["inputs", "values", "layers/dense1.relu/a"])
def test_no_numbers(saved: Path, key: str, value: float) -> None:
    def change(arrays: Arrays) -> None:
        arrays[key].flat[0] = value

    rewritten(saved, change)
    with pytest.raises(InvalidBundle, match=f"'{key}' holds NaN or infinite values"):
        load(saved)


def test_a_threshold_that_is_no_number(saved: Path) -> None:
    key = "layers/dense1.relu/tau"
    rewritten(saved, lambda arrays: arrays.update({key: np.full(3, np.nan)}))
    with pytest.raises(InvalidBundle, match="without NaN"):
        load(saved)


def test_an_infinite_threshold_is_one(saved: Path) -> None:
    made = replace(peer.reference(tau=-np.inf), name="b.npz")
    found = load(made.save(saved))
    assert all(layer.tau is not None for layer in found.layers.values())
    assert np.isneginf([layer.tau for layer in found.layers.values()]).all()
