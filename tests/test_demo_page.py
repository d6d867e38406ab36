"""The page of docs/demo in a headless browser: its maps are those of `explain`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from chromium import runtime, visited
from nets import Net, Op
from PIL import Image

import rectgrad_ref
from rectgrad_ref import Explainer, picture

ROOT = Path(rectgrad_ref.__file__).parents[1]
CIFAR10_CNN = ROOT / "onnx_models" / "cifar10_cnn.onnx"
EXPLAIN = """
  const { Explainer, PREPROCESSING } = await import("./explainer.js");
  const weights = { path: "weights.bin", data: "weights.bin" };
  const pixels = Uint8ClampedArray.from(PIXELS), found = {};
  for (const { file } of (await (await fetch("explainers.json")).json()).explainers) {
    const explainer = await Explainer.load(file, weights);
    const { scores, attribution } =
      await explainer.explain(pixels, TARGET, PREPROCESSING["x/127.5 − 1"]);
    found[file] = { scores: [...scores], attribution: [...attribution] };
  }
  return found;"""
# What somebody does with the page, and what it shows each time.
USE = """
  const pause = () => new Promise((resolve) => setTimeout(resolve, 20));
  const frame = document.querySelector("iframe"), found = {};
  const $ = (id) => frame.contentDocument.getElementById(id);
  while (!$("status")?.textContent.startsWith("Choose")) await pause();
  const file = async (name) => new File([await (await fetch(name)).arrayBuffer()], name);
  const carrying = async (name) => {
    const carried = new frame.contentWindow.DataTransfer();
    carried.items.add(await file(name));
    return carried;
  };
  const rgba = (id) => {
    const canvas = $(id), { width, height } = canvas, context = canvas.getContext("2d");
    return { width, height, pixels: [...context.getImageData(0, 0, width, height).data] };
  };
  const when = async (name, action) => {
    $("status").textContent = "";
    await action();
    while (!$("status").textContent) await pause();
    found[name] = { status: $("status").textContent, picture: rgba("picture"), map: rgba("map") };
  };
  const choose = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); };
  const upload = async (id, name) => {
    $(id).files = (await carrying(name)).files;
    $(id).dispatchEvent(new Event("change"));
  };
  const drop = async (name) => {
    const event = { dataTransfer: await carrying(name), cancelable: true, bubbles: true };
    const over = new frame.contentWindow.DragEvent("dragover", event);
    $("picture").dispatchEvent(over);
    found.accepts = over.defaultPrevented;
    $("picture").dispatchEvent(new frame.contentWindow.DragEvent("drop", event));
  };
  await when("uploaded", () => upload("file", "small.png"));
  await when("as class 3", () => choose("target", 3));
  await when("at q = 50", () => choose("q", 50));
  await when("by saliency", () => choose("method", "saliency"));
  await when("no picture", () => upload("file", "explainers.json"));
  await when("dropped", () => drop("wide.png"));
  await when("no model", () => upload("own", "small.png"));
  await when("own model", () => upload("own", "own.onnx"));
  await when("x/255", () => choose("range", "x/255"));
  return found;"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with everything that it loads."""
    dist = runtime()
    folder = tmp_path_factory.mktemp("demo") / "site"
    script = [sys.executable, str(ROOT / "docs" / "demo" / "build.py"), str(folder)]
    subprocess.run([*script, "--runtime", dist], check=True)
    return folder


def test_maps_in_the_browser(site: Path, tmp_path: Path) -> None:
    rgba, target = np.random.default_rng(0).integers(0, 256, (32, 32, 4)), 3
    script = EXPLAIN.replace("PIXELS", str(rgba.ravel().tolist())).replace("TARGET", str(target))
    found = visited(site, script, tmp_path)
    x = (rgba[..., :3].transpose(2, 0, 1)[None] / 127.5 - 1).astype(np.float32)
    explainer = Explainer(CIFAR10_CNN, backend="reference", dtype="float32")
    for entry in json.loads((site / "explainers.json").read_text("utf-8"))["explainers"]:
        options = {} if entry["q"] is None else {"q": entry["q"]}
        expected = explainer.explain(x, method=entry["method"], target=target, **options)
        there = found[entry["file"]]
        np.testing.assert_allclose(there["scores"], expected.logits[0], rtol=1e-4, atol=1e-4)
        bound = 1e-3 * np.abs(expected.values).max()
        error = np.abs(np.reshape(there["attribution"], x.shape) - expected.values).max()
        assert error <= bound, entry["file"]


