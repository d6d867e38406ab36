"""The command line: what it writes, what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from nets import Net, Op, model
from onnx import helper
from PIL import Image
from typer.testing import CliRunner, Result

import rectgrad_ref as r
from rectgrad_ref import cli, demo
from rectgrad_ref.methods import METHODS, make_method
from rectgrad_ref.onnx_models import cifar10_cnn, published
from rectgrad_ref.onnx_models.cifar10 import CLASS_NAMES

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder with a model and two pictures, and nothing else."""
    monkeypatch.chdir(tmp_path)
    onnx.save(network(), "net.onnx")
    for i, name in enumerate(("one.png", "two.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(name)
    return tmp_path


def network() -> onnx.ModelProto:
    """Conv, Relu, MaxPool, Gemm; 2 × 6 × 6 units are thresholded, and named classes scored."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    ops = (
        Op("Conv", "conv", ("x",), (weights(2, 3, 3, 3), weights(2))),
        Op("Relu", "relu", ("conv",)),
        Op("MaxPool", "pool", ("relu",), (), {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Op("Flatten", "flat", ("pool",)),
        Op("Gemm", "scores", ("flat",), (weights(18, 3), weights(3))),
    )
    made = Net((3, 8, 8), ops).onnx()
    helper.set_model_props(made, {**cifar10_cnn.IMAGE_METADATA, "class_names": json.dumps(NAMES)})
    return made


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


def done(*arguments: str) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def files() -> list[str]:
    return sorted(str(p) for p in Path().rglob("*") if p.is_file())


GIVEN = ["net.onnx", "one.png", "two.png"]


# --- explain ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["o.png", "o.pdf", "o.svg"])
def test_a_figure_of_all_images_and_methods(name: str) -> None:
    arguments = ("explain", *GIVEN, "-o", name, "-m", "rectgrad", "-m", "saliency")
    result = done(*arguments)
    assert files() == sorted([*GIVEN, name])
    assert Path(name).read_bytes()[:4] in (b"\x89PNG", b"%PDF", b"<?xm")
    a = r.explain("net.onnx", ["one.png", "two.png"])
    for image, target in zip(("one.png", "two.png"), a.target, strict=True):
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(image)]
        assert line.split()[1] == NAMES[target]
    assert result.stdout.endswith(f"wrote {name}\n")
    assert result.stderr == ""


def test_a_figure_has_a_row_an_image_and_a_column_a_method() -> None:
    done("explain", *GIVEN[:2], "-o", "small.png")
    done("explain", *GIVEN, "-o", "large.png", "-m", "rectgrad", "-m", "saliency")
    with Image.open("small.png") as small, Image.open("large.png") as large:
        assert large.width > small.width and large.height > small.height


@pytest.mark.parametrize("method", [name for name in METHODS if make_method(name).passes == 1])
def test_arrays_are_those_of_one_call(method: str) -> None:
    done("explain", *GIVEN, "-o", "o.npz", "-m", method, "--trace")
    expected = r.explain("net.onnx", ["one.png", "two.png"], method=method, trace=True)
    with np.load("o.npz") as found:
        for name in ("values", "inputs", "logits", "target"):
            np.testing.assert_array_equal(found[name], getattr(expected, name))
        for value, layer in expected.layers().items():
            for field in fields(layer):
                array = getattr(layer, field.name)
                if array is not None:
                    np.testing.assert_array_equal(found[f"layers/{value}/{field.name}"], array)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("smoothgrad", ["n=3"]), ("random", []), ("smoothgrad", ["n=3", "range=batch"])],
)
def test_noise_does_not_depend_on_how_images_are_fed(method: str, settings: list[str]) -> None:
    done("explain", *GIVEN, "-o", "o.npz", "-m", method, *(f"--set={s}" for s in settings))
    options: dict[str, Any] = {"n": 3} if settings else {}
    if "range=batch" in settings:
        options["range"] = "batch"
    expected = r.explain("net.onnx", ["one.png", "two.png"], method=method, **options)
    with np.load("o.npz") as found:
        np.testing.assert_allclose(found["values"], expected.values, rtol=1e-6, atol=1e-7)


def test_a_folder_has_a_picture_for_each_image_and_method() -> None:
    done("explain", *GIVEN, "-o", "maps", "-m", "saliency", "-m", "deeplift")
    pictures = [f"maps/{i}_{m}.png" for i in ("one", "two") for m in ("saliency", "deeplift")]
    assert files() == sorted([*GIVEN, *pictures])


def test_a_folder_keeps_what_was_there() -> None:
    Path("maps.v2").mkdir()
    Path("maps.v2/notes.txt").write_text("mine")
    done("explain", *GIVEN[:2], "-o", "maps.v2")
    assert files() == sorted([*GIVEN, "maps.v2/notes.txt", "maps.v2/one_rectgrad.png"])


def test_json_is_all_that_stdout_gets() -> None:
    arguments = ["-m", "rectgrad", "-m", "integrated_gradients", "--set", "q=90", "--json"]
    result = done("explain", *GIVEN, "-o", "o.png", *arguments)
    report = json.loads(result.stdout)
    assert report["out"] == "o.png"
    assert report["model"] == "net.onnx" and report["backend"] in ("cpu", "reference")
    kinds = [(record["image"], record["method"]) for record in report["results"]]
    assert kinds == [(i, m) for m in ("rectgrad", "integrated_gradients") for i in GIVEN[1:]]
    expected = r.explain("net.onnx", GIVEN[1:], method="rectgrad", q=90)
    for i, record in enumerate(report["results"][:2]):
        assert record["target"] == expected.target[i]
        assert record["class"] == NAMES[expected.target[i]]
        assert record["logit"] == pytest.approx(expected.logits[i].max(), rel=1e-6)
        assert 1 / 3 < record["probability"] < 1
        assert record["options"]["q"] == 90
        assert record["completeness_gap"] is None
    assert "q" not in report["results"][2]["options"]
    assert isinstance(report["results"][2]["completeness_gap"], float)


def test_the_completeness_gap_is_reported() -> None:
    result = done("explain", *GIVEN[:2], "-o", "o.png", "-m", "saliency", "-m", "deeplift")
    lines = [line.split() for line in result.stdout.splitlines()]
    gap = r.explain("net.onnx", "one.png", method="deeplift").completeness_gap
    assert ["image", "method", "completeness", "gap"] in lines
    assert ["one.png", "deeplift", f"{gap[0]:.4g}"] in lines


def test_json_has_neither_infinity_nor_nan() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    result = done("explain", *GIVEN[:2], "-o", "o.png", "--set", "tau=-inf", "--json")
    report = json.loads(result.stdout, parse_constant=refuse)
    assert report["results"][0]["options"]["tau"] == "-inf"


def test_suffixes_in_capitals() -> None:
    done("explain", *GIVEN[:2], "-o", "A.PNG")
    done("explain", *GIVEN[:2], "-o", "A.NPZ")
    assert files() == sorted([*GIVEN, "A.NPZ", "A.PNG"])
    with np.load("A.NPZ") as arrays:
        assert "values" in arrays


def test_targets() -> None:
    def targets(*given: str) -> list[int]:
        arguments = [part for t in given for part in ("-t", t)]
        result = done("explain", *GIVEN, "-o", "o.npz", "--json", *arguments)
        return [record["target"] for record in json.loads(result.stdout)["results"]]

    assert targets("bee") == [1, 1]
    assert targets("2", "ant") == [2, 0]
    assert targets() == r.explain("net.onnx", GIVEN[1:]).target.tolist()


def test_preprocess_labels_backend_and_dtype_reach_the_explainer() -> None:
    Path("names.txt").write_text("x\ny\nz\n")
    arguments = ["--preprocess", "unit", "--labels", "names.txt", "--dtype", "float64"]
    result = done("explain", *GIVEN[:2], "-o", "o.npz", "--json", *arguments)
    report = json.loads(result.stdout)
    assert (report["backend"], report["dtype"]) == ("reference", "float64")
    assert report["results"][0]["class"] in "xyz"
    with np.load("o.npz") as arrays:
        assert arrays["values"].dtype == np.float64
        assert 0 <= arrays["inputs"].min() < arrays["inputs"].max() <= 1


def test_input_output_and_layout() -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["chw"], perm=[0, 3, 1, 2]),
        helper.make_node("ReduceMean", ["chw"], ["scores"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceMax", ["chw"], ["other"], axes=[2, 3], keepdims=0),
    ]
    made = model(nodes, ["N", 3, 3, 3], "scores")
    made.graph.output.append(helper.make_tensor_value_info("other", 1, ["N", 3]))
    onnx.save(made, "net.onnx")
    arguments = ["explain", *GIVEN[:2], "-o", "o.npz", "--preprocess", "unit", "-m", "saliency"]
    assert run(*arguments, "--layout", "NHWC").exit_code == 2
    done(*arguments, "--layout", "NHWC", "--output-name", "scores", "--input-name", "x")
    with np.load("o.npz") as arrays:
        assert json.loads(str(arrays["provenance"]))["layout"] == "NHWC"


def test_a_trace_becomes_a_strip_of_layers() -> None:
    done("explain", *GIVEN[:2], "-o", "maps.png")
    done("explain", *GIVEN[:2], "-o", "strip.png", "--trace")
    assert Path("maps.png").read_bytes() != Path("strip.png").read_bytes()


def test_a_warning_is_said_once_on_stderr() -> None:
    result = done("explain", *GIVEN, "-o", "o.png", "--set", "q=100")
    assert result.stderr.count("warning: nothing can pass Relu 'relu'") == 1
    assert len(result.stderr.splitlines()) == 1
    assert "nothing can pass" not in result.stdout


WRONG = {
    "no model": (["none.onnx", "one.png"], "none.onnx"),
    "not a model": (["one.png", "one.png"], "one.png is not an ONNX model"),
    "no picture": (["net.onnx", "none.png"], "none.png: no such picture file"),
    "not a picture": (["net.onnx", "net.onnx"], "net.onnx: not a picture"),
    "unknown method": ([*GIVEN, "-m", "lime"], "unknown method 'lime'; there are rectgrad"),
    "unknown preset": ([*GIVEN, "--preset", "x"], "preset must be one of default"),
    "unknown backend": ([*GIVEN, "--backend", "x"], "backend must be one of"),
    "dtype of the wrong backend": (
        [*GIVEN, "--backend", "cpu", "--dtype", "float64"],
        "needs backend='reference'",
    ),
    "no such option": ([*GIVEN, "--set", "p=1"], "--set p: no such option of rectgrad; there are"),
    "option without value": ([*GIVEN, "--set", "q"], "--set q: write NAME=VALUE"),
    "not a number": ([*GIVEN, "--set", "q=high"], "--set q=high: rectgrad takes number"),
    "not a choice": (
        [*GIVEN, "--set", "scope=layer"],
        "--set scope=layer: rectgrad takes sample | channel | batch",
    ),
    "out of range": ([*GIVEN, "--set", "q=101"], "q must lie between 0 and 100"),
    "convention that does not fit": ([*GIVEN[:2], "-m", "random", "--trace"], "layer-wise trace"),
    "unknown class": ([*GIVEN, "-t", "dog"], "unknown class 'dog'"),
    "class out of range": ([*GIVEN, "-t", "3"], "class 3 does not exist"),
    "too many targets": ([*GIVEN, *("-t", "0") * 3], "--target: got 3 for 2 images"),
    "unknown preprocessing": ([*GIVEN, "--preprocess", "x"], "preprocess 'x' is neither"),
    "no labels": ([*GIVEN, "--labels", "none.txt"], "none.txt"),
    "unknown suffix": ([*GIVEN, "-o", "o.gif"], "cannot write o.gif"),
    "no folder": ([*GIVEN, "-o", "none/o.png"], "cannot write none/o.png: there is no folder none"),
    "no parent of a folder": ([*GIVEN, "-o", "none/maps"], "there is no folder none"),
    "methods in one npz": (
        [*GIVEN, "-m", "saliency", "-m", "rectgrad", "-o", "o.npz"],
        "an .npz holds one method, not 2",
    ),
    "strip of two images": ([*GIVEN, "--trace"], "a strip of layers shows one image, not 2"),
    "one name twice": (["net.onnx", "one.png", "one.png", "-o", "maps"], "2 images are called"),
    "batch in a folder": ([*GIVEN, "--set", "scope=batch", "-o", "maps"], "not a folder"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_one_line_and_writes_nothing(arguments: list[str], message: str) -> None:
    before = files()
    out = [] if "-o" in arguments else ["-o", "o.png"]
    result = run("explain", *arguments, *out, "--json")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert files() == before


def test_missing_arguments_are_wrong_use() -> None:
    assert run("explain", "net.onnx", "one.png").exit_code == 2
    assert run("explain", "net.onnx", "-o", "o.png").exit_code == 2
    assert run("explode").exit_code == 2


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_gets_all_or_nothing(exists: bool) -> None:
    Path("two.png").write_bytes(Path("one.png").read_bytes()[:60])
    if exists:
        Path("maps").mkdir()
    result = run("explain", *GIVEN, "-o", "maps")
    assert result.exit_code == 2
    assert "error: two.png" in result.stderr
    assert files() == sorted(GIVEN)
    assert Path("maps").exists() == exists


def test_an_output_that_cannot_be_written() -> None:
    Path("taken").write_text("a file, not a folder")
    result = run("explain", *GIVEN, "-o", "taken")
    assert result.exit_code == 2
    assert "error: cannot write to taken" in result.stderr


def test_images_of_several_sizes_need_a_folder() -> None:
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)]
    onnx.save(model(nodes, ["N", 3, "h", "w"], "y"), "net.onnx")
    Image.new("RGB", (9, 7)).save("two.png")
    Path("own_size.json").write_text('{"value_range": [0, 1], "resize": "none"}')
    arguments = ["explain", *GIVEN, "--preprocess", "own_size.json", "-m", "saliency"]
    result = run(*arguments, "-o", "o.npz")
    assert result.exit_code == 2
    assert "got (3, 8, 8), (3, 7, 9); write to a folder" in result.stderr
    done(*arguments, "-o", "maps")
    assert "maps/two_saliency.png" in files()


# --- options of methods -------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_default_can_be_written_as_it_is_listed(name: str) -> None:
    method = make_method(name)
    listed = done("methods").stdout.split(f"{name}: ")[1]
    settings = []
    for option in method.options():
        (line, *_) = [line for line in listed.splitlines() if line.startswith(f"    {option}=")]
        settings.append(line.split()[0])
    assert cli._methods([name], "default", settings) == [method]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("q=95", 95.0),
        ("tau=0", 0.0),
        ("tau=-inf", -np.inf),
        ("tau=none", None),
        ("padding_trick=same", "same"),
        ("padding_trick=False", False),
        ("prr=true", True),
        ("strictness=>=", ">="),
        ("propagation_rule=PR1+eps", "PR1+eps"),
    ],
)
def test_a_setting_is_read_by_the_type_of_its_field(setting: str, value: object) -> None:
    (method,) = cli._methods(["rectgrad"], "default", [setting])
    found = method.options()[setting.partition("=")[0]]
    assert found == value and type(found) is type(value)


def test_a_setting_goes_to_every_method_that_has_it() -> None:
    rectgrad, saliency, lrp = cli._methods(
        ["rectgrad", "saliency", "epsilon_lrp"], "authors", ["eps=0.5", "q=90"]
    )
    assert rectgrad == make_method("rectgrad", "authors", eps=0.5, q=90.0)
    assert saliency == make_method("saliency", "authors")
    assert lrp == make_method("epsilon_lrp", "authors", eps=0.5)


def test_methods_json() -> None:
    entries = json.loads(done("methods", "--json").stdout)
    assert [entry["id"] for entry in entries] == list(METHODS)
    options = {option["name"]: option for option in entries[0]["options"]}
    assert options["q"] == {"name": "q", "default": 98.0, "values": "number"}
    assert options["padding_trick"]["values"] == "true | false | same"


# --- inspect ------------------------------------------------------------------------------------


def test_inspect_shows_the_plan_from_input_to_scores() -> None:
    facts = json.loads(done("inspect", "net.onnx", "--json").stdout)
    assert facts["inputs"] == [{"name": "x", "dtype": "float", "shape": ["N", 3, 8, 8]}]
    assert [value["name"] for value in facts["outputs"]] == ["scores"]
    assert (facts["scores"], facts["head"], facts["classes"]) == ("scores", None, 3)
    assert (facts["image"], facts["image_shape"]) == ("x", [1, 3, 8, 8])
    assert facts["layers"] == ["relu"]
    assert facts["class_names"] == NAMES
    assert facts["nodes"] == r.Explainer("net.onnx").plan().rows()[::-1]
    assert [node["node"] for node in facts["nodes"]] == ["conv", "relu", "pool", "flat", "scores"]


def test_inspect_for_people() -> None:
    result = done("inspect", "net.onnx", "-m", "rectgrad", "--set", "q=90")
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert "float (N, 3, 8, 8)" in rows["input"]
    assert "Rectify(q=90.0)" in rows["relu"] and rows["relu"].split()[1] == "Relu"
    assert "relu, pool" in rows["pool"]


def test_inspect_says_what_the_method_warns_of() -> None:
    result = done("inspect", "net.onnx", "--set", "q=100")
    assert "warning: nothing can pass Relu 'relu'" in result.stderr


def test_nodes_without_a_rule() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="fine"),
        helper.make_node("Odd", ["a"], ["b"], name="odd", domain="my"),
    ]
    made = model(nodes, ["N", 3, 8, 8], "b")
    made.opset_import.append(helper.make_opsetid("my", 1))
    onnx.save(made, "net.onnx")
    result = run("inspect", "net.onnx")
    assert result.exit_code == 1
    assert "b: ? classes" in result.stdout
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line}
    assert rows["fine"][2] == "Gradient()"
    assert rows["odd"][1:3] == ["my.Odd", "NONE"]
    assert result.stderr.startswith("error: my.Odd 'odd'")
    assert [
        n["rule"] for n in json.loads(run("inspect", "net.onnx", "--json").stdout)["nodes"]
    ] == [
        "Gradient()",
        None,
    ]
    before = files()
    result = run("explain", *GIVEN, "-o", "o.png", "--preprocess", "unit")
    assert result.exit_code == 1 and "my.Odd 'odd'" in result.stderr
    assert files() == before


# --- models, demo and the rest ------------------------------------------------------------------


def test_models_list() -> None:
    entries = json.loads(done("models", "list", "--json").stdout)
    assert [entry["name"] for entry in entries] == [entry.name for entry in published.MODELS]
    lines = done("models", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [entry.name for entry in published.MODELS]
    for line, entry in zip(lines[1:], published.MODELS, strict=True):
        unverified = entry.download is not None and not entry.download.verified
        assert ("Not yet fetched and verified" in line) == unverified


def test_models_get_prints_a_path() -> None:
    assert done("models", "get", "cifar10_cnn").stdout == f"{cifar10_cnn.network_path()}\n"


def test_models_build_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, out: Path, **options: Any) -> Path:
        assert (name, options) == ("inception_v4", {"weights": Path("w"), "seed": 3})
        return out

    monkeypatch.setattr(published, "build", build)
    arguments = ["inception_v4", "-o", "o.onnx", "--weights", "w", "--seed", "3"]
    assert done("models", "build", *arguments).stdout == "o.onnx\n"


@pytest.mark.parametrize(
    "arguments",
    [("get", "none"), ("get", "inception_v4"), ("build", "cifar10_cnn", "-o", "o.onnx")],
)
def test_models_that_cannot_be_had_that_way(arguments: tuple[str, ...]) -> None:
    result = run("models", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and arguments[1] in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("out", ["demo.gif", "demo.npz", "demo", "absent/demo.png"])
def test_demo_refuses_before_it_computes(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(demo, "explain_cat")
    result = run("demo", "-o", out)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: cannot write {out}: ")


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise AssertionError("the demonstration must not use the network")

    rng = np.random.default_rng(0)
    weights = {
        name: (rng.normal(size=shape) * 0.1).astype(np.float32)
        for name, shape in cifar10_cnn.SHAPES.items()
    }
    onnx.save(cifar10_cnn.build(weights), "random.onnx")
    monkeypatch.setattr(demo, "network_path", lambda: Path("random.onnx"))
    monkeypatch.setattr(socket.socket, "connect", offline)
    result = done("demo", "-o", "demo.png")
    lines = result.stdout.splitlines()
    assert sorted(line.split()[0] for line in lines[1:11]) == sorted(CLASS_NAMES)
    shares = [float(line.split()[1]) for line in lines[1:11]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert lines[-1].startswith("wrote demo.png")
    with Image.open("demo.png") as picture:
        assert picture.width > 2000


def test_the_cat_is_a_cat() -> None:
    assert demo.cat().size == (240, 240)
    a = r.explain(cifar10_cnn.network_path(), demo.cat())
    assert a.class_name(a.target[0]) == "cat"


def test_a_terminal_without_all_characters() -> None:
    code = "from rectgrad_ref.cli import main; main()"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code, "methods"]
    result = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"?S_c/?x, signed" in result.stdout


def test_version() -> None:
    assert done("--version").stdout == f"{r.__version__}\n"


def test_a_published_model_explains_a_cat(shared_data: Path) -> None:
    network = shared_data / "models" / "imagenet_squeezenet1.1_logits.onnx"
    labels = shared_data / "models" / "imagenet_synsets.txt"
    picture = shared_data / "photos" / "coral_cat.bmp"
    arguments = [str(network), str(picture), "-o", "cat.png", "--json"]
    options = ["--preprocess", "caffe", "--labels", str(labels), "-m", "rectgrad", "-m", "saliency"]
    report = json.loads(done("explain", *arguments, *options).stdout)
    assert [record["class"] for record in report["results"]] == ["Egyptian cat"] * 2
    assert Path("cat.png").stat().st_size > 100_000
