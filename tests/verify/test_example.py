"""The PyTorch example: the right one agrees, and each mistake is called by its name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "verify"))

import pytorch_rectgrad as example

from rectgrad_ref.verify import Bundle, compare, diagnose
from rectgrad_ref.verify.adapters import from_torch
from rectgrad_ref.verify.compare import engine_of
from rectgrad_ref.verify.engine import Engine


@pytest.fixture(scope="module")
def reference() -> Bundle:
    return example.reference()


@pytest.fixture(scope="module")
def engine(reference: Bundle) -> Engine | None:
    return engine_of(reference)


QUICK = ("correct", "hooks that never fire")


@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in example.IMPLEMENTATIONS
            if n not in QUICK
        ),
    ],
)
def test_implementations(reference: Bundle, engine: Engine | None, name: str) -> None:
    make, expected = example.IMPLEMENTATIONS[name]
    model, attribute = make()
    comparison = compare(reference, from_torch(attribute, reference, model), engine)
    found = diagnose(comparison)
    if expected is None:
        assert comparison.agrees
        assert found.verdict == "agrees"
        return
    assert not comparison.agrees
    assert found.verdict == "explained"
    assert expected in {deviation.id for deviation in found.deviations}


@pytest.mark.slow
def test_the_script(capsys: Any) -> None:
    example.main(["no × input"])
    assert "\nno × input: differs\n  × input is missing" in capsys.readouterr().out