def test_using_the_page(site: Path, tmp_path: Path) -> None:
    """Upload, drop, choose, one's own explainer; and files that are none."""
    noise = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(site / "small.png")
    # Its middle is the same picture, four times as large.
    wide = np.zeros((128, 200, 3), np.uint8)
    wide[:, 36:164] = noise.repeat(4, axis=0).repeat(4, axis=1)
    Image.fromarray(wide).save(site / "wide.png")
    own = own_model()
    rectgrad_ref.export(own, site / "own.onnx", method="input_x_gradient")

    found = visited(site, USE, tmp_path, frame="index.html")

    signed = (noise.transpose(2, 0, 1)[None] / 127.5 - 1).astype(np.float32)
    cnn = Explainer(CIFAR10_CNN, backend="reference", dtype="float32")
    uploaded = cnn.explain(signed)
    shown(found["uploaded"], uploaded, uploaded.class_name(uploaded.target[0]), noise)
    shown(found["as class 3"], cnn.explain(signed, target=3), "cat", noise)
    shown(found["at q = 50"], cnn.explain(signed, target=3, q=50), "cat", noise)
    shown(found["by saliency"], cnn.explain(signed, target=3, method="saliency"), "cat", noise)
    assert found["no picture"]["status"].startswith("Not possible")
    assert found["no picture"]["map"] == found["by saliency"]["map"]
    assert found["accepts"]
    shown(found["dropped"], cnn.explain(signed, target=3, method="saliency"), "cat", noise)
    assert found["no model"]["status"].startswith("Not possible")
    assert found["no model"]["map"] == found["dropped"]["map"]
    mine = Explainer(own, backend="reference", dtype="float32")
    last = signed.transpose(0, 2, 3, 1)
    for name, x in (("own model", last), ("x/255", (last + 1) / 2)):
        expected = mine.explain(x, method="input_x_gradient")
        shown(found[name], expected, f"class {expected.target[0]}", noise)


def own_model() -> onnx.ModelProto:
    """Channels last, as Keras has them."""
    weights = np.random.default_rng(2).normal(size=(4, 3, 3, 3)).astype(np.float32)
    net = Net(
        (32, 32, 3),
        (
            Op("Transpose", "first", ("x",), attributes={"perm": [0, 3, 1, 2]}),
            Op("Conv", "conv", ("first",), (weights,)),
            Op("Relu", "relu", ("conv",)),
            Op("GlobalAveragePool", "pool", ("relu",)),
            Op("Flatten", "scores", ("pool",)),
        ),
    )
    return net.onnx()


def shown(
    found: dict[str, Any], expected: rectgrad_ref.Attribution, name: str, pixels: np.ndarray
) -> None:
    """Whether the page names the class, and shows the picture and its map."""
    assert found["status"].startswith(f"{name}, explained in "), found["status"]
    np.testing.assert_allclose(image(found["picture"]), pixels, atol=1)
    heatmap = picture.cap(expected.heatmap())[0]
    strength = np.abs(heatmap)[..., None] / np.abs(heatmap).max()
    end = np.where(heatmap[..., None] > 0, [178, 24, 43], [33, 102, 172])
    np.testing.assert_allclose(image(found["map"]), 255 + (end - 255) * strength, atol=2)


def image(canvas: dict[str, Any]) -> np.ndarray:
    rgba = np.reshape(canvas["pixels"], (canvas["height"], canvas["width"], 4))
    assert (rgba[..., 3] == 255).all()
    return rgba[..., :3].astype(float)
