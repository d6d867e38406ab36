"""RectGrad against the slow second derivation, with each of its conventions."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection
from typing import Any

import derived
import nets
import numpy as np
import pytest
import slow
from derived import close
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net, Op, Weights
from onnx import helper, numpy_helper

from rectgrad_ref import Attribution, Explainer, RectGrad
from rectgrad_ref.errors import RectGradWarning
from rectgrad_ref.threshold import PERCENTILES

PADDED = {"conv1", "conv2", "wide"}  # of both networks; "wide" as TensorFlow pads
SAME = PADDED | {"squeeze"}  # "last" has 2×2 cells, too few


def explained(net: Net, images: np.ndarray, **options: Any) -> Attribution:
    return derived.explained(net, images, "rectgrad", trace=True, **options)


def derivation(
    net: Net,
    images: np.ndarray,
    activation: slow.ActivationRule,
    pool: slow.PoolRule = slow.to_first,
    masked: Collection[str] = PADDED,
) -> list[slow.Values]:
    return derived.gradients(net, images, activation, pool, masked)


def assert_maps(result: Attribution, expected: Any) -> None:
    assert np.any(expected), "a map of zeros shows nothing"
    assert close(result, expected)


def check(
    net: Net, images: np.ndarray, result: Attribution, R: list[slow.Values], *, exact: bool
) -> None:
    """Every layer of the trace, and the map."""
    rel = 0 if exact else 1e-9
    activations = [op for op in net.ops if op.kind in slow.FUNCTIONS]
    assert list(result.layers()) == [op.name for op in activations]
    for op in activations:
        layer = result.layers()[op.name]
        assert close(layer.R_out, [r[op.name] for r in R], rel), op.name
        assert close(layer.R_in, [r[op.inputs[0]] for r in R], rel), op.name
    assert exact or np.any([r["x"] for r in R]), "a derivation of zero shows nothing"
    product = images.astype(np.float64) * derived.at_input(R)
    assert close(result, np.where(product > 0, product, 0), rel)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "q": draw(st.sampled_from([0.0, 20.0, 50.0, 90.0, 98.0, 100.0])),
        "convention": draw(st.sampled_from(PERCENTILES)),
        "scope": draw(st.sampled_from(["sample", "batch"])),
        "strict": draw(st.booleans()),
        "strict_relu": draw(st.booleans()),
    }


def ours(theirs: dict[str, Any]) -> dict[str, Any]:
    """The package's names for the slow derivation's options."""
    renamed = dict(theirs)
    renamed["percentile"] = renamed.pop("convention")
    renamed["strictness"] = ">" if renamed.pop("strict") else ">="
    return renamed


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([nets.plain, nets.branched]), options())
def test_integer_networks_agree_exactly(
    seed: int, build: Callable[[Weights], Net], chosen: dict[str, Any]
) -> None:
    """Integers make float64 sums exact in any order, and scores tie all the time."""
    weights = Weights(seed, integers=True)
    net = build(weights)
    images = weights.images(net, 2)
    result = explained(net, images, **ours(chosen))
    check(net, images, result, derivation(net, images, slow.rectify(**chosen)), exact=True)


@pytest.mark.parametrize("build", [nets.plain, nets.branched])
@pytest.mark.parametrize("q", [0, 50, 80])
def test_real_networks(build: Callable[[Weights], Net], q: float) -> None:
    weights = Weights(int(q))
    net = build(weights)
    images = weights.images(net, 2)
    result = explained(net, images, q=q)
    check(net, images, result, derivation(net, images, slow.rectify(q)), exact=False)


@pytest.mark.parametrize("tau", [-1.0, -0.01, 0.0, 0.01, -math.inf])
@pytest.mark.parametrize("strict_relu", [False, True])
def test_fixed_tau(tau: float, strict_relu: bool) -> None:
    weights = Weights(4)
    net = nets.branched(weights)
    images = weights.images(net, 2)
    result = explained(net, images, tau=tau, strict_relu=strict_relu)
    rule = slow.rectify(tau=tau, strict_relu=strict_relu)
    check(net, images, result, derivation(net, images, rule), exact=False)
    assert all((layer.tau == tau).all() for layer in result.layers().values())


def test_nothing_exceeds_infinity() -> None:
    net = nets.branched(Weights(3))
    result = explained(net, Weights(3).images(net, 2), tau=math.inf, final_threshold=False)
    assert not result.values.any()
    assert not any(layer.mask.any() for layer in result.layers().values())


def test_channel_scope() -> None:
    weights = Weights(5)
    net = nets.branched(weights)
    images = weights.images(net, 2)
    result = explained(net, images, scope="channel", q=60)
    rule = slow.rectify(60, scope="channel")
    check(net, images, result, derivation(net, images, rule), exact=False)
    assert result.layers()["relu1"].tau.shape == (2, 4)


def test_channel_scope_is_refused_for_dense_layers() -> None:
    net = nets.plain(Weights(0))
    with pytest.raises(ValueError, match=r"scope='channel' at Relu 'act3'.*one unit a channel"):
        explained(net, np.ones((1, *net.shape), np.float32), scope="channel")


SCORES: dict[str, Callable[[float, float], float]] = {
    "PR1": lambda a, r: a * r,
    "PR2": lambda a, r: abs(a * r),
    "PR3": lambda a, r: a,
    "PR4": lambda a, r: r,
    "PR1+eps": lambda a, r: (a + 1e-6) * r,
}


@pytest.mark.parametrize("rule", SCORES)
def test_propagation_rules(rule: str) -> None:
    weights = Weights(8)
    net = nets.branched(weights)
    images = weights.images(net, 2)
    result = explained(net, images, propagation_rule=rule, q=60)
    R = derivation(net, images, slow.rectify(60, score=SCORES[rule]))
    check(net, images, result, R, exact=False)


@pytest.mark.parametrize("last", ["PR1", "PR2"])
def test_mod(last: str) -> None:
    """PR2 everywhere but at the activations nearest the logits."""
    weights = Weights(11)
    net = nets.branched(weights)
    images = weights.images(net, 2)
    elsewhere = slow.rectify(60, score=SCORES["PR2"])
    nearest = slow.rectify(60, score=SCORES[last])

    def rule(op: Op, *arrays: list[np.ndarray]) -> list[np.ndarray]:
        return (nearest if op.name == "relu5" else elsewhere)(op, *arrays)

    result = explained(net, images, propagation_rule="mod", mod_last=last, q=60)
    check(net, images, result, derivation(net, images, rule), exact=False)


def test_mod_has_several_last_layers_where_branches_meet_at_the_logits() -> None:
    w = Weights(2)
    net = Net(
        (2, 4, 4),
        (
            nets.conv("conv1", "x", w(3, 2, 3, 3), w(3), pads=(1, 1, 1, 1)),
            Op("Relu", "early", ("conv1",)),
            nets.conv("conv2", "early", w(3, 3, 3, 3), w(3), pads=(1, 1, 1, 1)),
            Op("Relu", "late", ("conv2",)),
            Op("Add", "sum", ("early", "late")),  # "early" reaches the logits past "late"
            Op("Flatten", "flat", ("sum",)),
            Op("Gemm", "dense", ("flat",), (w(48, 3), w(3))),
        ),
    )
    images = w.images(net, 1)
    result = explained(net, images, propagation_rule="mod", q=70)
    both = slow.rectify(70)  # PR1 at both
    check(net, images, result, derivation(net, images, both), exact=False)


NON_RELU = {
    "LeakyRelu": {"alpha": 0.25},
    "Elu": {"alpha": 0.5},
    "Sigmoid": {},
    "Tanh": {},
    "Softplus": {},
    "Softsign": {},
    "HardSwish": {},
}


@pytest.mark.parametrize("kind", NON_RELU)
@pytest.mark.parametrize("derivative", [True, False])
def test_other_activations(kind: str, derivative: bool) -> None:
    weights = Weights(13)
    net = nets.plain(weights, kind, NON_RELU[kind])
    images = weights.images(net, 2)
    result = explained(net, images, q=50, derivative=derivative)
    R = derivation(net, images, slow.rectify(50, derivative=derivative))
    # The slow derivation has its derivatives from finite differences.
    for name in ("act1", "act2", "act3"):
        expected = np.stack([r[name] for r in R])
        found = result.layers()[name].R_out
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
        assert np.array_equal(result.layers()[name].mask, reference_mask(result, name, 50))


def reference_mask(result: Attribution, name: str, q: float) -> np.ndarray:
    """The mask from the layer's own a and R_out, unit by unit."""
    layer = result.layers()[name]
    masks = []
    for a, R in zip(layer.a, layer.R_out, strict=True):
        tau = slow.threshold((a * R).ravel().tolist(), q)
        masks.append(a * R > tau)
    return np.stack(masks)


