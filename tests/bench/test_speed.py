"""The speed benchmark runs and reckons right; how fast anything is, is not tested."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from nets import Net, Op, Weights, conv, pool
from typer.testing import CliRunner

from bench.speed import clock, contenders, experiments, report, results, subjects
from bench.speed.__main__ import app
from bench.speed.clock import Contender
from bench.speed.results import DENSE, FORWARD, OURS, Comparison, Entry, Results
from bench.speed.subjects import Subject
from rectgrad_ref import Explainer
from rectgrad_ref.errors import InvalidModel, OutputError
from rectgrad_ref.graph import InputSpec

onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore::rectgrad_ref.errors.RectGradWarning")


def network(activation: str = "Relu") -> Net:
    """Every operator that Inception V4 has, in colour."""
    w = Weights(0)
    return Net(
        (3, 12, 12),
        (
            conv("conv1", "x", w(6, 3, 3, 3), w(6), pads=(1, 1, 1, 1)),
            Op(activation, "act1", ("conv1",)),
            pool("MaxPool", "max_pool", "act1"),
            conv("conv2", "max_pool", w(8, 6, 1, 3), w(8), pads=(0, 1, 0, 1)),
            Op(activation, "act2", ("conv2",)),
            pool("AveragePool", "average_pool", "max_pool", size=3, stride=1, pad=1),
            conv("conv3", "average_pool", w(5, 6, 1, 1), w(5)),
            Op(activation, "act3", ("conv3",)),
            Op("Concat", "both", ("act2", "act3"), (), {"axis": 1}),
            Op("GlobalAveragePool", "mean", ("both",)),
            Op("Flatten", "flat", ("mean",)),
            Op("Gemm", "logits", ("flat",), (w(13, 4), w(4))),
        ),
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.onnx"
    onnx.save(network().onnx(), path)
    return path


def entry(by: str, seconds: list[float], method: str = "rectgrad", **more: Any) -> Entry:
    given: Entry = {
        "method": method,
        "by": by,
        "q": None,
        "seconds": seconds,
        "agreement": None,
    }
    return given | more  # type: ignore[return-value]


def comparison(part: str, *entries: Entry, shape: tuple[int, ...] = (8, 3, 32, 32)) -> Comparison:
    forward = entry(FORWARD, [1.0, 2.0, 4.0], "forward")
    return {"part": part, "model": "net", "input": list(shape), "entries": [forward, *entries]}


def some_results() -> Results:
    same, other = ({"cosine": c, "deviation": 0.0} for c in (1.0, 0.5))
    ours, dense = entry(OURS, [2.0, 4.0, 12.0], q=98.0), entry(DENSE, [4.0, 8.0, 12.0], q=98.0)
    peer = entry("PyTorch", [8.0, 8.0, 24.0], agreement=same)
    wrong = entry("Captum", [1.0, 1.0, 1.0], agreement=other)
    steps = ("import", "load", "plan", "first", "second", "until first")
    process = {"part": "cold", "model": "net", "batch": 1, "what": "cached"}
    memory = {"part": "memory", "model": "net", "batch": 8}
    peaks = {
        what: {"MiB before": [50.0], "MiB peak": [peak]}
        for what, peak in (("forward", 100.0), ("explain", 130.0))
    }
    return {
        "machine": {
            "cpu": "Abacus", "cores": 2, "flags": ["avx2"], "memory_gib": 1.0, "system": "Linux",
            "python": "3.11", "versions": {"numpy": "2"}, "commit": "abc", "date": "today",
            "load_before": [0.1], "load_after": [0.2],
        },
        "settings": {"threads": 2, "rounds": 3},
        "notes": ["Captum is late"],
        "comparisons": [
            comparison("methods", ours, peer, wrong),
            comparison("q", ours, dense),
            comparison("batch", ours),
            comparison("size", ours, shape=(1, 3, 75, 75)),
        ],
        "processes": [
            {**process, "figures": {step: [0.5, 0.25, 3.0] for step in steps}},
            *({**memory, "what": what, "figures": peak} for what, peak in peaks.items()),
        ],
    }  # type: ignore[typeddict-item]  # fmt: skip


# --- reckoning ----------------------------------------------------------------------------------


def test_ratios_are_taken_round_by_round() -> None:
    spread = results.ratio(entry("a", [2.0, 8.0, 3.0]), entry("b", [1.0, 2.0, 3.0]))
    assert (spread.median, spread.low, spread.high) == (2.0, 1.5, 3.0)
    assert str(spread) == "2.00 (1.50–3.00)"


def test_the_best_peer_computes_the_same_map() -> None:
    compared = some_results()["comparisons"][0]
    best = results.best_peer(compared, "rectgrad")
    assert best is not None and best["by"] == "PyTorch"
    assert results.best_peer(compared, "saliency") is None


def test_agreement() -> None:
    a = np.array([[3.0, 4.0]])
    assert results.agreement(2 * a, a) == {"cosine": 1.0, "deviation": 1.0}
    assert results.agreement(np.array([[-4.0, 3.0]]), a)["cosine"] == 0
    assert results.agreement(0 * a, 0 * a) == {"cosine": 1.0, "deviation": 0.0}
    assert results.agreement(a, 0 * a)["cosine"] == 0


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Time that passes in calls only: each takes as many seconds as it returns."""
    now, blocks = [0.0], []

    def timeit(call: Callable[[], float], number: int) -> float:
        cost = number * call()
        now[0] += cost
        blocks.append((call.__name__, number))
        return cost

    monkeypatch.setattr(clock.timeit, "timeit", timeit)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    yield blocks


