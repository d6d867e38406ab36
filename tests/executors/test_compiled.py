"""The compiled walk back against the reference, step by step on the same float32 numbers.

Small networks run with NumPy's forward pass (`OnNumpy`), so that only the walk back is in question;
published ones with onnxruntime's.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from walk_cases import (
    IDENTITIES,
    METHODS,
    NETS,
    Net,
    OnNumpy,
    both_sides,
    check_every_step,
    check_several_sizes,
    out_of_blocks,
    plan_of,
    seed_of,
    walked,
)

from rectgrad_ref import Explainer
from rectgrad_ref.errors import InvalidImage
from rectgrad_ref.executors import compiled, lowered
from rectgrad_ref.executors import cpu as lowering
from rectgrad_ref.executors.blocked import BlockedForward
from rectgrad_ref.executors.compiled import CompiledBackend, CompiledRunner
from rectgrad_ref.executors.crew import Crew
from rectgrad_ref.executors.runner import StepwiseRunner
from rectgrad_ref.forward import NumpyForward, OnnxruntimeForward, Places
from rectgrad_ref.graph import Graph, freeze, input_spec
from rectgrad_ref.images import prepare
from rectgrad_ref.methods import Method, make_method
from rectgrad_ref.model import read_model
from rectgrad_ref.plan import Plan, make_plan

pytest.importorskip("onnxruntime")

Array = np.ndarray
THREADS = (1, 2, 3)


@pytest.fixture(scope="module", autouse=True)
def threads_for_small_networks() -> Iterator[None]:
    """These networks are so small that their walks would wake nobody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_WAKING", 0)
        yield


SOME = ("q = 80", "saliency", "deeplift")

nets = pytest.mark.parametrize("net", NETS.values(), ids=NETS)
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
some_methods = pytest.mark.parametrize("method", [METHODS[name] for name in SOME], ids=SOME)


def runner_of(plan: Plan, *, threads: int = 1, forward: Any = None) -> CompiledRunner:
    runner = CompiledBackend(forward or OnNumpy(), threads).runner(plan)
    assert isinstance(runner, CompiledRunner)
    return runner


def walk_back(
    plan: Plan, x: Array, method: Method, *, trace: bool = False, **options: Any
) -> Array:
    """R at the input."""
    return walked(runner_of(plan, **options), x, method, trace=trace)


@methods
@nets
@pytest.mark.parametrize("dense", [False, True])
def test_every_step(
    net: Net, method: Method, dense: bool, walks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "DENSITY", 0 if dense else 1)
    plan, forward = plan_of(net, method), OnNumpy()
    runner = runner_of(plan, threads=2, forward=forward)
    check_every_step(runner, forward, method, net.images(plan.graph.batch), walks)


# --- what the result must not depend on -----------------------------------------------------------

densities = pytest.mark.parametrize("density", [0, lowering.DENSITY, 1])


@nets
@some_methods
@densities
def test_threads_do_not_change_a_bit(
    net: Net, method: Method, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "DENSITY", density)
    for n in (1, 3):
        plan = plan_of(net, method, n)
        x = net.images(plan.graph.batch)
        one, *others = (walk_back(plan, x, method, threads=threads) for threads in THREADS)
        for other in others:
            np.testing.assert_array_equal(one, other)


@nets
@some_methods
@densities
def test_a_trace_does_not_change_a_bit(
    net: Net, method: Method, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "DENSITY", density)
    plan = plan_of(net, method)
    x = net.images(plan.graph.batch)
    np.testing.assert_array_equal(
        walk_back(plan, x, method), walk_back(plan, x, method, trace=True)
    )


MOSTLY_BORDER = Net(
    (3, 8, 8),
    """
    c = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w1)
    r = Relu(c)
    p = MaxPool<kernel_shape=[2,1], strides=[2,1]>(r)
    f = Flatten(p)
    y = Gemm<transB=1>(f, w2)
    """,
    {"w1": (16, 3, 3, 3), "w2": (10, 128)},
)


