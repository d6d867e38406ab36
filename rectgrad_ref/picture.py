"""Pictures of attribution maps: cap and colour one map, lay out many as a figure, write a file.

Every figure is a `matplotlib.figure.Figure` made without pyplot, so it needs no display and no
backend, and may be made in any thread.

References
----------
Kim et al., "Why are Saliency Maps Noisy? Cause of and Solution to Noisy Saliency Maps", ICCV
Workshops 2019: appendix F.1 (capping), figures 1, 4, 5, 6 and 14 (layouts).
"""

from __future__ import annotations

import os
import re
import threading
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InvalidImage, OutputError
from .files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .attribution import Attribution

RGB = NDArray[np.uint8]

# From the most negative to the most positive. Both sides have the same CIE lightness (28, 40, 52
# … 100), so that neither sign looks stronger than the other.
_ANCHORS = (
    "003c96", "0156cf", "1e75fe", "5e9afe", "95bdff", "cadeff", "ffffff",
    "ffd3cd", "ffa398", "ff6c60", "f90314", "c0010f", "8a0009",
)  # fmt: skip

_FORMATS = (".png", ".pdf", ".svg")
_DPI = 300
_SMALL = 64  # pixels a side up to which an image is enlarged without smoothing

# Lengths are in inches, font sizes in points.
_FONT = "DejaVu Sans"  # comes with matplotlib, so that measured widths hold on every machine
_SIZES = (8.0, 7.0, 6.0)  # the largest at which the column heads fit
_LINE = 1.1 / 72  # height of a line, per point of font size
_LINES = 3
_PAGE = (7.2, 9.0)
_PANEL = (0.8, 1.6)
_COLUMNS = 7  # panels that fit across a page beside their label
_MARGIN = _GAP = 0.06
_SIDE = 1.0
_FOOT = 0.5
_BAR = (1.5, 0.08)

_saving = threading.Lock()  # matplotlib's settings are global


def cap(heatmap: ArrayLike, low: float = 0.5, high: float = 99.5) -> NDArray[np.float64]:
    """Cap the outlying values of each map at two of its own percentiles.

    Values above the `high`-th percentile become that percentile. Values below the `low`-th
    percentile become that percentile where it is negative or zero, and 0 where it is positive,
    so that a high `low` leaves a sparse map.

    Parameters
    ----------
    heatmap : array_like, shape (N, H, W)
        Attributions, summed over the colour channels.
    low, high : float
        Percentiles, 0 ≤ low ≤ high ≤ 100, interpolated linearly (NumPy's default) in float64.

    Returns
    -------
    numpy.ndarray, shape (N, H, W), float64

    Raises
    ------
    InvalidImage
        `heatmap` is not (N, H, W), or holds NaN or infinite values.
    ValueError
        The percentiles are out of range or out of order.

    References
    ----------
    Kim et al. 2019, appendix F.1; the rule for a positive low percentile is that of the authors'
    code.

    Examples
    --------
    >>> cap([[[-8.0, 1.0, 2.0, 3.0, 9.0]]], low=25, high=75)
    array([[[0., 1., 2., 3., 3.]]])
    >>> cap([[[-8.0, -1.0, 2.0, 3.0, 9.0]]], low=25, high=75)
    array([[[-1., -1.,  2.,  3.,  3.]]])
    """
    maps = _finite(heatmap, "NHW")
    if not 0 <= low <= high <= 100:
        raise ValueError(f"percentiles must satisfy 0 ≤ low ≤ high ≤ 100, got {low} and {high}")
    bottom, top = np.percentile(maps, (low, high), axis=(1, 2), keepdims=True)
    return np.where(maps < bottom, np.minimum(bottom, 0.0), np.minimum(maps, top))


def sparsify(heatmap: ArrayLike, p: float = 95.0) -> NDArray[np.float64]:
    """Cap each map low at its `p`-th percentile, for a baseline as sparse as RectGrad.

    Parameters
    ----------
    heatmap : array_like, shape (N, H, W)
        Attributions, summed over the colour channels.
    p : float
        Percentile, 0 to 100; 95 in the paper.

    Returns
    -------
    numpy.ndarray, shape (N, H, W), float64

    Raises
    ------
    InvalidImage, ValueError
        As `cap`.

    References
    ----------
    Kim et al. 2019, section 5.2 and figures 5, 15, 16.
    """
    return cap(heatmap, low=p, high=100.0)


