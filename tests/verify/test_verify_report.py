"""Reports: tables, sentences, and pages that need nothing but themselves."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import peer
import pytest
from PIL import Image
from rich.console import Console

from rectgrad_ref.verify import (
    Bundle,
    Certificate,
    Comparison,
    Diagnosis,
    certify,
    compare,
    diagnose,
    report,
)
from rectgrad_ref.verify.conformance import plain

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects what a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.images: list[Image.Image] = []
        self.marked = 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr" and given.get("class") == "first":
            self.marked += 1
        source = given.get("src") or given.get("href") or ""
        head, _, data = source.partition("base64,")
        if head == "data:image/png;":
            self.images.append(Image.open(io.BytesIO(base64.b64decode(data))))
            assert given["alt"]
        elif source:
            self.links.append(source)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def examined(bundle: Bundle, theirs: Any) -> tuple[Comparison, Diagnosis]:
    comparison = compare(bundle, theirs)
    return comparison, diagnose(comparison)


@pytest.fixture(scope="module")
def wrong(bundle: Bundle) -> tuple[Comparison, Diagnosis]:
    return examined(bundle, peer.explain(bundle, trick=False))


@pytest.fixture(scope="module")
def right(bundle: Bundle) -> tuple[Comparison, Diagnosis]:
    return examined(bundle, peer.explain(bundle))


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    return certify(plain(), peer.images(1))


def printed(parts: Any) -> str:
    console = Console(file=io.StringIO(), width=160, highlight=False)
    for part in parts:
        console.print(part)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


# --- comparisons ----------------------------------------------------------------------------------


def test_the_first_difference_is_marked(wrong: tuple[Comparison, Diagnosis]) -> None:
    table = report.layer_table(wrong[0])
    assert table.marked is not None
    assert table.rows[table.marked][:2] == ["conv1.relu", "R_out"]
    assert [row[0] for row in table.rows][-1] == "final map"
    assert Page(report.page(*wrong)).marked == 1


def test_a_map_alone_can_be_the_first_difference(bundle: Bundle) -> None:
    found = examined(bundle, peer.explain(bundle, trick=False)["values"])
    assert report.layer_table(found[0]).marked == 0


def test_nothing_is_marked_where_nothing_differs(right: tuple[Comparison, Diagnosis]) -> None:
    assert report.layer_table(right[0]).marked is None
    assert Page(report.page(*right)).marked == 0


def test_a_page_needs_nothing_else(wrong: tuple[Comparison, Diagnosis]) -> None:
    text = report.page(*wrong)
    page = Page(text)
    assert page.links == []
    assert "http" not in text and "<script" not in text
    assert re.search(r"<title>The implementation differs</title>", text)
    assert "The padding trick is missing." in text


def test_pictures_of_both_maps_and_their_difference(
    bundle: Bundle, wrong: tuple[Comparison, Diagnosis]
) -> None:
    *maps, bar = Page(report.page(*wrong)).images
    assert len(maps) == 3 * len(bundle.inputs)
    assert {image.size for image in maps} == {(8, 8)}
    assert bar.width > bar.height
    reference, theirs, difference = (np.asarray(image, int) for image in maps[:3])
    row = wrong[0].map
    assert row is not None
    # Where both are zero they are white, and red where theirs is larger.
    silent = (row.expected[0].sum(axis=0) == 0) & (row.found[0].sum(axis=0) == 0)
    assert silent.any()
    for picture in (reference, theirs, difference):
        assert (picture[silent] == 255).all()
    change = (row.found[0] - row.expected[0] * row.scale[0]).sum(axis=0)
    y, x = np.unravel_index(change.argmax(), change.shape)
    assert difference[y, x, 0] > difference[y, x, 2]


def test_equal_maps_have_a_white_difference(bundle: Bundle) -> None:
    *maps, _ = Page(report.page(*examined(bundle, bundle.values))).images
    for difference in maps[2::3]:
        assert (np.asarray(difference) > 250).all()


def test_many_images(bundle: Bundle) -> None:
    many = peer.reference(6)
    text = report.page(*examined(many, many.values))
    assert len(Page(text).images) == 4 * 3 + 1
    assert "2 further images not shown" in text


def test_models_without_pictures() -> None:
    from rectgrad_ref.verify.conformance import build

    dense = build("rank")
    text = report.page(*examined(dense, dense.values))
    assert Page(text).images == []


def test_names_are_escaped(bundle: Bundle) -> None:
    given = {"<b>bold": bundle.layers["conv1.relu"].R_out, "values": bundle.values}
    text = report.page(*examined(bundle, given))
    assert "<b>bold" not in text and "&lt;b&gt;bold" in text
    Page(text)


def test_text(wrong: tuple[Comparison, Diagnosis], right: tuple[Comparison, Diagnosis]) -> None:
    text = printed(report.text(*wrong))
    assert "The padding trick is missing." in text
    assert "The first difference is at R_out of conv1.relu." in text
    agreeing = printed(report.text(*right)).splitlines()[-1]
    assert agreeing.startswith("Same conventions")


def test_data_is_plain(wrong: tuple[Comparison, Diagnosis]) -> None:
    found = json.loads(json.dumps(report.as_data(*wrong)))
    assert found["agrees"] is False
    assert found["diagnosis"] == "explained"
    assert len(found["layers"]) == 6
    assert len(found["map"]["scale"]) == 3
    assert {match["by"] for match in found["names"]} == {"name"}


def test_notes_on_the_map(bundle: Bundle) -> None:
    (comparison, diagnosis) = examined(bundle, -3 * bundle.values)
    assert comparison.map is not None
    notes = report.map_notes(comparison.map)
    assert notes[0].startswith("Final map: relative distance 1.3, ")
    assert notes[1:] == [
        "The sign is reversed.", "Theirs is the reference times -3, -3, -3.",
    ]  # fmt: skip
    assert diagnosis.verdict == "agrees"


def test_without_the_model_that_is_said(bundle: Bundle) -> None:
    unknown = replace(bundle, model=None, provenance={**bundle.provenance, "sha256": "0" * 64})
    (sentence,) = report.conclusion(*examined(unknown, bundle.values))
    assert sentence.endswith("for want of the model.")


# --- certificates ---------------------------------------------------------------------------------


def test_a_certificate(certificate: Certificate) -> None:
    text = report.certificate_page(certificate)
    page = Page(text)
    assert (page.links, page.marked) == ([], 0)
    assert "<title>Certificate</title>" in text
    checks = [check for check in certificate.checks if check.verdict == "holds"]
    assert f"All {len(checks)} checks hold" in text
    assert "within rounding of τ" in text
    assert "All " in printed(report.certificate_text(certificate))


def test_a_refused_certificate(certificate: Certificate) -> None:
    first, second, *rest = certificate.checks
    failed = replace(second, verdict="fails", wrong=7)
    refused = replace(certificate, checks=(first, failed, *rest))
    assert not refused.holds
    text = report.certificate_page(refused)
    assert Page(text).marked == 1
    assert "<title>Certificate refused</title>" in text
    head, name, *_ = report.certificate_conclusion(refused)
    assert head.startswith("1 of ") and head.endswith("checks fail.")
    assert name == f"{failed.name} ({failed.where})"


def test_a_certificate_as_data(certificate: Certificate) -> None:
    found = json.loads(json.dumps(report.certificate_data(certificate)))
    assert found["holds"] is True
    assert len(found["checks"]) == len(certificate.checks)
    assert found["environment"]["sha256"] == certificate.environment["sha256"]
    assert [layer["units"] for layer in found["layers"]] == [320, 96, 30]
