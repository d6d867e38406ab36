"""Pictures: the cap against a slow derivation, colours, layouts without overlaps, whole files."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from PIL import Image

from rectgrad_ref import picture
from rectgrad_ref.errors import InvalidImage, OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = (
    "RectGrad",
    "RectGrad PRR",
    "Saliency map",
    "Guided backpropagation",
    "SmoothGrad",
    "Gradient × input",
    "Integrated gradients",
    "DeepLIFT (Rescale)",
    "ε-LRP",
    "Deconvolution",
)
CLASSES = (
    "hen-of-the-woods, hen of the woods, Polyporus frondosus",
    "Staffordshire bullterrier, Staffordshire bull terrier",
    "a class name so long that no column of any figure can possibly hold all of its many words",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    r"price in $\no $ and $mathematics$, x_1",
)


def attribution(
    samples: int = 2,
    size: tuple[int, int] = (8, 8),
    method: str = "RectGrad",
    pictures: bool = True,
    class_names: list[str] | None = None,
    seed: int = 0,
) -> Any:
    """A stand-in with what `picture` reads of an Attribution, and a trace of many layers."""
    rng = np.random.default_rng(seed)
    heatmap = rng.normal(size=(samples, *size))
    layers = {
        f"/model/features/features.{i}/branch{i % 3}/Relu_output_0": SimpleNamespace(
            a=np.maximum(rng.normal(size=(samples, 4, 12 - i, 12 - i)), 0),
            R_out=rng.normal(size=(samples, 4, 12 - i, 12 - i)),
        )
        for i in range(10)
    }
    layers["pooled"] = SimpleNamespace(
        a=np.ones((samples, 4, 1, 1)), R_out=np.ones((samples, 4, 1, 1))
    )
    layers["dense"] = SimpleNamespace(a=np.ones((samples, 4)), R_out=np.ones((samples, 4)))
    logits = rng.normal(size=(samples, 5))
    return SimpleNamespace(
        heatmap=lambda: heatmap,
        method=SimpleNamespace(id=method.split()[0].lower(), title=method),
        target=np.arange(samples) % 5,
        probabilities=np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True),
        class_names=class_names,
        pictures=list(rng.integers(0, 256, (samples, *size, 3), np.uint8)) if pictures else None,
        layers=lambda: layers,
    )


def texts(figure: Figure) -> list[str]:
    """The texts of a figure with their lines joined."""
    return [" ".join(text.get_text().split()) for text in figure.texts]


def images(figure: Figure) -> list[NDArray[np.uint8]]:
    """What the panels of a figure show, column by column; the last is the colour bar."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


# --- cap ---------------------------------------------------------------------------------------


