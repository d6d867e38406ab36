"""The paper's experiments run, go on where they were stopped, and reckon right."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console
from scipy.special import log_softmax, softmax
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")

from experiment_checks import assert_report_is_current, blobs, few_estimators, run_and_report

from bench.paper import report, sources
from bench.paper.__main__ import app
from bench.paper.deletion import deletion_curve
from bench.paper.evidence import (
    Claim,
    Conclusion,
    Table,
    compare,
    distribution_table,
    least_sure,
    quartiles,
)
from bench.paper.experiments import SUITE, feature_map_occlusion, roar, training_occlusion
from bench.paper.experiments.adversarial import fast_gradient_sign, value_range
from bench.paper.maps import (
    RECTGRAD,
    background_attribution,
    concentration,
    measured,
    object_share,
    resized_background,
    shown,
    similarity,
    total_variation,
)
from bench.paper.plots import style
from bench.paper.runner import Arrays, Experiment, Results, Unit, run, stacked
from bench.paper.sources import Sources, normalized
from rectgrad_ref import Explainer
from rectgrad_ref.errors import InvalidImage, InvalidModel
from rectgrad_ref.onnx_models.cifar10_cnn import network_path

pytestmark = pytest.mark.filterwarnings("ignore::rectgrad_ref.errors.RectGradWarning")

EXPERIMENTS = SUITE.experiments
TINY: dict[str, dict[str, Any]] = {
    "side_by_side": {"photos": 1},
    "training_occlusion": {"images": 3, "networks": 2},
    "feature_map_occlusion": {"masked": 2, "networks": 2, "steps": 3, "trials": 2},
    "feature_maps": {"masked": 2, "noisy": 1},
    "threshold_sweep": {"images": 3, "photos": 1},
    "coherence": {"masked": 2, "photos": 1},
    "adversarial": {"images": 3, "photos": 1},
    "layer_wise": {"masked": 2, "photos": 1},
    "noise_level": {"masked": 2, "images": 2, "networks": 2},
    "propagation_rules": {"masked": 2, "images": 3, "steps": 3, "photos": 1},
    "roar": {
        "train_images": 3,
        "test_images": 3,
        "fractions": (0.1, 0.9),
        "epochs": 1,
        "networks": 1,
    },
}


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(
    name: str, small: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "roar":
        pytest.importorskip("torch")
        few_estimators(monkeypatch)
    run_and_report(SUITE, EXPERIMENTS[name](**TINY[name]), small, tmp_path)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("name", ["threshold_sweep", "adversarial"])
def test_cifar_10_is_enough(name: str, small: Sources, tmp_path: Path) -> None:
    alone = replace(small, classifier=None)
    alone.__dict__["test"] = small.test
    record = run_and_report(SUITE, EXPERIMENTS[name](**TINY[name]), alone, tmp_path)
    assert len(record["tables"]) == 1


def test_experiments_are_the_papers_by_default() -> None:
    full = EXPERIMENTS["roar"]()
    assert (full.train_images, full.epochs, full.networks) == (50_000, 20, 3)  # type: ignore[attr-defined]
    assert all(set(cls.quick) <= {*cls.__dataclass_fields__} for cls in EXPERIMENTS.values())


# --- the runner ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Counting(Experiment):
    """Squares of numbers; it counts how often it is asked, and may fail."""

    name: ClassVar[str] = "counting"
    title: ClassVar[str] = "Counting"
    figures: ClassVar[str] = "figure 0"
    paper: ClassVar[str] = "It counts."
    extent: ClassVar[frozenset[str]] = frozenset({"count"})
    asked: ClassVar[list[int]] = []
    fails_at: ClassVar[int | None] = None

    count: int = 4
    start: int = 0

    def inputs(self, sources: Sources) -> dict[str, str]:
        return {}

    def units(self, sources: Sources, done: Results) -> Mapping[str, Unit]:
        def square(i: int) -> Arrays:
            if i == type(self).fails_at:
                raise KeyboardInterrupt
            self.asked.append(i)
            return {"square": np.array([i * i])}

        return {f"{i}": partial(square, i) for i in range(self.start, self.count)}

    def conclude(self, sources: Sources, found: Mapping[str, Arrays]) -> Conclusion:
        squares = stacked(found)["square"].tolist()
        expected = [i * i for i in range(self.start, self.count)]
        claim = Claim("It counts", squares == expected, str(squares))
        return Conclusion("four", {"squares": squares}, [Table(["a|b"], [["1"]])], [claim])


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr(Counting, "asked", [])
    monkeypatch.setattr(Counting, "fails_at", None)
    return Counting


def test_an_interrupted_run_goes_on_where_it_was(
    counting: type[Counting], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    go = partial(
        run,
        sources=Sources(),
        work=tmp_path / "work",
        out=tmp_path / "out",
        console=Console(quiet=True),
    )
    monkeypatch.setattr(counting, "fails_at", 2)
    with pytest.raises(KeyboardInterrupt):
        go(counting())
    assert not (tmp_path / "out" / "counting.json").exists()
    # What a kill during a write leaves behind.
    (next((tmp_path / "work").iterdir()) / ".2.x.npz").write_bytes(b"half")
    monkeypatch.setattr(counting, "fails_at", None)
    record = json.loads(go(counting()).read_text("utf-8"))
    assert counting.asked == [0, 1, 2, 3] and record["verdict"] == "reproduced"
    go(counting())
    assert counting.asked == [0, 1, 2, 3]
    go(counting(start=2))
    go(counting(count=2), sources=Sources(seed=1))
    assert counting.asked[4:] == [2, 3, 0, 1]


def test_a_larger_extent_starts_from_what_is_there(
    counting: type[Counting], tmp_path: Path
) -> None:
    def go(count: int) -> str:
        experiment, folder = counting(count=count), tmp_path / "work"
        quiet = Console(quiet=True)
        path = run(experiment, Sources(), work=folder, out=tmp_path / "out", console=quiet)
        return str(json.loads(path.read_text("utf-8"))["verdict"])

    assert [go(2), go(4), go(3)] == ["reproduced"] * 3  # each concludes from its own units
    assert counting.asked == [0, 1, 2, 3]


def test_the_verdict_counts_claims() -> None:
    def verdict(*holds: bool, reduced: bool = False) -> str:
        claims = [Claim("", h, "") for h in holds]
        return Conclusion("", {}, [], claims, reduced=reduced).verdict

    assert verdict(True, True) == "reproduced"
    assert verdict(True, False) == "partly reproduced"
    assert verdict(False) == "not reproduced"
    assert verdict(True, reduced=True) == "reproduced by a reduced protocol"
    assert verdict() == "pictures only"


def test_bars_do_not_break_tables() -> None:
    assert next(report._table(["Σ|x|"], [])) == r"| Σ\|x\| |"


def test_the_published_report_is_made_of_the_published_numbers(tmp_path: Path) -> None:
    assert_report_is_current(SUITE, tmp_path)


def test_what_the_critics_found_stands_next_to_it() -> None:
    text = (SUITE.folder / "RESULTS.md").read_text("utf-8")
    assert "(../sanity/RESULTS.md#randomised-layers-adebayo-et-al-2018-sixt-et-al-2020)" in text


def test_a_method_looks_the_same_in_all_plots() -> None:
    assert style("RectGrad") == ("-", style("RectGrad PRR")[1]) == ("-", style("RectGrad, x")[1])
    assert style("RectGrad PRR")[0] == style("Random, blurred")[0] == "--"
    assert len({style(name)[1] for name in ("Random", "RectGrad", "Saliency", "DeepLIFT")}) == 4
    assert style("b", ["a", "b"]) != style("a", ["a", "b"])


# --- statistics and measures ----------------------------------------------------------------------


def test_comparisons_are_paired_and_corrected() -> None:
    rng = np.random.default_rng(0)
    ours = rng.normal(size=200)
    pairs = compare(
        ours,
        {
            "higher": ours + 0.1 + 0.01 * rng.normal(size=200),
            "same": ours,
            "noise": ours + rng.normal(size=200),
        },
    )
    assert pairs["higher"].lower and pairs["higher"].wins == 1 and not pairs["higher"].higher
    assert pairs["same"].wins == 0.5 and pairs["same"].p == 1
    assert not pairs["noise"].lower and not pairs["noise"].higher


def test_an_order_must_be_the_same_on_every_network() -> None:
    rng = np.random.default_rng(0)
    other = rng.normal(size=(3, 200))
    pair = compare(other - 0.2, {"": other})[""]
    assert pair.lower and not pair.higher and pair.agree == 3
    shift = np.array([[-0.4], [-0.4], [0.1]])
    pair = compare(other + shift, {"": other})[""]
    assert pair.p < 1e-4 and pair.wins == 1 and not pair.lower and pair.agree == 2
    assert least_sure({"": pair}, "draws").endswith("the same on 2 of 3 draws")


def test_a_number_may_be_compared_with() -> None:
    above = np.random.default_rng(0).normal(1, 0.1, 50)
    assert compare(above, {"": 0.5})[""].higher and not compare(above, {"": 1.0})[""].higher


def test_an_order_of_quartiles_must_outlive_other_images() -> None:
    rng = np.random.default_rng(0)
    levels = {"RectGrad PRR": 1.0, "RectGrad": 2.0, "DeepLIFT": 3.0, "Saliency": 5.0}
    amounts = {name: rng.normal(level, 1, (2, 100)) for name, level in levels.items()}
    claim = training_occlusion._lowest_upper_quartiles(amounts)
    assert claim.holds and "100.0%" in claim.evidence
    amounts["Saliency"] = amounts["DeepLIFT"] + rng.normal(0.05, 1, (2, 100))
    assert not training_occlusion._lowest_upper_quartiles(amounts).holds


def test_quartiles_are_averaged_over_networks() -> None:
    networks = np.array([[0.0, 1, 2, 3, 4], [2, 3, 4, 5, 6]])
    assert quartiles(networks)["median"] == 3 and quartiles(networks)["lower"] == 2
    assert quartiles(networks)["sd of medians"] == pytest.approx(2**0.5)
    assert "sd of medians" not in quartiles(networks[0])
    (row,) = distribution_table({"a": networks}).rows
    assert row[2] == "3 ± 1.41"


def test_holm_multiplies_the_smallest_by_the_number_of_tests() -> None:
    from bench.paper.evidence import _holm

    assert _holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert _holm([0.9, 0.8]) == [1, 1]


def test_measures_on_a_map_done_by_hand() -> None:
    heatmap = np.array([[[1.0, -2.0], [0.0, 3.0]]])
    background = np.array([[[True, True], [False, False]]])
    assert total_variation(heatmap).tolist() == [1 + 5 + 3 + 3]
    assert background_attribution(heatmap, background).tolist() == [3]
    assert object_share(heatmap, background).tolist() == [0.5]
    assert object_share(np.zeros_like(heatmap), background).tolist() == [0.5]
    assert similarity(heatmap, 2 * heatmap).tolist() == pytest.approx([1])
    assert similarity(heatmap, 0 * heatmap).tolist() == [0]
    twenty = np.ones((1, 4, 5))
    twenty[0, 0, 0] = -81
    assert concentration(twenty).tolist() == [0.81]


def test_only_baselines_are_made_sparse() -> None:
    heatmap = np.arange(1.0, 1025).reshape(1, 32, 32)
    maps = {RECTGRAD: heatmap, "Saliency": heatmap}
    assert (measured(maps)[RECTGRAD] == heatmap).all()
    assert (measured(maps)["Saliency"] > 0).sum() == 52  # those above the 95th percentile
    assert measured(maps)["Saliency"].max() == 1024
    assert (shown(maps, sparse=True)["Saliency"] > 0).sum() == 52
    assert (shown(maps, sparse=False)["Saliency"] > 0).sum() == 1024 - 6


def test_a_background_is_resized_as_a_mask() -> None:
    background = np.ones((1, 32, 32), bool)
    background[:, 8:24, 8:24] = False
    half = resized_background(background, 16)
    assert half.shape == (1, 16, 16) and not half[0, 5:11, 5:11].any()
    assert half[0, :3].all() and half[0, :, :3].all()


def test_deletion_replaces_the_largest_first(small: Sources) -> None:
    explainer, x = small.network(), normalized(small.test.images[:2])
    heatmap = np.random.default_rng(0).normal(size=(2, 32, 32))
    colour = np.array([0.1, 0.2, 0.3], np.float32)
    curve = deletion_curve(explainer, x, heatmap, colour, 5)
    half = np.where((heatmap > np.median(heatmap, axis=(1, 2))[:, None, None])[:, None], 0, x)
    half += np.where(half == 0, colour[:, None, None], 0).astype(np.float32)
    logits = explainer.explain(x, method="random").logits
    later = explainer.explain(half, method="random").logits
    rows, target = np.arange(2), logits.argmax(axis=1)
    assert curve.shape == (2, 5)
    assert curve[:, 0] == pytest.approx(softmax(logits, axis=1)[rows, target], abs=1e-6)
    assert curve[:, 2] == pytest.approx(softmax(later, axis=1)[rows, target], abs=1e-6)


# --- single experiments -------------------------------------------------------------------------


def test_occlusion_begins_with_the_network_itself_and_ends_with_zeros(small: Sources) -> None:
    before, after = feature_map_occlusion._split(network_path(), "relu3")
    x = normalized(small.train.images[:1])
    where = np.zeros((16, 16), bool)
    where[4:9, 2:7] = True
    experiment = feature_map_occlusion.FeatureMapOcclusion(steps=3, trials=2)
    a = before(x)
    logits = experiment._logits(a[0], where, after, np.random.default_rng(0))
    assert logits.shape == (2, 3, 10)
    assert logits[:, 0] == pytest.approx(
        np.repeat(small.network().explain(x, method="random").logits, 2, axis=0), abs=1e-4
    )
    assert logits[:, 2] == pytest.approx(
        np.repeat(after(np.where(where, 0, a).astype(np.float32)), 2, axis=0), abs=1e-4
    )
    assert not np.allclose(logits[0, 1], logits[1, 1])
    margins = feature_map_occlusion._margin(np.array([[3.0, 1.0, 5.0], [7.0, 1.0, 5.0]]), 0)
    assert margins.tolist() == [-2, 2]


def test_the_attack_follows_the_gradient_of_the_loss() -> None:
    explainer = Explainer(network_path(), backend="reference")
    x = normalized(blobs(1, seed=3)).astype(np.float64) * 0.9
    attacked = fast_gradient_sign(explainer, x, 0.01, (-1, 1))
    assert np.abs(attacked - x).max() == pytest.approx(0.01)
    target = explainer.explain(x, method="random").logits[0].argmax()

    def loss(image: np.ndarray) -> float:
        logits = explainer.explain(image, method="random").logits
        return float(-log_softmax(logits, axis=1)[0, target])

    rng = np.random.default_rng(0)
    for c, i, j in zip(*(rng.integers(0, n, 8) for n in (3, 32, 32)), strict=True):
        step = np.zeros_like(x)
        step[0, c, i, j] = 1e-5
        slope = loss(x + step) - loss(x - step)
        assert np.sign(slope) == np.sign(attacked - x)[0, c, i, j]


def test_an_attack_stays_within_the_pictures_range() -> None:
    explainer = Explainer(network_path(), backend="cpu", preprocess="cifar10")
    white = normalized(np.full((1, 3, 32, 32), 255, np.uint8))
    low, high = value_range(explainer)
    assert low.min() == low.max() == -1 and high.min() == high.max() == 1
    attacked = fast_gradient_sign(explainer, white, 0.01, (low, high))
    assert attacked.max() == 1 and attacked.min() == pytest.approx(0.99)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.9])
def test_ranks_decide_as_percentiles_do(fraction: float) -> None:
    rng = np.random.default_rng(1)
    heatmap = rng.normal(size=(3, 32, 32))
    ranks = heatmap.reshape(3, -1).argsort(axis=1).argsort(axis=1).reshape(3, 32, 32)
    images = blobs(3)
    colour = np.array([10.2, 20.7, 30.0])
    threshold = np.percentile(heatmap, 100 - 100 * fraction, axis=(1, 2), keepdims=True)
    for test, replaced in (("ROAR", heatmap > threshold), ("KAR", heatmap < threshold)):
        modified = roar.modify(images, ranks, test, fraction, colour)  # type: ignore[arg-type]
        expected = np.where(replaced[:, None], np.array([10, 21, 30])[:, None, None], images)
        assert (modified == expected).all() and modified.dtype == np.uint8


def test_ranks_do_not_depend_on_the_batch(small: Sources) -> None:
    explainer, estimator = small.network(), roar.Roar().estimators()["SmoothGrad"]
    images = small.train.images
    whole = roar.pixel_ranks(explainer, estimator, images, slice(0, 4), 0)["ranks"]
    part = roar.pixel_ranks(explainer, estimator, images, slice(2, 4), 0)["ranks"]
    assert (np.sort(whole.reshape(4, -1), axis=1) == np.arange(1024)).all()
    assert (whole[2:] == part).mean() > 0.99  # sums in another order may swap neighbours


def test_versions_classified_better_than_the_unmodified_are_remarked() -> None:
    half, most = np.array([[True, False]]), np.array([[True, True]])
    correct = {"ROAR, unmodified, 0": half, "ROAR, Saliency, 0.5": half, "KAR, Random, 0.1": most}
    assert roar.leaks(correct, ("ROAR",)) == []
    (remark,) = roar.leaks(correct, ("ROAR", "KAR"))
    assert "1 of 3 versions" in remark and "KAR, Random, 0.1" in remark and "100.0%" in remark


def test_areas_by_the_trapezoid_rule() -> None:
    curves = np.array([[0.6], [0.4]])
    ends = [np.array([0.8]), np.array([0.1])]
    under = roar.area(np.array([0.25, 0.75]), curves, ends, over=False)
    assert under.inner == pytest.approx(0.5)
    assert under.whole == pytest.approx(0.25 * 0.7 + 0.5 * 0.5 + 0.25 * 0.25)
    over = roar.area(np.array([0.25, 0.75]), curves, ends, over=True)
    assert over.inner == pytest.approx(0.5) and over.whole == pytest.approx(1 - under.whole)


def test_areas_of_images_that_are_classified_rightly_or_not() -> None:
    curves = np.array([[True, True], [True, False], [True, False]])
    ends = [np.array([True, True]), np.array([0.1, 0.1])]
    area = roar.area(np.array([0.1, 0.5, 0.9]), curves, ends, over=False)
    assert area.inner == pytest.approx([1, 0.25])
    assert area.whole == pytest.approx([0.9 + 0.055, 0.1 + 0.2 + 0.005])


def test_the_same_networks_are_trained_in_stacks_and_alone() -> None:
    experiment = roar.Roar(fractions=(0.1, 0.9), networks=2)
    alone = list(experiment._stacks(together=False))
    together = list(experiment._stacks(together=True))
    assert {m for stack in alone for m in stack} == {m for stack in together for m in stack}
    assert len(alone) == 2 + 2 * 8 * 2 * 2 and max(map(len, together)) == 4
    for stacks in (alone, together):
        assert len({roar._label(stack) for stack in stacks}) == len(stacks)
    seeds = [stack[0].seed for stack in alone]
    assert seeds == sorted(seeds)  # the first network's results are whole before the second's


# --- data ---------------------------------------------------------------------------------------


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidImage, match="--masks"):
        _ = Sources().masked
    with pytest.raises(InvalidModel, match="--seed 3"):
        Sources().network_file(3)
    with pytest.raises(InvalidModel, match="does not exist"):
        Sources(networks=tmp_path).network_file(3)
    with pytest.raises(InvalidModel, match="--classifier"):
        Sources(classifier=None).needed_classifier()
    with pytest.raises(InvalidImage, match="cat_1_mask"):
        sources._class_and_number(Path("kitten_1_mask.jpg"))
    with pytest.raises(InvalidImage, match="no files"):
        _ = Sources(masks=tmp_path).masked


def test_masks_find_their_training_images(real: Sources, shared_data: Path) -> None:
    with (shared_data / "cifar10_masks" / "mask_index.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert set(real.masked.keys.tolist()) == {int(row["cifar10_index"]) for row in rows}
    assert len(set(real.masked.keys.tolist())) == len(real.masked.keys)
    chosen = real.correctly_classified(10)
    assert np.bincount(chosen.labels).tolist() == [10] * 10
    assert 0.3 < chosen.background.mean() < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_quick_runs_on_the_real_data(name: str, real: Sources, tmp_path: Path) -> None:
    if name == "roar":
        pytest.importorskip("torch")
    cls = EXPERIMENTS[name]
    run_and_report(SUITE, cls(**cls.quick), real, tmp_path)


# --- the command line ---------------------------------------------------------------------------


def test_the_command_line_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    invoke = partial(CliRunner().invoke, app)
    done = invoke(["nonsense", "--work", str(tmp_path), "--out", str(tmp_path / "results")])
    assert done.exit_code == 2 and "nonsense" in done.output
    for setting in ("epocs=3", "epochs=three", "fractions=.1,x", "precision=float16"):
        folders = ["--work", str(tmp_path), "--out", str(tmp_path / "r")]
        done = invoke(["roar", "--set", setting, *folders])
        assert done.exit_code == 2 and setting.partition("=")[0] in done.output


def test_missing_data_end_with_a_message(tmp_path: Path) -> None:
    arguments = ["training_occlusion", "--cifar", str(tmp_path), "--out", str(tmp_path / "results")]
    done = CliRunner().invoke(app, [*arguments, "--work", str(tmp_path)])
    assert done.exit_code == 1 and "CIFAR-10" in done.output
    assert "not run yet" in (tmp_path / "RESULTS.md").read_text("utf-8")
