"""Recipes: their formulas, and where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pixels import FORMULAS, IMAGENET_MEAN, IMAGENET_STD, noise

from rectgrad_ref.errors import InvalidImage
from rectgrad_ref.images import pictures, prepare
from rectgrad_ref.preprocess import PRESETS, Preprocess, resolve_preprocess

NCHW = (None, 3, 24, 24)
UNIT = PRESETS["unit"]


def test_every_preset_has_its_formula_here() -> None:
    assert set(FORMULAS) == set(PRESETS)


@pytest.mark.parametrize("name", FORMULAS)
def test_preset_values(name: str) -> None:
    channels = 1 if PRESETS[name].channels == "grey" else 3
    pixels = noise(64, channels)
    pixels[:2] = [[0] * channels, [255] * channels]
    expected = FORMULAS[name](pixels.astype(np.float64))
    np.testing.assert_allclose(PRESETS[name].apply(pixels), expected, rtol=0, atol=1e-13)


def numbers(lo: float, hi: float) -> st.SearchStrategy[tuple[float, ...]]:
    floats = st.floats(lo, hi)
    return floats.map(lambda v: (v,)) | st.tuples(floats, floats, floats)


@st.composite
def preprocesses(draw: st.DrawFn) -> Preprocess:
    lo = draw(st.floats(-300, 300))
    return Preprocess(
        value_range=(lo, lo + draw(st.floats(0.5, 300))),
        mean=draw(numbers(-300, 300)),
        std=draw(numbers(0.1, 300)),
        channels=draw(st.sampled_from(["RGB", "BGR"])),
        resize=draw(st.sampled_from(["shortest", "squash", "none"])),
        crop_fraction=draw(st.floats(0.1, 1)),
        interpolation=draw(st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"])),
        size=draw(st.none() | st.tuples(st.integers(1, 999), st.integers(1, 999))),
    )


@given(preprocesses(), hnp.arrays(np.uint8, (5, 3)))
def test_invert_undoes_apply_after_rounding_to_float32(
    preprocess: Preprocess, pixels: NDArray[np.uint8]
) -> None:
    values = preprocess.apply(pixels).astype(np.float32)
    np.testing.assert_array_equal(preprocess.invert(values), pixels)


def test_invert_clips_values_that_no_pixel_has() -> None:
    values = np.array([[-3.0, 0.5, 7.0]])
    np.testing.assert_array_equal(UNIT.invert(values), [[0, 128, 255]])


@given(preprocesses())
def test_dict_round_trip_through_json(preprocess: Preprocess) -> None:
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value_range": (1, 0)}, "lo < hi"),
        ({"value_range": (0, 1, 2)}, "lo < hi"),
        ({"value_range": "wide"}, "numbers"),
        ({"mean": (1, 2)}, "mean must be one number or three"),
        ({"mean": (float("nan"),)}, "finite"),
        ({"mean": [[1], [2, 3]]}, "numbers"),
        ({"std": (1, 0, 1)}, "std must be one positive"),
        ({"channels": "RGBA"}, "RGB, BGR, grey"),
        ({"resize": "fit"}, "shortest, squash, none"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"crop_fraction": 0}, "crop_fraction"),
        ({"crop_fraction": 1.1}, "crop_fraction"),
        ({"crop_fraction": "0.9"}, "crop_fraction"),
        ({"resize_size": 0}, "resize_size"),
        ({"resize_size": 256.5}, "resize_size"),
        ({"resize_size": 256, "crop_fraction": 0.9}, "not both"),
        ({"size": (224,)}, "height, width"),
        ({"size": 224}, "height, width"),
        ({"size": (224, 0)}, "height, width"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        Preprocess(**({"value_range": (0, 1)} | fields))


def test_from_dict_names_unknown_and_missing_fields() -> None:
    with pytest.raises(InvalidImage, match=r"no 'sdt'; it has value_range, mean, std"):
        Preprocess.from_dict({"value_range": [0, 1], "sdt": 1})
    with pytest.raises(InvalidImage, match="lacks 'value_range'"):
        Preprocess.from_dict({"mean": [0.5]})


# --- sources ------------------------------------------------------------------------------------

METADATA = {"Image.BitmapPixelFormat": "Bgr8", "Image.NominalPixelRange": "NominalRange_0_255"}
VIT = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 24, "width": 24},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
TIMM = {
    "input_size": [3, 24, 24],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_sources_in_their_order(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    timm = write_json(tmp_path / "config.json", {"pretrained_cfg": TIMM})
    assert resolve_preprocess(model_path=model) == resolve_preprocess(timm)
    vit = write_json(tmp_path / "preprocessor_config.json", VIT)
    assert resolve_preprocess(model_path=model) == resolve_preprocess(vit)
    onnx = resolve_preprocess(metadata=METADATA)
    assert resolve_preprocess(metadata=METADATA, model_path=model) == onnx
    unit = resolve_preprocess("unit", metadata=METADATA, model_path=model)
    assert unit == UNIT
    assert len({resolve_preprocess(timm), resolve_preprocess(vit), onnx, unit}) == 4


def test_unknown_preprocessing_says_what_is_missing(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "vit", "hidden_size": 768})
    message = r"model\.onnx wants its pictures is unknown: .*Image\.BitmapPixelFormat .* a preset"
    with pytest.raises(InvalidImage, match=message):
        prepare(noise(24, 24, 3), NCHW, model_path=tmp_path / "model.onnx")
    with pytest.raises(InvalidImage, match="imagenet, inception, mobilenet_tf, caffe"):
        prepare(noise(24, 24, 3), NCHW, metadata={"author": "somebody"})


def test_arrays_need_no_preprocessing_but_show_a_known_one(tmp_path: Path) -> None:
    array = noise(1, 3, 24, 24).astype(np.float32)
    prepared = prepare(array, NCHW, metadata=METADATA)
    shown = pictures(array, "NCHW", prepared.preprocess)
    np.testing.assert_array_equal(shown, array.transpose(0, 2, 3, 1)[..., ::-1])
    (tmp_path / "config.json").write_text("{ damaged")
    assert prepare(array, NCHW, model_path=tmp_path / "m.onnx").preprocess is None
    with pytest.raises(InvalidImage, match="neither a preset"):
        prepare(array, NCHW, preprocess="imagnet")


@pytest.mark.parametrize(
    ("pixel_range", "white"),
    [
        ("NominalRange_0_255", (0, 255)),
        ("Normalized_0_1", (0, 1)),
        ("Normalized_1_1", (-1, 1)),
        ("NominalRange_16_235", (16, 235)),
    ],
)
@pytest.mark.parametrize("pixel_format", ["Gray8", "Rgb8", "Bgr8"])
def test_onnx_metadata(pixel_format: str, pixel_range: str, white: tuple[float, float]) -> None:
    metadata = {
        "image.bitmappixelformat": pixel_format.upper(),
        "Image.NominalPixelRange": pixel_range.lower(),
        "Image.ColorSpaceGamma": "SRGB",
    }
    pixels = np.zeros((24, 24, 3), np.uint8)
    pixels[..., 0] = 255
    channels = 1 if pixel_format == "Gray8" else 3
    array = prepare(pixels, (None, channels, 24, 24), np.float64, metadata=metadata).array
    lo, hi = white
    expected = {
        "Gray8": [lo + (hi - lo) * 76 / 255],  # 0.299 · 255 = 76.2
        "Rgb8": [hi, lo, lo],
        "Bgr8": [lo, lo, hi],
    }[pixel_format]
    np.testing.assert_allclose(array[0, :, 5, 5], expected, rtol=1e-15)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"Image.BitmapPixelFormat": "Rgba16"}, "BitmapPixelFormat is 'Rgba16'; supported: gray8"),
        ({"Image.BitmapPixelFormat": "Bgra8"}, "is 'Bgra8'"),
        ({"Image.NominalPixelRange": "wide"}, "NominalPixelRange is 'wide'"),
        ({"Image.ColorSpaceGamma": "Linear"}, "ColorSpaceGamma is 'Linear'; supported: srgb"),
    ],
)
def test_onnx_metadata_beyond_what_is_supported(changed: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        resolve_preprocess(metadata=METADATA | changed)


@pytest.mark.parametrize("key", METADATA)
def test_incomplete_onnx_metadata_names_what_is_missing(key: str) -> None:
    with pytest.raises(InvalidImage, match=f"{key} is missing"):
        resolve_preprocess(metadata={k: v for k, v in METADATA.items() if k != key})


def test_explicit_forms_agree(tmp_path: Path) -> None:
    wanted = PRESETS["caffe"]
    path = write_json(tmp_path / "mine.json", wanted.to_dict())
    for form in ("caffe", wanted, wanted.to_dict(), path, str(path)):
        assert resolve_preprocess(form) == wanted
    assert resolve_preprocess(VIT) == resolve_preprocess(write_json(path, VIT))


def test_explicit_forms_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(InvalidImage, match=r"'imagnet' is neither a preset \(imagenet, .* JSON"):
        resolve_preprocess("imagnet")
    with pytest.raises(InvalidImage, match="got int"):
        resolve_preprocess(3)  # type: ignore[arg-type]
    damaged = tmp_path / "a.json"
    damaged.write_text("{ damaged")
    with pytest.raises(InvalidImage, match=r"a\.json: not a readable JSON"):
        resolve_preprocess(damaged)
    with pytest.raises(InvalidImage, match="must hold a JSON object, got a list"):
        resolve_preprocess(write_json(damaged, [1]))


MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
CROP = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}


def hugging_face(kind: str, **changed: Any) -> dict[str, Any]:
    return VIT | {"image_processor_type": kind} | changed


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (VIT, {"resize": "squash", "size": (24, 24)}),
        (
            hugging_face("ViTImageProcessorFast", size=224, resample=3),
            {"resize": "squash", "size": (224, 224), "interpolation": "bicubic"},
        ),
        (
            hugging_face("DeiTImageProcessor", size={"height": 256, "width": 256}, **CROP),
            {"resize": "squash", "resize_size": 256, "size": (224, 224)},
        ),
        (
            hugging_face("CLIPImageProcessor", size={"shortest_edge": 256}, **CROP),
            {"resize_size": 256, "size": (224, 224)},
        ),
        (
            hugging_face("CLIPFeatureExtractor", size=224, do_center_crop=True, crop_size=224),
            {"resize_size": 224, "size": (224, 224)},
        ),
        (
            hugging_face("ConvNextImageProcessor", size={"shortest_edge": 224}, crop_pct=0.95),
            {"resize_size": 235, "size": (224, 224)},
        ),
        (
            hugging_face("ConvNextImageProcessor", size={"shortest_edge": 224}, crop_pct=None),
            {"resize_size": 256, "size": (224, 224)},
        ),
        (
            hugging_face("ConvNextFeatureExtractor", size=384, crop_pct=0.875),
            {"resize": "squash", "size": (384, 384)},
        ),
        (hugging_face("BitImageProcessor", do_resize=False), {"resize": "none"}),
        (
            hugging_face("ViTImageProcessor", do_normalize=False),
            {"resize": "squash", "size": (24, 24), "mean": (0,), "std": (1,)},
        ),
        (
            hugging_face("ViTImageProcessor", do_rescale=False),
            {"resize": "squash", "size": (24, 24), "value_range": (0, 255)},
        ),
        (
            hugging_face("EfficientNetImageProcessor", include_top=True, rescale_offset=True),
            {
                "resize": "squash",
                "size": (24, 24),
                "value_range": (-1, 0),
                "std": (0.25, 0.25, 0.25),
            },
        ),
    ],
)
def test_hugging_face_configs(config: dict[str, Any], fields: dict[str, Any]) -> None:
    expected = Preprocess(**({"value_range": (0, 1), "mean": MEAN, "std": STD} | fields))
    assert resolve_preprocess(config) == expected


def test_hugging_face_bgr_without_normalisation() -> None:
    config = {
        "feature_extractor_type": "MobileViTFeatureExtractor",
        "do_resize": True,
        "size": 288,
        "resample": 2,
        "do_center_crop": True,
        "crop_size": 256,
        "do_flip_channel_order": True,
    }
    assert resolve_preprocess(config) == Preprocess(
        value_range=(0, 1), channels="BGR", resize_size=288, size=(256, 256)
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hugging_face("LevitImageProcessor"), "'LevitImageProcessor' is not supported; Bit, CLIP"),
        ({"do_normalize": True, "feature_extractor_type": "WhisperFeatureExtractor"}, "Whisper"),
        ({k: v for k, v in VIT.items() if k != "image_processor_type"}, "'' is not supported"),
        ({k: v for k, v in VIT.items() if k != "resample"}, "resample is missing"),
        ({k: v for k, v in VIT.items() if k != "image_mean"}, "image_mean is missing"),
        (hugging_face("CLIPImageProcessor", size={"shortest_edge": 9}), "leaves the size open"),
        (hugging_face("BitImageProcessor", do_resize=False, do_center_crop=True), "without do_res"),
        (hugging_face("ViTImageProcessor", size={"height": 9, "width": 8}, **CROP), "stretched"),
        (hugging_face("ViTImageProcessor", size={"longest_edge": 9}), "height is missing"),
        (hugging_face("ViTImageProcessor", resample=9), "Resampling"),
        (hugging_face("ViTImageProcessor", image_std=[0, 0, 0]), "one positive number"),
        (hugging_face("ConvNextImageProcessor", size={"shortest_edge": "9"}), "not supported betw"),
    ],
)
def test_hugging_face_configs_beyond_what_is_supported(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    path = write_json(tmp_path / "preprocessor_config.json", config)
    with pytest.raises(InvalidImage, match=message) as caught:
        resolve_preprocess(model_path=tmp_path / "model.onnx")
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("mode", "resize"), [("center", "shortest"), ("squash", "squash")])
def test_timm_configs(nested: bool, mode: str, resize: Any) -> None:
    config = TIMM | {"crop_mode": mode}
    found = resolve_preprocess(
        {"architecture": "x", "pretrained_cfg": config} if nested else config
    )
    assert found == Preprocess(
        value_range=(0, 1),
        mean=tuple(IMAGENET_MEAN),
        std=tuple(IMAGENET_STD),
        resize=resize,
        crop_fraction=0.9,
        interpolation="bicubic",
        size=(24, 24),
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TIMM | {"crop_mode": "border"}, "crop_mode 'border' is not supported"),
        ({k: v for k, v in TIMM.items() if k != "mean"}, "mean is missing"),
        (TIMM | {"input_size": [224, 224]}, "not enough values"),
        (TIMM | {"interpolation": "random"}, "interpolation must be one of"),
        (TIMM | {"crop_pct": None}, "crop_fraction"),
    ],
)
def test_timm_configs_beyond_what_is_supported(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    path = write_json(tmp_path / "config.json", config)
    with pytest.raises(InvalidImage, match=message) as caught:
        resolve_preprocess(path)
    assert str(caught.value).startswith(str(path))
