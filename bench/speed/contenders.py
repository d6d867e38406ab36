"""What runs against what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from rectgrad_ref import Explainer
from rectgrad_ref.forward import OnnxruntimeForward, import_onnxruntime
from rectgrad_ref.graph import Graph

from .clock import Contender
from .results import EXPOSED, FORWARD, OURS

# Of methods that sum over many points; the paper's 50 would cost time and change little a pass.
PASSES = {"smoothgrad": "n", "integrated_gradients": "steps"}


def plain_forward(explainer: Explainer, x: np.ndarray, threads: int) -> Contender:
    """Inference as anybody would run it: the denominator of all ratios."""
    model = explainer.model.proto
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names, feed = [output.name for output in model.graph.output], {explainer.input.name: x}
    return Contender("forward", FORWARD, lambda: session.run(names, feed))


def exposed_forward(forward: OnnxruntimeForward, graph: Graph, x: np.ndarray) -> Contender:
    """Inference that hands over all ReLU outputs, channels last: what any method needs at least."""
    values = [node.outputs[0] for node in graph.nodes if node.op == "Relu"]
    places = {}
    for value in values:
        samples, *rest = graph.shapes[value] or ()
        channels_last = (*rest[1:], rest[0])
        places[value] = np.empty((samples * len(x) // graph.batch, *channels_last), np.float32)
    return Contender("forward", EXPOSED, lambda: forward(graph, x, (graph.logits,), places))


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
    contenders = [plain_forward(explainer, x, threads)]
    if isinstance(explainer.backend.forward, OnnxruntimeForward):
        contenders.append(exposed_forward(explainer.backend.forward, explainer.graph, x))
    methods = list(methods)
    contenders += [explanation(explainer, x, method, passes=passes) for method in methods]

    def expected(method: str) -> Callable[[], Any]:
        return explanation(explainer, x, method, passes=passes).call

    try:
        from . import peers
    except ImportError:
        return contenders, ["PyTorch is not installed, its methods are left out: pip install torch"]
    try:
        network = peers.Network(explainer.graph)
    except NotImplementedError as reason:
        return contenders, [f"{explainer.model.name}: no PyTorch twin, {reason}"]
    peers.set_threads(threads)
    found = list(peers.torch_contenders(network, x, methods, passes, expected))
    captum, notes = peers.captum_contenders(network, x, methods, expected)
    return contenders + found + captum, notes
