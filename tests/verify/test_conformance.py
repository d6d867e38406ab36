"""The bundles in the package: they are what today's code makes, and each isolates something."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from rectgrad_ref import Explainer
from rectgrad_ref.methods import RectGrad
from rectgrad_ref.verify import Bundle, compare, load
from rectgrad_ref.verify.conformance import (
    CASES,
    FOLDER,
    build,
    bundle_paths,
    cifar10_cnn,
    main,
)

NAMES = [*CASES, "cifar10_cnn"]
UNIT = 2.0**-24


def made(name: str) -> Bundle:
    return cifar10_cnn() if name == "cifar10_cnn" else build(name)


def test_all_of_them_are_there() -> None:
    assert [path.stem for path in bundle_paths()] == sorted(NAMES)
    assert sum(path.stat().st_size for path in bundle_paths()) < 500_000


@pytest.mark.parametrize("name", NAMES)
def test_they_are_reproducible(name: str) -> None:
    """Bit by bit where sums are short; BLAS may sum a large one in another order elsewhere."""
    stored, again = load(FOLDER / f"{name}.npz"), made(name)
    assert stored.model == again.model
    assert stored.method == again.method
    for key in ("about", "sha256", "shape", "layers", "input", "output"):
        assert stored.provenance[key] == again.provenance[key], key
    np.testing.assert_array_equal(stored.inputs, again.inputs)
    np.testing.assert_array_equal(stored.target, again.target)
    pairs = [(stored.values, again.values)]
    for layer, other in zip(stored.layers.values(), again.layers.values(), strict=True):
        np.testing.assert_array_equal(layer.mask, other.mask)
        pairs += [(layer.a, other.a), (layer.R_out, other.R_out), (layer.tau, other.tau)]  # type: ignore[list-item]
    for one, other in pairs:
        assert np.abs(one - other).max() <= 16 * UNIT * np.abs(other).max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_both_backends_agree_with_them(name: str, backend: str) -> None:
    if backend == "cpu":
        pytest.importorskip("onnxruntime")
    stored = load(FOLDER / f"{name}.npz")
    model = stored.open_model()
    assert model is not None
    explainer = Explainer(model.path or model.proto, backend=backend, dtype="float32")
    options = {"method": stored.method, "target": stored.target, "trace": True}
    result = explainer.explain(stored.inputs, **options)
    given: dict[str, Any] = {"values": result.values}
    for layer, found in result.layers().items():
        given |= {f"{layer}/{part}": getattr(found, part) for part in ("a", "R_out", "R_in")}
    assert compare(stored, given).agrees


ISOLATED: dict[str, dict[str, Any]] = {
    "scope": {"scope": "batch"},
    "rank": {"percentile": "numpy_nearest"},
    "padding": {"padding_trick": False},
    "ties": {"maxpool_ties": "split"},
    "redistribution": {"prr": False},
    "negative_tau": {"strict_relu": True},
    "derivative": {"derivative": False},
    "derivative_replaced": {"derivative": True},
    "guided": {"tau": None},
    "mod": {"propagation_rule": "PR1"},
}


@pytest.mark.parametrize("name", ISOLATED)
def test_each_isolates_its_convention(name: str) -> None:
    """Whoever does this one thing otherwise gets another map."""
    stored = load(FOLDER / f"{name}.npz")
    method = stored.method
    assert isinstance(method, RectGrad)
    changed = RectGrad(**{**method.options(), **ISOLATED[name]})
    explainer = Explainer(stored.model or b"", backend="reference", dtype="float32")
    result = explainer.explain(stored.inputs, method=changed, target=stored.target)
    assert not compare(stored, result.values).agrees


@pytest.mark.parametrize("name", NAMES)
def test_they_show_something(name: str) -> None:
    stored = load(FOLDER / f"{name}.npz")
    assert stored.values.any()
    for layer in stored.layers.values():
        assert layer.mask is not None
        assert 0 < layer.mask.sum() < layer.mask.size
    assert not json.dumps(stored.provenance).count("/")


def test_writing_them_all(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main(tmp_path)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(NAMES)
    assert len(capsys.readouterr().out.splitlines()) == len(NAMES)
