"""Results as tables, on the terminal and in the README, and as figures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from rectgrad_ref.errors import OutputError
from rectgrad_ref.files import atomic_write
from rectgrad_ref.methods import METHODS

from .results import (
    DENSE,
    FORWARD,
    OURS,
    SAME,
    Comparison,
    Entry,
    Results,
    Spread,
    best_peer,
    find,
    forward,
    ratio,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BEGIN = "<!-- speed: begin -->"
_END = "<!-- speed: end -->"
_NONE = "–"


@dataclass(frozen=True)
class Sheet:
    """One table.

    Attributes
    ----------
    title : str
    note : str
    head : list of str
    rows : list of list of str
    """

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        table = Table(title=self.title, caption=self.note, title_justify="left")
        for i, name in enumerate(self.head):
            table.add_column(name, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.head, ["---"] + ["--:"] * (len(self.head) - 1), *self.rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"### {self.title}\n\n{self.note}\n\n{body}\n"


def sheets(results: Results) -> Iterator[Sheet]:
    """All tables that the results fill."""
    parts = (_costs, _duels, _agreements, _quantiles, _batches, _sizes, _cold, _memory, _floor)
    return (sheet for part in parts if (sheet := part(results)).rows)


def _part(results: Results, name: str) -> list[Comparison]:
    return [c for c in results["comparisons"] if c["part"] == name]


def _contenders(comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """All that took part, inference first, then method by method, ours before the peers'."""
    seen = dict.fromkeys((e["method"], e["by"]) for c in comparisons for e in c["entries"])
    methods = list(dict.fromkeys(method for method, _ in seen))
    return sorted(seen, key=lambda pair: methods.index(pair[0]))


def _column(comparison: Comparison) -> str:
    return f"{comparison['model']}, B = {comparison['input'][0]}"


def _label(method: str) -> str:
    return METHODS[method].label if method in METHODS else "Forward pass"


def _milliseconds(entry: Entry, samples: int = 1) -> str:
    """The median, of one sample."""
    value = 1000 * float(np.median(entry["seconds"])) / samples
    return f"{value:.0f} ms" if value >= 1000 else f"{value:.3g} ms"


def _costs(results: Results) -> Sheet:
    comparisons = _part(results, "methods")
    rows = []
    for method, by in _contenders(comparisons):
        row = [_label(method), by]
        for comparison in comparisons:
            entry = find(comparison, method, by)
            if entry is None:
                row.append(_NONE)
            elif by == FORWARD:
                row.append(f"1 ({_milliseconds(entry)})")
            else:
                row.append(str(ratio(entry, forward(comparison))))
        rows.append(row)
    return Sheet(
        "Cost in forward passes",
        "Median over the rounds of the time divided by that of onnxruntime's forward pass in the "
        "same round, with quartiles. SmoothGrad and integrated gradients: per pass.",
        ["", "by", *map(_column, comparisons)],
        rows,
    )


def _duels(results: Results) -> Sheet:
    comparisons = _part(results, "methods")
    rows = []
    for method in dict.fromkeys(method for method, by in _contenders(comparisons) if by == OURS):
        row = [_label(method)]
        for comparison in comparisons:
            ours, peer = find(comparison, method, OURS), best_peer(comparison, method)
            row.append(f"{ratio(ours, peer)} of {peer['by']}" if ours and peer else _NONE)
        rows.append(row)
    has_peers = any(cell != _NONE for row in rows for cell in row[1:])
    return Sheet(
        "Our time over that of the fastest peer",
        "The fastest other program that computes the same map.",
        ["", *map(_column, comparisons)],
        rows if has_peers else [],
    )


def _agreements(results: Results) -> Sheet:
    comparisons = _part(results, "methods")
    rows = []
    for method, by in _contenders(comparisons):
        found = [find(comparison, method, by) for comparison in comparisons]
        alike = [entry["agreement"] if entry else None for entry in found]
        if any(alike):
            rows.append(
                [_label(method), by, *(f"{a['cosine']:.4f}" if a else _NONE for a in alike)]
            )
    return Sheet(
        "Do the peers compute the same map?",
        f"Cosine similarity with ours. Below {SAME} a peer is not taken for one.",
        ["", "by", *map(_column, comparisons)],
        rows,
    )


