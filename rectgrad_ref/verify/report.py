"""Comparisons and certificates as text and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .compare import Comparison, MapRow, Row, per_sample
from .diagnose import Diagnosis

if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST_PICTURES = 4
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 "DejaVu Sans", "Segoe UI", Helvetica, Arial, sans-serif; color: #1b1f24;
       max-width: 60rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.sub { color: #57606a; margin: 0 0 1rem; overflow-wrap: anywhere; }
.verdict { border-left: .3rem solid; padding: .6rem 1rem; margin: 1rem 0; background: #f6f8fa; }
.verdict p { margin: .25rem 0; } .good { border-color: #1a7f37; } .bad { border-color: #cf222e; }
.verdict p:first-child { font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; width: 100%; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #d8dee4;
         vertical-align: top; }
th { font-weight: 600; color: #57606a; } td.n, th.n { text-align: right; white-space: nowrap; }
td:first-child { overflow-wrap: anywhere; }
tr.first td { background: #ffebe9; } tr.first td:first-child { box-shadow: inset .2rem 0 #cf222e; }
.exact, .rounding, .holds { color: #1a7f37; } .threshold { color: #9a6700; }
.different, .fails { color: #cf222e; font-weight: 600; } .not { color: #57606a; }
figure { margin: 0; } .maps { display: grid; grid-template-columns: repeat(3, 1fr); gap: .75rem; }
.maps img { width: 100%; border: 1px solid #d8dee4; image-rendering: pixelated; display: block; }
figcaption { font-size: .8rem; color: #57606a; }
"""


@dataclass(frozen=True)
class Table:
    """A table to print and to show.

    Attributes
    ----------
    title : str
    head : sequence of str
    rows : sequence of sequence of str
    marked : int or None
        Index of the row that is highlighted.
    verdict : int or None
        Index of the column that is coloured by its first word.
    numeric : frozenset of int
        Columns that are aligned to the right.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int | None = None
    verdict: int | None = None
    numeric: frozenset[int] = frozenset()


def conclusion(comparison: Comparison, diagnosis: Diagnosis) -> list[str]:
    """The finding in sentences."""
    if comparison.agrees and diagnosis.verdict == "agrees":
        shared = (
            ""
            if comparison.shared
            else (" Linear steps were compared with the stored values only, for want of the model.")
        )
        return [f"{diagnosis.sentences[0]}{shared}"]
    return list(diagnosis.sentences)


def layer_table(comparison: Comparison) -> Table:
    """A row for each value of the network, from the logits to the input."""
    rows = [_layer_cells(row) for row in comparison.rows]
    marked = next((i for i, r in enumerate(comparison.rows) if r.verdict == "different"), None)
    if comparison.map is not None:
        if marked is None and comparison.map.verdict == "different":
            marked = len(rows)
        rows.append(_map_cells(comparison.map))
    head = ("value", "what", "shape", "verdict", "units", "near τ", "max|Δ|/max", "allowed")
    return Table(
        "Layer by layer, from the logits to the input",
        head,
        rows,
        marked,
        3,
        frozenset({4, 5, 6, 7}),
    )


def name_table(comparison: Comparison) -> Table:
    """How each array of the other side was understood."""
    rows = [
        (m.key, m.name, m.part, m.by, "channels last" if m.transposed else "")
        for m in comparison.matches
    ]
    rows += [(key, "—", "", "no place found: ignored", "") for key in comparison.theirs.ignored]
    return Table("Names", ("theirs", "ONNX value", "as", "matched by", "axes"), rows)


def convention_table(comparison: Comparison) -> Table:
    """The conventions of the reference."""
    options = comparison.bundle.provenance["options"]
    return Table(
        "Conventions of the reference",
        ("option", "value"),
        [(name, str(value)) for name, value in options.items()],
    )


def text(comparison: Comparison, diagnosis: Diagnosis) -> Iterator[RenderableType]:
    """What to print."""
    from rich.text import Text

    if any(m.by != "name" or m.transposed for m in comparison.matches) or comparison.theirs.ignored:
        yield from _rich(name_table(comparison))
    yield from _rich(layer_table(comparison))
    if comparison.map is not None:
        yield from (Text(note) for note in map_notes(comparison.map))
    colour = "green" if comparison.agrees else "red"
    for i, sentence in enumerate(conclusion(comparison, diagnosis)):
        yield Text(sentence, style=f"bold {colour}" if i == 0 else "")


def page(comparison: Comparison, diagnosis: Diagnosis) -> str:
    """The report as one HTML page without links."""
    bundle = comparison.bundle
    title = "The implementation agrees" if comparison.agrees else "The implementation differs"
    sentences = conclusion(comparison, diagnosis)
    parts = [_verdict(sentences, comparison.agrees), _html(layer_table(comparison))]
    if comparison.map is not None:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in map_notes(comparison.map))
        parts.append(f"<h2>The final map</h2>{notes}{_pictures(comparison)}")
    parts += [_html(name_table(comparison)), _html(convention_table(comparison))]
    sub = (
        f"{bundle.name}: {bundle.provenance['model']}, SHA-256 {bundle.sha256}; "
        f"{len(bundle.inputs)} images, {bundle.dtype}"
    )
    return document(title, sub, parts)


def as_data(comparison: Comparison, diagnosis: Diagnosis) -> dict[str, Any]:
    """The report as plain data."""
    mapped = comparison.map
    return {
        "agrees": comparison.agrees,
        "shared": comparison.shared,
        "first_difference": comparison.first_difference,
        "diagnosis": diagnosis.verdict,
        "deviations": [{"id": d.id, "sentence": d.sentence} for d in diagnosis.deviations],
        "alternatives": [[d.id for d in option] for option in diagnosis.alternatives],
        "sentences": conclusion(comparison, diagnosis),
        "layers": [asdict(row) for row in comparison.rows],
        "map": None
        if mapped is None
        else {
            "verdict": mapped.verdict,
            "distance": mapped.distance,
            "plain_distance": mapped.plain_distance,
            "scale": mapped.scale.tolist(),
            "border": mapped.border,
            "moves": mapped.moves,
            "notes": list(mapped.notes),
        },
        "names": [asdict(match) for match in comparison.matches],
        "ignored": list(comparison.theirs.ignored),
    }


def document(title: str, subtitle: str, parts: Sequence[str]) -> str:
    """A page around `parts`, which are HTML."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p class='sub'>{html.escape(subtitle)}</p>"
        f"{''.join(parts)}</body></html>\n"
    )