def test_relu6_saturates() -> None:
    """Where Clip(0, 6) is flat, f' is 0 however high the score; without f' the unit passes."""
    w = np.array([[[[1.0]]]], np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["z"]),
        helper.make_node("Clip", ["z", "lo", "hi"], ["a"], name="relu6"),
        helper.make_node("Flatten", ["a"], ["flat"]),
        helper.make_node("Gemm", ["flat", "v"], ["logits"]),
    ]
    constants = {"w": w, "lo": np.float32(0), "hi": np.float32(6), "v": np.ones((4, 1), np.float32)}
    model = nets.model(
        nodes,
        [1, 1, 2, 2],
        "logits",
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    x = np.array([[[[-1, 3], [5, 7]]]], np.float32)
    explainer = Explainer(model, backend="reference")
    assert explainer.explain(x, tau=0).values.ravel().tolist() == [0, 3, 5, 0]
    assert explainer.explain(x, tau=0, derivative=False).values.ravel().tolist() == [0, 3, 5, 7]
    assert explainer.explain(x, tau=4).values.ravel().tolist() == [0, 0, 5, 0]


@pytest.mark.parametrize(
    ("trick", "masked"), [(True, PADDED), ("same", SAME), (False, set())], ids=["on", "same", "off"]
)
@pytest.mark.filterwarnings("ignore::rectgrad_ref.errors.RectGradWarning")
def test_padding_trick(trick: Any, masked: set[str]) -> None:
    weights = Weights(17)
    net = nets.branched(weights)
    images = weights.images(net, 2)
    result = explained(net, images, q=50, padding_trick=trick)
    R = derivation(net, images, slow.rectify(50), masked=masked)
    check(net, images, result, R, exact=False)


@pytest.mark.parametrize("ties", ["first", "split"])
@pytest.mark.parametrize("integers", [True, False])
def test_max_pool_ties(ties: Any, integers: bool) -> None:
    weights = Weights(19, integers=integers)
    net = nets.branched(weights)
    images = weights.images(net, 2)
    result = explained(net, images, q=50, maxpool_ties=ties)
    pool = slow.to_first if ties == "first" else slow.split
    # Thirds are no binary fractions, but both sides divide once and add few.
    R = derivation(net, images, slow.rectify(50), pool)
    check(net, images, result, R, exact=integers and ties == "first")


@pytest.mark.parametrize("build", [nets.plain, nets.branched])
def test_proportional_redistribution(build: Callable[[Weights], Net]) -> None:
    weights = Weights(23)
    net = build(weights)
    images = weights.images(net, 2)
    result = explained(net, images, q=50, prr=True)
    R = derivation(net, images, slow.rectify(50), slow.redistribute)
    check(net, images, result, R, exact=False)


def test_redistribution_of_a_dead_window_is_zero() -> None:
    net = nets.plain(Weights(0))
    op = next(op for op in net.ops if op.name == "conv1")
    dead = dataclasses.replace(op, weights=(op.weights[0], np.full(3, -1e3, np.float32)))
    net = dataclasses.replace(net, ops=(dead, *net.ops[1:]))
    result = explained(net, np.ones((1, *net.shape), np.float32), prr=True, tau=-math.inf)
    assert not result.layers()["act1"].R_out.any()
    assert result.layers()["act2"].R_in.any()


@pytest.mark.parametrize("times_input", [True, False])
@pytest.mark.parametrize("final_threshold", [True, False])
def test_last_step(times_input: bool, final_threshold: bool) -> None:
    weights = Weights(29)
    net = nets.branched(weights)
    images = weights.images(net, 2)
    result = explained(net, images, q=50, times_input=times_input, final_threshold=final_threshold)
    R = derived.at_input(derivation(net, images, slow.rectify(50)))
    expected = images * R if times_input else R
    if final_threshold:
        expected = expected * (expected > 0)
    assert_maps(result, expected)


@pytest.mark.parametrize("seed", ["one", "logit", "softmax"])
def test_seeds(seed: str) -> None:
    weights = Weights(31)
    net = nets.branched(weights)
    images = weights.images(net, 2)
    result = explained(net, images, q=50, output_seed=seed, final_threshold=False)
    values = [slow.forward(net, x) for x in images]
    seeds = []
    for v in values:
        logits = v[net.output]
        p = np.exp(logits) / np.exp(logits).sum()
        seeds.append(
            {
                "one": np.array([0.0, 1, 0, 0]),
                "logit": np.array([0, logits[1], 0, 0]),
                "softmax": np.array([p[1] * ((i == 1) - p[i]) for i in range(4)]),
            }[seed]
        )
    R = slow.backward(net, values, seeds, slow.rectify(50), masked=PADDED)
    assert_maps(result, [x * r["x"] for x, r in zip(images, R, strict=True)])


def test_presets() -> None:
    paper = RectGrad()
    assert Explainer(nets.plain(Weights(0)).onnx()).explain(
        np.ones((1, 2, 6, 6), np.float32), preset="paper", q=50
    ).method == dataclasses.replace(paper, q=50.0)
    assert (paper.q, paper.percentile, paper.scope) == (98.0, "tf_nearest", "sample")
    assert (paper.strictness, paper.padding_trick, paper.prr) == (">", True, False)
    assert paper.times_input and paper.final_threshold and paper.derivative
    assert (paper.tau, paper.strict_relu, paper.propagation_rule) == (None, False, "PR1")


def test_authors_preset() -> None:
    """What their code does: no final threshold, TensorFlow's SAME, no f', PR2 everywhere in mod."""
    weights = Weights(37)
    net = nets.plain(weights, "Softplus")
    images = weights.images(net, 2)
    result = explained(net, images, preset="authors", q=50)
    R = derivation(net, images, slow.rectify(50, derivative=False))
    expected = [x * r["x"] for x, r in zip(images, R, strict=True)]
    assert_maps(result, expected)
    mod = explained(net, images, preset="authors", q=50, propagation_rule="mod")
    R = derivation(net, images, slow.rectify(50, derivative=False, score=SCORES["PR2"]))
    assert_maps(mod, [x * r["x"] for x, r in zip(images, R, strict=True)])


def test_samples_do_not_influence_each_other() -> None:
    weights = Weights(41)
    net = nets.branched(weights)
    images = weights.images(net, 5)
    together = explained(net, images, q=70)
    alone = [explained(net, images[i : i + 1], q=70) for i in range(5)]
    assert_maps(together, [np.asarray(a)[0] for a in alone])
    for name, layer in together.layers().items():
        assert np.array_equal(layer.mask, np.concatenate([a.layers()[name].mask for a in alone]))


@pytest.mark.parametrize("q", [-0.1, 100.1])
def test_q_out_of_range(q: float) -> None:
    with pytest.raises(ValueError, match="q must lie between 0 and 100"):
        RectGrad(q=q)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scope", "image"),
        ("percentile", "nearest"),
        ("strictness", "<"),
        ("propagation_rule", "PR5"),
        ("padding_trick", "SAME"),
        ("maxpool_ties", "last"),
        ("output_seed", "two"),
    ],
)
def test_unknown_choice(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"rectgrad: {name} must be .* '.*', got '{value}'"):
        RectGrad(**{name: value})


