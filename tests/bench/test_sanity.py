"""The sanity checks run, and reckon right on cases that are known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")
pytest.importorskip("skimage")

from experiment_checks import assert_report_is_current, few_estimators, run_and_report

from bench.paper.sources import Sources, normalized
from bench.sanity.__main__ import app
from bench.sanity.experiments import SUITE, input_bias, without_retraining
from bench.sanity.experiments.randomization import Randomization
from bench.sanity.likeness import RANK, SSIM, likeness, rank_correlation
from bench.sanity.networks import layers, of_unit_range, randomized, with_random_outputs
from rectgrad_ref import Explainer
from rectgrad_ref.onnx_models.cifar10_cnn import network_path

pytestmark = pytest.mark.filterwarnings("ignore::rectgrad_ref.errors.RectGradWarning")

RETRAINED: dict[str, Any] = {
    "train_images": 3,
    "test_images": 6,
    "fractions": (0.1, 0.9),
    "epochs": 1,
    "networks": 1,
}
EXPERIMENTS = SUITE.experiments
TINY: dict[str, dict[str, Any]] = {
    "randomization": {"images": 2, "draws": 1, "stages": 2},
    "class_sensitivity": {"images": 2},
    "convergence": {"images": 2, "draws": 2},
    "input_bias": {"masked": 2},
    "blurry_maps": RETRAINED,
    "without_retraining": RETRAINED,
}


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_check_runs(
    name: str, small: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if TINY[name] is RETRAINED:
        pytest.importorskip("torch")
        few_estimators(monkeypatch)
    alone = replace(small, classifier=None)
    alone.__dict__.update({k: small.__dict__[k] for k in ("train", "test", "masked")})
    run_and_report(SUITE, EXPERIMENTS[name](**TINY[name]), alone, tmp_path)


def test_the_published_report_is_made_of_the_published_numbers(tmp_path: Path) -> None:
    assert_report_is_current(SUITE, tmp_path)


def test_the_command_line_lists_the_checks() -> None:
    done = CliRunner().invoke(app, ["nonsense"])
    assert done.exit_code == 2 and "convergence" in done.output


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_quick_runs_on_the_real_data(name: str, real: Sources, tmp_path: Path) -> None:
    if TINY[name] is RETRAINED:
        pytest.importorskip("torch")
    cls = EXPERIMENTS[name]
    run_and_report(SUITE, cls(**cls.quick), real, tmp_path)


# --- likeness -----------------------------------------------------------------------------------


def test_a_map_is_like_itself_at_any_scale() -> None:
    heatmap = np.random.default_rng(0).normal(size=(2, 16, 16))
    for measure, values in likeness(heatmap, 3 * heatmap).items():
        assert values == pytest.approx([1, 1]), measure
    opposite = likeness(heatmap, -heatmap)
    assert opposite[RANK] == pytest.approx([1, 1]) and opposite[SSIM].max() < 0


def test_rank_correlation_is_spearmans_with_ties() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 4, (2, 3, 8, 8)).astype(float)
    expected = [spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b, strict=True)]
    assert rank_correlation(a, b) == pytest.approx(expected)
    assert rank_correlation(a, np.zeros_like(a)).tolist() == [0, 0, 0]


def test_the_half_of_an_object() -> None:
    heatmap = np.array([[[4.0, -3.0], [2.0, 100.0]]])
    quantity = np.array([[[1.0, 5.0], [2.0, 9.0]]])
    where = np.array([[[True, True], [True, False]]])
    assert input_bias._half_share(heatmap, quantity, where).tolist() == [3 / 9]
    assert input_bias._half_share(0 * heatmap, quantity, where).tolist() == [0.5]


# --- networks -----------------------------------------------------------------------------------


def test_layers_are_randomised_from_the_output_down() -> None:
    path = network_path()
    names = layers(path)
    assert len(names) == 6 and names[0] == "logits"
    changes = Randomization(stages=3).changes(path)
    assert [len(change.names) for change in changes] == [1, 3, 6, 1, 1, 1]
    assert changes[0].names == names[:1] and changes[2].names == names


def test_only_the_named_layers_become_random() -> None:
    path = network_path()
    names = layers(path)
    before = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    changed = randomized(path, names[:1], np.random.default_rng(0))
    after = {t.name: onnx.numpy_helper.to_array(t) for t in changed.graph.initializer}
    (node,) = (node for node in changed.graph.node if node.output[0] == names[0])
    weight, bias = node.input[1:]
    for name, values in before.items():
        assert (values.shape == after[name].shape) and (
            np.array_equal(values, after[name]) == (name not in (weight, bias))
        )
    limit = np.sqrt(6 / sum(after[weight].shape))
    assert 0.9 * limit < np.abs(after[weight]).max() <= limit and not after[bias].any()


def test_random_outputs_begin_the_backward_pass_with_random_vectors(small: Sources) -> None:
    x = normalized(small.test.images[:2])
    model = with_random_outputs(network_path(), 2, np.random.default_rng(0))
    (directions,) = (
        onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name == "random_directions"
    )
    assert directions.T @ directions == pytest.approx(np.eye(2), abs=1e-6)
    gradient = partial(small.network().explain, x, method="saliency")
    expected = sum(directions[c, 1] * gradient(target=c).values for c in range(10))
    found = Explainer(model, backend="cpu").explain(x, method="saliency", target=1).values
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5 * float(np.abs(expected).max()))


def test_another_range_of_the_input_is_the_same_function(small: Sources) -> None:
    x = normalized(small.test.images[:2])
    unit = Explainer(of_unit_range(network_path()), backend="cpu")
    explained = unit.explain((x + 1) / 2, method="saliency")
    expected = small.network().explain(x, method="saliency")
    assert explained.logits == pytest.approx(expected.logits, abs=1e-4)
    scale = float(np.abs(expected.values).max())
    assert explained.values == pytest.approx(2 * expected.values, abs=1e-4 * scale)


# --- retraining ---------------------------------------------------------------------------------


def test_opposite_orders_are_found_where_both_are_sure() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1, 300))

    def areas(a: float, b: float, c: float) -> dict[str, np.ndarray]:
        noise = {name: 0.1 * rng.normal(size=(1, 300)) for name in "abc"}
        return {n: base + s + noise[n] for n, s in zip("abc", (a, b, c), strict=True)}

    found = without_retraining._opposite(areas(0, 1, 1), areas(0, -1, 0.001))
    assert found == ["a and b"]


def test_maps_are_trained_once_for_all_that_need_them(
    small: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {EXPERIMENTS[name].family for name in ("blurry_maps", "without_retraining")}
    assert folders == {"roar"}
    few_estimators(monkeypatch)
    blurry = set(EXPERIMENTS["blurry_maps"](**RETRAINED).units(small, None))  # type: ignore[arg-type]
    others = set(EXPERIMENTS["without_retraining"](**RETRAINED).units(small, None))  # type: ignore[arg-type]
    shared = {name for name in blurry if "blurred" not in name}
    assert shared and shared <= others
