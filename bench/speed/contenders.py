"""What runs against what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper

from rectgrad_ref import Explainer
from rectgrad_ref.forward import OnnxruntimeForward, import_onnxruntime
from rectgrad_ref.graph import Graph
from rectgrad_ref.model import Model

from .clock import Contender
from .results import EXPOSED, FORWARD, OURS

# Of methods that sum over many points; the paper's 50 would cost time and change little a pass.
PASSES = {"smoothgrad": "n", "integrated_gradients": "steps"}


def plain_forward(model: Model, x: np.ndarray, threads: int, backend: str = "cpu") -> Contender:
    """Inference as anybody would run it: the denominator of all ratios."""
    session = _session(model.proto, threads, backend)
    feed = {session.get_inputs()[0].name: x}
    return Contender("forward", FORWARD, lambda: session.run(None, feed))


def exposed_forward(
    model: Model, graph: Graph, x: np.ndarray, threads: int, backend: str = "cpu"
) -> Contender:
    """Inference that hands over all ReLU outputs: what any method needs at least.

    Channels last, on a GPU as they are and where they are.
    """
    place = "cuda" if backend == "cuda" else "cpu"
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for value in (node.outputs[0] for node in graph.nodes if node.op == "Relu"):
        if len(graph.shapes[value] or ()) == 4 and place == "cpu":
            last = f"{value}/channels_last"
            transpose = helper.make_node("Transpose", [value], [last], perm=[0, 2, 3, 1])
            proto.graph.node.append(transpose)
            value = last
        output = helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None)
        proto.graph.output.append(output)
    session = _session(proto, threads, backend)
    binding = session.io_binding()  # no copies of outputs
    binding.bind_cpu_input(graph.input, x)
    for output in session.get_outputs():
        binding.bind_output(output.name, place)
    return Contender("forward", EXPOSED, lambda: session.run_with_iobinding(binding))


def _session(proto: onnx.ModelProto, threads: int, backend: str) -> Any:
    """At onnxruntime's default options, but in full precision."""
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    provider: Any = "CPUExecutionProvider"
    if backend == "cuda":
        runtime.preload_dlls()
        provider = ("CUDAExecutionProvider", {"use_tf32": "0"})
    return runtime.InferenceSession(proto.SerializeToString(), options, providers=[provider])


def explanation(
    explainer: Explainer,
    x: np.ndarray,
    method: str,
    *,
    by: str = OURS,
    passes: int = 1,
    **options: Any,
) -> Contender:
    """Ours, from array to array."""
    if method in PASSES:
        options[PASSES[method]] = passes
    return Contender(
        method,
        by,
        lambda: explainer.explain(x, method=method, **options),
        passes=passes if method in PASSES else 1,
        q=options.get("q"),
    )


def all_contenders(
    explainer: Explainer, x: np.ndarray, methods: Iterable[str], *, passes: int, threads: int
) -> tuple[list[Contender], list[str]]:
    """Inference, every method by us, and by every peer that is installed.

    Returns
    -------
    contenders : list of Contender
    notes : list of str
        Who is absent, and why.
    """
    explainer.explain(x[:1])  # fixes the extents that the file leaves open
    backend = explainer.backend.name
    contenders = [plain_forward(explainer.model, x, threads, backend)]
    if isinstance(explainer.backend.forward, OnnxruntimeForward):
        contenders.append(exposed_forward(explainer.model, explainer.graph, x, threads, backend))
    methods = list(methods)
    contenders += [explanation(explainer, x, method, passes=passes) for method in methods]

    def expected(method: str) -> Callable[[], Any]:
        return explanation(explainer, x, method, passes=passes).call

    try:
        from . import peers
    except ImportError:
        return contenders, ["PyTorch is not installed, its methods are left out: pip install torch"]
    try:
        network = peers.Network(explainer.graph, device="cuda" if backend == "cuda" else "cpu")
    except NotImplementedError as reason:
        return contenders, [f"{explainer.model.name}: no PyTorch twin, {reason}"]
    peers.set_threads(threads)
    found = list(peers.torch_contenders(network, x, methods, passes, expected))
    captum, notes = peers.captum_contenders(network, x, methods, expected)
    return contenders + found + captum, notes