def render(heatmap: ArrayLike) -> RGB:
    """Colour one map: blue below zero, white at zero, red above, on a scale symmetric around 0.

    Parameters
    ----------
    heatmap : array_like, shape (H, W)
        One map, usually capped. Its largest absolute value gets the darkest colour; a map of
        zeros is white.

    Returns
    -------
    numpy.ndarray, shape (H, W, 3), uint8

    Raises
    ------
    InvalidImage
        `heatmap` is not (H, W), or holds NaN or infinite values.
    """
    colours = _colours()
    middle = len(colours) // 2
    return colours[middle + np.rint(_unit(heatmap) * middle).astype(int)]


def overlay(attribution: Attribution) -> Figure:
    """Draw each image, its map, and the map over the image in faded grey.

    Parameters
    ----------
    attribution : Attribution
        N samples, one row each. Without `attribution.pictures` only the map is drawn.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InvalidImage
        A map holds NaN or infinite values, or a picture has another size than its map.
    """
    maps = cap(attribution.heatmap())
    rows: list[list[RGB]] = [[render(heatmap)] for heatmap in maps]
    heads = [attribution.method.title]
    if attribution.pictures is not None:
        for row, picture, heatmap in zip(rows, attribution.pictures, maps, strict=True):
            row.insert(0, picture)
            row.append(_blend(picture, heatmap))
        heads = ["Image", *heads, "Overlay"]
    return _grid(rows, [heads], _class_labels(attribution))


def side_by_side(attributions: Sequence[Attribution], *, sparsify: float | None = None) -> Figure:
    """Compare methods: one row an image, one column a method (figures 1 and 5).

    Many methods on a single image wrap into several rows.

    Parameters
    ----------
    attributions : sequence of Attribution
        One a method, all of the same N images and targets.
    sparsify : float, optional
        Percentile at which the maps of the baselines (all methods but RectGrad) are capped low,
        see the function of that name; 95 in the paper.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        `attributions` is empty, or they differ in the number of images or in the targets.
    InvalidImage
        A map holds NaN or infinite values.
    """
    maps = [_heatmap(attribution, sparsify) for attribution in attributions]
    return _comparison(attributions, maps, [a.method.title for a in attributions])


def threshold_sweep(attributions: Sequence[Attribution], labels: Sequence[str]) -> Figure:
    """Compare thresholds of one method: one row an image, one column a threshold (figure 4).

    Parameters
    ----------
    attributions : sequence of Attribution
        One a threshold, all of the same N images and targets.
    labels : sequence of str
        Column heads, such as ``["τ = 0", "q = 0", "q = 10", …]``.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        As `side_by_side`, or there is not one label for each attribution.
    InvalidImage
        A map holds NaN or infinite values.
    """
    if len(labels) != len(attributions):
        raise ValueError(f"got {len(labels)} labels for {len(attributions)} attributions")
    return _comparison(attributions, [a.heatmap() for a in attributions], labels)


