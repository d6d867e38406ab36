"""`rectgrad verify`: what it writes and prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peer
import pytest
from onnx import helper
from PIL import Image
from typer.testing import CliRunner, Result

from rectgrad_ref.cli import app
from rectgrad_ref.onnx_models.cifar10_cnn import IMAGE_METADATA
from rectgrad_ref.verify import Bundle, load
from rectgrad_ref.verify.conformance import FOLDER, plain


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    monkeypatch.chdir(tmp_path)
    bundle.save("bundle.npz")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["verify", *arguments])


def theirs(bundle: Bundle, rule: Any = peer.rectgrad) -> None:
    np.savez("theirs.npz", **peer.explain(bundle, rule))


# --- make -----------------------------------------------------------------------------------------


@pytest.fixture
def pictures() -> list[str]:
    model = plain()
    helper.set_model_props(model, IMAGE_METADATA)
    onnx.save(model, "net.onnx")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(f"{i}.png")
    return ["net.onnx", "0.png", "1.png"]


def test_make(pictures: list[str]) -> None:
    result = run("make", *pictures, "-o", "b.npz", "--set", "q=90", "--layer", "conv2.relu")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("wrote b.npz: 2 images, 1 layer, float32, with its model")
    made = load("b.npz")
    assert made.method.options()["q"] == 90
    assert list(made.layers) == ["conv2.relu"]


def test_make_with_targets_and_dtype(pictures: list[str]) -> None:
    options = ["-t", "1", "-t", "3", "--backend", "reference", "--dtype", "float64"]
    assert run("make", *pictures, "-o", "b.npz", *options).exit_code == 0
    made = load("b.npz")
    assert made.target.tolist() == [1, 3]
    assert made.dtype == np.float64


@pytest.mark.parametrize(
    "options",
    [["-o", "b.zip"], ["-o", "nowhere/b.npz"], ["-o", "b.npz", "--layer", "conv9"],
     ["-o", "b.npz", "--set", "quantile=3"], ["-o", "b.npz", "-m", "lime"]],
    ids=" ".join,
)  # fmt: skip
def test_make_refuses(pictures: list[str], options: list[str]) -> None:
    result = run("make", *pictures, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert not Path("b.npz").exists()


# --- compare --------------------------------------------------------------------------------------


def test_agreement(bundle: Bundle) -> None:
    theirs(bundle)
    result = run("compare", "bundle.npz", "theirs.npz")
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1].strip()
    assert last == "Same conventions: nothing differs beyond rounding and threshold ties."
    assert "conv2.relu" in result.stdout


def test_difference(bundle: Bundle) -> None:
    theirs(bundle, peer.over_the_batch)
    result = run("compare", "bundle.npz", "theirs.npz", "--html", "page.html")
    assert result.exit_code == 1
    assert "Percentile taken over the batch, not over each sample." in result.stdout
    assert "Percentile taken over the batch" in Path("page.html").read_text(encoding="utf-8")


def test_a_difference_that_explains_itself_away_is_one(bundle: Bundle) -> None:
    """A map that threshold ties could explain, but a convention explains better."""
    theirs(bundle, peer.absolute)
    assert run("compare", "bundle.npz", "theirs.npz", "--json").exit_code == 1


def test_json(bundle: Bundle) -> None:
    theirs(bundle, peer.over_the_batch)
    result = run("compare", "bundle.npz", "theirs.npz", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["agrees"] is False
    assert found["first_difference"].startswith("R_in of ")
    assert [d["id"] for d in found["deviations"]] == ["scope=batch"]
    assert [row["value"] for row in found["layers"]][::2] == list(peer.RELUS[::-1])


def test_names_are_shown_where_they_were_guessed(bundle: Bundle) -> None:
    given = peer.explain(bundle)
    np.savez("theirs.npz", **{f"act{i}": given[f"{n}/R_out"] for i, n in enumerate(peer.RELUS)})
    result = run("compare", "bundle.npz", "theirs.npz")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["act1", "conv2.relu", "R_out", "shape", "and", "order"] in lines


def test_the_model_may_be_given(bundle: Bundle) -> None:
    theirs(bundle)
    Path("net.onnx").write_bytes(bundle.model or b"")
    assert run("compare", "bundle.npz", "theirs.npz", "--model", "net.onnx").exit_code == 0


# --- bad input ------------------------------------------------------------------------------------


def refused(*arguments: str, said: str) -> None:
    result = run("compare", *arguments, "--html", "page.html")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert said in " ".join(result.stderr.split())
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert not Path("page.html").exists()


def changed(**arrays: Any) -> None:
    with np.load("bundle.npz") as archive:
        np.savez("bundle.npz", allow_pickle=True, **{**archive, **arrays})


def said(bundle: Bundle, **changes: Any) -> np.ndarray:
    return np.array(json.dumps({**bundle.provenance, **changes}))


def test_wrong_shape(bundle: Bundle) -> None:
    np.savez("theirs.npz", values=np.zeros((3, 3, 8, 7)))
    refused("bundle.npz", "theirs.npz", said="must have the model input's shape (3, 3, 8, 8)")


def test_nan(bundle: Bundle) -> None:
    np.savez("theirs.npz", values=np.full_like(bundle.values, np.nan))
    refused("bundle.npz", "theirs.npz", said="holds NaN")


def test_missing_layers(bundle: Bundle) -> None:
    theirs(bundle)
    with np.load("bundle.npz") as archive:
        np.savez("bundle.npz", **{k: v for k, v in archive.items() if "conv2.relu" not in k})
    refused("bundle.npz", "theirs.npz", said="'layers/conv2.relu/a' is missing")


def test_another_model(bundle: Bundle) -> None:
    theirs(bundle)
    refused("bundle.npz", "theirs.npz", "--model", str(other_model()), said="another model")


def other_model() -> Path:
    onnx.save(plain(), "other.onnx")
    model = onnx.load("other.onnx")
    model.doc_string = "another"
    onnx.save(model, "other.onnx")
    return Path("other.onnx")


def test_a_newer_version(bundle: Bundle) -> None:
    theirs(bundle)
    changed(provenance=said(bundle, version=99))
    refused("bundle.npz", "theirs.npz", said="install a newer rectgrad-ref")


@pytest.mark.parametrize("which", ["bundle.npz", "theirs.npz"])
def test_truncated(bundle: Bundle, which: str) -> None:
    theirs(bundle)
    Path(which).write_bytes(Path(which).read_bytes()[:2000])
    refused("bundle.npz", "theirs.npz", said="truncated")


@pytest.mark.parametrize("which", ["bundle", "theirs"])
def test_pickles(bundle: Bundle, which: str) -> None:
    theirs(bundle)
    if which == "bundle":
        changed(values=np.array([object()]))
    else:
        np.savez("theirs.npz", allow_pickle=True, values=np.array([{}]))
    refused("bundle.npz", "theirs.npz", said="pickles are never loaded")


def test_no_such_file() -> None:
    refused("bundle.npz", "nothing.npz", said="there is no such file")


def test_a_target_that_is_no_class(bundle: Bundle) -> None:
    theirs(bundle)
    changed(target=bundle.target + 100)
    refused("bundle.npz", "theirs.npz", said="its target must be classes 0 to 4")


def test_an_unwritable_page(bundle: Bundle) -> None:
    theirs(bundle)
    result = run("compare", "bundle.npz", "theirs.npz", "--html", "nowhere/page.html")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


# --- self and bundles -----------------------------------------------------------------------------


def test_self(bundle: Bundle) -> None:
    Path("net.onnx").write_bytes(bundle.model or b"")
    result = run("self", "net.onnx", "--html", "page.html")
    assert result.exit_code == 0, result.output
    assert "checks hold" in result.stdout
    assert "<title>Certificate</title>" in Path("page.html").read_text(encoding="utf-8")


def test_self_in_json_on_pictures(pictures: list[str]) -> None:
    result = run("self", "net.onnx", "--image", "0.png", "--image", "1.png", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["holds"] is True
    assert found["images"] == "2 images"
    everywhere = [check for check in found["checks"] if check["where"] != "cuda"]
    assert {check["verdict"] for check in everywhere} == {"holds", "reported"}
    assert [layer["value"] for layer in found["layers"]] == list(peer.RELUS)


def test_self_fails_with_1(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from rectgrad_ref.rules import declared

    whole = declared.Gradient.__call__
    monkeypatch.setattr(declared.Gradient, "__call__", lambda self, call: 1.01 * whole(self, call))
    Path("net.onnx").write_bytes(bundle.model or b"")
    result = run("self", "net.onnx")
    assert result.exit_code == 1
    assert "checks fail" in result.stdout


def test_an_unwritable_certificate(bundle: Bundle) -> None:
    Path("net.onnx").write_bytes(bundle.model or b"")
    result = run("self", "net.onnx", "--html", "nowhere/page.html")
    assert result.exit_code == 2
    assert "there is no folder nowhere" in result.stderr
    assert "identities" not in result.stderr


def test_self_refuses_what_is_no_model() -> None:
    Path("net.onnx").write_bytes(b"no model")
    result = run("self", "net.onnx")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


def test_bundles() -> None:
    result = run("bundles")
    assert result.exit_code == 0
    assert str(FOLDER / "scope.npz") in result.stdout
    assert "one percentile for each sample" in result.stdout
