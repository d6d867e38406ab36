"""Load damaged models: a program, so that a crash or a limit ends it and not the tests.

    PYTHONPATH=tests/conformance python tests/fuzz/loader.py FIRST COUNT [--all]

loads the inputs FIRST … FIRST + COUNT − 1 and prints as JSON how many ended how. It ends with
status 1 at the first one that is neither loaded nor refused by an error of this package; its
number is the last line before the traceback on the standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import onnx
from model_cases import FOLDERS, read
from mutations import damage_bytes, damage_model
from node_cases import cases

import rectgrad_ref
from rectgrad_ref import Explainer
from rectgrad_ref.errors import InvalidModel, RectGradWarning, UnsupportedOperator
from rectgrad_ref.methods import METHODS

SECONDS = 60  # for one input
MEMORY = 3 << 30  # bytes beyond what the program itself takes
SECRET = b"SECRETSECRETSECRET"
LARGEST = 400_000  # bytes of a development model
PROJECT = Path(__file__).resolve().parents[2]
DEVELOPMENT = PROJECT.parent / "shared" / "data" / "models"
INSTALLED = Path(rectgrad_ref.__file__).parent
OWN_CODE = (*map(str, (PROJECT, INSTALLED)), sys.prefix, sys.base_prefix)


class Forbidden(BaseException):
    """What no handler of an error may catch."""


@cache
def corpus(everything: bool) -> tuple[bytes, ...]:
    """Classifiers: PyTorch's exports in onnx's backend tests, two cases of every operator, and
    the small development models.
    """
    models = [read(name).classifier() for name in FOLDERS]
    for group in cases().values():
        models += [case.classifier() for case in group if not case.excluded][::7][:2]
    files = [model.SerializeToString() for model in models]
    if everything and DEVELOPMENT.is_dir():
        small = [p for p in sorted(DEVELOPMENT.glob("*.onnx")) if p.stat().st_size < LARGEST]
        files += [path.read_bytes() for path in small] * 20
    return tuple(files)


@cache
def parsed(data: bytes) -> onnx.ModelProto:
    return onnx.load_from_string(data)


def damaged(index: int, everything: bool) -> bytes:
    """The input of that number, always the same."""
    random = Random(index)
    data, other = random.choice(corpus(everything)), random.choice(corpus(everything))
    if index % 2:
        return damage_bytes(data, other, random)
    return damage_model(parsed(data), parsed(other), random).SerializeToString()


def load(path: Path) -> str:
    """How the model at `path` ends."""
    try:
        explainer = Explainer(path, backend="reference")
        if SECRET in explainer.model.proto.SerializeToString():
            raise Forbidden("a file outside the model's folder was read")
        for method in METHODS:
            explainer.plan(method)
        explainer.plan("rectgrad", prr=True, padding_trick="same", propagation_rule="mod")
    except (InvalidModel, UnsupportedOperator) as error:
        if not str(error).strip():
            raise
        return type(error).__name__
    return "valid"


def prepare(folder: Path) -> Path:
    """A folder with everything that a location might name; returns where the model goes."""
    inside = folder / "model"
    inside.mkdir()
    (folder / "outside.bin").write_bytes(SECRET * 100)
    (inside / "inside.bin").write_bytes(bytes(2000))
    (inside / "link.bin").symlink_to(folder / "outside.bin")
    (inside / "up").symlink_to(folder)
    os.mkfifo(inside / "pipe")
    return inside / "model.onnx"


def watch(folder: Path) -> None:
    """Refuse to open files that are neither the model's nor Python's own."""
    allowed = (str(folder.resolve()), *OWN_CODE)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        loading = signal.getitimer(signal.ITIMER_REAL)[0] > 0
        if event == "open" and loading and not isinstance(arguments[0], int):
            path = os.path.realpath(arguments[0])
            if not path.startswith(allowed):
                raise Forbidden(f"opened {path}")

    sys.addaudithook(hook)


def limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def too_long(*_: object) -> None:
        raise Forbidden(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--all", action="store_true", help="development models too")
    options = parser.parse_args()
    warnings.simplefilter("ignore", RectGradWarning)
    warnings.simplefilter("ignore", RuntimeWarning)
    ends: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        path = prepare(Path(name))
        corpus(options.all)
        watch(path.parent)
        limit()
        for index in range(options.first, options.first + options.count):
            path.write_bytes(damaged(index, options.all))
            print(index, file=sys.stderr, flush=True)  # known even after a crash
            began = time.perf_counter()
            signal.alarm(SECONDS)
            ends[load(path)] += 1
            signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"ends": ends, "slowest_s": round(slowest, 2), "peak_mib": peak}))


if __name__ == "__main__":
    main()