# --- warnings -------------------------------------------------------------------------------------


def notes(net: Net, **options: Any) -> list[str]:
    explainer = Explainer(net.onnx(), backend="reference")
    return list(explainer.plan("rectgrad", **options).notes)


def dense(units: int) -> Net:
    w = Weights(0)
    return Net(
        (3, 1, 1),
        (
            Op("Flatten", "flat", ("x",)),
            Op("Gemm", "hidden", ("flat",), (w(3, units), w(units))),
            Op("Relu", "relu", ("hidden",)),
            Op("Gemm", "logits", ("relu",), (w(units, 2), w(2))),
        ),
    )


def test_small_layers_die() -> None:
    assert notes(dense(26)) == []
    assert notes(dense(25), strictness=">=") == notes(dense(25), tau=0.0) == []
    (note,) = notes(dense(25))
    assert "Relu 'relu'" in note and "25 units" in note and "q = 98" in note


def test_dying_is_warned_of() -> None:
    images = np.ones((1, 3, 1, 1), np.float32)
    explainer = Explainer(dense(25).onnx(), backend="reference")
    with pytest.warns(RectGradWarning, match="nothing can pass Relu 'relu'") as caught:
        result = explainer.explain(images)
    assert not result.values.any()
    assert result.notes == tuple(str(w.message) for w in caught)


