"""Exported explainers node by node in onnxruntime-web, in headless Chromium."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import nets
import numpy as np
import onnx
import pytest
from chromium import runtime, visited
from test_exporter import CIFAR10_CNN, Run, check_nodes, method_of

RUN = """
  const ort = await import("onnxruntime-web");
  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create("model.onnx"), feed = {};
  for (const [name, { type, data, dims }] of Object.entries(FEED))
    feed[name] = new ort.Tensor(
      type, type === "int64" ? BigInt64Array.from(data, BigInt) : Float32Array.from(data), dims);
  const found = {};
  for (const [name, { data, dims }] of Object.entries(await session.run(feed)))
    found[name] = { dims, data: Array.from(data, Number) };
  return found;"""


@pytest.fixture
def in_browser(tmp_path: Path) -> Run:
    site = tmp_path / "site"
    site.mkdir()
    (site / "runtime").symlink_to(runtime())
    return partial(_run, site)


def _run(
    site: Path, proto: onnx.ModelProto, feed: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    (site / "model.onnx").write_bytes(proto.SerializeToString())
    said = {
        name: {"type": str(array.dtype), "data": array.ravel().tolist(), "dims": array.shape}
        for name, array in feed.items()
    }
    found = visited(site, RUN.replace("FEED", json.dumps(said)), site.parent / "profile")
    return {
        name: np.array(value["data"], np.float32).reshape(value["dims"])
        for name, value in found.items()
    }


@pytest.mark.parametrize("name", ["rectgrad", "authors", "prr", "guided_backprop", "epsilon_lrp"])
def test_every_node_of_a_branched_network(name: str, in_browser: Run) -> None:
    w = nets.Weights(3)
    net = nets.branched(w)
    assert check_nodes(net.onnx(), method_of(name), w.images(net, 2), in_browser) > 15


def test_every_node_of_the_cifar10_network(in_browser: Run) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
    assert check_nodes(CIFAR10_CNN, method_of("rectgrad"), x, in_browser) == 15
