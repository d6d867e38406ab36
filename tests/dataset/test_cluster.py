"""The same job on a local Ray cluster of two worker processes."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_job import BROKEN, content

from rectgrad_ref import explain_dataset
from rectgrad_ref.dataset import Store
from rectgrad_ref.errors import BackendUnavailable, InvalidModel, OutputError

pytest.importorskip("zarr")
ray = pytest.importorskip("ray")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, log_to_driver=False, logging_level="error", include_dashboard=False)
    yield
    ray.shutdown()


def recipe(folder: Path, at: int | None = None, how: str = "") -> Callable[[np.ndarray], Any]:
    """Preprocessing; the first worker that comes to picture number `at` dies, or its disk fills."""
    fatal = None if at is None else int(np.load(folder / "sums.npy")[at])

    def prepared(picture: np.ndarray) -> np.ndarray:
        (folder / f"pid{os.getpid()}").touch()
        if int(picture.sum()) == fatal and not (folder / "happened").exists():
            (folder / "happened").touch()
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        return (picture / 127.5 - 1).astype(np.float32).transpose(2, 0, 1)

    return prepared


def run(model: Path, source: Path, out: Path, **settings: Any) -> Store:
    settings = {"backend": "reference", "chunk_size": 1, "threads": 1} | settings
    return explain_dataset(model, source, out, **settings)


@pytest.fixture
def notes(tmp_path: Path, pixels: np.ndarray) -> Path:
    """Where workers leave word."""
    made = tmp_path / "notes"
    made.mkdir()
    sums = pixels.reshape(len(pixels), -1).sum(axis=1, dtype=int)
    assert len(set(sums.tolist())) == len(sums)
    np.save(made / "sums.npy", sums)
    return made


def test_two_workers_write_what_one_process_writes(
    model: Path, folder: Path, tmp_path: Path, notes: Path
) -> None:
    told: list[int] = []
    store = run(
        model,
        folder,
        tmp_path / "ray",
        ray="local",
        preprocess=recipe(notes),
        progress=lambda done, total: told.append(done),
    )
    assert store.skipped == len(BROKEN)
    assert told == list(range(26))
    assert len(list(notes.glob("pid*"))) == 1 + 2  # this process settles the shape
    run(model, folder, tmp_path / "one", preprocess=recipe(notes))
    assert content(tmp_path / "ray") == content(tmp_path / "one")


def test_a_worker_that_is_killed_is_replaced(
    model: Path, folder: Path, tmp_path: Path, notes: Path
) -> None:
    run(model, folder, tmp_path / "ray", ray="local", preprocess=recipe(notes, 17, "killed"))
    assert (notes / "happened").exists()
    run(model, folder, tmp_path / "one", preprocess=recipe(notes))
    assert content(tmp_path / "ray") == content(tmp_path / "one")


def test_a_full_disk_at_a_worker_stops_the_job_which_can_go_on_elsewhere(
    model: Path, folder: Path, tmp_path: Path, notes: Path
) -> None:
    with pytest.raises(OutputError, match="the chunks that are finished stay"):
        run(model, folder, tmp_path / "out", ray="local", preprocess=recipe(notes, 20, "full"))
    finished = Store(tmp_path / "out").finished()
    assert 0 < len(finished) < 25
    run(model, folder, tmp_path / "out", preprocess=recipe(notes))
    run(model, folder, tmp_path / "one", preprocess=recipe(notes))
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_a_job_that_one_process_began_is_finished_by_several(
    model: Path, folder: Path, tmp_path: Path, notes: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, folder, tmp_path / "out", preprocess=recipe(notes), progress=stop)
    run(model, folder, tmp_path / "out", preprocess=recipe(notes), ray="local", workers=1)
    run(model, folder, tmp_path / "one", preprocess=recipe(notes))
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_a_worker_that_cannot_load_the_model_says_so(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    """As where the paths of this machine are not those of another."""
    mine = tmp_path / "mine.onnx"
    mine.write_bytes(model.read_bytes())

    def gone(done: int, total: int) -> None:
        mine.unlink(missing_ok=True)

    with pytest.raises(InvalidModel, match=r"cannot read .*mine\.onnx"):
        run(mine, folder, tmp_path / "out", ray="local", progress=gone)


def test_a_worker_that_fits_nowhere(model: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="a worker takes 3 processors and 0 GPUs"):
        run(model, folder, tmp_path / "out", ray="local", threads=3)