def layer_strip(
    attributions: Sequence[Attribution],
    *,
    sample: int = 0,
    times_activation: bool = True,
    columns: int = 8,
) -> Figure:
    """Follow attributions from the logits (right) to the input (left) (figures 6 and 14).

    Each map is the mean over channels of a·R at one layer: its activation times the gradient
    that arrives there. The first column is the map of the input itself.

    Parameters
    ----------
    attributions : sequence of Attribution
        One row a method, made with ``trace=True``, all of the same images and targets.
    sample : int
        Index of the image.
    times_activation : bool
        False for the mean of R.
    columns : int
        The most layers shown. Among more than that with a spatial map, an even selection that
        keeps the first and the last; the foot of the figure says how many there are.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        As `side_by_side`, or no layer that all the methods traced has a spatial map.
    InvalidImage
        A map holds NaN or infinite values.
    """
    _check_comparable(attributions)
    traces = [attribution.layers() for attribution in attributions]
    spatial = [
        name
        for name, layer in traces[0].items()
        if layer.a.ndim == 4 and layer.a[0, 0].size > 1 and all(name in trace for trace in traces)
    ]
    if not spatial:
        raise ValueError("no layer with a spatial map (N, C, h, w) is in all the traces")
    chosen = [spatial[i] for i in _evenly(len(spatial), columns)]
    rows: list[list[RGB | None]] = []
    for attribution, trace in zip(attributions, traces, strict=True):
        maps = [attribution.heatmap()[sample]]
        for name in chosen:
            value = trace[name].R_out[sample]
            if times_activation:
                value = trace[name].a[sample] * value
            maps.append(value.mean(axis=0, dtype=np.float64))
        rows.append([render(cap(heatmap[None])[0]) for heatmap in maps])
    heads = ["Input"]
    for name in chosen:
        node = re.sub(r"(_output_0|:0)$", "", name)  # exporters' marks for a node's first output
        heads.append(f"{node}\n{'×'.join(map(str, traces[0][name].a.shape[1:]))}")
    first = attributions[0]
    if first.pictures is not None:
        heads.insert(0, _class_labels(first)[sample])
        for i, row in enumerate(rows):
            row.insert(0, first.pictures[sample] if i == 0 else None)
    note = (
        f"{len(chosen)} of {len(spatial)} layers with a map, from the input (left) to the logits "
        f"(right): mean of {'a·R' if times_activation else 'R'} over channels"
    )
    return _grid(rows, [heads], [a.method.title for a in attributions], note)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure for print: 300 dots an inch, embedded TrueType fonts.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : str or path-like
        Ends in .png, .pdf or .svg. Replaced whole or not at all.

    Raises
    ------
    OutputError
        Another suffix, or the folder cannot be written to.
    """
    import matplotlib

    suffix = _suffix(path, _FORMATS)
    # Publishers refuse the Type 3 fonts that matplotlib writes by default. The dates and salts
    # are fixed so that the same figure gives the same file.
    metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(suffix)
    settings = matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "rectgrad"})
    with atomic_write(path) as temporary, _saving, settings:
        figure.savefig(temporary, format=suffix[1:], dpi=_DPI, facecolor="white", metadata=metadata)


def save_map(heatmap: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write one coloured map as a PNG of exactly its own size, one pixel a value.

    Parameters
    ----------
    heatmap : array_like, shape (H, W)
        One map, coloured as by `render`.
    path : str or path-like
        Ends in .png. Replaced whole or not at all.

    Raises
    ------
    InvalidImage
        As `render`.
    OutputError
        Another suffix, or the folder cannot be written to.
    """
    from PIL import Image

    _suffix(path, (".png",))
    image = Image.fromarray(render(heatmap))
    with atomic_write(path) as temporary:
        image.save(temporary, format="png")