@pytest.mark.parametrize("tau", [0.0, -0.001, -1.0])
def test_maxima_on_the_border_do_not_count(tau: float) -> None:
    """With the padding trick, a trace and a map take one way: by how many lie inside."""
    method = make_method("rectgrad", tau=tau, propagation_rule="PR2")
    plan = plan_of(MOSTLY_BORDER, method)
    for seed in range(5):
        x = MOSTLY_BORDER.images(plan.graph.batch, seed)
        np.testing.assert_array_equal(
            walk_back(plan, x, method), walk_back(plan, x, method, trace=True)
        )


class Picked(OnNumpy):
    """Of the values of a whole batch, those of one sample."""

    def __init__(self, graph: Graph, sample: int, *inputs: Array | None) -> None:
        super().__init__()
        self.whole, self.sample, self.inputs = graph, sample, inputs

    def computed(self, graph: Graph, x: Array, names: Sequence[str]) -> dict[str, Array]:
        (whole,) = (
            i for i in self.inputs if i is not None and np.array_equal(i[self.sample], x[0])
        )
        values = super().computed(self.whole, whole, names)
        return {name: value[self.sample : self.sample + 1] for name, value in values.items()}


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.batch == "N"])
@some_methods
@densities
def test_a_batch_does_not_change_a_bit(
    name: str, method: Method, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "DENSITY", density)
    net = NETS[name]
    plan, alone = plan_of(net, method, 3), plan_of(net, method, 1)
    x = net.images(3)
    together = walk_back(plan, x, method, threads=2)
    baseline = method.reference_input(x)
    for i in range(3):
        forward = Picked(plan.graph, i, x, baseline)
        single = walk_back(alone, x[i : i + 1], method, threads=2, forward=forward)
        np.testing.assert_array_equal(single, together[i : i + 1])


