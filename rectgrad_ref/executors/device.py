"""A GPU: its memory, one stream on it, and onnxruntime working on both.

Everything is enqueued on one stream, onnxruntime's kernels too, so that nothing has to wait for
anything but the host for a result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import BackendUnavailable, InvalidModel, OutOfMemory
from ..forward import LoadedModel, OnnxruntimeForward, Places, import_onnxruntime
from ..graph import Graph
from ..model import Model

_REMEDY = "pip uninstall onnxruntime; pip install 'rectgrad-ref[gpu]'"
_EXHAUSTED = ("out of memory", "failed to allocate", "alloc_failed", "out_of_memory")

# An array in device memory: Numba's, in the simulator its stand-in.
DeviceArray = Any


class Device:
    """The current CUDA device.

    Parameters
    ----------
    tf32 : bool
        Whether matrix products and convolutions may round their inputs to 11 significant bits.

    Raises
    ------
    BackendUnavailable
        numba-cuda, the driver, a GPU or onnxruntime's GPU package is missing.
    """

    provider = "CUDAExecutionProvider"
    place = "cuda"

    def __init__(self, *, tf32: bool = False) -> None:
        self.tf32 = tf32
        self._cuda = self._numba()
        self.stream = self._cuda.stream()

    def _numba(self) -> Any:
        try:
            from numba import cuda
            from numba.cuda.core import config
        except ImportError as error:
            raise BackendUnavailable(
                f"numba-cuda cannot be imported ({error}): {_REMEDY}"
            ) from error
        try:
            cuda.current_context()
        except Exception as error:  # a driver reports its absence in several classes
            raise BackendUnavailable(
                f"no CUDA device can be used ({_first_line(error)}). It takes an NVIDIA GPU and a "
                "driver for CUDA 13 (580 or newer); backend='cpu' runs without"
            ) from error
        runtime = import_onnxruntime()
        if self.provider not in runtime.get_available_providers():
            raise BackendUnavailable(f"this onnxruntime was built without CUDA: {_REMEDY}")
        config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # small layers fill no GPU
        runtime.preload_dlls()  # CUDA and cuDNN from their wheels, where they come from these
        return cuda

    @property
    def name(self) -> str:
        """What it is called."""
        name = self._cuda.get_current_device().name
        return name.decode() if isinstance(name, bytes) else str(name)

    @property
    def options(self) -> dict[str, str]:
        """What onnxruntime's provider is told."""
        return {
            "device_id": "0",
            "user_compute_stream": str(int(self.stream)),
            "use_tf32": str(int(self.tf32)),
            # The same algorithms in every process, where trials of all would let chance decide.
            "cudnn_conv_algo_search": "HEURISTIC",
            # Blocks of the size that is asked for: what is left of the memory is ours.
            "arena_extend_strategy": "kSameAsRequested",
        }

    @property
    def free(self) -> int:
        """Bytes of memory that nobody uses."""
        return int(self._cuda.current_context().get_memory_info().free)

    def empty(self, size: int, dtype: type) -> DeviceArray:
        """An array of one axis, of any content.

        Raises
        ------
        OutOfMemory
        """
        try:
            return self._cuda.device_array(size, dtype)
        except Exception as error:
            if not _is_exhausted(error):
                raise
            wanted = size * np.dtype(dtype).itemsize
            raise OutOfMemory(
                f"{self.name} has {self.free / 2**20:,.0f} MiB left of its memory, but "
                f"{wanted / 2**20:,.0f} MiB are needed at once; give a smaller batch_size"
            ) from error

    def address(self, array: DeviceArray) -> int:
        """Where it begins in memory."""
        return int(array.__cuda_array_interface__["data"][0])

    def upload(self, values: np.ndarray, into: DeviceArray) -> None:
        """Copy to the device, after what is enqueued."""
        into.copy_to_device(np.ascontiguousarray(values), stream=self.stream)

    def download(self, array: DeviceArray) -> np.ndarray:
        """Copy to the host, after what is enqueued."""
        values: np.ndarray = array.copy_to_host(stream=self.stream)
        self.stream.synchronize()
        return values

    def recorded(self, run: Callable[[], None]) -> Callable[[], None]:
        """What `run` launches, as one CUDA graph: with one call to the driver instead of hundreds.

        Every kernel must have been launched before, so that none is compiled meanwhile.
        """
        from cuda.bindings import driver

        stream = driver.CUstream(int(self.stream))
        with self._cuda.defer_cleanup():
            mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            _checked(driver.cuStreamBeginCapture(stream, mode))
            try:
                run()
            finally:
                graph = _checked(driver.cuStreamEndCapture(stream))
        executable = _checked(driver.cuGraphInstantiate(graph, 0))
        _checked(driver.cuGraphDestroy(graph))
        return lambda: _checked(driver.cuGraphLaunch(executable, stream))


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a call to the driver returns besides its status."""
    status, *values = answer
    if status != type(status).CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver answers {status.name}")
    return values[0] if values else None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def _is_exhausted(error: BaseException) -> bool:
    return any(sign in str(error).lower() for sign in _EXHAUSTED)


# Where a value lies: its array, and its shape.
Place = tuple[DeviceArray, Sequence[int]]


class Session:
    """An ONNX graph in onnxruntime, whose inputs and outputs lie in device memory.

    Raises
    ------
    BackendUnavailable
        onnxruntime cannot use the GPU after all.
    """

    def __init__(self, device: Device, model: bytes) -> None:
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.use_deterministic_compute = True
        self._device = device
        self._session = runtime.InferenceSession(
            model, options, providers=[(device.provider, device.options)]
        )
        require_provider(self._session, device)

    def __call__(self, inputs: Mapping[str, Place], outputs: Mapping[str, Place]) -> None:
        """Enqueue a run of float32 tensors."""
        binding = self._session.io_binding()
        for bind, places in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, (array, shape) in places.items():
                address = self._device.address(array)
                bind(name, self._device.place, 0, np.float32, list(shape), address)
        self._session.run_with_iobinding(binding, unsynchronised())


def unsynchronised() -> Any:
    """Options of a run that returns before the GPU has finished it."""
    options = import_onnxruntime().RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def require_provider(session: Any, device: Device) -> None:
    """onnxruntime goes on without a provider that it cannot load; we do not.

    Raises
    ------
    BackendUnavailable
    """
    if session.get_providers()[0] != device.provider:
        raise BackendUnavailable(
            f"onnxruntime {import_onnxruntime().__version__} cannot load its {device.provider}: "
            "the driver is too old, or CUDA's or cuDNN's libraries are missing. Remedy: "
            "pip install 'onnxruntime-gpu[cuda,cudnn]', and a driver for CUDA 13 (580 or newer)"
        )


class DeviceForward(OnnxruntimeForward):
    """The user's model on the GPU, which leaves values in its memory, in their own axis order."""

    def __init__(self, model: Model, input: str, device: Device, *, rebatch: bool) -> None:
        provider = (device.provider, device.options)
        super().__init__(model, input, rebatch=rebatch, providers=(provider,))
        self.device = device
        self.description += f" on {device.name}" + " with TF32" * device.tf32

    def __call__(
        self,
        graph: Graph,
        x: np.ndarray,
        names: Sequence[str],
        into: Places | None = None,
    ) -> dict[str, np.ndarray]:
        """The values called `names`, on the host; those of `into` stay on the device, as float32.

        Raises
        ------
        OutOfMemory
        """
        places = Places() if into is None else into
        if graph.input in places:
            array, _ = places[graph.input]
            self.device.upload(x.ravel(), array)
            places = Places({v: place for v, place in places.items() if v != graph.input})
        asked = [name for name in names if name not in places]
        try:
            values = super().__call__(graph, x, asked, places)
        except InvalidModel as error:
            if not _is_exhausted(error):
                raise
            raise OutOfMemory(
                f"{graph.model.name}: {len(x)} samples do not fit {self.device.name}, which has "
                f"{self.device.free / 2**20:,.0f} MiB of its memory left; give a smaller batch_size"
            ) from error

        for name in names:
            if name in places:
                array, shape = places[name]
                values[name] = self.device.download(array).reshape(shape)
        return values

    def _bind(
        self,
        binding: Any,
        session: LoadedModel,
        graph: Graph,
        name: str,
        shape: tuple[int, ...],
        place: Place,
    ) -> None:
        address = self.device.address(place[0])
        result = self._written(graph, name)[1]
        binding.bind_output(result, self.device.place, 0, np.float32, list(shape), address)

    def _session(
        self, graph: Graph, names: tuple[str, ...], placed: tuple[str, ...]
    ) -> LoadedModel:
        session = super()._session(graph, names, placed)
        require_provider(session.runs, self.device)
        return session