def test_a_batch_scope_counts_the_whole_batch() -> None:
    explainer = Explainer(dense(20).onnx(), backend="reference")
    with pytest.warns(RectGradWarning, match="with 20 units"):
        explainer.explain(np.ones((1, 3, 1, 1), np.float32), scope="batch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explainer.explain(np.ones((2, 3, 1, 1), np.float32), scope="batch")


def test_batch_scope_is_refused_where_chunks_would_split_it() -> None:
    explainer = Explainer(dense(40).onnx(), backend="reference", batch_size=2)
    explainer.explain(np.ones((2, 3, 1, 1), np.float32), scope="batch")
    with pytest.raises(ValueError, match="whole batch, but 3 samples do not fit one pass of 2"):
        explainer.explain(np.ones((3, 3, 1, 1), np.float32), scope="batch")


def test_no_activation() -> None:
    w = Weights(0)
    linear = Net(
        (2, 1, 1), (Op("Flatten", "flat", ("x",)), Op("Gemm", "y", ("flat",), (w(2, 3), w(3))))
    )
    (note,) = notes(linear)
    assert "no activation" in note


def test_padding_trick_leaves_small_maps_alone() -> None:
    net = nets.branched(Weights(0))
    assert not any("padding trick" in note for note in notes(net))  # "last" has no pads
    (note,) = [note for note in notes(net, padding_trick="same") if "padding trick" in note]
    assert "last left alone" in note and "3 cells" in note


def test_redistribution_needs_non_negative_inputs() -> None:
    def net(kind: str) -> Net:
        w = Weights(0)
        return Net(
            (1, 8, 8),
            (
                nets.conv("conv", "x", w(2, 1, 3, 3), w(2)),
                Op(kind, "act", ("conv",)),
                nets.pool("MaxPool", "pool", "act"),
                Op("Flatten", "flat", ("pool",)),
                Op("Gemm", "logits", ("flat",), (w(18, 2), w(2))),
            ),
        )

    assert not any("PRR" in note for note in notes(net("Relu"), prr=True))
    (note,) = [note for note in notes(net("Tanh"), prr=True) if "PRR" in note]
    assert "pool" in note and "ordinary backpropagation" in note
    images = Weights(1).images(net("Tanh"), 1)
    with_prr = explained(net("Tanh"), images, prr=True, q=50)
    assert np.array_equal(with_prr, explained(net("Tanh"), images, q=50))
