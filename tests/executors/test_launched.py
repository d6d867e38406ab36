"""The `cuda` backend against the reference, step by step on the same float32 numbers.

Everything runs in Numba's simulator, with arrays of the host for a device's and onnxruntime on the
processor; and on a GPU with ``-m gpu`` (see `cuda_device`). The networks and methods are those of
the compiled walk.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from cuda_device import MARKS, SIMULATED, cuda
from walk_cases import (
    IDENTITIES,
    METHODS,
    NETS,
    Net,
    OnNumpy,
    both_sides,
    check_every_step,
    check_several_sizes,
    plan_of,
    seed_of,
    walked,
)

from rectgrad_ref import Explainer
from rectgrad_ref.errors import OutOfMemory
from rectgrad_ref.executors import cuda as lowering
from rectgrad_ref.executors import device as devices
from rectgrad_ref.executors import launched
from rectgrad_ref.executors.cuda import HostStep, Launch, Product
from rectgrad_ref.executors.device import Device, Place
from rectgrad_ref.executors.launched import CudaBackend, CudaRunner
from rectgrad_ref.kernels import cuda as k
from rectgrad_ref.methods import METHODS as ALL_METHODS
from rectgrad_ref.methods import make_method
from rectgrad_ref.plan import Plan

pytestmark = MARKS
Array = np.ndarray


class Simulated(Device):
    """The simulator's device: its arrays are the host's, and begin as what nobody wants."""

    provider, place, name, options = "CPUExecutionProvider", "cpu", "a simulator", {}  # type: ignore[assignment]
    free = 2**30

    def _numba(self) -> Any:
        return cuda

    def empty(self, size: int, dtype: type) -> Any:
        array = super().empty(size, dtype)
        array[:] = np.nan if np.dtype(dtype).kind == "f" else np.int64(-(2**20))
        return array

    def address(self, array: Any) -> int:
        return int(array._ary.ctypes.data)

    def recorded(self, run: Any) -> Any:
        return run


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are several blocks, and the simulator has few threads to start."""
    if SIMULATED:
        for name, size in (
            ("THREADS", 1),
            ("UNITS", 64),
            ("GROUP", 1),
            ("LANES", 1),
            ("BLOCKS", 8),
            ("SAMPLE", 16),
        ):
            monkeypatch.setattr(lowering, name, size)
        # Shorter digits: fewer bins to go through.
        for name, size in (("BITS", 8), ("DIGITS", 4), ("BINS", 256)):
            monkeypatch.setattr(k, name, size)
        monkeypatch.setattr(devices, "Device", Simulated)


def new_device() -> Device:
    return Simulated() if SIMULATED else Device()


class OnDevice(OnNumpy):
    """NumPy's forward pass, which leaves values on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.device = new_device()

    def leave(self, value: Array, place: Place, *, blocked: bool) -> None:
        array, shape = place
        assert value.shape == tuple(shape)
        self.device.upload(value.ravel(), array)


def runner_of(plan: Plan, forward: Any = None) -> CudaRunner:
    runner = CudaBackend(forward or OnDevice()).runner(plan)
    assert isinstance(runner, CudaRunner)
    return runner


# Each network goes with one or two methods, so that all of both are met.
PAIRS = [
    (net, method)
    for i, net in enumerate(NETS)
    for j, method in enumerate(METHODS)
    if (i + j) % len(NETS) == 0
]


@pytest.mark.parametrize(("net", "method"), PAIRS)
def test_every_step(
    net: str, method: str, walks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = METHODS[method]
    for density in (0.0, 1.0) if not SIMULATED else (float(len(net + method) % 2),):
        monkeypatch.setattr(lowering, "DENSITY", density)
        monkeypatch.setattr(lowering, "PARTS", (10**9,) * 2 if density else (50, 100))
        plan, forward = plan_of(NETS[net], chosen), OnDevice()
        runner, x = runner_of(plan, forward), NETS[net].images(plan.graph.batch)
        R = check_every_step(runner, forward, chosen, x, walks)
        again = walked(runner, x, chosen)
        np.testing.assert_array_equal(again, R, "a trace changes the result")


# --- what the result must not depend on -----------------------------------------------------------

SMALL = Net(
    (2, 6, 6),
    """
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    p1 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)
    c2 = Conv<pads=[1,1,1,1]>(p1, w2, b2)
    r2 = Relu(c2)
    f = Flatten(r2)
    y = Gemm(f, w3, b3)
    """,
    {"w1": (4, 2, 3, 3), "b1": (4,), "w2": (5, 4, 3, 3), "b2": (5,), "w3": (45, 3), "b3": (3,)},
)
IMAGES = SMALL.images(3, seed=5)


@pytest.mark.parametrize("name", ["q = 80", "deeplift"])
def test_a_batch_does_not_change_a_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no dense product of onnxruntime takes part, which sums as it likes."""
    monkeypatch.setattr(lowering, "DENSITY", 1.0)
    method = METHODS[name]
    together = walked(runner_of(plan_of(SMALL, method, 3)), IMAGES, method)
    for i in range(3):
        alone = walked(runner_of(plan_of(SMALL, method, 1)), IMAGES[i : i + 1], method)
        np.testing.assert_array_equal(alone, together[i : i + 1])


