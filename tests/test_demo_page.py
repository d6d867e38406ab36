"""The page of docs/demo in a headless browser: its maps are those of `explain`.

Needs Chromium, and the npm package onnxruntime-web, whose folder `dist` the environment variable
ORT_WEB_DIST names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import rectgrad_ref

ROOT = Path(rectgrad_ref.__file__).parents[1]
HARNESS = """<!doctype html>
<meta charset="utf-8">
<script type="importmap">{"imports": {"onnxruntime-web": "./runtime/ort.wasm.min.mjs"}}</script>
<script type="module">
  const answer = (content) => fetch("/done", { method: "POST", body: JSON.stringify(content) });
  try {
    const { Explainer, PREPROCESSING, colours } = await import("./explainer.js");
    const weights = { path: "weights.bin", data: "weights.bin" };
    const pixels = Uint8ClampedArray.from(PIXELS), found = {};
    for (const { file } of (await (await fetch("explainers.json")).json()).explainers) {
      const explainer = await Explainer.load(file, weights);
      const { scores, attribution, map } =
        await explainer.explain(pixels, TARGET, PREPROCESSING["x/127.5 − 1"]);
      found[file] = { scores: [...scores], attribution: [...attribution], rgba: [...colours(map)] };
    }
    await answer(found);
  } catch (error) { await answer({ error: String(error) }); }
</script>"""


class Handler(SimpleHTTPRequestHandler):
    """Serves the site, and takes what the page found."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }
    found: ClassVar[dict[str, Any]] = {}
    done = threading.Event()

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        type(self).found = json.loads(self.rfile.read(size))
        self.send_response(204)
        self.end_headers()
        self.done.set()

    def log_message(self, *_: Any) -> None:
        pass


def test_maps_in_the_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    runtime = os.environ.get("ORT_WEB_DIST")
    if browser is None or runtime is None:
        pytest.skip("needs chromium and ORT_WEB_DIST, the folder dist of onnxruntime-web")
    site, target = tmp_path / "site", 3
    script = [sys.executable, str(ROOT / "docs" / "demo" / "build.py"), str(site)]
    subprocess.run([*script, "--runtime", runtime], check=True)
    rgba = np.random.default_rng(0).integers(0, 256, (32, 32, 4))
    page = HARNESS.replace("PIXELS", str(rgba.ravel().tolist())).replace("TARGET", str(target))
    (site / "harness.html").write_text(page, "utf-8")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
    ]
    process = subprocess.Popen(
        [*command, f"http://127.0.0.1:{server.server_port}/harness.html"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert Handler.done.wait(120), "the page did not answer"
    finally:
        process.terminate()
        process.wait()
        server.shutdown()
    assert "error" not in Handler.found, Handler.found
    x = (rgba[..., :3].transpose(2, 0, 1)[None] / 127.5 - 1).astype(np.float32)
    entries = json.loads((site / "explainers.json").read_text("utf-8"))["explainers"]
    explainer = rectgrad_ref.Explainer(
        ROOT / "onnx_models" / "cifar10_cnn.onnx", backend="reference", dtype="float32"
    )
    for entry in entries:
        options = {} if entry["q"] is None else {"q": entry["q"]}
        expected = explainer.explain(x, method=entry["method"], target=target, **options)
        found = Handler.found[entry["file"]]
        np.testing.assert_allclose(found["scores"], expected.logits[0], rtol=1e-4, atol=1e-4)
        bound = 1e-3 * np.abs(expected.values).max()
        error = np.abs(np.reshape(found["attribution"], x.shape) - expected.values).max()
        assert error <= bound, entry["file"]
        assert np.shape(found["rgba"]) == (4 * 32 * 32,)
