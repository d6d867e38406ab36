"""Comparisons and certificates as text and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .certify import Certificate, Check
from .compare import Comparison, MapRow, Row, per_sample
from .diagnose import Diagnosis

if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST_PICTURES = 4
_STRONGEST = 20.0  # times the colours of the maps
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
th:first-child, td:first-child { padding-left: .5rem; min-width: 8rem; overflow-wrap: anywhere; }
tr.first td { background: #ffebe9; }
tr.first td:first-child { box-shadow: inset .2rem 0 #cf222e; }
.exact, .rounding, .holds { color: #1a7f37; } .threshold { color: #9a6700; }
.different, .fails { color: #cf222e; font-weight: 600; } .not { color: #57606a; }
figure { margin: 0; } .maps { display: grid; grid-template-columns: repeat(3, 1fr); gap: .75rem; }
.maps img { width: 100%; border: 1px solid #d8dee4; image-rendering: pixelated; display: block; }
figcaption { font-size: .8rem; color: #57606a; }
.bar { display: flex; align-items: center; gap: .5rem; margin: .75rem 0; font-size: .8rem;
       color: #57606a; } .bar img { width: 14rem; height: .8rem; }
@media print { body { max-width: none; margin: 0; } tr, figure { break-inside: avoid; } }
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
            if comparison.engine is not None
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
    head = ("value", "what", "shape", "verdict", "differing", "near τ", "max|Δ|/max", "allowed")
    title = "Layer by layer, from the logits to the input"
    return _filled(Table(title, head, rows, marked, 3, frozenset({4, 5, 6, 7})))


def name_table(comparison: Comparison) -> Table:
    """How each array of the other side was understood."""
    rows = [
        (m.key, m.name, m.part, m.by, "channels last" if m.transposed else "")
        for m in comparison.matches
    ]
    rows += [(key, "—", "", "no place found: ignored", "") for key in comparison.theirs.ignored]
    return _filled(Table("Names", ("theirs", "ONNX value", "as", "matched by", "axes"), rows))


def convention_table(comparison: Comparison) -> Table:
    """What the reference is, with all its conventions."""
    said = comparison.bundle.provenance
    rows = [(name, str(said[name])) for name in ("model", "sha256", "method", "backend", "forward")]
    rows += [(name, str(value)) for name, value in said["options"].items()]
    return Table("The reference and its conventions", ("", ""), rows)


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
    sub = f"{bundle.provenance['model']}, {counted(len(bundle.inputs), 'image')}, {bundle.dtype}"
    return document(title, sub, parts)


def as_data(comparison: Comparison, diagnosis: Diagnosis) -> dict[str, Any]:
    """The report as plain data."""
    mapped = comparison.map
    return {
        "agrees": comparison.agrees,
        "shared": comparison.engine is not None,
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


def certificate_conclusion(certificate: Certificate) -> list[str]:
    """The finding in sentences."""
    checks = [c for c in certificate.checks if c.verdict in ("holds", "fails")]
    failing = [check for check in checks if check.verdict == "fails"]
    compared = sum(check.count for check in checks)
    near, units = (
        sum(getattr(layer, key) for layer in certificate.layers) for key in ("near", "units")
    )
    head = (
        f"{len(failing)} of {len(checks)} checks fail."
        if failing
        else f"All {len(checks)} checks hold; {compared:,} numbers were compared."
    )
    sensitivity = (
        f"RectGrad at q = 98: {near:,} of {units:,} units lie within float32 rounding of their "
        "thresholds."
    )
    if near:
        sensitivity += (
            f" When each changes sides with probability ½, the map moves by "
            f"{certificate.moves:.2g} of its norm; two correct implementations may differ by that."
        )
    return [head, *(f"{check.name} ({check.where})" for check in failing), sensitivity]


def certificate_tables(certificate: Certificate) -> list[Table]:
    """One table for each group of checks, and one of the sensitivity."""
    groups = dict.fromkeys(check.group for check in certificate.checks)
    head = ("check", "where", "verdict", "compared", "wrong", "largest", "allowed", "note")
    tables = []
    for group in groups:
        checks = [check for check in certificate.checks if check.group == group]
        names = [check.name for check in checks]
        checks.sort(key=lambda check: names.index(check.name))
        marked = next((i for i, c in enumerate(checks) if c.verdict == "fails"), None)
        rows = [_check_cells(check) for check in checks]
        for i in reversed(range(1, len(rows))):
            if rows[i][0] == rows[i - 1][0]:
                rows[i] = ("", *rows[i][1:])
        tables.append(_filled(Table(group, head, rows, marked, 2, frozenset({3, 4, 5, 6}))))
    return [*tables, _sensitivity_table(certificate)]


def _sensitivity_table(certificate: Certificate) -> Table:
    rows = [(s.value, f"{s.units:,}", f"{s.passing:,}", f"{s.near:,}") for s in certificate.layers]
    head = ("layer", "units", "passing", "within rounding of τ")
    title = "Sensitivity of RectGrad at q = 98, from the input to the logits"
    return Table(title, head, rows, numeric=frozenset({1, 2, 3}))


def certificate_text(certificate: Certificate) -> Iterator[RenderableType]:
    """What to print."""
    from rich.text import Text

    for table in certificate_tables(certificate):
        yield from _rich(table)
    colour = "green" if certificate.holds else "red"
    for i, sentence in enumerate(certificate_conclusion(certificate)):
        yield Text(sentence, style=f"bold {colour}" if i == 0 else "")


def certificate_page(certificate: Certificate) -> str:
    """The certificate as one HTML page without links."""
    title = "Certificate" if certificate.holds else "Certificate refused"
    parts = [_verdict(certificate_conclusion(certificate), certificate.holds)]
    parts += [_html(table) for table in certificate_tables(certificate)]
    environment = dict(certificate.environment)
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    model = Path(environment["model"]).name
    sub = f"{model}, SHA-256 {environment['sha256']}; {certificate.images}; {versions}"
    return document(title, sub, parts)


def certificate_data(certificate: Certificate) -> dict[str, Any]:
    """The certificate as plain data."""
    return {"holds": certificate.holds, **asdict(certificate)}


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
    plain, distance = f"{row.plain_distance:.2g}", f"{row.distance:.2g}"
    notes = [f"Final map: relative distance {plain}"]
    if plain != distance:
        notes[0] += f", {distance} with the scale of each sample factored out"
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
    units = "" if row.verdict == "not checked" else f"{row.units:,}"
    verdict = row.verdict if row.verdict != "threshold ties" else f"threshold ties ({row.ties})"
    if row.scale is not None:
        verdict = f"different (× {row.scale:.4g})"
    numbers = ("", "") if row.verdict == "not checked" else _numbers(row.error, row.tolerance)
    shape = "×".join(map(str, row.shape))
    return (
        row.value,
        row.part,
        shape,
        verdict,
        units,
        f"{row.band:,}" if row.band else "",
        *numbers,
    )


def _check_cells(check: Check) -> tuple[str, ...]:
    counts = (f"{check.count:,}", f"{check.wrong:,}") if check.count else ("", "")
    sizes = ("" if v is None else _size(v) for v in (check.largest, check.allowed))
    return (check.name, check.where, check.verdict, *counts, *sizes, check.note)


def _filled(table: Table) -> Table:
    """The table without columns that are empty."""
    kept = [i for i in range(len(table.head)) if any(row[i] for row in table.rows)]
    return replace(
        table,
        head=[table.head[i] for i in kept],
        rows=[[row[i] for i in kept] for row in table.rows],
        verdict=None if table.verdict is None else kept.index(table.verdict),
        numeric=frozenset(n for n, i in enumerate(kept) if i in table.numeric),
    )


def _numbers(error: float, tolerance: float) -> tuple[str, str]:
    return _size(error), _size(tolerance)


def _size(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _map_cells(row: MapRow) -> tuple[str, ...]:
    shape = "×".join(map(str, row.found.shape))
    wrong = int((row.found != row.expected).sum()) if row.verdict == "different" else 0
    return ("final map", "map", shape, row.verdict, f"{wrong:,}", "", _size(row.distance), "")


def _rich(table: Table) -> Iterator[RenderableType]:
    from rich.table import Table as RichTable
    from rich.text import Text

    yield Text(table.title, style="bold")
    shown = RichTable(box=None, pad_edge=False)
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
    both = (row.expected, row.found, row.found - row.expected * scale)
    maps = [_flat(values, comparison) for values in both]
    if maps[0].ndim != 3:
        return ""
    figures = []
    for i, (ours, theirs, difference) in enumerate(zip(*maps, strict=True)):
        if i == _MOST_PICTURES:
            break
        peak, most = _peak(theirs), float(np.abs(difference).max())
        # A small difference is made visible, but rounding is not blown up to a picture.
        stronger = float(np.clip(peak / most, 1, _STRONGEST)) if most else 1.0
        more = f", colours × {stronger:.2g}" if stronger > 1 else ""
        figures += [
            _figure(ours, _peak(ours), f"reference, image {i}"),
            _figure(theirs, peak, f"theirs, image {i}"),
            _figure(difference, peak / stronger, f"theirs − reference{more}"),
        ]
    rest = len(maps[0]) - _MOST_PICTURES
    last = f"<p>{counted(rest, 'further image')} not shown.</p>" if rest > 0 else ""
    scaled = "" if np.allclose(scale, 1) else ", after the reference is brought to their scale"
    bar = _image(np.linspace(-1, 1, 128)[None], 1.0, "colours")
    return (
        "<p>Sums over colour channels, each map in its own scale. "
        f"The difference is in the colours of theirs{scaled}.</p>"
        f"<div class='maps'>{''.join(figures)}</div>"
        f"<div class='bar'>negative {bar} positive</div>{last}"
    )


def _peak(values: np.ndarray) -> float:
    """Where the colours end."""
    return float(np.percentile(np.abs(values), 99.5)) or 1.0


def counted(n: int, noun: str) -> str:
    """The number with its noun, as in "1 image" and "2 images"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _flat(values: np.ndarray, comparison: Comparison) -> np.ndarray:
    layout = str(comparison.bundle.provenance.get("layout") or "NCHW")
    return values.sum(axis=layout.index("C")) if values.ndim == 4 else values


def _figure(values: np.ndarray, peak: float, caption: str) -> str:
    image = _image(values, peak, caption)
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _image(values: np.ndarray, peak: float, text: str) -> str:
    """A picture inside the page, in colours from −peak to +peak."""
    from PIL import Image

    from ..picture import render

    # A cell of ± peak fixes the colours; it is cut off again.
    framed = np.vstack([np.clip(values, -peak, peak), np.full((1, values.shape[1]), peak)])
    buffer = io.BytesIO()
    Image.fromarray(render(framed)[:-1]).save(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(text)}' src='data:image/png;base64,{data}'>"
