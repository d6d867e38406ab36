"""The list of methods, their presets and options."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import rectgrad_ref
from rectgrad_ref import Deconvolution, GuidedBackprop, RectGrad, SmoothGrad
from rectgrad_ref.methods import METHODS, make_method

IDS = [
    "rectgrad",
    "saliency",
    "input_x_gradient",
    "deconvolution",
    "guided_backprop",
    "smoothgrad",
    "integrated_gradients",
    "epsilon_lrp",
    "deeplift",
    "random",
]


def test_list() -> None:
    assert list(METHODS) == list(rectgrad_ref.methods()) == IDS
    assert all(text and "\n" not in text for text in rectgrad_ref.methods().values())


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_the_paper_is_the_default(name: str, preset: str) -> None:
    assert make_method(name, preset) == METHODS[name]()


def test_authors() -> None:
    changed = {name: make_method(name, "authors") for name in IDS}
    assert changed.pop("rectgrad") == RectGrad(
        padding_trick="same", final_threshold=False, derivative=False, mod_last="PR2"
    )
    assert changed.pop("smoothgrad") == SmoothGrad(range="batch")
    assert all(method == METHODS[name]() for name, method in changed.items())


def test_an_option_wins_over_the_preset() -> None:
    assert make_method("rectgrad", "authors", derivative=True).options()["derivative"]


@pytest.mark.parametrize("name", IDS)
def test_unknown_options_list_those_there_are(name: str) -> None:
    with pytest.raises(TypeError) as caught:
        make_method(name, gamma=1)
    assert f"{name} has no option 'gamma'; it has output_seed" in str(caught.value)
    assert all(option in str(caught.value) for option in METHODS[name]().options())


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown method 'gradcam'; there are rectgrad, saliency"):
        make_method("gradcam")
    with pytest.raises(ValueError, match="preset must be one of default, paper, authors"):
        make_method("rectgrad", "code")


@pytest.mark.parametrize(
    ("name", "option", "value", "allowed"),
    [
        ("rectgrad", "q", math.nan, "a number"),
        ("rectgrad", "q", "98", "a number"),
        ("rectgrad", "q", True, "a number"),
        ("rectgrad", "tau", math.nan, "a number or None"),
        ("rectgrad", "tau", "0", "a number or None"),
        ("rectgrad", "prr", "no", "True or False"),
        ("rectgrad", "prr", None, "True or False"),
        ("rectgrad", "padding_trick", "SAME", "True or False or 'same'"),
        ("rectgrad", "scope", ["sample"], "one of 'sample', 'channel', 'batch'"),
        ("rectgrad", "eps", -1e-6, "at least 0"),
        ("smoothgrad", "n", 2.5, "an integer"),
        ("smoothgrad", "n", 0, "at least 1"),
        ("smoothgrad", "sigma", -0.1, "at least 0"),
        ("smoothgrad", "sigma", math.inf, "at least 0"),
        ("smoothgrad", "seed", -1, "at least 0"),
        ("integrated_gradients", "steps", 0, "at least 1"),
        ("integrated_gradients", "baseline", "black", "a number or an array"),
        ("deeplift", "baseline", math.nan, "a number or an array"),
        ("deeplift", "eps", math.inf, "at least 0"),
        ("epsilon_lrp", "eps", 0.0, "above 0"),
        ("epsilon_lrp", "eps", math.inf, "above 0"),
        ("random", "seed", -1, "at least 0"),
    ],
)
def test_values_that_an_option_does_not_have(
    name: str, option: str, value: Any, allowed: str
) -> None:
    with pytest.raises(ValueError) as error:
        make_method(name, **{option: value})
    assert str(error.value) == f"{name}: {option} must be {allowed}, got {value!r}"


def test_numbers_may_be_numpys() -> None:
    given = RectGrad(q=np.float32(90), prr=np.bool_(True), tau=np.int64(0))
    assert given == RectGrad(q=90, prr=True, tau=0)


def test_an_object_takes_neither_preset_nor_options() -> None:
    method = RectGrad(q=90)
    assert make_method(method) is method
    with pytest.raises(TypeError, match="no preset and no options"):
        make_method(method, q=80)
    with pytest.raises(TypeError, match="no preset and no options"):
        make_method(method, "authors")


def test_titles_tell_the_methods_of_a_figure_apart() -> None:
    titles = [make_method(name).title for name in IDS]
    assert titles[0] == "RectGrad" and len(set(titles)) == len(IDS)
    assert RectGrad(prr=True).title == "RectGrad PRR"
    assert RectGrad(propagation_rule="mod").title == "RectGrad mod"
    assert RectGrad(propagation_rule="PR3", prr=True).title == "RectGrad PR3 PRR"
    assert RectGrad(q=90, padding_trick=False).title == "RectGrad"


def test_methods_are_values() -> None:
    assert RectGrad(q=90) == RectGrad(q=90.0) != RectGrad(q=91)
    assert hash(RectGrad(q=90)) == hash(RectGrad(q=90.0))
    assert Deconvolution() != GuidedBackprop()
    with pytest.raises(AttributeError):
        RectGrad().q = 1.0
