"""How long each kernel of a walk back takes on a GPU, over the least that moving its bytes takes.

Bytes are counted once for each tensor that a launch must read or write in device memory, however
often it does; of lists, and of the few units that a selection leaves, nothing. The bandwidth is
that of a large copy on the same device. Each launch is timed alone, as a CUDA graph of many of it,
so that the host does not count.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np

from rectgrad_ref import Explainer
from rectgrad_ref.executors.cuda import Launch
from rectgrad_ref.executors.device import Device
from rectgrad_ref.executors.launched import CudaRunner, _Launches
from rectgrad_ref.kernels import cuda as kernels
from rectgrad_ref.methods import make_method

_REPEATS = 20
_COPIED = 2**30  # bytes
_FLOAT = 4


def per_kernel(explainer: Explainer, x: np.ndarray) -> dict[str, dict[str, float]]:
    """RectGrad's walk back for the images `x`.

    Returns
    -------
    dict
        Kernel → its number of launches, their µs and MB, and the µs that these take at least.
    """
    explainer.explain(x)
    runner = explainer._prepare(x.shape, make_method("rectgrad")).runner
    assert isinstance(runner, CudaRunner)
    device, memory = runner.backend.device, runner.backend.memory
    speed = bandwidth(device)
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for item in runner.lowered.items:
        if not isinstance(item, Launch):
            continue
        part = _Launches(device, memory.arrays, [item], shared=False)
        part._launch()
        seconds, moved = timed(device, part._launch), moved_bytes(item)
        figures = found[item.kernel]
        figures["launches"] += 1
        figures["µs"] += 1e6 * seconds
        figures["MB"] += 1e-6 * moved
        figures["floor, µs"] += 1e6 * moved / speed
    return {kernel: dict(figures) for kernel, figures in found.items()}


def timed(device: Device, launch: Callable[[], None]) -> float:
    """Seconds of one launch among many."""
    cuda = device._cuda

    def many() -> None:
        for _ in range(_REPEATS):
            launch()

    run = device.recorded(many)
    run()
    begin, end = cuda.event(), cuda.event()
    begin.record(device.stream)
    run()
    end.record(device.stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / _REPEATS


def bandwidth(device: Device) -> float:
    """Bytes a second that a copy reads and writes."""
    source, target = (device.empty(_COPIED // _FLOAT, np.float32) for _ in range(2))
    launch = lambda: target.copy_to_device(source, stream=device.stream)  # noqa: E731
    launch()
    return 2 * _COPIED / timed(device, launch)


def moved_bytes(launch: Launch) -> float:
    """What a launch must read and write at least."""
    names = inspect.signature(getattr(kernels, launch.kernel).py_func).parameters
    arguments: dict[str, Any] = dict(zip(names, launch.arguments, strict=True))
    return _FLOAT * launch.blocks[0] * _FLOATS[launch.kernel](arguments)


def _written(a: Mapping[str, Any]) -> int:
    return 1 + a["adds"]


def _units(a: Mapping[str, Any]) -> int:
    return prod(a[name] for name in ("channels", "height", "width"))


def _compared(a: Mapping[str, Any]) -> float:
    """Of each unit, to see whether it passes: gradient and activation; after `select`, a bit."""
    if a["mode"] == kernels.EVERYTHING:
        return 1
    return 1 / kernels.WORD if np.isnan(a["fixed"]) else 2


def _outputs(a: Mapping[str, Any]) -> float:
    """Units of a pool's output, from those of its input."""
    return float(a["units"] / (a["height"] * a["width"]) * a["s_height"] * a["s_width"])


# Floats of one sample; weights, which all samples share, are left out.
_FLOATS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "select": lambda a: (2 + 1 / kernels.WORD) * a["units"],
    "activate": lambda a: (_compared(a) + _written(a)) * a["units"],
    "ratio": lambda a: (2 + _written(a)) * a["units"],
    "compact": lambda a: _compared(a) * _units(a),
    "transpose": lambda a: _written(a) * _units(a),
    "add": lambda a: (1 + _written(a)) * a["units"],
    "max_pool": lambda a: (1 + _written(a)) * a["units"] + 2 * _outputs(a),
    "spread": lambda a: (_written(a) + (a["x_base"] >= 0)) * a["units"] + _outputs(a),
    "share": lambda a: 2 * a["units"] + a["units"] / (a["s_height"] * a["s_width"])
    * a["height"] * a["width"],
}  # fmt: skip