def short() -> float:
    return 0.01


def long() -> float:
    return 2.0


def test_rounds_are_interleaved(simulated: list[tuple[str, int]]) -> None:
    pair = [Contender("a", "short", short), Contender("b", "long", long, passes=4)]
    times = clock.measure(pair, rounds=2)
    np.testing.assert_allclose(times, [[0.01, 0.01], [0.5, 0.5]])
    first = [("short", 10), ("short", 20), ("long", 1), ("long", 1)]  # untimed, timed
    assert simulated == [("short", 1), ("long", 1), *first, *first[2:], *first[:2]]


@pytest.mark.usefixtures("simulated")
def test_no_round_begins_after_the_time_but_five_do() -> None:
    assert len(clock.measure([Contender("b", "long", long)], rounds=99, seconds=3)[0]) == 5
    assert len(clock.measure([Contender("b", "long", long)], rounds=99, seconds=30)[0]) == 8


# --- subjects -----------------------------------------------------------------------------------


def test_photographs_follow_the_input() -> None:
    first = subjects.photographs(4, InputSpec("x", (None, 3, 20, 30), np.dtype(np.float32)))
    last = subjects.photographs(4, InputSpec("x", (None, 20, 30, 3), np.dtype(np.float32)))
    assert first.shape == (4, 3, 20, 30) and first.dtype == np.float32
    np.testing.assert_array_equal(first, last.transpose(0, 3, 1, 2))
    assert first.min() >= -1 and first.max() <= 1 and (first.std(axis=(1, 2, 3)) > 0.05).all()
    with pytest.raises(InvalidModel, match="not a colour image"):
        subjects.photographs(1, InputSpec("x", (1, 1, 8, 8), np.dtype(np.float32)))


def test_a_subject_is_a_name_or_a_file(model: Path) -> None:
    assert subjects.subject("cifar10_cnn").path.is_file()
    assert subjects.subject(str(model)) == Subject("tiny", model)
    with pytest.raises(InvalidModel, match="no such file"):
        subjects.subject("absent.onnx")


# --- contenders ---------------------------------------------------------------------------------


def found(model: Path | onnx.ModelProto, *methods: str) -> tuple[list[Contender], list[str]]:
    explainer = Explainer(model)
    x = subjects.photographs(3, explainer.input)
    return contenders.all_contenders(explainer, x, methods, passes=2, threads=1)


def test_peers_compute_the_same_maps(model: Path) -> None:
    pytest.importorskip("torch")
    methods = experiments.Settings().methods
    everyone, _ = found(model, *methods, "input_x_gradient", "deconvolution")
    compared = {
        (c.method, c.by): results.agreement(c.call(), c.expected())
        for c in everyone
        if c.expected is not None and "quantile" not in c.by
    }
    peers = {method for method, by in compared if by.startswith("PyTorch")}
    assert peers == {*methods, "input_x_gradient", "deconvolution"} - {"smoothgrad"}
    for alike in (a for (_, by), a in compared.items() if by.startswith("PyTorch")):
        assert alike["cosine"] > 0.9999 and alike["deviation"] < 1e-3


def test_absent_libraries_are_noted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bench.speed.peers", raising=False)
    monkeypatch.delattr("bench.speed.peers", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]
    everyone, notes = found(model, "saliency")
    assert notes == ["PyTorch is not installed, its methods are left out: pip install torch"]
    assert [c.by for c in everyone if c.method == "saliency"] == [OURS]


def test_captum_is_optional(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "captum", None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "captum.attr", None)  # type: ignore[arg-type]
    everyone, notes = found(model, "guided_backprop")
    assert notes == ["Captum is not installed, its methods are left out: pip install captum"]
    assert [c.by for c in everyone if c.method == "guided_backprop"] == [OURS, "PyTorch"]


