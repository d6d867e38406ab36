"""Where lowered plans keep what they need."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from walk_cases import METHODS, Net, OnNumpy, plan_of, walked

from rectgrad_ref.executors.compiled import CompiledBackend
from rectgrad_ref.executors.runner import StepwiseRunner
from rectgrad_ref.executors.storage import Arena, WeightStore
from rectgrad_ref.forward import NumpyForward


@given(st.lists(st.integers(1, 40) | st.none(), max_size=60), st.sampled_from([1, 16]))
def test_an_arena_gives_no_float_twice(requests: list[int | None], alignment: int) -> None:
    """A number takes so many floats, None gives the oldest back."""
    arena, given_out = Arena(alignment), []
    for floats in requests:
        if floats is not None:
            given_out.append((arena.take(floats), floats))
        elif given_out:
            arena.give_back(*given_out.pop(0))
        used = [set(range(begin, begin + n)) for begin, n in given_out]
        assert sum(map(len, used)) == len(set().union(*used))
        assert all(begin % alignment == 0 and begin + n <= arena.size for begin, n in given_out)
    for taken in given_out:
        arena.give_back(*taken)
    whole = arena.size
    assert arena.take(max(whole, 1)) == 0, "not one piece again"
    assert arena.size == max(whole, alignment)


def test_weights_stay_where_they_are() -> None:
    store = WeightStore()
    first = store.add("w", "conv", lambda: np.ones(3, np.float32))
    before = store.array
    second = store.add("v", "conv", lambda: np.full(20, 2, np.float32))
    assert store.add("w", "conv", lambda: np.zeros(9, np.float32)) == first
    np.testing.assert_array_equal(store.array[: before.size], before)
    np.testing.assert_array_equal(store.array[second : second + 20], 2)


def test_one_model_at_several_sizes() -> None:
    """Weights that depend on the size of what they are applied to are not mixed up."""
    body = """
        n = BatchNormalization(x, s, b, m, v)
        r = Relu(n)
        p = ReduceMean<keepdims=0>(r, axes)
        y = Gemm(p, w)
    """
    axes = np.array([2], np.int64)
    backend = CompiledBackend(OnNumpy(), 1)  # type: ignore[arg-type]
    weights = {"s": (3,), "b": (3,), "m": (3,), "v": (3,), "w": (3, 4), "axes": axes}
    for length in (5, 8, 5):
        method, sized = METHODS["saliency"], Net((3, length), body, weights)
        plan, x = plan_of(sized, method), sized.images(2)
        assert backend.runs_as(plan)[plan.steps[-1].node.name] == "numba"
        expected = walked(StepwiseRunner(plan, NumpyForward(np.float32)), x, method)
        np.testing.assert_allclose(walked(backend.runner(plan), x, method), expected, rtol=1e-6)