def _quantiles(results: Results) -> Sheet:
    rows = []
    for comparison in _part(results, "q"):
        for q, ours, dense in _by_q(comparison):
            over_forward, over_dense = ratio(ours, forward(comparison)), ratio(ours, dense)
            rows.append([_column(comparison), f"{q:g}", str(over_forward), str(over_dense)])
    return Sheet(
        "RectGrad at other q",
        "Its time over that of the forward pass, and over its own with every convolution's "
        "transpose made dense.",
        ["", "q", "forward passes", "of all dense"],
        rows,
    )


def _by_q(comparison: Comparison) -> list[tuple[float, Entry, Entry]]:
    """q, RectGrad as it is, and all dense."""
    ours, dense = (
        {e["q"]: e for e in comparison["entries"] if e["by"] == by and e["q"] is not None}
        for by in (OURS, DENSE)
    )
    return [(q, ours[q], dense[q]) for q in ours if q is not None]


def _batches(results: Results) -> Sheet:
    return _scaling(results, "batch", "RectGrad at other batch sizes")


def _sizes(results: Results) -> Sheet:
    return _scaling(results, "size", "RectGrad on larger images")


def _scaling(results: Results, part: str, title: str) -> Sheet:
    rows = []
    for comparison in _part(results, part):
        entry, shape = find(comparison, "rectgrad", OURS), comparison["input"]
        assert entry is not None
        cost, an_image = ratio(entry, forward(comparison)), _milliseconds(entry, shape[0])
        rows.append([comparison["model"], "×".join(map(str, shape)), an_image, str(cost)])
    return Sheet(
        title,
        "Time for one image, and over that of the forward pass at the same shape.",
        ["", "input", "an image", "forward passes"],
        rows,
    )


def _cold(results: Results) -> Sheet:
    steps = ("import", "load", "plan", "first", "second", "until first")
    rows = []
    for process in results["processes"]:
        if process["part"] == "cold":
            figures = [Spread.of(process["figures"][step]).median for step in steps]
            rows.append([process["model"], process["what"], *(f"{v:.2f} s" for v in figures)])
    return Sheet(
        "Cold start",
        "One image in a new process, RectGrad; medians. The last column counts from the start of "
        "the interpreter to the end of the first explanation.",
        ["", "kernels", "import", "load", "plan", "explain", "again", "all"],
        rows,
    )


def _memory(results: Results) -> Sheet:
    peaks = {
        (p["model"], p["batch"], p["what"]): p["figures"]
        for p in results["processes"]
        if p["part"] == "memory"
    }
    rows = []
    for model, batch in dict.fromkeys((model, batch) for model, batch, _ in peaks):
        before, peak = ("MiB before", "MiB peak")
        explain, alone = (peaks[model, batch, what] for what in ("explain", "forward"))
        rows.append(
            [
                f"{model}, B = {batch}",
                *(f"{f[name][0]:.0f} MiB" for f in (alone, explain) for name in (before, peak)),
                f"{explain[peak][0] / alone[peak][0]:.2f}",
            ]
        )
    return Sheet(
        "Peak memory",
        "Of a process that only runs the forward pass with all ReLU outputs kept, and of one that "
        "explains by RectGrad; each before it runs for the first time, and at its peak.",
        ["", "forward: before", "peak", "explain: before", "peak", "ratio of peaks"],
        rows,
    )


def _floor(results: Results) -> Sheet:
    names = ("launches", "µs", "MB", "floor, µs")
    rows = [
        [
            f"{p['model']}, B = {p['batch']}: {p['what']}",
            *(f"{p['figures'][name][0]:,.0f}" for name in names),
            f"{p['figures']['µs'][0] / p['figures']['floor, µs'][0]:.1f}",
        ]
        for p in results["processes"]
        if p["part"] == "floor"
    ]
    return Sheet(
        "Kernels over their floor",
        "RectGrad's walk back on the GPU: time of each kernel, all its launches together, and what "
        "moving each of its tensors once takes at the speed of a large copy. A launch takes about "
        "two µs whatever it does.",
        ["", *names, "time over floor"],
        rows,
    )


