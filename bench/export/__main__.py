"""`python -m bench.export MODEL`: prints a table in Markdown."""

from __future__ import annotations

import timeit
from functools import partial
from typing import Annotated

import numpy as np
import onnxruntime
import typer

from bench.speed.machine import describe, load
from bench.speed.results import Spread
from bench.speed.subjects import photographs, subject
from rectgrad_ref.exporter import explainer_model
from rectgrad_ref.graph import input_spec
from rectgrad_ref.methods import METHODS, make_method
from rectgrad_ref.model import read_model

SINGLE_PASS = "rectgrad,saliency,guided_backprop,epsilon_lrp,deeplift"
_SECONDS = 0.3  # of calls that are timed, at least


def main(
    model: Annotated[str, typer.Argument(help="cifar10_cnn, inception_v4 or an ONNX file.")],
    batch: Annotated[int, typer.Option(min=1)] = 1,
    methods: Annotated[str, typer.Option(help="Ids, by commas.")] = SINGLE_PASS,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Time explainers and their model in turn, in onnxruntime at its default options."""
    machine, path = describe(), subject(model).path
    spec = input_spec(read_model(path))
    feed = {spec.name: photographs(batch, spec), "target": np.full(batch, -1)}
    names = methods.split(",")
    files = [path.read_bytes()]
    files += [explainer_model(path, make_method(n)).SerializeToString() for n in names]
    times = np.array([[_pass(file, feed, threads) for file in files] for _ in range(rounds)])
    print(
        f"{machine['cpu']}, {threads} threads, onnxruntime {onnxruntime.__version__}, commit "
        f"{machine['commit']}, {machine['date']}; load average {machine['load_before'][0]} → "
        f"{load()[0]}.\n"
    )
    costs = (Spread.of(column) for column in (times[:, 1:] / times[:, :1]).T)
    print("| network | " + " | ".join(METHODS[name].label for name in names) + " |")
    print("|---|" + "--:|" * len(names))
    forward = 1000 * np.median(times[:, 0])
    print(f"| {model}, B = {batch} ({forward:.3g} ms) | {' | '.join(map(str, costs))} |")


def _pass(model: bytes, feed: dict[str, np.ndarray], threads: int) -> float:
    """Seconds; in a session of its own, since the threads of another would spin beside it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {value.name: feed[value.name] for value in session.get_inputs()}
    call = partial(session.run, None, inputs)
    call()
    number = max(2, int(_SECONDS / timeit.timeit(call, number=1)))
    return min(timeit.repeat(call, number=number // 2, repeat=2)) / (number // 2)


if __name__ == "__main__":
    typer.run(main)