@pytest.mark.parametrize("claim", IDENTITIES)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_identities(claim: str, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """SPEC section 5."""
    monkeypatch.setattr(lowering, "DENSITY", density)
    sides = both_sides(claim, SMALL, True, runner_of)
    assert np.any(sides[0])
    np.testing.assert_array_equal(*sides)


def test_recorded_launches_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "RECORD", True)
    recorded, record = [], Device.recorded if not SIMULATED else Simulated.recorded

    def counted(self: Any, run: Any) -> Any:
        recorded.append(run)
        return record(self, run)

    monkeypatch.setattr(Device if not SIMULATED else Simulated, "recorded", counted)
    method = METHODS["q = 80"]
    runner = runner_of(plan_of(SMALL, method, 3))
    first, again, once_more = (runner(IMAGES, seed_of)[1] for _ in range(3))
    assert len(recorded) == sum(map(_is_launch, launched._runs(runner.lowered.items)))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, once_more)


def _is_launch(items: list[Any]) -> bool:
    return isinstance(items[0], Launch)


# --- through the front door -----------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "rectgrad": {"q": 80.0},
    "smoothgrad": {"n": 2},
    "integrated_gradients": {"steps": 2},
}


@pytest.mark.parametrize("method", ALL_METHODS)
def test_explanations_are_those_of_the_reference(method: str) -> None:
    options = OPTIONS.get(method, {})
    reference, explainer = (
        Explainer(SMALL.onnx(), backend=backend, dtype=np.float32, batch_size=2)
        for backend in ("reference", "cuda")
    )
    expected = reference.explain(IMAGES, method=method, **options)
    found = explainer.explain(IMAGES, method=method, **options)
    np.testing.assert_array_equal(found.target, expected.target)
    scale = np.abs(expected.values).max()
    np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=1e-5 * scale)
    assert found.environment["backend"] == "cuda"


def test_images_of_several_sizes() -> None:
    check_several_sizes("cuda")


def test_calls_from_several_threads_take_turns() -> None:
    explainer = Explainer(SMALL.onnx(), backend="cuda")
    expected = [explainer.explain(IMAGES[i : i + 1], q=80.0).values for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(explainer.explain, IMAGES[i : i + 1], q=80.0) for i in range(3)]
        for job, values in zip(jobs, expected, strict=True):
            np.testing.assert_array_equal(job.result(timeout=60).values, values)


def test_a_trace_shows_every_layer() -> None:
    expected, found = (
        Explainer(SMALL.onnx(), backend=backend, dtype=np.float32)
        .explain(IMAGES[:2], q=80.0, trace=True)
        .layers()
        for backend in ("reference", "cuda")
    )
    assert list(found) == list(expected)
    for name, layer in found.items():
        for part in ("a", "R_out", "R_in", "tau"):
            values = getattr(expected[name], part)
            scale = np.abs(values).max()
            np.testing.assert_allclose(getattr(layer, part), values, rtol=0, atol=1e-5 * scale)
        np.testing.assert_array_equal(layer.mask, expected[name].mask)


def test_the_plan_says_what_runs_where() -> None:
    backend = CudaBackend(OnDevice())  # type: ignore[arg-type]
    methods = make_method("rectgrad", q=98.0), make_method("saliency")
    selected, dense = (
        backend.runs_as(plan_of(NETS["other activations"], method, 1)) for method in methods
    )
    assert set(selected.values()) == {"cuda", "onnxruntime", "numpy"}
    assert dense.keys() == selected.keys()
    plan = plan_of(SMALL, methods[0], 1)
    assert set(backend.runs_as(plan).values()) == {"cuda"}
    items = backend.lower(plan, trace=False).items
    assert not any(isinstance(item, Product | HostStep) for item in items)
    residual = plan_of(NETS["residual, batch norm"], methods[0])
    taken, traced = (backend.lower(residual, trace=trace).runs_as for trace in (False, True))
    assert taken == traced, "a trace takes another way"


# --- memory ---------------------------------------------------------------------------------------


def test_too_many_samples_are_taken_in_smaller_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = limit_memory(monkeypatch, 10**9)
    expected = Explainer(SMALL.onnx(), backend="cuda").explain(IMAGES, q=80.0).values
    limit = max(sizes)
    sizes = limit_memory(monkeypatch, limit - 1)
    explainer = Explainer(SMALL.onnx(), backend="cuda")
    found = explainer.explain(IMAGES, q=80.0).values
    assert limit in sizes
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(OutOfMemory):
        explainer.explain(IMAGES, q=80.0, scope="batch")  # which must not be cut


def test_what_was_computed_at_a_baseline_is_lost_when_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def explained(explainer: Explainer, samples: int) -> Array:
        return explainer.explain(IMAGES[:samples], method="deeplift", baseline=0.25).values

    sizes = limit_memory(monkeypatch, 10**9)
    explainer = Explainer(SMALL.onnx(), backend="cuda")
    explained(explainer, 1)
    needed = max(sizes)
    expected = explained(explainer, len(IMAGES))
    limits = {size - 1 for size in sizes if size > needed}
    assert limits
    for limit in limits:
        limit_memory(monkeypatch, 10**9)
        explainer = Explainer(SMALL.onnx(), backend="cuda")
        explained(explainer, 1)
        limit_memory(monkeypatch, limit)
        found = explained(explainer, len(IMAGES))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_one_sample_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 10)
    with pytest.raises(OutOfMemory, match=r"MiB are needed at once; give a smaller batch_size"):
        Explainer(SMALL.onnx(), backend="cuda").explain(IMAGES, q=80.0)


def limit_memory(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[int]:
    """Have the device refuse larger arrays; returns the sizes that it is asked for."""
    empty, asked = numba_empty, []

    def limited(shape: int, *arguments: Any, **options: Any) -> Any:
        asked.append(shape)
        if shape > limit:
            raise RuntimeError("[CUDA_ERROR_OUT_OF_MEMORY] Call to cuMemAlloc results in an error")
        return empty(shape, *arguments, **options)

    monkeypatch.setattr(cuda, "device_array", limited)
    return asked


numba_empty = cuda.device_array
