"""Plots of numbers in one style: box plots, curves, points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rectgrad_ref import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, OTHER, PAPER = "#b2182b", "#4d4d4d", "#2166ac"
_COLOURS = {
    "RectGrad": "#b2182b",
    "Saliency": "#2166ac",
    "Guided BP": "#e08214",
    "SmoothGrad": "#762a83",
    "Gradient × input": "#8c510a",
    "IntegGrad": "#dd1c77",
    "DeepLIFT": "#1b7837",
    "Random": "#878787",
}
_RELATIVES = {
    "RectGrad PRR": "RectGrad",
    "ε-LRP": "Gradient × input",
    "Deconvolution": "Guided BP",
}
_SIZE = 8


def figure(
    columns: int = 1, height: float = 2.6, width: float = 3.5, *, share_x: bool = False
) -> tuple[Figure, list[Axes]]:
    """A row of axes, each `width` × `height` inches, of one range if told so."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width * columns, height), layout="constrained")
    axes = list(made.subplots(1, columns, sharex=share_x, squeeze=False)[0])
    for ax in axes:
        ax.tick_params(labelsize=_SIZE)
        ax.spines[["top", "right"]].set_visible(False)
    return made, axes


def style(name: str, others: Sequence[str] = ()) -> tuple[str, str]:
    """Dashes and colour: a method has its own in all plots, other names by their position.

    Dashed are relatives of a method, and its variants, whose names go on after a comma.
    """
    plain = name.partition(", ")[0]
    if plain in _RELATIVES or plain in _COLOURS:
        dashes = "-" if name in _COLOURS else "--"
        return dashes, _COLOURS[_RELATIVES.get(plain, plain)]
    return "-", list(_COLOURS.values())[list(others).index(name)]


def boxes(
    ax: Axes,
    values: Mapping[str, np.ndarray],
    *,
    ours: Sequence[str],
    label: str,
    title: str = "",
    paper: Mapping[str, float] | None = None,
    legend: bool = True,
) -> None:
    """Horizontal boxes in the given order: quartiles, whiskers to 1.5 times their distance.

    Where there are several networks, values are (networks, N), boxes are of all of them, and a dot
    is one network's median. `paper` adds the medians that the paper shows.
    """
    names = list(values)
    drawn = ax.boxplot(
        [values[name].ravel() for name in names],
        orientation="horizontal",
        showfliers=False,
        widths=0.6,
        patch_artist=True,
    )
    for name, box, median in zip(names, drawn["boxes"], drawn["medians"], strict=True):
        colour = OURS if name in ours else OTHER
        box.set(facecolor="white", edgecolor=colour)
        median.set(color=colour, linewidth=2)
    for i, name in enumerate(names):
        if values[name].ndim > 1:
            medians = np.median(values[name], axis=1)
            colour = OURS if name in ours else OTHER
            (dots,) = ax.plot(medians, np.full(len(medians), i + 1), ".", markersize=4)
            dots.set(color=colour, label="" if name in ours else "median of a network")
    if paper:
        known = [i + 1 for i, name in enumerate(names) if name in paper]
        marks = [paper[names[i - 1]] for i in known]
        ax.plot(marks, known, "D", color=PAPER, markersize=4, label="paper's median", zorder=3)
    if legend:
        _legend(ax, ax)
    ax.set_yticks(range(1, len(names) + 1), names)
    ax.invert_yaxis()
    ax.set_xlabel(label, size=_SIZE)
    ax.set_title(title, size=_SIZE + 1)


def curves(
    ax: Axes,
    x: Sequence[float] | np.ndarray,
    lines: Mapping[str, np.ndarray],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    spread: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    marker: str = "",
    legend: bool = True,
) -> None:
    """One line a name; `spread` shades the space between two others."""
    for name, y in lines.items():
        dashes, colour = style(name, list(lines))
        (line,) = ax.plot(x, y, dashes, color=colour, label=name, linewidth=1.4)
        line.set(marker=marker, markersize=3)
        if spread and name in spread:
            ax.fill_between(x, *spread[name], color=colour, alpha=0.15, linewidth=0)
    ax.set_xlabel(xlabel, size=_SIZE)
    ax.set_ylabel(ylabel, size=_SIZE)
    ax.set_title(title, size=_SIZE + 1)
    if legend:
        _legend(ax, ax)


def points(
    ax: Axes,
    values: Mapping[str, tuple[float, float]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> None:
    """One point (x, y) a name, for a legend beside the axes."""
    for name, (x, y) in values.items():
        ax.plot(x, y, "o", color=style(name, list(values))[1], label=name, markersize=5)
    ax.set_xlabel(xlabel, size=_SIZE)
    ax.set_ylabel(ylabel, size=_SIZE)
    ax.set_title(title, size=_SIZE + 1)


def reference(ax: Axes, label: str = "", *, x: float | None = None, y: float | None = None) -> None:
    """A dashed line to compare with, named in the legend where there is room for one."""
    dashed: dict[str, Any] = {"color": "0.6", "linewidth": 0.8, "linestyle": "--", "label": label}
    if x is not None:
        ax.axvline(x, **dashed)
    if y is not None:
        ax.axhline(y, **dashed)
    _legend(ax, ax)


def shared_legend(made: Figure, ax: Axes) -> None:
    """One legend beside all axes, of what is in one of them."""
    _legend(made, ax, loc="outside right center")


def save(made: Figure, folder: Path, name: str) -> str:
    """Write a plot as PNG; its file name."""
    picture.save(made, folder / f"{name}.png")
    return f"{name}.png"


def _legend(
    place: Axes | Figure, ax: Axes, loc: Literal["best", "outside right center"] = "best"
) -> None:
    """Of whatever has a label in `ax`, each label once."""
    handles, labels = ax.get_legend_handles_labels()
    if named := dict(zip(labels, handles, strict=True)):
        keys, values = list(named), list(named.values())
        place.legend(values, keys, loc=loc, fontsize=_SIZE - 1, frameon=False)
