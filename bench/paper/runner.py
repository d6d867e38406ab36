"""What an experiment is, and how it is run: unit by unit, resumable at any moment."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bench.speed.machine import describe
from rectgrad_ref.files import atomic_write

from .evidence import Conclusion
from .sources import Sources

Arrays = Mapping[str, np.ndarray]
Unit = Callable[[], Arrays]


class Results(Mapping[str, Arrays]):
    """What units found, by their names, read from the folder when asked for.

    `names` are the units that count, where others may lie beside them.
    """

    def __init__(self, folder: Path, names: Collection[str] | None = None) -> None:
        self.folder = folder
        self._names = names

    def __getitem__(self, key: str) -> Arrays:
        if key not in self:
            raise KeyError(key)
        with np.load(self.path(key)) as file:
            return {
                name.removeprefix("result/"): file[name]
                for name in file.files
                if name.startswith("result/")
            }

    def __contains__(self, key: object) -> bool:
        known = self._names is None or key in self._names
        return known and self.path(str(key)).exists()

    def __iter__(self) -> Iterator[str]:
        # A temporary file of an interrupted run begins with a dot.
        stems = (path.stem for path in sorted(self.folder.glob("[!.]*.npz")))
        return (stem for stem in stems if stem in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def path(self, key: str) -> Path:
        """The file of a unit."""
        return self.folder / f"{key}.npz"

    def provenance(self) -> tuple[list[str], float]:
        """The commits at which units were computed, and how many seconds they took."""
        commits, seconds = set(), 0.0
        for key in self:
            with np.load(self.path(key)) as file:
                commits.add(str(file["commit"]))
                seconds += float(file["seconds"])
        return sorted(commits), seconds


@dataclass(frozen=True, kw_only=True)
class Experiment(ABC):
    """Settings of one experiment; their defaults are the paper's protocol.

    Attributes
    ----------
    name, title, figures
        On the command line and in the report.
    paper
        The paper's outcome, in words.
    quick
        Settings with which it ends within five minutes on two cores.
    revision
        Of what units compute and store; raised so that older results are not taken for newer ones.
    family
        Experiments of one family and the same settings share what they have found; by default
        each is its own.
    extent
        The settings that decide which units there are, and nothing about what one of them finds:
        a run that raises them starts from the units of those before it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    figures: ClassVar[str]
    paper: ClassVar[str]
    quick: ClassVar[Mapping[str, Any]] = {}
    revision: ClassVar[int] = 1
    family: ClassVar[str] = ""
    extent: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def inputs(self, sources: Sources) -> dict[str, str]:
        """The SHA-256 of every network and data set that the results depend on."""

    @abstractmethod
    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        """The work, cut into pieces of some seconds, by name and in order.

        A unit may read what units before it found in `done`, and keep a checkpoint in its folder.
        """

    @abstractmethod
    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        """What follows from the results of all units."""

    def plot(self, conclusion: Conclusion, found: Mapping[str, Arrays], folder: Path) -> list[str]:
        """Draw plots of numbers into `folder`; their file names."""
        return []

    def pictures(self, sources: Sources, folder: Path) -> None:  # noqa: B027  (optional)
        """Draw pictures that show images of others, which stay out of the repository."""


def run(
    experiment: Experiment, sources: Sources, *, work: Path, out: Path, console: Console
) -> Path:
    """Do what is left of an experiment and write its JSON file and plots.

    Parameters
    ----------
    work : Path
        Folder of the units' results and of pictures. A unit whose file is there is not done again,
        so that an interrupted run goes on where it was; the files of other settings, seeds,
        networks or data are never taken for it (but see `Experiment.extent`).
    out : Path
        Folder of `<name>.json` and the plots.

    Returns
    -------
    Path
        The JSON file.
    """
    inputs = experiment.inputs(sources)
    settings = asdict(experiment)
    identity = {
        "settings": settings,
        "revision": experiment.revision,
        "seed": sources.seed,
        "backend": sources.backend,
        "inputs": inputs,
    }
    decisive = {key: settings[key] for key in settings if key not in experiment.extent}
    hashed = json.dumps(identity | {"settings": decisive}, sort_keys=True)
    digest = hashlib.sha256(hashed.encode()).hexdigest()[:12]
    folder = work / f"{experiment.family or experiment.name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    machine = describe()
    units = experiment.units(sources, Results(folder))
    found = Results(folder, units)
    with _progress(console) as progress:
        bar = progress.add_task(experiment.name, total=len(units))
        for key, unit in units.items():
            if key not in found:
                _compute(unit, found.path(key), machine["commit"])
            progress.advance(bar)
    commits, seconds = found.provenance()
    conclusion = experiment.conclude(sources, found)
    plots = experiment.plot(conclusion, found, out)
    content = {
        "experiment": experiment.name,
        "title": experiment.title,
        "figures": experiment.figures,
        "paper": experiment.paper,
        **identity,
        "environment": {
            **machine,
            "device": sources.device,
            "commits_of_units": commits,
            "seconds": round(seconds, 1),
        },
        "verdict": conclusion.verdict,
        **asdict(conclusion),
        "plots": plots,
    }
    path = out / f"{experiment.name}.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    pictures = folder / "pictures" / experiment.name
    pictures.mkdir(parents=True, exist_ok=True)
    experiment.pictures(sources, pictures)
    console.print(f"{experiment.name}: {conclusion.verdict}; {path}; pictures: {pictures}")
    return path


def batches(count: int, size: int) -> dict[str, slice]:
    """Slices of at most `size` of the indices 0 … count − 1, by a name that sorts."""
    return {
        f"{start:06d}": slice(start, min(start + size, count)) for start in range(0, count, size)
    }


def stacked(found: Mapping[str, Arrays], prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of all units whose names begin so, joined along axis 0."""
    parts = [found[key] for key in sorted(found) if key.startswith(prefix)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def of_networks(found: Mapping[str, Arrays], networks: int, prefix: str = "") -> Arrays:
    """The same of units that are named ``<seed>-<prefix>…``: arrays (networks, N, …)."""
    parts = [stacked(found, f"{seed}-{prefix}") for seed in range(networks)]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
    )


def _compute(unit: Unit, path: Path, commit: str | None) -> None:
    start = time.perf_counter()
    arrays = {f"result/{name}": array for name, array in unit().items()}
    seconds = np.float64(time.perf_counter() - start)
    with atomic_write(path) as temporary:
        np.savez_compressed(
            temporary, allow_pickle=False, seconds=seconds, commit=np.array(str(commit)), **arrays
        )
