"""The `cuda` backend against the reference, step by step on the same float32 numbers.

Everything runs in Numba's simulator, with arrays of the host for a device's and onnxruntime on the
processor; and on a GPU with ``-m gpu`` (see `cuda_device`). The networks and methods are those of
the compiled walk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from cuda_device import MARKS, SIMULATED, cuda

pytest.importorskip("onnxruntime")
pytestmark = MARKS

from test_compiled import METHODS, NETS, Observed, check, plan_of, seed_of  # noqa: E402

from rectgrad_ref.executors import cuda as lowering  # noqa: E402
from rectgrad_ref.executors import device as devices  # noqa: E402
from rectgrad_ref.executors import launched  # noqa: E402
from rectgrad_ref.executors.device import Device, Place  # noqa: E402
from rectgrad_ref.executors.launched import CudaBackend, CudaRunner  # noqa: E402
from rectgrad_ref.forward import NumpyForward  # noqa: E402
from rectgrad_ref.graph import Graph  # noqa: E402
from rectgrad_ref.kernels import cuda as k  # noqa: E402

Array = np.ndarray


class Simulated(Device):
    """The simulator's device: its arrays are the host's, and begin as what nobody wants."""

    provider, place, name, options = "CPUExecutionProvider", "cpu", "a simulator", {}  # type: ignore[assignment]
    free = 2**30

    def _numba(self) -> Any:
        return cuda

    def empty(self, size: int, dtype: type) -> Any:
        array = super().empty(size, dtype)
        array[:] = np.nan if np.dtype(dtype).kind == "f" else -(2**20)
        return array

    def address(self, array: Any) -> int:
        return int(array._ary.ctypes.data)

    def recorded(self, run: Any) -> Any:
        return run


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are several blocks, and the simulator has few threads to start."""
    if SIMULATED:
        for name, size in (("THREADS", 1), ("UNITS", 64), ("GROUP", 2), ("LANES", 2)):
            monkeypatch.setattr(lowering, name, size)
        # Shorter digits: fewer bins to go through.
        for name, size in (("BITS", 8), ("DIGITS", 4), ("BINS", 256), ("COUNTS", 512)):
            monkeypatch.setattr(k, name, size)
        monkeypatch.setattr(devices, "Device", Simulated)


def new_device() -> Device:
    return Simulated() if SIMULATED else Device()


class OnNumpy(NumpyForward):
    """NumPy's forward pass in float32, which also leaves values on the device.

    The first time it is asked for `values`, then for those at the `baseline`.
    """

    any_batch = False

    def __init__(self) -> None:
        super().__init__(np.float32)
        self.device = new_device()
        self.values: dict[str, Array] = {}
        self.baseline: dict[str, Array] = {}

    def __call__(
        self,
        graph: Graph,
        x: Array,
        names: Sequence[str],
        into: Mapping[str, Place] = MappingProxyType({}),
    ) -> dict[str, Array]:
        values = super().__call__(graph, x, (*names, *into))
        (self.baseline if self.values else self.values).update(values)
        for name, (array, shape) in into.items():
            assert values[name].shape == tuple(shape)
            self.device.upload(values[name].ravel(), array)
        return {name: values[name] for name in names}


class Walk(launched._Walk):
    """A walk that remembers its seed."""

    def plant(self, seed: Array) -> None:
        self.seed = seed
        super().plant(seed)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Walk]:
    """The walks of this test, whose sheets can be looked at afterwards where they were traced."""
    kept: list[Walk] = []

    class Kept(Walk):
        def plant(self, seed: Array) -> None:
            kept.append(self)
            super().plant(seed)

    monkeypatch.setattr(launched, "_Walk", Kept)
    return kept


def runner_of(plan: Any, forward: Any = None) -> CudaRunner:
    runner = CudaBackend(forward or OnNumpy()).runner(plan)
    assert isinstance(runner, CudaRunner)
    return runner


# In the simulator each network goes with some methods, so that all of both are met.
PAIRS = [
    (net, method)
    for i, net in enumerate(NETS)
    for j, method in enumerate(METHODS)
    if not SIMULATED or (i + j) % len(NETS) in (0, 1)
]


@pytest.mark.parametrize(("net", "method"), PAIRS)
def test_every_step(
    net: str, method: str, walks: list[Walk], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = METHODS[method]
    for density in (0.0, 1.0) if not SIMULATED else (float(len(net + method) % 2),):
        monkeypatch.setattr(lowering, "DENSITY", density)
        monkeypatch.setattr(lowering, "PART", 10**9 if density else 50)
        walks.clear()
        plan = plan_of(NETS[net], chosen, 2)
        x = NETS[net].images(plan.graph.batch)
        forward, observed = OnNumpy(), []
        runner = runner_of(plan, forward)
        baseline = chosen.reference_input(x)

        def observe(*seen: Any, observed: list[Observed] = observed) -> None:
            observed.append(Observed(*seen))

        R = runner(x, seed_of, baseline=baseline, observe=observe)[1]
        assert {o.step.node.name for o in observed} == plan.layers
        check(walks[0], forward, observed)  # type: ignore[arg-type]
        again = runner(x, seed_of, baseline=baseline)[1]
        np.testing.assert_array_equal(again, R, "a trace changes the result")
