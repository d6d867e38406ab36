"""How the other side's arrays are understood: names, shapes, axis order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nets
import numpy as np
import peer
import pytest
from onnx import helper, numpy_helper

from rectgrad_ref import Explainer
from rectgrad_ref.verify import Bundle, InvalidBundle, compare, make
from rectgrad_ref.verify.theirs import MAP_NAMES, Theirs, read_theirs


def layers(bundle: Bundle, part: str = "R_out") -> dict[str, np.ndarray]:
    return {name: getattr(layer, part) for name, layer in bundle.layers.items()}


def channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 1, -1) if array.ndim > 2 else array


def same(found: Theirs, bundle: Bundle, part: str = "R_out") -> None:
    expected = layers(bundle, part)
    assert getattr(found, part).keys() == expected.keys()
    for name, array in getattr(found, part).items():
        np.testing.assert_array_equal(array, expected[name])


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", MAP_NAMES)
def test_names_of_the_map(bundle: Bundle, key: str) -> None:
    found = read_theirs({key: bundle.values}, bundle)
    np.testing.assert_array_equal(found.values, bundle.values)
    assert [match.by for match in found.matches] == ["name"]


def test_an_array_is_the_map(bundle: Bundle) -> None:
    np.testing.assert_array_equal(read_theirs(bundle.values, bundle).values, bundle.values)


def test_a_lone_array_of_the_input_s_shape_is_the_map(bundle: Bundle) -> None:
    found = read_theirs({"relevance": bundle.values}, bundle)
    np.testing.assert_array_equal(found.values, bundle.values)


@pytest.mark.parametrize("prefix", ["", "gradients/"])
def test_gradients_by_value_name(bundle: Bundle, prefix: str) -> None:
    given = {f"{prefix}{name}": array for name, array in layers(bundle).items()}
    same(read_theirs(given, bundle), bundle)


@pytest.mark.parametrize("part", ["a", "R_out", "R_in"])
def test_parts_of_layers(bundle: Bundle, part: str) -> None:
    given = {f"layers/{name}/{part}": array for name, array in layers(bundle, part).items()}
    same(read_theirs(given, bundle), bundle, part)


def test_what_leaves_an_activation_is_the_gradient_at_its_input(bundle: Bundle) -> None:
    given = {"conv2": bundle.layers["conv2.relu"].R_in}
    found = compare(bundle, given).theirs
    assert list(found.R_in) == ["conv2.relu"]


def test_a_saved_attribution(bundle: Bundle, tmp_path: Path) -> None:
    explainer = Explainer(bundle.model or b"", backend="reference", dtype="float32")
    result = explainer.explain(bundle.inputs, q=peer.Q, trace=True)
    found = read_theirs(result.save(tmp_path / "theirs.npz"), bundle)
    for part in ("a", "R_out", "R_in"):
        same(found, bundle, part)
    assert not found.ignored


def test_a_saved_attribution_of_another_model(bundle: Bundle, tmp_path: Path) -> None:
    other = Explainer(nets.plain(nets.Weights(0)).onnx(), backend="reference")
    result = other.explain(np.zeros((3, 2, 6, 6)), trace=True)
    with pytest.raises(InvalidBundle, match="is a result of another model"):
        read_theirs(result.save(tmp_path / "theirs.npz"), bundle)


def test_another_bundle_of_another_model(bundle: Bundle, tmp_path: Path) -> None:
    other = make(nets.plain(nets.Weights(0)).onnx(), np.zeros((3, 2, 6, 6), np.float32))
    with pytest.raises(InvalidBundle, match="is a bundle of another model"):
        read_theirs(other.save(tmp_path / "theirs.npz"), bundle)


# --- shapes ---------------------------------------------------------------------------------------


def test_channels_last(bundle: Bundle) -> None:
    given = {"values": channels_last(bundle.values)}
    given |= {name: channels_last(array) for name, array in layers(bundle).items()}
    found = read_theirs(given, bundle)
    same(found, bundle)
    np.testing.assert_array_equal(found.values, bundle.values)
    assert [match.key for match in found.matches if match.transposed] == [
        "values", "conv1.relu", "conv2.relu",
    ]  # fmt: skip
    assert compare(bundle, given).agrees


def test_channels_first_for_a_model_that_has_them_last() -> None:
    made = make(channels_last_network(), nhwc_images(), q=50.0, backend="reference")
    assert made.values.shape == (2, 6, 6, 3)
    first = np.moveaxis(made.values, -1, 1)
    assert read_theirs(first, made).matches[0].transposed
    assert compare(made, first).agrees
    assert not compare(made, np.roll(first, 1, axis=1)).agrees


def nhwc_images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype(np.float32)


def channels_last_network() -> Any:
    w = nets.Weights(0)
    weights = {"w": w(4, 3, 3, 3), "b": w(4), "d": w(4, 3)}
    nodes = [
        helper.make_node("Transpose", ["x"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "w", "b"], ["z"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Relu", ["z"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "d"], ["logits"]),
    ]
    arrays = [numpy_helper.from_array(v, k) for k, v in weights.items()]
    return nets.model(nodes, ["N", 6, 6, 3], "logits", arrays)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 1, 8, 8), (3, 8, 8, 1)])
def test_a_map_summed_over_its_channels(bundle: Bundle, shape: tuple[int, ...]) -> None:
    comparison = compare(bundle, bundle.values.sum(axis=1).reshape(shape))
    assert comparison.agrees
    assert comparison.map is not None and comparison.map.expected.shape == (3, 8, 8)


def test_one_image_without_its_batch_axis() -> None:
    one = peer.reference(1)
    assert compare(one, {"values": one.values[0], "dense1.relu": layers(one)["dense1.relu"][0]})
    assert compare(one, one.values[0].sum(axis=0)).agrees


# --- matching by shape and order ------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True], ids=["input first", "logits first"])
@pytest.mark.parametrize("part", ["", "/R_out"])
def test_other_names_are_matched_by_shape_and_order(
    bundle: Bundle, turned: bool, part: str
) -> None:
    arrays = list(layers(bundle).values())
    given = {f"relu_{i}{part}": v for i, v in enumerate(arrays[::-1] if turned else arrays)}
    found = read_theirs(given, bundle)
    same(found, bundle)
    assert {match.by for match in found.matches} == {"shape and order"}
    assert compare(bundle, given).agrees


def test_equal_shapes_are_told_by_their_likeness() -> None:
    """Three layers of one shape: their order alone leaves two ways."""
    w = nets.Weights(3)
    ops = []
    source = "x"
    for i in range(3):
        ops.append(nets.conv(f"c{i}", source, w(3, 3, 3, 3), w(3), pads=(1, 1, 1, 1)))
        ops.append(nets.Op("Relu", f"r{i}", (f"c{i}",)))
        source = f"r{i}"
    ops.append(nets.Op("Flatten", "flat", (source,)))
    ops.append(nets.Op("Gemm", "logits", ("flat",), (w(108, 4), w(4))))
    net = nets.Net((3, 6, 6), tuple(ops))
    made = make(net.onnx(), w.images(net, 2), q=60.0, backend="reference")
    for order in (1, -1):
        given = {f"hook{i}": v for i, v in enumerate(list(layers(made).values())[::order])}
        same(read_theirs(given, made), made)


def test_a_part_of_the_layers(bundle: Bundle) -> None:
    given = {"first": layers(bundle)["conv2.relu"], "second": layers(bundle)["dense1.relu"]}
    found = read_theirs(given, bundle)
    assert list(found.R_out) == ["conv2.relu", "dense1.relu"]


def test_what_has_no_place_is_said(bundle: Bundle) -> None:
    given = {"values": bundle.values, "loss": np.zeros(7), "epoch": np.zeros((), int)}
    assert read_theirs(given, bundle).ignored == ("loss", "epoch")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("key", ["values", "conv2.relu", "anything"])
def test_no_numbers(bundle: Bundle, key: str, value: float) -> None:
    given = {"values": bundle.values.copy(), "conv2.relu": layers(bundle)["conv2.relu"].copy()}
    given["anything"] = given["values"].copy()
    given[key].flat[5] = value
    with pytest.raises(InvalidBundle, match=f"'{key}' holds NaN or infinite values"):
        compare(bundle, given)


@pytest.mark.parametrize("array", [np.zeros(3, bool), np.zeros(3, complex), np.array(["a"])])
def test_no_real_numbers(bundle: Bundle, array: np.ndarray) -> None:
    with pytest.raises(InvalidBundle, match="'values' holds no real numbers"):
        read_theirs({"values": array}, bundle)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 8, 8), (3, 3, 8, 9), (3, 8, 8, 3, 1)])
def test_a_map_of_a_wrong_shape(bundle: Bundle, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidBundle, match="must have the model input's shape"):
        read_theirs({"values": np.zeros(shape)}, bundle)


def test_a_layer_of_a_wrong_shape(bundle: Bundle) -> None:
    with pytest.raises(InvalidBundle, match=r"'conv2.relu' must have shape \(3, 6, 4, 4\)"):
        read_theirs({"conv2.relu": np.zeros((3, 6, 4, 5))}, bundle)


@pytest.mark.parametrize("given", [{}, {"loss": np.zeros(7)}])
def test_nothing_to_compare(bundle: Bundle, given: dict[str, np.ndarray]) -> None:
    with pytest.raises(InvalidBundle, match=r"nothing to compare .* give the final map"):
        read_theirs(given, bundle)