def slow_percentile(values: list[float], q: float) -> float:
    """Linear interpolation between the two order statistics around (n − 1)·q/100."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * (q / 100)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    weight, step = position - below, ordered[above] - ordered[below]
    # NumPy's rounding: from the nearer end.
    if weight < 0.5:
        return ordered[below] + step * weight
    return ordered[above] - step * (1 - weight)


def slow_cap(heatmap: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    capped = np.empty_like(heatmap)
    for sample, plane in enumerate(heatmap):
        values = plane.ravel().tolist()
        bottom, top = slow_percentile(values, low), slow_percentile(values, high)
        for place, value in np.ndenumerate(plane):
            if value < bottom:
                value = 0.0 if bottom > 0 else bottom
            elif value > top:
                value = top
            capped[sample][place] = value
    return capped


@st.composite
def heatmaps(draw: st.DrawFn) -> NDArray[np.float64]:
    """Maps with and without ties, of both signs, or shifted so that the low cap is positive."""
    shape = draw(array_shapes(min_dims=3, max_dims=3, max_side=9))
    elements = draw(
        st.sampled_from([st.integers(-3, 3), st.integers(1, 4), st.floats(-1e3, 1e3, width=32)])
    )
    return draw(arrays(np.float64, shape, elements=elements))


percentiles = st.one_of(
    st.sampled_from([0.0, 0.5, 50.0, 95.0, 99.5, 100.0]), st.floats(0, 100, width=32)
)


@given(heatmaps(), percentiles, percentiles)
def test_cap_is_the_slow_derivation(heatmap: NDArray[np.float64], one: float, other: float) -> None:
    low, high = sorted((one, other))
    np.testing.assert_array_equal(picture.cap(heatmap, low, high), slow_cap(heatmap, low, high))


def test_positive_low_cap_clears_and_negative_one_raises() -> None:
    heatmap = np.arange(1.0, 401.0).reshape(1, 20, 20)
    sparse = picture.cap(heatmap, 95, 100)
    np.testing.assert_array_equal(sparse, np.where(heatmap > 380, heatmap, 0))
    raised = picture.cap(heatmap - 500, 95, 100)
    np.testing.assert_array_equal(raised, np.maximum(heatmap - 500, np.percentile(raised, 0)))
    assert raised.min() == pytest.approx(380.05 - 500)


def test_cap_treats_samples_apart() -> None:
    heatmap = np.random.default_rng(1).normal(size=(3, 10, 10)) * [[[1]], [[100]], [[0]]]
    capped = picture.cap(heatmap)
    for sample in range(3):
        np.testing.assert_array_equal(capped[sample], picture.cap(heatmap[sample][None])[0])


def test_float32_maps_are_capped_in_float64() -> None:
    heatmap = np.random.default_rng(2).normal(size=(2, 50, 50)).astype(np.float32)
    capped = picture.cap(heatmap)
    assert capped.dtype == np.float64
    np.testing.assert_array_equal(capped, picture.cap(heatmap.astype(np.float64)))


@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_capping_a_sparse_map_for_display_is_one_cap(shift: float) -> None:
    heatmap = np.random.default_rng(3).normal(shift, 1, size=(2, 40, 40))
    np.testing.assert_array_equal(
        picture.cap(picture.sparsify(heatmap, 95)), picture.cap(heatmap, 95, 99.5)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_maps_that_are_not_finite_are_refused(bad: float) -> None:
    heatmap = np.zeros((2, 3, 3))
    heatmap[1, 2, 2] = bad
    for function, argument in ((picture.cap, heatmap), (picture.render, heatmap[1])):
        with pytest.raises(InvalidImage, match="NaN or infinite"):
            function(argument)
    broken = attribution()
    broken.heatmap = lambda: heatmap
    with pytest.raises(InvalidImage, match="NaN or infinite"):
        picture.side_by_side([broken])


@pytest.mark.parametrize("shape", [(4,), (4, 4), (1, 3, 4, 4), (0, 4, 4)])
def test_cap_wants_three_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidImage, match=r"\(N, H, W\)"):
        picture.cap(np.zeros(shape))


@pytest.mark.parametrize(("low", "high"), [(-1, 50), (0, 101), (60, 40), (np.nan, 50)])
def test_percentiles_must_be_in_order(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="percentiles"):
        picture.cap(np.zeros((1, 2, 2)), low, high)


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(picture) == doctest.TestResults(failed=0, attempted=2)


# --- colours -----------------------------------------------------------------------------------

SCALE = picture.render(np.linspace(-1, 1, 257)[None])[0]


@given(arrays(np.float64, (5, 7), elements=st.floats(-1e6, 1e6)))
def test_opposite_maps_exchange_blue_and_red(heatmap: NDArray[np.float64]) -> None:
    place = {tuple(colour): position for position, colour in enumerate(SCALE.tolist())}
    assert len(place) == 257
    to_place = np.vectorize(lambda *colour: place[colour])
    plus = to_place(*np.moveaxis(picture.render(heatmap), -1, 0))
    minus = to_place(*np.moveaxis(picture.render(-heatmap), -1, 0))
    np.testing.assert_array_equal(plus - 128, 128 - minus)
    np.testing.assert_array_equal(np.sign(plus - 128)[plus != 128], np.sign(heatmap)[plus != 128])


def test_scale_is_blue_white_red_with_balanced_lightness() -> None:
    rgb2lab = pytest.importorskip("skimage.color").rgb2lab
    signed = SCALE.astype(int)
    assert (signed[:128, 2] > signed[:128, 0]).all()
    assert (SCALE[128] == 255).all()
    assert (signed[129:, 0] > signed[129:, 2]).all()
    lightness = rgb2lab(SCALE[None])[0, :, 0]
    assert (np.diff(lightness[:129]) > 0).all()
    assert np.abs(lightness - lightness[::-1]).max() < 2  # of 100


@pytest.mark.parametrize("magnitude", [5e-324, 1e-30, 1.0, 1e300])
def test_colours_do_not_depend_on_the_unit(magnitude: float) -> None:
    rendered = picture.render(np.array([[-1.0, 0.0, 1.0]]) * magnitude)
    np.testing.assert_array_equal(rendered[0], SCALE[[0, 128, 256]])


def test_zero_map_is_white() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (picture.render(np.zeros((4, 5))) == 255).all()
        zeros = attribution()
        zeros.heatmap = lambda: np.zeros((2, 8, 8))
        assert (images(picture.overlay(zeros))[2] == 255).all()


# --- figures -----------------------------------------------------------------------------------


def assert_tidy(figure: Figure) -> None:
    """No text or panel overlaps another one or leaves the page."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = [text for text in figure.texts if text.get_text()]
    for text in drawn:
        assert [line.strip() for line in text.get_text().split("\n")] == text.get_text().split("\n")
    drawn += [label for axes in figure.axes for label in axes.get_xticklabels()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn]
    boxes += [(f"panel {i}", axes.get_window_extent()) for i, axes in enumerate(figure.axes)]
    for (name, box), (other, its) in combinations(boxes, 2):
        width = min(box.x1, its.x1) - max(box.x0, its.x0)
        height = min(box.y1, its.y1) - max(box.y0, its.y0)
        assert min(width, height) < 1, f"{name!r} overlaps {other!r}"
    for name, box in boxes:
        inside = figure.bbox.padded(0.5).containsx(box.x0) and figure.bbox.containsx(box.x1)
        assert inside, f"{name!r} leaves the page sideways"
        inside = figure.bbox.padded(0.5).containsy(box.y0) and figure.bbox.containsy(box.y1)
        assert inside, f"{name!r} leaves the page up or down"