@nets
def test_a_dense_product_for_each_sample_does_not_change_a_bit(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large results have."""
    monkeypatch.setattr(lowering, "DENSITY", 0.0)
    method = METHODS["saliency"]
    plan = plan_of(net, method, 3)
    x = net.images(plan.graph.batch)
    together = walk_back(plan, x, method)
    monkeypatch.setattr(compiled, "_ALONE", 0)
    np.testing.assert_array_equal(walk_back(plan, x, method), together)


@nets
@densities
def test_memory_is_used_again(net: Net, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many calls of one backend, whose results stay what they were."""
    monkeypatch.setattr(lowering, "DENSITY", density)
    backend = CompiledBackend(OnNumpy(), 2)
    calls = []
    for n, name in itertools.product((1, 3), ("q = 80", "deeplift")):
        method = METHODS[name]
        plan = plan_of(net, method, n)
        runner = backend.runner(plan)
        assert isinstance(runner, CompiledRunner)
        calls += [(runner, method, plan, net.images(plan.graph.batch, seed)) for seed in (0, 1)]
    order = [*range(len(calls)), *np.random.default_rng(0).permutation(len(calls))]
    found = [(i, walked(calls[i][0], calls[i][3], calls[i][1], trace=i % 3 == 0)) for i in order]
    for i, R in found:
        _, method, plan, x = calls[i]
        np.testing.assert_array_equal(R, walk_back(plan, x, method))


@pytest.mark.parametrize("name", NETS)
def test_dense_and_sparse_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of methods that select nothing by a threshold, so that rounding stays rounding."""
    plan = plan_of(NETS[name], METHODS["saliency"])
    x = NETS[name].images(plan.graph.batch)
    found = []
    for density in (0, 1):
        monkeypatch.setattr(lowering, "DENSITY", density)
        found.append(walk_back(plan, x, METHODS["saliency"]))
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5 * np.abs(found[0]).max())


# --- identities -----------------------------------------------------------------------------------

RELU_NETS = [name for name in NETS if name != "other activations"]


@pytest.mark.parametrize("name", RELU_NETS)
@pytest.mark.parametrize("claim", IDENTITIES)
@pytest.mark.parametrize("trick", [False, True, "same"], ids=str)
@densities
def test_identities(
    name: str, claim: str, trick: Any, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "DENSITY", density)
    np.testing.assert_array_equal(*both_sides(claim, NETS[name], trick, runner_of))


# --- through the front door -----------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [1, 4])
@pytest.mark.parametrize("density", [0.0, 0.2])
def test_images_of_several_sizes(
    density: float, sizes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense products belong to one size, and are forgotten when there are too many."""
    monkeypatch.setattr(lowering, "DENSITY", density)
    monkeypatch.setattr(lowered, "_SIZES", sizes)
    check_several_sizes("cpu")


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    """A network with residuals in onnxruntime, explained before."""
    net = NETS["residual, batch norm"]
    explainer = Explainer(net.onnx(), backend="cpu", threads=2)
    explainer.explain(net.images(3), q=80.0)
    return explainer


IMAGES = NETS["residual, batch norm"].images(3, seed=7)


@pytest.mark.parametrize("options", [{"q": 80.0}, {"method": "saliency"}, {"method": "deeplift"}])
def test_concurrent_calls(explainer: Explainer, options: dict[str, Any]) -> None:
    """Four threads with five calls each, the first of which meet while the plan is lowered."""
    fresh = Explainer(NETS["residual, batch norm"].onnx(), backend="cpu", threads=2)
    batches = [IMAGES[:1], IMAGES[1:2], IMAGES[:2], IMAGES]
    expected = [explainer.explain(x, **options).values for x in batches]
    with ThreadPoolExecutor(len(batches)) as pool:
        jobs = [[pool.submit(fresh.explain, x, **options) for x in batches] for _ in range(5)]
        for row in jobs:
            for job, values in zip(row, expected, strict=True):
                np.testing.assert_array_equal(job.result(timeout=60).values, values)


def test_a_small_network_wakes_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Counted(Crew):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            sizes.append(self.size)

    monkeypatch.setattr(compiled, "Crew", Counted)
    fresh = Explainer(NETS["residual, batch norm"].onnx(), backend="cpu", threads=2)
    several = fresh.explain(IMAGES).values
    monkeypatch.setattr(compiled, "_WAKING", fresh.explain(IMAGES).inputs.size * 1000)
    np.testing.assert_array_equal(fresh.explain(IMAGES).values, several)
    assert sizes == [2, 2, 1]
    with Crew(1), Crew(2) as other:  # one that wakes nobody leaves the threads to others
        assert other.size == 2


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_fork_explains_as_well(explainer: Explainer) -> None:
    """It takes no threads along; what its parent's threads were doing must not matter."""
    calls = [{"q": 80.0}, {"method": "saliency"}, {"q": 81.0}]
    expected = [explainer.explain(IMAGES, **options).values for options in calls[:2]]
    fresh = Explainer(NETS["residual, batch norm"].onnx(), backend="cpu", threads=2)
    expected.append(fresh.explain(IMAGES, **calls[2]).values)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        for options in calls:
            sender.send(explainer.explain(IMAGES, **options).values)

    # At that moment one call has all threads, and another lowers a plan.
    with Crew(2) as crew, CompiledBackend._lowering:
        assert crew.size == 2
        process = context.Process(target=child)
        process.start()
    try:
        for values in expected:
            assert receiver.poll(60), "the child hangs"
            np.testing.assert_array_equal(receiver.recv(), values)
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


def test_a_baseline_that_all_share_is_run_once(
    explainer: Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, batches = OnnxruntimeForward.__call__, []

    def counted(self: Any, graph: Graph, x: Array, *arguments: Any) -> dict[str, Array]:
        batches.append(len(x))
        return run(self, graph, x, *arguments)

    monkeypatch.setattr(OnnxruntimeForward, "__call__", counted)

    def passes(expected: list[int], **options: Any) -> Array:
        batches.clear()
        values = explainer.explain(IMAGES, **options).values
        assert batches == expected
        return values

    n, shared = len(IMAGES), np.full_like(IMAGES, 0.25)
    other = np.concatenate([shared[:-1], shared[-1:] + 1])
    deeplift = partial(passes, method="deeplift")
    one = deeplift([n, 1, 1], baseline=0.25)  # the last one for the completeness gap
    same = deeplift([n], baseline=shared)
    last = deeplift([n, n, n], baseline=other)
    after = deeplift([n, 1], baseline=0.25)
    passes([n], method="saliency")  # in the same memory
    again = deeplift([n, 1], baseline=0.25)
    for values in (same, after, again):
        np.testing.assert_array_equal(values, one)
    np.testing.assert_allclose(last[:-1], one[:-1], atol=1e-6 * np.abs(one).max())
    assert np.abs(last[-1] - one[-1]).max() > 1e-3 * np.abs(one).max()


def test_a_baseline_that_its_owner_changes_is_not_remembered() -> None:
    net = Net(
        (3, 4, 4),
        """
        s = Sigmoid(x)
        c = Conv(s, w1)
        r = Relu(c)
        f = Flatten(r)
        y = Gemm(f, w2)
        """,
        {"w1": (4, 3, 3, 3), "w2": (16, 5)},
    )
    explainer, images = Explainer(net.onnx(), backend="cpu"), net.images(2)
    baseline = np.full_like(images, 0.25)
    options: dict[str, Any] = {"method": "deeplift", "target": 0}
    expected = explainer.explain(images, baseline=baseline, **options).values
    before = baseline.copy()
    baseline[:] = 5
    found = explainer.explain(images, baseline=before, **options).values
    np.testing.assert_array_equal(found, expected)


def test_no_samples(explainer: Explainer) -> None:
    with pytest.raises(InvalidImage, match="empty"):
        explainer.explain(IMAGES[:0])


def test_samples_on_another_axis_go_step_by_step() -> None:
    net = Net(
        (4,),
        """
        t = Transpose(x)
        g = Gemm<transA=1>(t, w1, b1)
        r = Relu(g)
        y = Gemm(r, w2)
        """,
        {"w1": (4, 6), "b1": (6,), "w2": (6, 3)},
    )
    method = METHODS["saliency"]
    plan, x = plan_of(net, method, 3), net.images(3)
    runner = CompiledBackend(OnNumpy(), 1).runner(plan)
    assert isinstance(runner, StepwiseRunner)
    np.testing.assert_array_equal(
        runner(x, seed_of)[1], StepwiseRunner(plan, NumpyForward(np.float32))(x, seed_of)[1]
    )


# --- published networks ---------------------------------------------------------------------------

PUBLISHED = {
    "imagenet_squeezenet1.1_logits": "caffe",
    "imagenet_mobilenet_v2_1.0_224": "mobilenet_tf",
    "cifar10_resnet20_bn_unfused": "cifar10_imagenet",
    "cifar10_marabou_small_tf2onnx": "unit",
    "cifar10_vit_ibp_3_3_8": "cifar10_standard",
}


class Recorded:
    """A forward pass that remembers what it handed over, in the values' own axis order."""

    def __init__(self, forward: Any) -> None:
        self.forward, self.any_batch = forward, forward.any_batch
        self.values: dict[str, Array] = {}

    def __call__(
        self,
        graph: Graph,
        x: Array,
        names: Sequence[str],
        into: Places | None = None,
    ) -> dict[str, Array]:
        values: dict[str, Array] = self.forward(graph, x, names, into)
        for name, place in into.items() if into is not None else ():
            assert into is not None and into.session is not None
            shape = graph.shapes[name] or ()
            if name in into.session.blocked:
                self.values[name] = out_of_blocks(place, shape).copy()
            elif len(shape) == 4:
                n, c, h, w = shape
                image = place[: n * c * h * w].reshape(n, h, w, c)
                self.values[name] = np.moveaxis(image, -1, 1).copy()
            else:
                self.values[name] = place.reshape(shape).copy()
        self.values |= values
        return values


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("method", [METHODS["q = 95, same"], METHODS["saliency"]], ids=str)
def test_published_networks(name: str, method: Method, shared_data: Path, walks: list[Any]) -> None:
    """One photo, with onnxruntime's forward pass, at every step."""
    loaded = read_model(shared_data / "models" / f"{name}.onnx")
    spec = input_spec(loaded)
    photo = prepare(
        shared_data / "photos" / "n01820546_lorikeet.JPEG",
        spec.shape,
        spec.dtype,
        preprocess=PUBLISHED[name],
    )
    x = photo.array.astype(np.float32)
    graph = freeze(loaded, x.shape)
    plan = make_plan(graph, method.rules(graph))
    forward = Recorded(BlockedForward(loaded, spec.name, rebatch=False, threads=2))
    check_every_step(
        runner_of(plan, threads=2, forward=forward), forward, method, x, walks, highest
    )


def highest(scores: Array) -> Array:
    return (scores == scores.max(axis=1, keepdims=True)).astype(np.float32)