def map_notes(row: MapRow) -> list[str]:
    """What is known of the final map besides its verdict."""
    notes = [f"Final map: relative distance {row.plain_distance:.2g}"]
    if abs(row.plain_distance - row.distance) > 1e-3 * row.plain_distance:
        notes[0] += f", {row.distance:.2g} with the scale of each sample factored out"
    notes[0] += "."
    if row.border is not None:
        notes.append(f"The maps agree without the outermost {row.border} cells of every border.")
    if row.moves:
        notes.append(
            f"Units within rounding of their thresholds may move it by {row.moves:.2g}, when each "
            "changes sides with probability ½."
        )
    return notes + [f"{note[0].upper()}{note[1:]}." for note in row.notes]


def _layer_cells(row: Row) -> tuple[str, ...]:
    units = "" if row.verdict == "not checked" else str(row.units)
    verdict = row.verdict if row.verdict != "threshold ties" else f"threshold ties ({row.ties})"
    if row.scale is not None:
        verdict = f"different (× {row.scale:.4g})"
    numbers = ("", "") if row.verdict == "not checked" else _numbers(row.error, row.tolerance)
    shape = "×".join(map(str, row.shape))
    return (row.value, row.part, shape, verdict, units, str(row.band or ""), *numbers)


def _numbers(error: float, tolerance: float) -> tuple[str, str]:
    return f"{error:.1e}" if error else "0", f"{tolerance:.1e}" if tolerance else "0"


def _map_cells(row: MapRow) -> tuple[str, ...]:
    shape = "×".join(map(str, row.found.shape))
    wrong = int((row.found != row.expected).sum()) if row.verdict == "different" else 0
    return ("final map", "map", shape, row.verdict, str(wrong), "", f"{row.distance:.1e}", "")


def _rich(table: Table) -> Iterator[RenderableType]:
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=table.title, title_justify="left", box=None, pad_edge=False)
    for i, head in enumerate(table.head):
        shown.add_column(head, justify="right" if i in table.numeric else "left")
    for i, row in enumerate(table.rows):
        style = "bold red" if i == table.marked else ""
        shown.add_row(*(Text(cell) for cell in row), style=style)
    yield shown
    yield Text("")


def _html(table: Table) -> str:
    def cell(tag: str, i: int, content: str, colour: str = "") -> str:
        classes = " ".join(filter(None, ("n" if i in table.numeric else "", colour)))
        return f"<{tag}{f' class={classes!r}' if classes else ''}>{html.escape(content)}</{tag}>"

    head = "".join(cell("th", i, h) for i, h in enumerate(table.head))
    body = ""
    for r, row in enumerate(table.rows):
        cells = "".join(
            cell("td", i, c, (c.split() or [""])[0] if i == table.verdict else "")
            for i, c in enumerate(row)
        )
        body += f"<tr{' class=first' if r == table.marked else ''}>{cells}</tr>"
    return (
        f"<h2>{html.escape(table.title)}</h2><div class='scroll'><table><thead><tr>{head}</tr>"
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _verdict(sentences: Sequence[str], good: bool) -> str:
    body = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)
    return f"<div class='verdict {'good' if good else 'bad'}'>{body}</div>"


def _pictures(comparison: Comparison) -> str:
    """Reference, theirs and their difference, for the first images."""
    row = comparison.map
    assert row is not None
    scale = per_sample(row.scale, row.expected)
    maps = [_flat(v, comparison) for v in (row.expected * scale, row.found)]
    if maps[0].ndim != 3:
        return ""
    figures = []
    for i in range(min(len(maps[0]), _MOST_PICTURES)):
        ours, theirs = maps[0][i], maps[1][i]
        peak = np.percentile(np.abs([ours, theirs]), 99.5) or 1.0
        for caption, values in (
            (f"reference, image {i}", ours),
            ("theirs", theirs),
            ("theirs − reference", theirs - ours),
        ):
            figures.append(_figure(values, peak, caption))
    rest = len(maps[0]) - _MOST_PICTURES
    more = f"<p>{rest} further images are not shown.</p>" if rest > 0 else ""
    scaled = "" if np.allclose(scale, 1) else ", the reference brought to the scale of theirs"
    return (
        f"<p>Sum over colour channels; one scale for each image{scaled}; blue − white 0 red +.</p>"
        f"<div class='maps'>{''.join(figures)}</div>{more}"
    )


def _flat(values: np.ndarray, comparison: Comparison) -> np.ndarray:
    layout = str(comparison.bundle.provenance.get("layout") or "NCHW")
    return values.sum(axis=layout.index("C")) if values.ndim == 4 else values


def _figure(values: np.ndarray, peak: float, caption: str) -> str:
    from PIL import Image

    from ..picture import render

    # A cell of ± peak fixes the colours; it is cut off again.
    framed = np.vstack([np.clip(values, -peak, peak), np.full((1, values.shape[1]), peak)])
    buffer = io.BytesIO()
    Image.fromarray(render(framed)[:-1]).save(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<figure><img alt='{html.escape(caption)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