# --- the README ---------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    """The results section: machine, tables, notes."""
    machine, settings = results["machine"], results["settings"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    loads = " → ".join(f"{machine[when][0]:.2f}" for when in ("load_before", "load_after"))
    gpu = f"{machine['gpu']}; " if machine.get("gpu") else ""
    lines = [
        f"{gpu}{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['flags'])}), "
        f"{machine['memory_gib']:g} GiB, {machine['system']}, Python {machine['python']}, "
        f"{versions}. {settings['threads']} threads for everybody; up to {settings['rounds']} "
        f"rounds; load average {loads}; {machine['date']}, commit {machine['commit']}.",
        *(sheet.markdown().rstrip() for sheet in sheets(results)),
        *(f"*{note}*" for note in results["notes"]),
    ]
    return "\n\n".join(lines) + "\n"


def update(readme: Path, section: str) -> None:
    """Put `section` between the two marks in a file.

    Raises
    ------
    OutputError
        The file lacks the marks, or cannot be written.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise OutputError(f"{readme} has no section between {_BEGIN} and {_END}")
    with atomic_write(readme) as temporary:
        temporary.write_text(f"{before}{begin}\n\n{section}\n{end}{after}", encoding="utf-8")


# --- figures ------------------------------------------------------------------------------------

_BLUE, _GREY, _DARK = "#0156cf", "#b8bcc4", "#4a4f58"
_SHADES = (_BLUE, "#d9480f", "#2b8a3e", "#862e9c")
_STYLE: Any = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


def save_figures(results: Results, folder: Path) -> list[Path]:
    """Write `methods.png` and `sweeps.png`, as far as there are results for them."""
    import matplotlib as mpl

    figures = {}
    with mpl.rc_context(_STYLE):
        if methods := _part(results, "methods"):
            figures["methods.png"] = bars(methods)
        sweeps = [c for part in ("q", "batch", "size") for c in _part(results, part)]
        if sweeps:
            figures["sweeps.png"] = curves(results)
        for name, figure in figures.items():
            with atomic_write(folder / name) as temporary:
                figure.savefig(temporary, dpi=200)
    return [folder / name for name in figures]


def bars(comparisons: Sequence[Comparison]) -> Figure:
    """The cost of every contender in forward passes, a panel for each network and batch size."""
    from matplotlib.figure import Figure

    contenders = [pair for pair in _contenders(comparisons) if pair[1] != FORWARD]
    heights = _spaced(contenders)
    size = (2.1 + 1.75 * len(comparisons), 0.9 + 0.19 * (max(heights) + 1))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(comparisons), sharey=True, squeeze=False)[0]
    for axes, comparison in zip(panels, comparisons, strict=True):
        base = forward(comparison)
        for pair, y in zip(contenders, heights, strict=True):
            entry = find(comparison, *pair)
            if entry is not None:
                _bar(axes, y, ratio(entry, base), _BLUE if pair[1] == OURS else _GREY)
        axes.axvline(1, color=_DARK, linewidth=0.7, linestyle=(0, (3, 2)))
        axes.set_title(f"{comparison['model']}\nbatch {comparison['input'][0]}", loc="left")
        axes.set_xlim(0, axes.dataLim.x1 * 1.25)
        axes.set_xlabel("forward passes")
    panels[0].set_yticks(heights, [_short(*pair) for pair in contenders])
    panels[0].set_ylim(max(heights) + 0.7, -0.7)
    for label, (_, by) in zip(panels[0].get_yticklabels(), contenders, strict=True):
        label.set_color(_BLUE if by == OURS else _DARK)
        label.set_fontweight("bold" if by == OURS else "normal")
    for axes in panels:
        axes.tick_params(axis="y", length=0)
    return figure


def _short(method: str, by: str) -> str:
    """The name of a bar: peers stand below the method's own."""
    if by == OURS:
        return _label(method)
    return f"Forward pass, {by.removeprefix(f'{FORWARD}, ')}" if method == "forward" else by


def _spaced(contenders: Sequence[tuple[str, str]]) -> list[float]:
    """Heights of the bars, with a gap between methods."""
    heights, y = [], 0.0
    for i, (method, _) in enumerate(contenders):
        y += 0.6 if i and method != contenders[i - 1][0] else 0
        heights.append(y)
        y += 1
    return heights


def _bar(axes: Axes, y: float, cost: Spread, colour: str) -> None:
    error = [[cost.median - cost.low], [cost.high - cost.median]]
    line = {"elinewidth": 0.8, "capsize": 1.8, "capthick": 0.8, "ecolor": _DARK}
    axes.barh(y, cost.median, 0.78, color=colour, xerr=error, error_kw=line)
    axes.annotate(
        f"{cost.median:.2f}",
        (cost.high, y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=6.5,
        color=_DARK,
    )


def curves(results: Results) -> Figure:
    """RectGrad's cost in forward passes along q, the batch size, and the size of the image."""
    from matplotlib.figure import Figure

    draw = {"q": _draw_q, "batch": _draw_batches, "size": _draw_sizes}
    shown = {part: found for part in draw if (found := _part(results, part))}
    figure = Figure(figsize=(0.3 + 2.5 * len(shown), 2.5), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    models = dict.fromkeys(c["model"] for found in shown.values() for c in found)
    colours = dict(zip(models, itertools.cycle(_SHADES), strict=False))
    for axes, (part, comparisons) in zip(panels, shown.items(), strict=True):
        for model in dict.fromkeys(c["model"] for c in comparisons):
            draw[part](axes, [c for c in comparisons if c["model"] == model], colours[model])
        axes.set_ylim(0, max(axes.dataLim.y1, 1) * 1.4)
        axes.axhline(1, color=_DARK, linewidth=0.7, linestyle=(0, (3, 2)))
        axes.legend(frameon=False, fontsize=6, loc="upper right")
    panels[0].set_ylabel("forward passes")
    return figure


def _draw_q(axes: Axes, comparisons: Sequence[Comparison], colour: str) -> None:
    for comparison in comparisons:
        points, base = _by_q(comparison), forward(comparison)
        marks = range(len(points))  # at even distances, because q is crowded near 100
        costs = [ratio(ours, base) for _, ours, _ in points]
        _curve(axes, marks, costs, colour, _column(comparison))
        costs = [ratio(dense, base) for _, _, dense in points]
        _curve(axes, marks, costs, colour, "the same, all dense", linestyle=":")
        axes.set_xticks(marks, [f"{q:g}" for q, _, _ in points])
    axes.set_xlabel("q")


def _draw_batches(axes: Axes, comparisons: Sequence[Comparison], colour: str) -> None:
    _draw_scaling(axes, comparisons, colour, 0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("batch size")


def _draw_sizes(axes: Axes, comparisons: Sequence[Comparison], colour: str) -> None:
    sizes = _draw_scaling(axes, comparisons, colour, -1)
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_xlabel("image side in pixels")


def _draw_scaling(
    axes: Axes, comparisons: Sequence[Comparison], colour: str, axis: int
) -> list[int]:
    """Costs along one axis of the input; its extents."""
    extents = [c["input"][axis] for c in comparisons]
    found = [(find(c, "rectgrad", OURS), forward(c)) for c in comparisons]
    costs = [ratio(entry, base) for entry, base in found if entry is not None]
    _curve(axes, extents, costs, colour, comparisons[0]["model"])
    return extents


def _curve(
    axes: Axes,
    x: Sequence[float],
    costs: Sequence[Spread],
    colour: str,
    label: str,
    linestyle: str = "-",
) -> None:
    axes.fill_between(
        x, [c.low for c in costs], [c.high for c in costs], color=colour, alpha=0.15, linewidth=0
    )
    medians = [c.median for c in costs]
    axes.plot(x, medians, linestyle, color=colour, label=label, marker="o", ms=2.5, lw=1.1)
