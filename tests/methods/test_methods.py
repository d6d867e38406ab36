"""The list of methods, their presets and options."""

from __future__ import annotations

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


def test_an_object_takes_neither_preset_nor_options() -> None:
    method = RectGrad(q=90)
    assert make_method(method) is method
    with pytest.raises(TypeError, match="no preset and no options"):
        make_method(method, q=80)
    with pytest.raises(TypeError, match="no preset and no options"):
        make_method(method, "authors")


def test_methods_are_values() -> None:
    assert RectGrad(q=90) == RectGrad(q=90.0) != RectGrad(q=91)
    assert hash(RectGrad(q=90)) == hash(RectGrad(q=90.0))
    assert Deconvolution() != GuidedBackprop()
    with pytest.raises(AttributeError):
        RectGrad().q = 1.0
