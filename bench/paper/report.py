"""RESULTS.md, made of the JSON files of a suite of experiments and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rectgrad_ref.files import atomic_write

from .evidence import SIGNIFICANT
from .runner import Experiment

_COLUMNS = ("claims that hold", "verdict", "what was run")
_METHOD = """\
This file is written by `python -m bench.{suite.name} report` from the JSON files in `{results}`,
which `python -m bench.{suite.name} all` writes; no number is typed by hand. A claim holds here if
the numbers say so and the difference is significant: paired over the images, Wilcoxon's
signed-rank test, p < {significant} after Holm's correction for all methods compared, unless it says
otherwise. Where there are several networks, an image's number is its mean over them, and the order
must be the same on each of them alone; elsewhere significance is over images for one trained
network. The verdict counts claims: all, some or none of them hold. CIFAR-10 and photographs are
not ours to publish, so pictures stay in the work folder and only plots of numbers are here.
"""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Experiments that are run by one command and reported in one file.

    Attributes
    ----------
    folder
        Of the package in `bench`, with RESULTS.md and `results`.
    title, introduction
        At the head of RESULTS.md.
    origin, claimant
        What `Experiment.figures` and `Experiment.paper` are: the head of a column, and who says so.
    members
        In the order of the report.
    critics
        The suite in `bench` that speaks against it; its summary is printed below one's own.
    """

    folder: Path
    title: str
    introduction: str
    origin: str
    claimant: str
    members: Sequence[type[Experiment]]
    critics: str = ""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def experiments(self) -> dict[str, type[Experiment]]:
        """The members by name."""
        return {cls.name: cls for cls in self.members}


def write(suite: Suite, results: Path, destination: Path) -> None:
    """Write the comparison of every experiment whose JSON file is in `results`."""
    paths = {name: results / f"{name}.json" for name in suite.experiments}
    records = _records(paths.values())
    missing = [cls for name, cls in suite.experiments.items() if not paths[name].exists()]
    folder = results.relative_to(destination.parent).as_posix()
    rows = [
        *_rows(records),
        *([cls.title, cls.figures, "–", "not run yet", "–"] for cls in missing),
    ]
    lines = [
        f"# {suite.title}",
        "",
        suite.introduction,
        "",
        _METHOD.format(suite=suite, results=folder, significant=SIGNIFICANT),
        *_table(["experiment", suite.origin, *_COLUMNS], rows),
        *_critics(suite, destination.parent.parent),
    ]
    for record in records:
        lines += _section(suite, record, folder)
    with atomic_write(destination) as temporary:
        temporary.write_text("\n".join(lines) + "\n", "utf-8")


def _records(paths: Iterable[Path]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]


def _rows(records: Sequence[dict[str, Any]], file: str = "") -> list[list[str]]:
    """One of the summary for every experiment; `file` has its section."""
    return [
        [
            f"[{record['title']}]({file}#{_anchor(_heading(record))})",
            record["figures"],
            _count(record["claims"]),
            f"**{record['verdict']}**",
            record["scale"],
        ]
        for record in records
    ]


def _critics(suite: Suite, root: Path) -> Iterator[str]:
    """The summary of the other suite, where there are results of it next to these."""
    records = _records(sorted(root.joinpath(suite.critics, "results").glob("*.json")))
    if suite.critics and records:
        file = f"../{suite.critics}/RESULTS.md"
        yield (
            f"Next to it, what [bench/{suite.critics}]({file}) found. A claim there is the "
            "critics'; where it is reproduced, the method fails the check."
        )
        yield ""
        yield from _table(["check", "in the literature", *_COLUMNS], _rows(records, file))


def _section(suite: Suite, record: dict[str, Any], folder: str) -> Iterator[str]:
    yield f"## {_heading(record)}"
    yield ""
    yield f"**{suite.claimant}.** {record['paper']}"
    yield ""
    yield f"**Here: {record['verdict']}.** {record['scale']}"
    yield ""
    for claim in record["claims"]:
        yield f"- {'✓' if claim['holds'] else '✗'} {claim['text']}: {claim['evidence']}."
    yield ""
    for table in record["tables"]:
        if table["note"]:
            yield f"{table['note']}"
            yield ""
        yield from _table(table["head"], table["rows"])
    for name in record["plots"]:
        yield f"![{record['title']}]({folder}/{name})"
        yield ""
    for remark in record["remarks"]:
        yield f"{remark}"
        yield ""
    yield f"<sub>{_provenance(record)}</sub>"
    yield ""


def _heading(record: dict[str, Any]) -> str:
    return f"{record['title']} ({record['figures']})"


def _anchor(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _count(claims: Sequence[dict[str, Any]]) -> str:
    return f"{sum(claim['holds'] for claim in claims)} of {len(claims)}" if claims else "–"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for line in (head, ["---"] * len(head), *rows):
        # A bar within a cell, as in Σ|map|, would end it.
        cells = [cell.replace("|", r"\|") for cell in line]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _provenance(record: dict[str, Any]) -> str:
    environment = record["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    settings = ", ".join(f"{k} = {v}" for k, v in record["settings"].items())
    return (
        f"{settings}; seed {record['seed']}; commit {', '.join(environment['commits_of_units'])}; "
        f"{environment['cpu']}, {environment['cores']} cores; {versions}; {environment['date']}; "
        f"{environment['seconds']:.0f} s of work"
    )
