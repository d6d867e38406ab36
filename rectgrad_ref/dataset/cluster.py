"""The same job on a Ray cluster: each worker holds one Explainer and writes chunks of its own."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import BackendUnavailable, RectGradError
from ..explainer import Explainer
from .job import Job
from .store import Store

# Chunks that a worker is given at once, if there are enough for all. It reads the next of them
# while it explains one.
_RUN = 4
_PATIENCE, _LONGER = 10, 60  # seconds, for an answer by anything, and by a cluster


class _Worker:
    """What an actor of Ray Data holds."""

    def __init__(self, job: Job, store: Store) -> None:
        self.job, self.store = job, store

    @cached_property
    def explainer(self) -> Explainer:
        # Not in the constructor, whose errors Ray wraps in pages of its own.
        return self.job.explainer()

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        # In place of a worker that died, those that it had finished are not made again.
        wanted = set(batch["chunk"].tolist())
        finished = wanted & self.store.finished()
        for number in finished:
            yield {"chunk": np.array([number])}
        for number in self.job.run(self.explainer, self.store, sorted(wanted - finished)):
            yield {"chunk": np.array([number])}


def run_on_ray(
    job: Job, store: Store, numbers: Sequence[int], address: str, workers: int | None
) -> Iterator[int]:
    """Make chunks on a Ray cluster, and yield the number of each that is written.

    Parameters
    ----------
    address : str
        ``"local"``, ``"auto"`` or ``"HOST:PORT"``.
    workers : int or None
        Actors, each with the job's number of threads and, on a backend that needs one, a GPU; at
        most, and by default, as many as the cluster has room for.

    Raises
    ------
    BackendUnavailable
        The cluster cannot be reached, or has no room for one worker.
    """
    if not numbers:
        return
    import ray
    from ray.data import ActorPoolStrategy

    connected_here = not ray.is_initialized()
    if connected_here:
        _connect(ray, address)
    try:
        needs = {"CPU": job.loading["threads"], "GPU": int(job.loading["backend"] == "cuda")}
        room = sum(
            min(int(node["Resources"].get(kind, 0)) // n for kind, n in needs.items() if n)
            for node in ray.nodes()
            if node["Alive"]
        )
        if not room:
            raise BackendUnavailable(
                f"a worker takes {needs['CPU']} processors and {needs['GPU']} GPUs, which no "
                "machine of the Ray cluster has; give fewer threads"
            )
        size = min(workers or room, room, len(numbers))
        run = min(_RUN, -(-len(numbers) // size))
        runs = -(-len(numbers) // run)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        work = ray.data.from_items([{"chunk": n} for n in numbers], override_num_blocks=runs)
        work.context.enable_progress_bars = False
        work.context.target_max_block_size = 1  # so that every chunk is told of at once
        written = work.map_batches(
            _Worker,
            fn_constructor_args=(job, store),
            compute=ActorPoolStrategy(size=min(size, runs)),
            batch_size=run,
            num_cpus=needs["CPU"],
            num_gpus=needs["GPU"],
        )
        for row in written.iter_rows():
            yield int(row["chunk"])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RectGradError):
            raise error.cause from None
        raise
    finally:
        if connected_here:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Start or join a cluster, quietly."""
    host, colon, port = address.rpartition(":")
    try:
        if colon:
            # Ray itself tries for minutes, and at another program's port for ever.
            socket.create_connection((host, int(port)), _PATIENCE).close()
            status = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
            subprocess.run(status, timeout=_LONGER, check=True, capture_output=True, text=True)
        ray.init(address=address, log_to_driver=False, logging_level="error")
        return
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().rpartition("\n")[2]
    except subprocess.TimeoutExpired:
        reason = "what listens there does not answer as Ray does"
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error)
    raise BackendUnavailable(
        f"no Ray cluster at {address}: {reason}. Start one with 'ray start --head', or use 'local'"
    )
