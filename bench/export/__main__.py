"""`python -m bench.export MODEL`: prints a table in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import onnxruntime
import typer

from bench.speed.clock import Contender, measure
from bench.speed.machine import describe, load
from bench.speed.results import Spread
from bench.speed.subjects import photographs, subject
from rectgrad_ref.exporter import explainer_model
from rectgrad_ref.graph import input_spec
from rectgrad_ref.methods import METHODS, make_method
from rectgrad_ref.model import read_model

SINGLE_PASS = "rectgrad,saliency,guided_backprop,epsilon_lrp,deeplift"


def main(
    model: Annotated[str, typer.Argument(help="cifar10_cnn, inception_v4 or an ONNX file.")],
    batch: Annotated[int, typer.Option(min=1)] = 1,
    methods: Annotated[str, typer.Option(help="Ids, by commas.")] = SINGLE_PASS,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Time explainers and their model in turn, in onnxruntime at its default options."""
    machine, path = describe(), subject(model).path
    source = read_model(path)
    spec = input_spec(source)
    x = photographs(batch, spec)
    feed = {spec.name: x, "target": np.full(batch, -1)}
    contenders = [Contender("forward", "onnxruntime", _run(path.read_bytes(), feed, threads))]
    for name in methods.split(","):
        proto = explainer_model(path, make_method(name))
        call = _run(proto.SerializeToString(), feed, threads)
        contenders.append(Contender(name, "onnxruntime", call))
    forward, *others = measure(contenders, rounds=rounds)
    print(
        f"{machine['cpu']}, {threads} threads, onnxruntime {onnxruntime.__version__}, commit "
        f"{machine['commit']}, {machine['date']}; load average {machine['load_before'][0]} → "
        f"{load()[0]}.\n"
    )
    costs = [Spread.of(np.divide(times, forward)) for times in others]
    print("| network | " + " | ".join(METHODS[c.method].label for c in contenders[1:]) + " |")
    print("|---|" + "--:|" * len(costs))
    pass_ms = 1000 * np.median(forward)
    print(f"| {model}, B = {batch} ({pass_ms:.3g} ms) | {' | '.join(map(str, costs))} |")


def _run(model: bytes, feed: dict[str, np.ndarray], threads: int) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {value.name: feed[value.name] for value in session.get_inputs()}
    return partial(session.run, None, inputs)


if __name__ == "__main__":
    typer.run(main)