@pytest.mark.parametrize("pictures", [True, False])
@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("samples", [1, 12])
def test_side_by_side(samples: int, count: int, pictures: bool) -> None:
    names = list(CLASSES)
    several = [
        attribution(samples, method=label, pictures=pictures, class_names=names, seed=seed)
        for seed, label in enumerate(METHODS[:count])
    ]
    figure = picture.side_by_side(several)
    assert_tidy(figure)
    heads = (["Image"] if pictures else []) + list(METHODS[:count])
    assert texts(figure)[: len(heads)] == heads
    shown = images(figure)
    assert len(shown) == samples * len(heads) + 1
    if pictures:
        for panel, expected in zip(shown, several[0].pictures, strict=False):
            np.testing.assert_array_equal(panel, expected)
    last = shown[-1 - samples : -1]
    capped = picture.cap(several[-1].heatmap())
    for panel, heatmap in zip(last, capped, strict=True):
        np.testing.assert_array_equal(panel, picture.render(heatmap))


@pytest.mark.parametrize("pictures", [True, False])
@pytest.mark.parametrize("count", [6, 7, 8, 13])
def test_many_methods_on_one_image_wrap(count: int, pictures: bool) -> None:
    several = [attribution(1, method=f"method {i}", pictures=pictures) for i in range(count)]
    figure = picture.side_by_side(several)
    assert_tidy(figure)
    assert figure.get_figwidth() < 8.5
    assert texts(figure)[pictures : pictures + count] == [f"method {i}" for i in range(count)]
    places = [axes.get_position().bounds for axes in figure.axes[:-1]]
    assert len(places) == count + pictures
    lines = len({round(y, 6) for _, y, _, _ in places})
    assert lines == -(-count // (7 - pictures))
    first = np.asarray(figure.axes[0].images[0].get_array())
    expected = several[0].pictures[0] if pictures else None
    if expected is not None:  # the image has the first column for itself
        np.testing.assert_array_equal(first, expected)
        assert sum(round(x, 6) == round(places[0][0], 6) for x, _, _, _ in places) == 1


def test_rows_name_the_class_and_its_score() -> None:
    one = attribution(samples=2, class_names=["gar, garfish", "tench, Tinca tinca", "a", "b", "c"])
    one.probabilities = np.array([[0.0642, 0.2, 0.3, 0.2, 0.2358], [1.0, 0.0, 0.0, 0.0, 0.0]])
    assert "gar 6.4 %" in texts(picture.overlay(one))
    assert "tench < 0.1 %" in texts(picture.overlay(one))
    one.class_names = None
    assert "class 1 < 0.1 %" in texts(picture.overlay(one))


def test_sparse_baselines_beside_rectgrad() -> None:
    rectgrad, saliency = attribution(1), attribution(1, method="Saliency map")
    _, first, second, _ = images(picture.side_by_side([rectgrad, saliency], sparsify=95))
    np.testing.assert_array_equal(first, picture.render(picture.cap(rectgrad.heatmap())[0]))
    sparse = picture.cap(picture.sparsify(saliency.heatmap(), 95))[0]
    np.testing.assert_array_equal(second, picture.render(sparse))
    assert (second == 255).all(axis=-1).mean() > 0.9


@pytest.mark.parametrize(
    ("samples", "size"),
    [(1, (28, 28)), (12, (32, 32)), (12, (90, 160)), (1, (160, 90)), (2, (227, 227))],
)
def test_overlay(samples: int, size: tuple[int, int]) -> None:
    one = attribution(samples, size, class_names=list(CLASSES))
    figure = picture.overlay(one)
    assert_tidy(figure)
    assert texts(figure)[:3] == ["Image", "RectGrad", "Overlay"]
    assert len(figure.axes) == 3 * samples + 1
    for panel, heatmap in zip(
        images(figure)[samples : 2 * samples], picture.cap(one.heatmap()), strict=True
    ):
        np.testing.assert_array_equal(panel, picture.render(heatmap))
    smooth = figure.axes[0].images[0].get_interpolation()
    assert smooth == ("nearest" if max(size) <= 32 else "antialiased")


def test_overlay_of_nothing_is_the_picture_in_light_grey() -> None:
    one = attribution(1)
    one.heatmap = lambda: np.zeros((1, 8, 8))
    over = images(picture.overlay(one))[2].astype(int)
    assert (over == over[..., :1]).all()
    grey = one.pictures[0] @ [0.299, 0.587, 0.114]
    assert np.corrcoef(over[..., 0].ravel(), grey.ravel())[0, 1] > 0.999
    assert (over[..., 0] >= grey).all()
    assert over.min() > 128


def test_overlay_without_pictures_is_the_map() -> None:
    figure = picture.overlay(attribution(2, pictures=False))
    assert texts(figure)[0] == "RectGrad"
    assert len(figure.axes) == 3


def test_overlay_refuses_a_picture_of_another_size() -> None:
    one = attribution(1)
    one.pictures = [np.zeros((9, 8, 3), np.uint8)]
    with pytest.raises(InvalidImage, match=r"\(9, 8\).*\(8, 8\)"):
        picture.overlay(one)


def test_threshold_sweep() -> None:
    labels = ["τ = 0", *(f"q = {q}" for q in (0, 10, 20, 80, 90, 95, 99))]
    sweep = [attribution(3, class_names=list(CLASSES), seed=seed) for seed in range(8)]
    figure = picture.threshold_sweep(sweep, labels)
    assert_tidy(figure)
    assert texts(figure)[:9] == ["Image", *labels]
    assert len(figure.axes) == 3 * 9 + 1
    with pytest.raises(ValueError, match="7 labels for 8"):
        picture.threshold_sweep(sweep, labels[1:])


@pytest.mark.parametrize("times_activation", [True, False])
def test_layer_strip_shows_means_over_channels(times_activation: bool) -> None:
    one = attribution(2)
    figure = picture.layer_strip([one], sample=1, times_activation=times_activation, columns=10)
    assert_tidy(figure)
    shown = images(figure)
    assert len(shown) == 2 + 10 + 1
    np.testing.assert_array_equal(shown[0], one.pictures[1])
    np.testing.assert_array_equal(shown[1], picture.render(picture.cap(one.heatmap())[1]))
    for panel, layer in zip(shown[2:-1], one.layers().values(), strict=False):
        value = layer.a * layer.R_out if times_activation else layer.R_out
        mean = sum(value[1]) / 4
        np.testing.assert_array_equal(panel, picture.render(picture.cap(mean[None])[0]))
    assert ("mean of a·R" if times_activation else "mean of R") in texts(figure)[-1]


@pytest.mark.parametrize("columns", [2, 3, 8, 50])
@pytest.mark.parametrize(("count", "pictures"), [(3, True), (1, False)])
def test_layer_strip_selects_layers_evenly(columns: int, count: int, pictures: bool) -> None:
    several = [
        attribution(3, method=label, pictures=pictures, class_names=list(CLASSES))
        for label in METHODS[:count]
    ]
    figure = picture.layer_strip(several, sample=2, columns=columns)
    assert_tidy(figure)
    expected = min(columns, 10)
    assert len(figure.axes) == count * (expected + 1) + pictures + 1
    heads = texts(figure)[: expected + 1 + pictures]
    assert heads[pictures] == "Input"
    assert heads[pictures + 1].endswith("4×12×12")
    assert heads[-1].endswith("4×3×3")
    sizes = [int(head.rsplit("×", 1)[1]) for head in heads[pictures + 1 :]]
    steps = -np.diff(sizes)
    assert (steps > 0).all()
    assert steps.max() - steps.min() <= 1
    assert texts(figure)[-1].startswith(f"{expected} of 10 layers")


def test_layer_strip_takes_layers_that_all_methods_traced() -> None:
    one, other = attribution(), attribution(method="Saliency map")
    name = next(iter(one.layers()))
    common = {name: other.layers()[name], "dense": other.layers()["dense"]}
    other.layers = lambda: common
    assert "1 of 1 layers" in texts(picture.layer_strip([one, other]))[-1]
    del common[name]
    with pytest.raises(ValueError, match="spatial"):
        picture.layer_strip([one, other])


@pytest.mark.parametrize(
    "draw",
    [
        picture.side_by_side,
        picture.layer_strip,
        lambda a: picture.threshold_sweep(a, "ab"[: len(a)]),
    ],
)
def test_only_the_same_targets_are_compared(draw: Callable[[list[Any]], Figure]) -> None:
    other = attribution(method="Saliency map")
    other.target = np.array([0, 3])
    with pytest.raises(ValueError, match="Saliency map has"):
        draw([attribution(), other])
    with pytest.raises(ValueError, match="no attribution"):
        draw([])


# --- files -------------------------------------------------------------------------------------


def test_save_writes_what_the_suffix_says(tmp_path: Path) -> None:
    figure = picture.overlay(attribution(1))
    for suffix in ("png", "PDF", "svg"):
        picture.save(figure, tmp_path / f"map.{suffix}")
    with Image.open(tmp_path / "map.png") as image:
        assert image.format == "PNG"
        np.testing.assert_allclose(image.size, 300 * figure.get_size_inches(), atol=1)
        assert len(np.unique(np.asarray(image))) > 50
    pdf = (tmp_path / "map.PDF").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert b"/FontFile2" in pdf  # TrueType
    assert b"/Type3" not in pdf
    assert "<svg" in (tmp_path / "map.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_same_figure_same_file(tmp_path: Path, suffix: str) -> None:
    files = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for file in files:
        picture.save(picture.overlay(attribution(1)), file)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", ["map.jpg", "map", "map.png.txt"])
def test_unknown_suffix_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"\.png or \.pdf or \.svg"):
        picture.save(picture.overlay(attribution(1)), tmp_path / name)
    with pytest.raises(OutputError, match=r"must be \.png"):
        picture.save_map(np.zeros((2, 2)), tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_nothing_is_left_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for folder in ("absent", "file"):
        with pytest.raises(OutputError, match=r"map\.png"):
            picture.save(picture.overlay(attribution(1)), tmp_path / folder / "map.png")
        with pytest.raises(OutputError, match=r"map\.png"):
            picture.save_map(np.zeros((2, 2)), tmp_path / folder / "map.png")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_failing_while_writing_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = picture.overlay(attribution(1))
    (tmp_path / "map.png").write_bytes(b"old")

    def full(file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OutputError, match="No space left"):
        picture.save(figure, tmp_path / "map.png")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_save_map_has_a_pixel_for_each_value(tmp_path: Path) -> None:
    heatmap = np.random.default_rng(4).normal(size=(13, 17))
    picture.save_map(heatmap, tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert image.size == (17, 13)
        np.testing.assert_array_equal(np.asarray(image), picture.render(heatmap))


# --- no global state ---------------------------------------------------------------------------


def test_pyplot_and_settings_are_left_alone(tmp_path: Path) -> None:
    import matplotlib
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    picture.save(picture.layer_strip([attribution()]), tmp_path / "strip.pdf")
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def test_figures_need_neither_pyplot_nor_a_display(tmp_path: Path) -> None:
    program = """
import sys
from rectgrad_ref import picture
assert "matplotlib" not in sys.modules
from tests.test_picture import attribution
picture.save(picture.overlay(attribution(1)), sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", program, str(tmp_path / "map.png")]
    subprocess.run(command, check=True, cwd=root, env={**os.environ, "MPLBACKEND": "TkAgg"})
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_settings_of_the_user_do_not_change_a_figure(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import style

    picture.save(picture.overlay(attribution(1)), tmp_path / "plain.png")
    settings = {"font.family": "serif", "axes.grid": True, "savefig.facecolor": "black"}
    with style.context(["dark_background", settings]):
        picture.save(picture.overlay(attribution(1)), tmp_path / "dark.png")
    assert matplotlib.rcParams["axes.grid"] is False
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "dark.png").read_bytes()


def test_files_are_written_one_at_a_time(tmp_path: Path) -> None:
    writing = []

    def savefig(file: Path, **_: object) -> None:
        writing.append("begin")
        time.sleep(0.02)
        writing.append("end")

    figure: Any = SimpleNamespace(savefig=savefig)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: picture.save(figure, tmp_path / f"{i}.pdf"), range(4)))
    assert writing == ["begin", "end"] * 4


def test_threads_write_the_same_files(tmp_path: Path) -> None:
    def write(name: int) -> bytes:
        file = tmp_path / f"{name}.pdf"
        picture.save(picture.side_by_side([attribution(1)]), file)
        return file.read_bytes()

    alone = write(0)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, range(1, 5))) == [alone] * 4
