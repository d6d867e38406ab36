"""Jobs: what they write, and that nothing that happens on the way changes it."""

from __future__ import annotations

import gc
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from nets import Net, Op
from PIL import Image

from rectgrad_ref import Explainer, RectGrad, SmoothGrad, explain_dataset
from rectgrad_ref.dataset import Store
from rectgrad_ref.dataset.job import Job
from rectgrad_ref.dataset.sources import Pictures
from rectgrad_ref.errors import (
    BackendUnavailable,
    InvalidImage,
    InvalidTarget,
    OutputError,
    RectGradError,
)

pa = pytest.importorskip("pyarrow")
pytest.importorskip("zarr")

BROKEN = [3, *range(10, 15)]


def run(model: Path, source: Path, out: Path, **settings: Any) -> Store:
    settings = {"backend": "reference", "chunk_size": 4} | settings
    return explain_dataset(model, source, out, **settings)


def rows(store: Store) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = store.table.to_table().to_pylist()
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"q": 50.0, "target": "bee"},
        {"method": "smoothgrad", "n": 3},
        {"method": "integrated_gradients", "steps": 3},
    ],
    ids=["rectgrad", "target", "smoothgrad", "integrated_gradients"],
)
def test_maps_and_rows_are_what_explain_says_of_each_picture(
    model: Path, folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    store = run(model, folder, tmp_path / "out", **settings)
    explainer = Explainer(model, backend="reference")
    table = rows(store)
    assert [row["index"] for row in table] == list(range(25))
    assert [row["source"] for row in table] == [f"{i:03}.png" for i in range(25)]
    for i, row in enumerate(table):
        if i in BROKEN:
            assert row["status"].startswith(("not a picture", "damaged"))
            assert row["target"] is row["scores"] is row["sparsity"] is None
            assert np.isnan(store.maps[i]).all()
            continue
        one = explainer.explain(folder / f"{i:03}.png", keys=[i], **settings)
        expected = one.values[0].astype(np.float32)
        np.testing.assert_allclose(store.maps[i], expected, rtol=1e-6, atol=1e-12)
        assert row["status"] == "ok"
        assert row["target"] == one.target[0]
        np.testing.assert_allclose(row["scores"], one.logits[0], rtol=1e-6)
        assert row["sparsity"] == np.mean(expected == 0)
        if one.completeness_gap is None:
            assert row["completeness_gap"] is None
        else:
            assert row["completeness_gap"] == pytest.approx(one.completeness_gap[0], abs=1e-12)
    assert store.skipped == len(BROKEN)


def test_a_target_for_each_picture(model: Path, folder: Path, tmp_path: Path) -> None:
    targets = [i % 3 for i in range(25)]
    store = run(model, folder, tmp_path / "out", target=targets)
    expected = [None if i in BROKEN else i % 3 for i in range(25)]
    assert [row["target"] for row in rows(store)] == expected


def test_arrays_may_be_pictures_or_input(model: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    inputs = (pixels / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2)
    inputs[5, 0, 0, 0] = np.nan
    np.save(tmp_path / "pictures.npy", pixels)
    np.save(tmp_path / "inputs.npy", inputs)
    a = run(model, tmp_path / "pictures.npy", tmp_path / "a")
    b = run(model, tmp_path / "inputs.npy", tmp_path / "b")
    np.testing.assert_array_equal(np.delete(a.maps[:], 5, 0), np.delete(b.maps[:], 5, 0))
    assert "NaN" in rows(b)[5]["status"]
    assert (a.skipped, b.skipped) == (0, 1)


def test_pictures_of_every_kind(model: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    """A CMYK, a 16-bit, a large and a strange picture are no reason to stop."""
    source = tmp_path / "pictures"
    source.mkdir()
    picture = Image.fromarray(pixels[0])
    picture.convert("CMYK").save(source / "cmyk.jpg")
    Image.fromarray(pixels[0, :, :, 0].astype(np.uint16) * 257).save(source / "deep.png")
    picture.resize((3000, 2000)).save(source / "large.jpg")
    Image.fromarray(pixels[0, :, :, 0].astype(np.float32)).save(source / "real.tiff")
    (source / "text.gif").write_text("no picture")
    store = run(model, source, tmp_path / "out")
    assert [row["status"] == "ok" for row in rows(store)] == [True, True, True, False, False]
    assert "no defined range" in rows(store)[3]["status"]


def test_float16(model: Path, folder: Path, tmp_path: Path) -> None:
    full = run(model, folder, tmp_path / "full", method="saliency")
    half = run(model, folder, tmp_path / "half", method="saliency", precision="float16")
    assert half.maps.dtype == np.float16
    np.testing.assert_array_equal(half.maps[:], full.maps[:].astype(np.float16))


def test_a_map_that_float16_cannot_hold_is_said_so(tmp_path: Path) -> None:
    weights = (np.full((48, 2), 1e5), np.zeros(2))
    steep = Net((3, 4, 4), (Op("Flatten", "flat", ("x",)), Op("Gemm", "y", ("flat",), weights)))
    onnx.save(steep.onnx(), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", np.ones((2, 3, 4, 4), np.float32))
    settings = {"method": "saliency", "precision": "float16"}
    store = run(tmp_path / "net.onnx", tmp_path / "x.npy", tmp_path / "out", **settings)
    assert {row["status"] for row in rows(store)} == {"the map has values that float16 cannot hold"}
    assert np.isnan(store.maps[:]).all()


def test_maps_are_compressed_and_chunked(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((100, 3, 8, 8), np.float32))
    store = run(model, tmp_path / "x.npy", tmp_path / "out", chunk_size=40)
    assert store.maps.chunks == (40, 3, 8, 8)
    assert store.maps.nbytes_stored() < store.maps.nbytes / 10


def test_a_map_does_not_depend_on_the_chunk_if_batches_are_of_one(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    several = [
        run(
            model, folder, tmp_path / str(n), backend="cpu", chunk_size=n, batch_invariant=True
        ).maps[:]
        for n in (1, 7, 25)
    ]
    np.testing.assert_array_equal(several[0], several[1])
    np.testing.assert_array_equal(several[0], several[2])


def test_progress_is_of_pictures(model: Path, folder: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    run(model, folder, tmp_path / "out", chunk_size=10, progress=lambda *now: told.append(now))
    run(model, folder, tmp_path / "out", chunk_size=10, progress=lambda *now: told.append(now))
    assert told == [(0, 25), (10, 25), (20, 25), (25, 25), (25, 25)]


# --- reading ahead, in bounded memory -------------------------------------------------------------


def test_the_next_chunk_is_read_while_one_is_explained_and_no_further(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_out = 0
    second_read = threading.Event()

    def items(self: Pictures, start: int) -> Iterator[Path]:
        nonlocal handed_out
        for name in self.files[start:]:
            handed_out += 1
            if handed_out > 6:  # one to settle the shape, four of the first chunk
                second_read.set()
            yield self.root / name

    explain, ahead = Explainer.explain, []

    def waiting(self: Explainer, image: np.ndarray, **settings: Any) -> Any:
        assert second_read.wait(30)
        ahead.append(handed_out - 1 - settings["keys"][0])
        return explain(self, image, **settings)

    monkeypatch.setattr(Pictures, "items", items)
    monkeypatch.setattr(Explainer, "explain", waiting)
    run(model, folder, tmp_path / "out")
    assert max(ahead) <= 2 * 4 + 1


def test_memory_does_not_grow_with_the_number_of_pictures(model: Path, tmp_path: Path) -> None:
    def peak(images: int) -> int:
        source = tmp_path / f"{images}.npy"
        np.save(source, np.zeros((images, 3, 8, 8), np.float32))
        gc.freeze()
        tracemalloc.start()
        # What only waits for the garbage collector does not count.
        run(model, source, source.with_suffix(""), chunk_size=20, progress=lambda *_: gc.collect())
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        gc.unfreeze()
        return most

    peak(40)  # imports
    one_map = 3 * 8 * 8 * 4
    assert peak(1000) - peak(100) < 900 * one_map / 20


# --- interrupted ----------------------------------------------------------------------------------

SMOOTHGRAD = {"method": "smoothgrad", "n": 30, "chunk_size": 2}


def killed(model: Path, source: Path, out: Path, after: int, delay: float) -> bool:
    """Run a job, and kill it some time after so many chunks; False if it was too fast."""
    code = (
        "import sys, json; from rectgrad_ref import explain_dataset; "
        "explain_dataset(*sys.argv[1:4], backend='reference', **json.loads(sys.argv[4]))"
    )
    arguments = [model, source, out, json.dumps(SMOOTHGRAD)]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])
    while process.poll() is None and len(Store(out).finished()) < after:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    return process.wait() == -signal.SIGKILL


def written(out: Path) -> dict[Path, int]:
    """When each file of a finished chunk was written."""
    numbers = Store(out).finished()
    files = [
        file
        for n in numbers
        for file in (out / f"maps.zarr/c.{n}.0.0.0", out / f"table/{n:08}.parquet")
    ]
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.mark.parametrize(
    "times",
    [pytest.param(3, id="three"), pytest.param(25, id="twenty-five", marks=pytest.mark.slow)],
)
def test_killed_at_any_moment_it_goes_on_without_loss_or_repetition(
    model: Path, folder: Path, tmp_path: Path, times: int
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(model, folder, whole, **SMOOTHGRAD)
    rng = np.random.default_rng(times)
    kills = 0
    before: dict[Path, int] = {}
    for _ in range(times):
        after = len(before) // 2 + int(rng.integers(0, max(1, 20 // times) + 1))
        kills += killed(model, folder, out, min(after, 12), rng.uniform(0, 0.1))
        now = written(out)
        assert now.items() >= before.items()
        before = now
    assert kills
    run(model, folder, out, **SMOOTHGRAD)
    assert written(out).items() >= before.items()
    assert content(out) == content(whole)


@pytest.mark.parametrize("where", ["read", "explained", "written"])
def test_an_error_on_the_way_leaves_what_can_be_gone_on_with(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    name, owner = {
        "read": ("_sample", Job),
        "explained": ("_explained", Job),
        "written": ("write", Store),
    }[where]
    original, calls = getattr(owner, name), 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (10 if where == "read" else 3):
            raise MemoryError("none left")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(MemoryError):
            run(model, folder, tmp_path / "out")
    assert Store(tmp_path / "out").finished() == {0, 1}
    run(model, folder, tmp_path / "out")
    run(model, folder, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_the_number_of_threads_is_that_of_the_beginning(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    run(model, folder, tmp_path / "out", threads=3)
    run(model, folder, tmp_path / "out")
    with pytest.raises(OutputError, match=r"computation\.threads is 3 there, 1 here"):
        run(model, folder, tmp_path / "out", threads=1)


# --- bad input ------------------------------------------------------------------------------------


def swap(folder: Path) -> None:
    (folder / "005.png").write_bytes((folder / "006.png").read_bytes() + b" ")


def rename(folder: Path) -> None:
    (folder / "005.png").rename(folder / "005a.png")


def remove(folder: Path) -> None:
    (folder / "024.png").unlink()


@pytest.mark.parametrize("change", [swap, rename, remove])
def test_a_source_that_has_changed_is_refused(
    model: Path, folder: Path, tmp_path: Path, change: Any
) -> None:
    run(model, folder, tmp_path / "out")
    before = content(tmp_path / "out")
    change(folder)
    with pytest.raises(OutputError, match=r"begun with other pictures .*: source\."):
        run(model, folder, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_a_picture_that_goes_away_meanwhile_stops_the_job(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    def remove_last(done: int, total: int) -> None:
        (folder / "024.png").unlink(missing_ok=True)

    with pytest.raises(InvalidImage, match=r"024\.png: no such picture"):
        run(model, folder, tmp_path / "out", progress=remove_last)
    assert Store(tmp_path / "out").finished() == set(range(6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"q": 90.0}, r"method\.q is 98\.0 there, 90\.0 here"),
        ({"method": "saliency"}, r"method\.id is 'rectgrad' there, 'saliency' here"),
        ({"target": 1}, r"target is 'predicted' there, 1 here"),
        ({"precision": "float16"}, r"maps\.dtype is 'float32' there, 'float16' here"),
        ({"preprocess": "unit"}, r"preprocess\.value_range"),
        ({"chunk_size": 5}, r"maps\.chunk_size is 4 there, 5 here"),
        ({"batch_invariant": True}, r"computation\.batch_size is None there, 1 here"),
        ({"dtype": "float32"}, r"computation\.dtype is 'float64' there, 'float32' here"),
    ],
)
def test_a_folder_of_another_job_is_refused(
    model: Path, folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    run(model, folder, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(OutputError, match=message):
        run(model, folder, tmp_path / "out", **settings)
    assert content(tmp_path / "out") == before


def test_a_folder_of_another_model_is_refused(model: Path, folder: Path, tmp_path: Path) -> None:
    run(model, folder, tmp_path / "out")
    proto = onnx.load(model)
    proto.producer_name = "another"
    onnx.save(proto, tmp_path / "another.onnx")
    with pytest.raises(OutputError, match=r"model\.sha256 is '\w{64}' there"):
        run(tmp_path / "another.onnx", folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": RectGrad(scope="batch")}, ValueError, "a data set has no batch"),
        ({"method": SmoothGrad(range="batch")}, ValueError, "a data set has no batch"),
        ({"precision": "float64"}, ValueError, "precision must be float32 or float16"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"batch_invariant": True, "batch_size": 2}, ValueError, "a batch_size of 1, got 2"),
        ({"workers": 2}, ValueError, "say which one with ray"),
        ({"target": "dog"}, InvalidTarget, "unknown class 'dog'"),
        ({"target": [0, 1]}, InvalidTarget, "2 targets for 25 samples"),
        ({"target": [0] * 24 + [3]}, InvalidTarget, "class 3 does not exist"),
        ({"preprocess": "nonsense"}, InvalidImage, "nonsense"),
        ({"layout": "NHWC"}, InvalidImage, "none of the first 25 pictures can be used"),
    ],
)
def test_what_no_job_can_be_is_refused_before_anything_is_written(
    model: Path,
    folder: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run(model, folder, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_an_output_inside_the_source_is_refused(model: Path, folder: Path) -> None:
    with pytest.raises(OutputError, match="inside the source"):
        run(model, folder, folder / "out")
    assert not (folder / "out").exists()


def test_without_zarr_it_says_how_to_install(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rectgrad_ref.dataset.job.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'rectgrad-ref\[dataset\]'"):
        run(model, folder, tmp_path / "out")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379"])
def test_a_cluster_that_cannot_be_reached(
    model: Path, folder: Path, tmp_path: Path, address: str
) -> None:
    pytest.importorskip("ray")
    with pytest.raises(RectGradError, match=f"no Ray cluster at {address}"):
        run(model, folder, tmp_path / "out", ray=address)
    run(model, folder, tmp_path / "out", threads=1)  # the folder can still be used


def test_another_program_at_the_clusters_address(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself would wait for ever."""
    pytest.importorskip("ray")
    monkeypatch.setattr("rectgrad_ref.dataset.cluster._LONGER", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(BackendUnavailable, match="does not answer as Ray does"):
            run(model, folder, tmp_path / "out", ray=address)