def test_a_network_without_a_twin_is_noted() -> None:
    pytest.importorskip("torch")
    everyone, notes = found(network("Softplus").onnx(), "saliency")
    assert [c.by for c in everyone if c.method == "saliency"] == [OURS]
    (note,) = notes
    assert "no PyTorch twin" in note and "Softplus" in note


# --- the whole ----------------------------------------------------------------------------------


def test_a_run_from_the_command_line(model: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "out", "methods,q,batch"
    options = {"models": model, "methods": "rectgrad", "batches": "2", "parts": parts, "out": out}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    done = CliRunner().invoke(app, [*arguments, "--rounds", "2", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert "Cost in forward passes" in done.output and "RectGrad at other q" in done.output
    written: Results = json.loads((out / "results.json").read_text())
    assert [(c["part"], c["input"][0]) for c in written["comparisons"]] == [
        ("methods", 2), ("q", 2), ("batch", 1), ("batch", 2),
    ]  # fmt: skip
    entries = [e for c in written["comparisons"] for e in c["entries"]]
    assert all(len(e["seconds"]) == 2 and min(e["seconds"]) > 0 for e in entries)
    assert {e["q"] for e in entries if e["by"] == DENSE} == set(experiments.QUANTILES)
    assert len(written["machine"]["load_after"]) == 3 and written["settings"]["threads"] == 1
    assert all((out / name).stat().st_size for name in ("methods.png", "sweeps.png"))


@pytest.mark.parametrize("option", ["--parts", "--methods"])
def test_unknown_names_are_refused(option: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [option, "nonsense", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("action", ["forward", "explain"])
def test_a_process_of_its_own_reports(action: str, model: Path) -> None:
    settings = experiments.Settings(backend="reference", threads=1)
    figures = experiments.in_a_process(action, Subject("tiny", model), 2, settings)
    assert {"first", "second", "MiB before", "MiB peak"} <= figures.keys()
    assert 0 < figures["MiB before"] <= figures["MiB peak"]
    if action == "explain":
        assert figures["until first"] >= figures["import"] + figures["load"] + figures["first"]


# --- the report ---------------------------------------------------------------------------------


def test_the_report_states_every_result() -> None:
    text = report.markdown(some_results())
    assert "| RectGrad | rectgrad_ref | 2.00 (2.00–2.50) |" in text
    assert "| Forward pass | onnxruntime | 1 (2000 ms) |" in text
    assert "| RectGrad | 0.50 (0.38–0.50) of PyTorch |" in text
    assert "| RectGrad | Captum | 0.5000 |" in text
    assert "| net, B = 8 | 98 | 2.00 (2.00–2.50) | 0.50 (0.50–0.75) |" in text
    assert "| net | 1×3×75×75 | 4000 ms | 2.00 (2.00–2.50) |" in text
    assert "| net | cached | 0.50 s |" in text
    assert "| net, B = 8 | 50 MiB | 100 MiB | 50 MiB | 130 MiB | 1.30 |" in text
    assert "Abacus, 2 cores (avx2)" in text and "load average 0.10 → 0.20" in text
    assert text.endswith("*Captum is late*\n")


def test_parts_that_did_not_run_have_no_table() -> None:
    some = some_results()
    some["comparisons"], some["processes"] = some["comparisons"][2:3], []
    assert [sheet.title for sheet in report.sheets(some)] == ["RectGrad at other batch sizes"]


def test_the_report_replaces_the_marked_section(tmp_path: Path) -> None:
    file, readme = tmp_path / "results.json", tmp_path / "README.md"
    file.write_text(json.dumps(some_results()))
    readme.write_text("before\n<!-- speed: begin -->\nstale numbers\n<!-- speed: end -->\nafter\n")
    for _ in range(2):
        done = CliRunner().invoke(app, ["report", str(file), "--readme", str(readme)])
        assert done.exit_code == 0, done.output
    text = readme.read_text()
    assert text.startswith("before\n<!-- speed: begin -->\n\nAbacus") and "stale" not in text
    assert text.endswith("\n<!-- speed: end -->\nafter\n") and text.count("Abacus") == 1
    assert (tmp_path / "methods.png").exists() and (tmp_path / "sweeps.png").exists()


def test_a_readme_without_marks_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no marks")
    with pytest.raises(OutputError, match="no section"):
        report.update(readme, "numbers")
    assert readme.read_text() == "no marks"


def test_the_readme_has_the_marks(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text((Path(report.__file__).parents[1] / "README.md").read_text())
    report.update(copy, "numbers")
    assert "\n\nnumbers\n\n<!-- speed: end -->" in copy.read_text().replace(
        "numbers\n<", "numbers\n\n<"
    )