def _suffix(path: str | os.PathLike[str], known: Sequence[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in known:
        raise OutputError(f"cannot write {Path(path)}: the suffix must be {' or '.join(known)}")
    return suffix


def _finite(heatmap: ArrayLike, axes: str) -> NDArray[np.float64]:
    """`heatmap` in float64, checked to have one axis for each letter and no NaN or infinity."""
    values = np.asarray(heatmap, dtype=np.float64)
    if values.ndim != len(axes) or values.size == 0:
        raise InvalidImage(f"a heat map must have shape ({', '.join(axes)}), got {values.shape}")
    if not np.isfinite(values).all():
        raise InvalidImage("the heat map holds NaN or infinite values, so it has no picture")
    return values


def _unit(heatmap: ArrayLike) -> NDArray[np.float64]:
    """One map divided by its largest absolute value; zeros stay zeros."""
    values = _finite(heatmap, "HW")
    peak = np.abs(values).max()
    return values / peak if peak > 0 else values


@cache
def _colours() -> RGB:
    """The scale of 257 colours, an odd number so that zero has one of its own: white."""
    anchors = np.array([list(bytes.fromhex(colour)) for colour in _ANCHORS])
    at = np.linspace(0, len(anchors) - 1, 257)
    channels = [np.interp(at, np.arange(len(anchors)), channel) for channel in anchors.T]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _blend(picture: RGB, heatmap: NDArray[np.float64]) -> RGB:
    """Colour a map and multiply it with the picture in faded grey, so that zeros leave it bare."""
    if picture.shape[:2] != heatmap.shape:
        raise InvalidImage(
            f"a picture of {picture.shape[:2]} pixels does not fit a map of {heatmap.shape}"
        )
    grey = picture @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    faded = 0.65 + 0.35 * grey / 255
    return np.rint(render(heatmap) * faded[..., None]).astype(np.uint8)


def _check_comparable(attributions: Sequence[Attribution]) -> None:
    if not attributions:
        raise ValueError("there is no attribution to draw")
    first = attributions[0]
    for other in attributions[1:]:
        if not np.array_equal(first.target, other.target):
            raise ValueError(
                f"attributions side by side need the same images and targets; "
                f"{first.method.title} has targets {first.target}, "
                f"{other.method.title} has {other.target}"
            )


def _heatmap(attribution: Attribution, p: float | None) -> NDArray[np.floating]:
    """Its heat maps, made sparse with percentile `p` if they are a baseline's."""
    if p is None or attribution.method.id == "rectgrad":
        return attribution.heatmap()
    return sparsify(attribution.heatmap(), p)


def _comparison(
    attributions: Sequence[Attribution],
    heatmaps: Sequence[NDArray[np.floating]],
    labels: Sequence[str],
) -> Figure:
    """Images and their maps: one row an image, one column an attribution."""
    _check_comparable(attributions)
    first = attributions[0]
    columns = [[render(heatmap) for heatmap in cap(maps)] for maps in heatmaps]
    if len(first.target) == 1:
        return _wrapped([column[0] for column in columns], labels, first)
    heads = list(labels)
    if first.pictures is not None:
        columns.insert(0, list(first.pictures))
        heads.insert(0, "Image")
    rows = [list(row) for row in zip(*columns, strict=True)]
    return _grid(rows, [heads], _class_labels(first))


def _wrapped(maps: Sequence[RGB], labels: Sequence[str], attribution: Attribution) -> Figure:
    """One image and its maps in as many rows of equal length as the page needs, the image first."""
    image = [] if attribution.pictures is None else [attribution.pictures[0]]
    lines = -(-len(maps) // (_COLUMNS - len(image)))
    length = -(-len(maps) // lines)
    rows: list[list[RGB | None]] = []
    heads: list[list[str]] = []
    for start in range(0, len(maps), length):
        part = slice(start, start + length)
        rows.append([*(image if start == 0 else [None] * len(image)), *maps[part]])
        heads.append([*(["Image" if start == 0 else ""] * len(image)), *labels[part]])
    return _grid(rows, heads, [*_class_labels(attribution), *[""] * (lines - 1)])


def _class_labels(attribution: Attribution) -> list[str]:
    """Name (its first synonym) and probability of each sample's target, on two lines."""
    labels = []
    for target, score in zip(attribution.target, attribution.probabilities, strict=True):
        names = attribution.class_names
        name = " ".join(names[target].split(",")[0].split()) if names else f"class {target}"
        percent = 100 * score[target]
        labels.append(f"{name}\n{'< 0.1' if percent < 0.1 else f'{percent:.1f}'} %")
    return labels


def _evenly(count: int, limit: int) -> list[int]:
    """At most `limit` of the indices 0 … count − 1, evenly spaced, both ends among them."""
    return [round(i) for i in np.linspace(0, count - 1, min(count, limit))]


def _grid(
    rows: Sequence[Sequence[RGB | None]],
    heads: Sequence[Sequence[str]],
    sides: Sequence[str],
    note: str = "",
) -> Figure:
    """Lay out images in rows and columns, with heads, row labels and one colour bar.

    The heads are a list for each row that has some, from the first; usually it alone. Every
    position follows from measured text, so that nothing overlaps.
    """
    count = len(rows[0])
    pixels = next(cell for cell in rows[0] if cell is not None)
    aspect = pixels.shape[0] / pixels.shape[1]
    fitting = min(_PAGE[0] / count, _PAGE[1] / len(rows) / aspect)
    across = min(max(fitting, _PANEL[0]), _PANEL[1])
    down = across * aspect
    for size in _SIZES:
        wrapped = [[_wrap(head, across, size) for head in line] for line in heads]
        if not any("…" in head for line in wrapped for head in line):
            break
    sides = [_wrap(side, _SIDE, size) for side in sides]
    left = _MARGIN + max(_width(line, size) for side in sides for line in side.split("\n"))
    columns = [left + _GAP + j * (_GAP + across) for j in range(count)]
    tops: list[float] = []
    bottom = _MARGIN
    for i in range(len(rows)):
        lines = max((h.count("\n") + 1 for h in wrapped[i]), default=0) if i < len(heads) else 0
        tops.append(bottom + lines * size * _LINE + _GAP * (2 if lines and i else 1))
        bottom = tops[-1] + down
    right = left + count * (_GAP + across)
    page = _Page(right + _MARGIN, bottom + _FOOT)
    for top, line in zip(tops, wrapped, strict=False):
        for x, head in zip(columns, line, strict=False):
            page.text(x + across / 2, top - _GAP, head, size, ha="center", va="baseline")
    for j, x in enumerate(columns):
        for top, row in zip(tops, rows, strict=True):
            if j < len(row) and (cell := row[j]) is not None:
                page.image(x, top, across, down, cell)
    for top, side in zip(tops, sides, strict=True):
        page.text(left, top + down / 2, side, size, ha="right", va="center")

    bar = min(_BAR[0], right - left - _GAP)
    page.colour_bar(right - bar, bottom + _GAP, bar, _BAR[1])
    scale = "each map on its own scale"
    page.text(right, bottom + _FOOT - _GAP, scale, _SIZES[-1], ha="right", va="bottom")
    note = _wrap(note, right - bar - left - 3 * _GAP, _SIZES[-1])
    page.text(left + _GAP, bottom + _GAP, note, _SIZES[-1], ha="left", va="top")
    return page.figure


class _Page:
    """A figure on which things are placed in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor="white")

    def text(self, x: float, y: float, content: str, size: float, *, ha: str, va: str) -> None:
        if not content:
            return
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            content,
            ha=ha,
            va=va,
            size=size,
            family=_FONT,
            color="black",
            linespacing=1.05,
            parse_math=False,
        )

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        box = (x / self.width, 1 - (y + height) / self.height)
        axes = self.figure.add_axes((*box, width / self.width, height / self.height))
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set(linewidth=0.4, color="0.6")
        return axes

    def image(self, x: float, y: float, width: float, height: float, pixels: RGB) -> None:
        """Draw pixels, crisp where they are few."""
        axes = self.axes(x, y, width, height)
        smooth = max(pixels.shape[:2]) > _SMALL
        axes.imshow(pixels, interpolation="antialiased" if smooth else "nearest")
        axes.set(xticks=[], yticks=[])

    def colour_bar(self, x: float, y: float, width: float, height: float) -> None:
        colours = _colours()
        axes = self.axes(x, y, width, height)
        axes.imshow(colours[None], aspect="auto", interpolation="nearest")
        axes.set(yticks=[])
        ends = len(colours) - 1
        axes.set_xticks([0, ends / 2, ends], ["−max", "0", "+max"])
        for label, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
            label.set(ha=side, family=_FONT, color="black")
        axes.tick_params(labelsize=_SIZES[-1], length=2, width=0.4, pad=1.5, color="0.6")


def _wrap(text: str, width: float, size: float) -> str:
    """Break each paragraph into lines of at most `width`, leaving out its middle if it is long."""
    return "\n".join(_fit(paragraph, width, size) for paragraph in text.split("\n"))


def _fit(text: str, width: float, size: float) -> str:
    def fits(removed: int) -> bool:
        lines = _fill(_elide(text, removed), width, size)
        return len(lines) <= _LINES and all(_width(line, size) <= width for line in lines)

    fewest = bisect_left(range(len(text)), True, key=fits)
    return "\n".join(_fill(_elide(text, fewest), width, size))


def _elide(text: str, removed: int) -> str:
    """Replace that many characters in the middle by an ellipsis."""
    kept = len(text) - removed
    return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}" if removed else text


def _fill(text: str, width: float, size: float) -> list[str]:
    """Break a text into lines at white space, hyphens and the joints of layer names.

    A part that cannot be broken may be wider than `width`.
    """
    lines = [""]
    for part in re.split(r"(?=[\s/_.:…])|(?<=-)", text):
        if lines[-1] and _width(lines[-1] + part, size) > width:
            lines.append("")
        lines[-1] += part if lines[-1] else part.lstrip()
    return lines


def _width(text: str, size: float) -> float:
    """Width of a line in inches."""
    return _points(text) * size / 72


@lru_cache(maxsize=4096)
def _points(text: str) -> float:
    """Width of a line in points, per point of font size."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=_FONT, size=1)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]
