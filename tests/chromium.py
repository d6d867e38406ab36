"""Scripts run in a page of headless Chromium, beside onnxruntime-web.

Needs Chromium, and the npm package onnxruntime-web, whose folder `dist` the environment variable
ORT_WEB_DIST names.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

_HARNESS = """<!doctype html>
<meta charset="utf-8">
<script type="importmap">{"imports": {"onnxruntime-web": "./runtime/ort.wasm.min.mjs"}}</script>
<iframe src="FRAME"></iframe>
<script type="module">
  const answer = (content) => fetch("/done", { method: "POST", body: JSON.stringify(content) });
  try { await answer(await (async () => { SCRIPT })()); }
  catch (error) { await answer({ error: String(error) }); }
</script>"""


class _Handler(SimpleHTTPRequestHandler):
    """Serves the site, and takes what the page found."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }
    answers: ClassVar[queue.Queue[dict[str, Any]]] = queue.Queue()

    def do_POST(self) -> None:
        self.answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def runtime() -> Path:
    """The folder `dist` of onnxruntime-web; skips the test where that or the browser is missing."""
    folder = os.environ.get("ORT_WEB_DIST")
    if _browser() is None or folder is None:
        pytest.skip("needs chromium and ORT_WEB_DIST, the folder dist of onnxruntime-web")
    return Path(folder)


def _browser() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome")


def visited(site: Path, script: str, profile: Path, frame: str = "about:blank") -> dict[str, Any]:
    """What a script returns in a page of the site, with another page in a frame.

    Parameters
    ----------
    site : Path
        A folder with onnxruntime-web in its sub-folder `runtime`.
    """
    page = _HARNESS.replace("SCRIPT", script).replace("FRAME", frame)
    (site / "harness.html").write_text(page, "utf-8")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [str(_browser()), *options, f"http://127.0.0.1:{server.server_port}/harness.html"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        found = _Handler.answers.get(timeout=120)
    finally:
        process.terminate()
        process.wait()
        server.shutdown()
    assert "error" not in found, found
    return found
