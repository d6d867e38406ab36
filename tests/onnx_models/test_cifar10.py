"""The loader of the official CIFAR-10 pickles."""

from __future__ import annotations

import hashlib
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rectgrad_ref.errors import DownloadError, InvalidImage
from rectgrad_ref.onnx_models import cifar10
from rectgrad_ref.onnx_models.cifar10 import FOLDER, MD5, load_cifar10, occlude, unpickle

N = 3  # images a batch


def python2_pickle(labels: list[int], images: NDArray[np.uint8]) -> bytes:
    """A batch as Python 2 wrote it: byte strings and the old names of NumPy's functions."""

    def short(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    pixels = images.reshape(len(images), -1)
    return b"".join(
        [
            b"\x80\x02}(",
            short(b"labels") + b"](" + b"".join(number(label) for label in labels) + b"e",
            short(b"data"),
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b"),
            b"\x87R(K\x01" + number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86",
            b"cnumpy\ndtype\n" + short(b"u1") + b"K\x00K\x01\x87R",
            b"(K\x03" + short(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb\x89",
            b"T" + struct.pack("<i", pixels.size) + pixels.tobytes(),
            b"tbu.",
        ]
    )


def images_of(name: str) -> NDArray[np.uint8]:
    rng = np.random.default_rng(list(name.encode()))
    return rng.integers(0, 256, (N, 3, 32, 32), np.uint8)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of three images a file whose md5s are taken for the official ones."""
    monkeypatch.delenv(cifar10.FOLDER_VARIABLE, raising=False)
    folder = tmp_path / "data" / FOLDER
    folder.mkdir(parents=True)
    for index, name in enumerate(MD5):
        content = python2_pickle([index, index + 1, 9], images_of(name))
        (folder / name).write_bytes(content)
        monkeypatch.setitem(MD5, name, hashlib.md5(content).hexdigest())
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("pooch.os_cache", lambda project: folder)
    return folder


def test_splits_are_read_in_file_order(fake: Path) -> None:
    train = load_cifar10("train", fake)
    np.testing.assert_array_equal(
        train.images, np.concatenate([images_of(f"data_batch_{k}") for k in range(1, 6)])
    )
    np.testing.assert_array_equal(train.labels, [0, 1, 9, 1, 2, 9, 2, 3, 9, 3, 4, 9, 4, 5, 9])
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int64
    assert train.class_names[9] == "truck"

    test = load_cifar10("test", fake)
    np.testing.assert_array_equal(test.images, images_of("test_batch"))


def test_folder_is_found_by_parent_variable_and_cache(
    fake: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = images_of("test_batch")
    np.testing.assert_array_equal(load_cifar10("test", fake.parent).images, expected)
    with monkeypatch.context() as patch:
        patch.setenv(cifar10.FOLDER_VARIABLE, str(fake))
        np.testing.assert_array_equal(load_cifar10("test").images, expected)
    cache.mkdir()
    fake.rename(cache / FOLDER)
    np.testing.assert_array_equal(load_cifar10("test").images, expected)


def test_absent_data_set_says_what_to_do(fake: Path, cache: Path) -> None:
    with pytest.raises(InvalidImage, match=r"no CIFAR-10 at .*cache: pass download=True"):
        load_cifar10("test")
    (fake / "data_batch_3").unlink()
    with pytest.raises(InvalidImage, match=r"cannot read .*data_batch_3"):
        load_cifar10("train", fake)


def test_altered_file_is_refused(fake: Path) -> None:
    content = bytearray((fake / "data_batch_2").read_bytes())
    content[1000] ^= 1
    (fake / "data_batch_2").write_bytes(content)
    with pytest.raises(InvalidImage, match="data_batch_2 is not the official CIFAR-10 file"):
        load_cifar10("train", fake)
    assert len(load_cifar10("test", fake).images) == N


class Malicious:
    """Creates the file `path` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickle_with_another_global_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    content = pickle.dumps(Malicious(victim), protocol=2)
    pickle.loads(content)
    assert victim.exists(), "the pickle is harmless, so refusing it would show nothing"
    victim.unlink()
    with pytest.raises(InvalidImage, match=r"it names \w+"):
        unpickle(content)
    assert not victim.exists()


@pytest.mark.parametrize("name", ["os\nsystem", "builtins\neval", "numpy\nload"])
def test_only_the_names_of_an_array_are_allowed(name: str) -> None:
    with pytest.raises(InvalidImage, match=r"it names " + name.replace("\n", ".")):
        unpickle(b"\x80\x02c" + name.encode() + b"\n.")


@pytest.mark.parametrize("length", [0, 1, 30, 200])
def test_truncated_pickle_is_refused(length: int) -> None:
    content = python2_pickle([0, 1, 2], images_of("x"))
    with pytest.raises(InvalidImage, match="not a pickle of plain arrays"):
        unpickle(content[:length])


@pytest.fixture
def server(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serve the fake data set's archive on the loopback as if it were the official site."""
    root = tmp_path / "www"
    root.mkdir()
    archive = root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(fake, FOLDER)
    handler = partial(SimpleHTTPRequestHandler, directory=str(root))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}/{archive.name}"
        monkeypatch.setattr(cifar10, "ARCHIVE_URL", url)
        sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", sha256)
        yield archive
        http.shutdown()


def test_download_is_kept_in_the_cache(server: Path, cache: Path) -> None:
    assert len(load_cifar10("test", download=True).images) == N
    server.unlink()
    assert len(load_cifar10("train", download=True).images) == 5 * N
    assert len(load_cifar10("train").images) == 5 * N


def test_download_of_another_archive_is_refused(server: Path, cache: Path) -> None:
    server.write_bytes(b"not the archive")
    with pytest.raises(DownloadError, match=r"cannot download cifar-10-python\.tar\.gz"):
        load_cifar10("test", download=True)
    assert not (cache / FOLDER).exists()


def test_occlusion_is_the_authors_patch() -> None:
    images = np.full((2, 3, 32, 32), 255, np.uint8)
    occluded = occlude(images)
    assert np.all(images == 255), "the input was changed"
    # np.random.seed(100); np.random.randint(0, 255, [1, 10, 10, 3]): its first and last pixels.
    np.testing.assert_array_equal(occluded[:, :, 0, 0], [[8, 24, 67]] * 2)
    np.testing.assert_array_equal(occluded[:, :, 0, 1], [[103, 87, 79]] * 2)
    np.testing.assert_array_equal(occluded[:, :, 9, 9], [[99, 209, 16]] * 2)
    assert np.all(occluded[:, :, 10:] == 255)
    assert np.all(occluded[:, :, :, 10:] == 255)


def test_official_files(cifar10_folder: Path) -> None:
    train = load_cifar10("train", cifar10_folder)
    test = load_cifar10("test", cifar10_folder)
    assert train.images.shape == (50000, 3, 32, 32)
    assert test.images.shape == (10000, 3, 32, 32)
    np.testing.assert_array_equal(np.bincount(train.labels), [5000] * 10)
    np.testing.assert_array_equal(np.bincount(test.labels), [1000] * 10)
    # The channel means that every recipe for CIFAR-10 quotes.
    means = train.images.mean((0, 2, 3)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=5e-5)
