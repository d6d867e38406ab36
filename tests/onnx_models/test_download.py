"""Downloads from a server on loopback that may stall, drop the line, or know no ranges."""

from __future__ import annotations

import functools
import hashlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from rectgrad_ref.errors import DownloadError, OutputError
from rectgrad_ref.onnx_models.download import fetch

CONTENT = np.random.default_rng(0).bytes(500_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What the server does, and what it has been asked."""

    url: str = ""
    ranges: bool = True
    drop_after: int | None = None
    """Close the connection after so many bytes."""
    stall_after: int | None = None
    """Send so many bytes and then nothing until `resume` is set."""
    resume: threading.Event = field(default_factory=threading.Event)
    requests: list[Message] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    def __init__(self, state: Server, *args: object) -> None:
        self.state = state
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.state.requests.append(self.headers)
        if self.path != "/model.onnx":
            self.send_error(404)
            return
        start = 0
        if self.state.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        body = CONTENT[start:]
        if self.state.drop_after is not None:
            self.wfile.write(body[: self.state.drop_after])
        elif self.state.stall_after is not None:
            self.wfile.write(body[: self.state.stall_after])
            self.state.resume.wait(30)
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = Server()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, state)) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_port}/model.onnx"
        yield state
        state.resume.set()
        http.shutdown()
        thread.join()


def part_in(folder: Path) -> Path:
    (part,) = folder.glob("*.part")
    return part


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_downloads_once(server: Server, tmp_path: Path) -> None:
    destination = tmp_path / "new" / "folder" / "model.onnx"
    for _ in range(2):
        assert fetch([server.url], destination, sha256=SHA256) == destination
        assert destination.read_bytes() == CONTENT
    assert len(server.requests) == 1
    assert server.requests[0]["Accept-Encoding"] == "identity"
    assert names(destination.parent) == ["model.onnx"]


def test_reports_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    fetch(
        [server.url],
        tmp_path / "model.onnx",
        sha256=SHA256,
        progress=lambda received, total: seen.append((received, total)),
    )
    assert seen == sorted(seen)
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_continues_after_the_line_dropped(server: Server, tmp_path: Path) -> None:
    destination = tmp_path / "model.onnx"
    server.drop_after = 300_000
    with pytest.raises(DownloadError, match="try again to continue"):
        fetch([server.url], destination, sha256=SHA256)
    part = part_in(tmp_path)
    assert names(tmp_path) == [part.name]
    received = part.stat().st_size
    assert 0 < received <= 300_000
    assert part.read_bytes() == CONTENT[:received]

    server.drop_after = None
    seen: list[int] = []
    fetch([server.url], destination, sha256=SHA256, progress=lambda n, _: seen.append(n))
    assert server.requests[-1]["Range"] == f"bytes={received}-"
    assert seen[0] > received
    assert destination.read_bytes() == CONTENT
    assert names(tmp_path) == ["model.onnx"]


def test_continues_after_the_process_was_killed(server: Server, tmp_path: Path) -> None:
    destination = tmp_path / "model.onnx"
    server.stall_after = 300_000
    program = (
        "import sys; from pathlib import Path; from rectgrad_ref.onnx_models.download import fetch;"
        "fetch([sys.argv[1]], Path(sys.argv[2]), sha256=sys.argv[3])"
    )
    command = [sys.executable, "-c", program, server.url, str(destination), SHA256]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not any(part.stat().st_size for part in tmp_path.glob("*.part")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    server.stall_after = None
    received = part_in(tmp_path).stat().st_size
    fetch([server.url], destination, sha256=SHA256)
    assert server.requests[-1]["Range"] == f"bytes={received}-"
    assert destination.read_bytes() == CONTENT
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("received", [0, 1, 65_536, 65_537, len(CONTENT) - 1, len(CONTENT)])
def test_continues_anywhere(server: Server, tmp_path: Path, received: int) -> None:
    destination = tmp_path / "model.onnx"
    server.drop_after = 0
    with pytest.raises(DownloadError):
        fetch([server.url], destination, sha256=SHA256)
    part_in(tmp_path).write_bytes(CONTENT[:received])
    server.drop_after = None
    fetch([server.url], destination, sha256=SHA256)
    assert destination.read_bytes() == CONTENT
    assert names(tmp_path) == ["model.onnx"]


def test_starts_again_where_the_server_knows_no_ranges(server: Server, tmp_path: Path) -> None:
    destination = tmp_path / "model.onnx"
    server.drop_after = 300_000
    with pytest.raises(DownloadError):
        fetch([server.url], destination, sha256=SHA256)
    server.drop_after, server.ranges = None, False
    fetch([server.url], destination, sha256=SHA256)
    assert "Range" in server.requests[-1]
    assert destination.read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"expected sha256:{'0' * 64} but got {SHA256}"):
        fetch([server.url], tmp_path / "model.onnx", sha256="0" * 64)
    assert names(tmp_path) == []


@pytest.mark.parametrize("damaged", [b"x" * 1000, b"x" * (len(CONTENT) + 1)])
def test_a_damaged_part_is_given_up(server: Server, tmp_path: Path, damaged: bytes) -> None:
    destination = tmp_path / "model.onnx"
    server.drop_after = 300_000
    with pytest.raises(DownloadError):
        fetch([server.url], destination, sha256=SHA256)
    part_in(tmp_path).write_bytes(damaged)
    server.drop_after = None
    with pytest.raises(DownloadError, match="does not match"):
        fetch([server.url], destination, sha256=SHA256)
    assert names(tmp_path) == []
    fetch([server.url], destination, sha256=SHA256)
    assert destination.read_bytes() == CONTENT


def test_another_version_does_not_continue_a_part(server: Server, tmp_path: Path) -> None:
    destination = tmp_path / "model.onnx"
    server.drop_after = 300_000
    with pytest.raises(DownloadError):
        fetch([server.url], destination, sha256="0" * 64)
    server.drop_after = None
    fetch([server.url], destination, sha256=SHA256)
    assert "Range" not in server.requests[-1]


def test_a_changed_file_is_replaced(server: Server, tmp_path: Path) -> None:
    destination = tmp_path / "model.onnx"
    destination.write_bytes(CONTENT[:-1] + b"x")
    fetch([server.url], destination, sha256=SHA256)
    assert destination.read_bytes() == CONTENT


def test_the_next_place_is_tried(server: Server, tmp_path: Path) -> None:
    destination = tmp_path / "model.onnx"
    gone = server.url.replace("model", "gone")
    fetch([gone, server.url], destination, sha256=SHA256)
    assert destination.read_bytes() == CONTENT


def test_every_failure_is_told(server: Server, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{closed.getsockname()[1]}/model.onnx"
        gone = server.url.replace("model", "gone")
        with pytest.raises(DownloadError) as error:
            fetch([refusing, gone], tmp_path / "model.onnx", sha256=SHA256)
    assert "refused" in str(error.value)
    assert "404" in str(error.value)
    assert names(tmp_path) == []


def test_an_unwritable_folder_is_an_output_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="cannot write"):
        fetch([server.url], tmp_path / "file" / "model.onnx", sha256=SHA256)
