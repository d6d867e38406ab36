"""Pictures and arrays become a model's input as stated, checked against recomputations by hand."""

from __future__ import annotations

import csv
import io
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pixels import FORMULAS, noise

from rectgrad_ref.errors import InvalidImage
from rectgrad_ref.images import (
    Prepared,
    infer_layout,
    load_picture,
    pictures,
    prepare,
)
from rectgrad_ref.preprocess import PRESETS, Preprocess

NCHW = (None, 3, 24, 24)
UNIT = PRESETS["unit"]


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def read(path: Path) -> NDArray[np.uint8]:
    picture = load_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def shown(prepared: Prepared) -> NDArray[np.uint8] | None:
    return pictures(prepared.array, prepared.layout, prepared.preprocess)


# --- layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((None, 3, 224, 224), "NCHW"),
        ((1, 1, 28, 28), "NCHW"),
        ((None, 28, 28, 1), "NHWC"),
        ((None, 32, 32, 3), "NHWC"),
        ((None, 3, None, None), "NCHW"),
        ((None, None, None, 3), "NHWC"),
        ((None, 4, 64, 64), "NCHW"),
        ((None, 64, 64, 4), "NHWC"),
        ((None, 3, 4, 4), "NCHW"),
        ((None, 4, 4, 1), "NHWC"),
    ],
)
def test_infer_layout(shape: tuple[int | None, ...], layout: str) -> None:
    assert infer_layout(shape) == layout


@pytest.mark.parametrize(
    "shape", [(None, 3, 8, 3), (1, 1, 1, 1), (None, 8, 8, 8), (1, None, 8, None), (1, 4, 8, 4)]
)
def test_ambiguous_layout_asks(shape: tuple[int | None, ...]) -> None:
    with pytest.raises(InvalidImage, match="say layout='NCHW' or layout='NHWC'"):
        infer_layout(shape)


def test_layout_needs_four_axes() -> None:
    with pytest.raises(InvalidImage, match=r"four axes, this one is \(N, 784\)"):
        infer_layout((None, 784))


@given(
    st.sampled_from([1, 3]), st.integers(5, 9), st.integers(5, 9), st.sampled_from(["NCHW", "NHWC"])
)
def test_both_layouts_hold_the_same_picture(
    channels: int, height: int, width: int, layout: str
) -> None:
    pixels = noise(height, width, 3)
    shape = (None, channels, height, width) if layout == "NCHW" else (None, height, width, channels)
    prepared = prepare(pixels, shape, preprocess="raw")
    values = prepared.array[0].transpose(1, 2, 0) if layout == "NCHW" else prepared.array[0]
    assert prepared.array.flags.c_contiguous
    assert shown(prepared) is not None
    np.testing.assert_array_equal(shown(prepared)[0], np.broadcast_to(values, pixels.shape))
    if channels == 3:
        np.testing.assert_array_equal(values, pixels)


# --- resize and crop ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "crop", "picture", "top", "left"),
    [
        # The pictures have the resized size already, so that resizing leaves them alone.
        ("imagenet", (224, 224), (256, 300), 16, 38),
        ("imagenet", (224, 224), (301, 256), 38, 16),  # 38.5 goes to the even neighbour,
        ("caffe", (227, 227), (256, 302), 14, 38),  # and so does 37.5
        ("caffe", (227, 227), (302, 256), 38, 14),
        ("inception", (299, 299), (341, 341), 21, 21),
        ("cifar10", (32, 32), (32, 32), 0, 0),
        ("cifar10", (32, 32), (32, 41), 0, 4),
    ],
)
def test_centre_crop_offsets(
    preset: str, crop: tuple[int, int], picture: tuple[int, int], top: int, left: int
) -> None:
    pixels = noise(*picture, 3)
    prepared = prepare(pixels, (None, 3, *crop), np.float64, preprocess=preset)
    seen = pixels[top : top + crop[0], left : left + crop[1]]
    np.testing.assert_array_equal(shown(prepared), [seen])
    expected = FORMULAS[preset](seen.astype(np.float64)).transpose(2, 0, 1)
    np.testing.assert_allclose(prepared.array, expected[None], rtol=0, atol=1e-13)


def antialiased_bilinear(pixels: NDArray[np.uint8], axis: int, length: int) -> NDArray[np.float64]:
    """Resampling by a triangle as wide as the scale, from its definition, rounded half up."""
    moved = np.moveaxis(pixels.astype(np.float64), axis, 0)
    scale = len(moved) / length
    centres = (np.arange(length) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(len(moved)) - centres[:, None]) / max(scale, 1)
    weights = np.maximum(1 - distance, 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.moveaxis(np.floor(np.tensordot(weights, moved, axes=1) + 0.5), 0, axis)


@pytest.mark.parametrize(
    ("preprocess", "model", "picture", "resized"),
    [
        (PRESETS["imagenet"], (28, 28), (70, 101), (32, 46)),  # 101·32/70 = 46.2
        (PRESETS["imagenet"], (28, 28), (101, 70), (46, 32)),
        (replace(UNIT, resize="squash"), (24, 20), (70, 101), (24, 20)),
        (replace(UNIT, resize="squash", crop_fraction=0.5), (24, 20), (90, 50), (48, 40)),
        (replace(UNIT, resize="squash", resize_size=30), (24, 20), (90, 50), (30, 30)),
        (UNIT, (20, 30), (70, 70), (30, 30)),
        (UNIT, (20, 30), (40, 120), (20, 60)),
        (UNIT, (40, 40), (10, 13), (40, 52)),  # enlarged
        (replace(UNIT, resize_size=40), (20, 30), (70, 101), (40, 57)),
    ],
)
def test_resized_pixels(
    preprocess: Preprocess,
    model: tuple[int, int],
    picture: tuple[int, int],
    resized: tuple[int, int],
) -> None:
    pixels = noise(*picture, 3)
    prepared = prepare(pixels, (None, *model, 3), preprocess=preprocess)
    # Pillow resizes along the width first and rounds in between.
    wide = antialiased_bilinear(pixels, 1, resized[1])
    both = antialiased_bilinear(wide.astype(np.uint8), 0, resized[0])
    top, left = (round((r - m) / 2) for r, m in zip(resized, model, strict=True))
    expected = both[top : top + model[0], left : left + model[1]]
    assert shown(prepared) is not None
    assert np.abs(shown(prepared)[0] - expected).max() <= 1  # Pillow's weights are fixed-point


def test_interpolation_is_the_one_asked_for() -> None:
    pixels = noise(6, 6, 3)
    preprocess = replace(UNIT, interpolation="nearest")
    prepared = prepare(pixels, (None, 3, 12, 12), preprocess=preprocess)
    np.testing.assert_array_equal(shown(prepared), [pixels.repeat(2, 0).repeat(2, 1)])


def test_resize_none_takes_only_the_models_size() -> None:
    preprocess = replace(UNIT, resize="none")
    pixels = noise(24, 24, 3)
    np.testing.assert_array_equal(shown(prepare(pixels, NCHW, preprocess=preprocess)), [pixels])
    with pytest.raises(InvalidImage, match=r"is 24×25 .*takes 24×24, and preprocess has resize"):
        prepare(noise(24, 25, 3), NCHW, preprocess=preprocess)


def test_resize_size_smaller_than_the_model() -> None:
    with pytest.raises(InvalidImage, match="resizes to 256 pixels, fewer than the model's 299×299"):
        prepare(noise(9, 9, 3), (None, 3, 299, 299), preprocess="caffe")


def test_resize_size_for_another_crop() -> None:
    preprocess = replace(UNIT, resize_size=32, size=(28, 28))
    with pytest.raises(InvalidImage, match=r"crop of \(28, 28\), but the model takes \(24, 24\)"):
        prepare(noise(40, 40, 3), NCHW, preprocess=preprocess)


def test_elongated_picture_is_refused_before_it_grows() -> None:
    with pytest.raises(InvalidImage, match="too elongated"):
        prepare(noise(1, 20_000, 3), (None, 3, 224, 224), preprocess="imagenet")


def test_symbolic_height_and_width_come_from_the_preprocess() -> None:
    symbolic = (None, 3, None, None)
    assert prepare(noise(50, 60, 3), symbolic, preprocess="cifar10").array.shape == (1, 3, 32, 32)
    assert prepare(
        noise(50, 60, 3), symbolic, preprocess=replace(UNIT, resize="none")
    ).array.shape == (
        1,
        3,
        50,
        60,
    )
    half = prepare(noise(50, 60, 3), (None, 3, None, 40), preprocess=replace(UNIT, size=(20, 30)))
    assert half.array.shape == (1, 3, 20, 40)
    with pytest.raises(InvalidImage, match="symbolic and preprocess has no size"):
        prepare(noise(50, 60, 3), symbolic, preprocess="unit")


def test_fixed_size_wins_over_the_presets() -> None:
    assert prepare(noise(50, 60, 3), NCHW, preprocess="imagenet").array.shape == (1, 3, 24, 24)


# --- reading pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "ppm"])
def test_rgb_files_are_read_exactly(tmp_path: Path, suffix: str) -> None:
    pixels = noise(11, 13, 3)
    options = {"lossless": True} if suffix == "webp" else {}
    np.testing.assert_array_equal(
        read(saved(tmp_path / f"a.{suffix}", Image.fromarray(pixels), **options)), pixels
    )


UPRIGHT: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    pixels = noise(5, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(read(path), UPRIGHT[orientation](pixels))


def test_exif_of_a_jpeg(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = read(saved(tmp_path / "a.jpg", Image.fromarray(pixels), exif=exif, quality=100))
    assert upright.shape == (32, 16, 3)
    assert upright[:16, :, 0].min() > 200 and upright[16:, :, 0].max() < 50


def on_white(colour: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.float64]:
    opacity = alpha[..., None] / 255
    return colour * opacity + 255 * (1 - opacity)


def test_rgba_is_laid_on_white(tmp_path: Path) -> None:
    pixels = noise(16, 16, 4)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    shown = read(saved(tmp_path / "a.png", Image.fromarray(pixels)))
    assert np.abs(shown - on_white(pixels[..., :3], pixels[..., 3])).max() <= 1
    assert (shown[0] == 255).all()
    np.testing.assert_array_equal(shown[1], pixels[1, :, :3])


def test_grey_with_alpha_is_laid_on_white(tmp_path: Path) -> None:
    pixels = noise(16, 16, 2)
    shown = read(saved(tmp_path / "a.png", Image.fromarray(pixels, "LA")))
    assert np.abs(shown - on_white(pixels[..., :1], pixels[..., 1])).max() <= 1


def test_transparent_colour_key_is_white(tmp_path: Path) -> None:
    pixels = np.array([[[10, 20, 30], [40, 50, 60]]], np.uint8)
    path = saved(tmp_path / "a.png", Image.fromarray(pixels), transparency=(10, 20, 30))
    np.testing.assert_array_equal(read(path), [[[255, 255, 255], [40, 50, 60]]])


@pytest.mark.parametrize("transparent", [False, True])
def test_palette(tmp_path: Path, transparent: bool) -> None:
    colours = noise(4, 3)
    indices = np.arange(16, dtype=np.uint8).reshape(4, 4) % 4
    image = Image.fromarray(indices, "P")
    image.putpalette(colours.tobytes())
    options = {"transparency": 2} if transparent else {}
    expected = colours.copy()
    if transparent:
        expected[2] = 255
    path = saved(tmp_path / "a.png", image, **options)
    np.testing.assert_array_equal(read(path), expected[indices])


def test_grey_and_bilevel_files(tmp_path: Path) -> None:
    grey = noise(9, 7)
    np.testing.assert_array_equal(
        read(saved(tmp_path / "a.png", Image.fromarray(grey))), grey[..., None].repeat(3, -1)
    )
    bits = grey > 127
    np.testing.assert_array_equal(
        read(saved(tmp_path / "b.png", Image.fromarray(bits))),
        (255 * bits)[..., None].repeat(3, -1),
    )


SIXTEEN_BITS: dict[str, Callable[[Path, NDArray[np.uint16]], Path]] = {
    "png": lambda folder, levels: saved(folder / "a.png", Image.fromarray(levels)),
    "tiff": lambda folder, levels: saved(folder / "a.tiff", Image.fromarray(levels)),
    "tiff_big_endian": lambda folder, levels: saved(
        folder / "a.tiff",
        Image.frombytes("I;16B", levels.shape[::-1], levels.astype(">u2").tobytes()),
    ),
    "pgm": lambda folder, levels: pgm(folder / "a.pgm", levels),
}


def pgm(path: Path, levels: NDArray[np.uint16]) -> Path:
    height, width = levels.shape
    path.write_bytes(b"P5 %d %d 65535\n" % (width, height) + levels.astype(">u2").tobytes())
    return path


@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, kind: str) -> None:
    levels = noise(12, 10, dtype=np.uint16)
    levels[0, :4] = [0, 128, 129, 65535]
    shown = read(SIXTEEN_BITS[kind](tmp_path, levels))
    np.testing.assert_array_equal(shown[..., 0], np.rint(levels / 257))
    assert list(shown[0, :4, 0]) == [0, 0, 1, 255]
    assert (shown == shown[..., :1]).all()


def test_sixteen_bit_picture_is_turned_upright(tmp_path: Path) -> None:
    levels = noise(4, 7, dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 8
    shown = read(saved(tmp_path / "a.png", Image.fromarray(levels), exif=exif))
    np.testing.assert_array_equal(shown[..., 0], np.rint(np.rot90(levels) / 257))


def test_cmyk(tmp_path: Path) -> None:
    inks = noise(16, 16, 4)
    shown = read(saved(tmp_path / "a.tiff", Image.fromarray(inks, "CMYK")))
    paper = 255 - inks.astype(np.float64)
    assert np.abs(shown - paper[..., :3] * paper[..., 3:] / 255).max() <= 1


def test_cmyk_jpeg(tmp_path: Path) -> None:
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[..., 1:3] = 255
    shown = read(saved(tmp_path / "a.jpg", Image.fromarray(inks, "CMYK"), quality=100))
    np.testing.assert_allclose(shown, np.broadcast_to([255, 0, 0], shown.shape), atol=3)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read(path), np.asarray(frames[0]))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidImage, match=r"none\.png: no such picture file"):
        load_picture(tmp_path / "none.png")
    with pytest.raises(InvalidImage, match="a folder, not a picture"):
        load_picture(tmp_path)
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    with pytest.raises(InvalidImage, match=r"notes\.png: not a picture in a format"):
        load_picture(text)
    empty = tmp_path / "empty.jpg"
    empty.touch()
    with pytest.raises(InvalidImage, match=r"empty\.jpg: not a picture"):
        load_picture(empty)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "gif", "bmp"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(noise(64, 64, 3)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InvalidImage, match=rf"a\.{suffix}: damaged, truncated"):
        load_picture(path)


@given(st.binary(max_size=40), st.integers(0, 120))
def test_damaged_png_is_read_or_refused_cleanly(junk: bytes, at: int) -> None:
    whole = io.BytesIO()
    Image.fromarray(noise(6, 6, 3)).save(whole, "PNG")
    content = bytearray(whole.getvalue())
    content[at : at + len(junk)] = junk
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "damaged.png"
        path.write_bytes(content)
        try:
            assert load_picture(path).mode == "RGB"
        except InvalidImage as error:
            assert str(error).startswith(str(path))


@pytest.mark.parametrize("limit", [10, 30])
def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Over twice the limit Pillow raises; over the limit it warns, which `-W error` raises too."""
    path = saved(tmp_path / "bomb.png", Image.fromarray(noise(6, 6)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InvalidImage, match=r"bomb\.png: too many pixels"):
            load_picture(path)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_range_are_refused(tmp_path: Path, dtype: Any) -> None:
    path = saved(tmp_path / "a.tiff", Image.fromarray(np.full((4, 4), 300, dtype)))
    with pytest.raises(InvalidImage, match=r"a\.tiff: pixels of mode [IF] .* no defined range"):
        load_picture(path)


# --- prepare: pictures --------------------------------------------------------------------------


def test_path_picture_and_array_agree(tmp_path: Path) -> None:
    pixels = noise(40, 30, 3)
    image = Image.fromarray(pixels)
    path = saved(tmp_path / "a.png", image)
    arrays = [
        prepare(item, NCHW, preprocess="imagenet").array
        for item in (path, str(path), image, pixels, [image])
    ]
    for array in arrays[1:]:
        np.testing.assert_array_equal(array, arrays[0])
    assert arrays[0].dtype == np.float32


@pytest.mark.parametrize("channels", [0, 4])
def test_grey_and_rgba_arrays_are_pictures(channels: int) -> None:
    pixels = noise(24, 24, 4)
    if channels:
        expected = np.rint(on_white(pixels[..., :3], pixels[..., 3]))
    else:
        pixels = pixels[..., 0]
        expected = pixels[..., None].repeat(3, -1).astype(np.float64)
    prepared = prepare(pixels, (1, 24, 24, 3), preprocess="raw")
    assert np.abs(prepared.array[0] - expected).max() <= (1 if channels else 0)


def test_colour_to_grey_uses_the_luma_weights() -> None:
    pixels = noise(24, 24, 3)
    prepared = prepare(pixels, (None, 1, 24, 24), preprocess="raw")
    weighted = pixels.astype(np.int64) @ np.array([19595, 38470, 7471])
    luma = (weighted + 0x8000) >> 16
    np.testing.assert_array_equal(prepared.array[0, 0], luma)
    assert shown(prepared) is not None
    np.testing.assert_array_equal(shown(prepared)[0], luma[..., None].repeat(3, -1))


def test_grey_preprocess_settles_a_symbolic_channel_axis() -> None:
    prepared = prepare(noise(28, 28), (None, None, 28, 28), layout="NCHW", preprocess="mnist")
    assert prepared.array.shape == (1, 1, 28, 28)


def test_list_of_mixed_sizes_and_kinds(tmp_path: Path) -> None:
    pixels = [noise(40, 30, 3), noise(24, 24, 3, seed=1), noise(31, 77, 3, seed=2)]
    path = saved(tmp_path / "a.png", Image.fromarray(pixels[0]))
    batch = noise(2, 3, 24, 24).astype(np.float32) / 255
    together = prepare(
        [path, pixels[1], batch, Image.fromarray(pixels[2])], NCHW, preprocess="unit"
    )
    assert together.array.shape == (5, 3, 24, 24)
    for index, item in ((0, pixels[0]), (1, pixels[1]), (4, pixels[2])):
        alone = prepare(item, NCHW, preprocess="unit")
        np.testing.assert_array_equal(together.array[index], alone.array[0])
        assert shown(together) is not None and shown(alone) is not None
        np.testing.assert_array_equal(shown(together)[index], shown(alone)[0])
    np.testing.assert_array_equal(together.array[2:4], batch)


def test_images_of_one_call_must_agree_in_size() -> None:
    preprocess = replace(UNIT, resize="none")
    with pytest.raises(InvalidImage, match=r"array 1 of 2 \(3, 8, 9\), array 2 of 2 \(3, 9, 9\)"):
        prepare([noise(8, 9, 3), noise(9, 9, 3)], (None, 3, None, None), preprocess=preprocess)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_are_rounded_once_to_the_models_dtype(dtype: Any) -> None:
    pixels = noise(24, 24, 3)
    prepared = prepare(pixels, NCHW, dtype, preprocess="cifar10_standard")
    exact = FORMULAS["cifar10_standard"](pixels.astype(np.float64)).transpose(2, 0, 1)
    assert prepared.array.dtype == dtype
    tolerance = np.finfo(dtype).eps
    np.testing.assert_allclose(prepared.array[0], exact, rtol=tolerance, atol=1e-15)


@pytest.mark.parametrize("preset", FORMULAS)
def test_pictures_of_a_picture_and_of_its_array_are_the_same(preset: str) -> None:
    channels = 1 if PRESETS[preset].channels == "grey" else 3
    model = (None, channels, 32, 32)
    picture = prepare(noise(50, 40, 3), model, preprocess=preset)
    array = prepare(picture.array, model, preprocess=preset)
    np.testing.assert_array_equal(array.array, picture.array)
    np.testing.assert_array_equal(shown(array), shown(picture))


def test_integer_models() -> None:
    pixels = noise(24, 24, 3)
    prepared = prepare(pixels, NCHW, np.uint8, preprocess="raw")
    assert prepared.array.dtype == np.uint8
    np.testing.assert_array_equal(prepared.array[0], pixels.transpose(2, 0, 1))
    np.testing.assert_array_equal(prepare(pixels, (1, 24, 24, 3), np.uint8).array, [pixels])
    with pytest.raises(InvalidImage, match=r"takes uint8, but preprocess makes values .*'raw'"):
        prepare(pixels, NCHW, np.uint8, preprocess="imagenet")
    with pytest.raises(InvalidImage, match="object, which holds no pixel values"):
        prepare(pixels, NCHW, np.object_, preprocess="raw")


def test_channels_that_do_not_fit_the_model() -> None:
    pixels = noise(24, 24, 3)
    with pytest.raises(InvalidImage, match=r"takes 3 channels, .*'grey' makes 1"):
        prepare(pixels, NCHW, preprocess="mnist")
    with pytest.raises(InvalidImage, match="three channels, but the model takes one"):
        prepare(pixels, (None, 1, 24, 24), preprocess="imagenet")
    with pytest.raises(InvalidImage, match="takes 4 channels"):
        prepare(pixels, (None, 4, 24, 24), preprocess="unit")


def test_function_as_preprocess() -> None:
    pixels = noise(30, 30, 4)
    seen = []

    def function(picture: NDArray[np.uint8]) -> NDArray[Any]:
        seen.append(picture)
        return picture[:24, :24].transpose(2, 0, 1) * 2.0

    prepared = prepare(pixels, NCHW, preprocess=function)
    assert seen[0].shape == (30, 30, 3) and seen[0].dtype == np.uint8
    assert prepared.preprocess is function and prepared.array.dtype == np.float32
    np.testing.assert_array_equal(prepared.array[0], seen[0][:24, :24].transpose(2, 0, 1) * 2.0)
    with pytest.raises(
        InvalidImage, match=r"what preprocess makes of the array must have .*24, 24"
    ):
        prepare(pixels, NCHW, preprocess=lambda picture: picture.astype(float))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "no images"),
        (3.5, "must be a path, a PIL image or an array, got float"),
        ([None], "got NoneType"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (Image.new("RGB", (0, 5)), "no pixels"),
    ],
)
def test_what_is_no_image(image: Any, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        prepare(image, NCHW, preprocess="unit")


def test_pictures_need_a_known_layout() -> None:
    pixels, shape = noise(8, 8, 3), (None, 3, 8, 3)
    with pytest.raises(InvalidImage, match="say layout="):
        prepare(pixels, shape, preprocess="unit")
    assert prepare(pixels, shape, layout="NCHW", preprocess="unit").array.shape == (1, 3, 8, 3)
    with pytest.raises(InvalidImage, match="four axes"):
        prepare(pixels, (None, 784), preprocess="unit")
    with pytest.raises(InvalidImage, match="layout must be"):
        prepare(pixels, shape, layout="CHW", preprocess="unit")  # type: ignore[arg-type]
    with pytest.raises(InvalidImage, match="needs a model input with four axes"):
        prepare(np.zeros((1, 784)), (None, 784), layout="NCHW")


# --- prepare: arrays ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 24, 24), (3, 24, 24)])
def test_preprocessed_arrays_pass_untouched(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    prepared = prepare(array, NCHW)
    np.testing.assert_array_equal(prepared.array, array.reshape(-1, 3, 24, 24))
    assert prepared.array.dtype == np.float32 and prepared.preprocess is None


def test_arrays_of_other_ranks_have_no_picture() -> None:
    prepared = prepare(np.ones((4, 784)), (None, 784))
    assert prepared.array.shape == (4, 784) and shown(prepared) is None
    assert shown(prepare(np.ones((1, 3, 8, 3)), (None, 3, 8, 3))) is None
    assert shown(prepare(np.ones((1, 3, 8, 3)), (None, 3, 8, 3), layout="NHWC")) is not None


def test_a_fixed_batch_does_not_limit_the_number_of_images() -> None:
    assert prepare(np.ones((5, 1, 28, 28)), (1, 1, 28, 28)).array.shape == (5, 1, 28, 28)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_unknown_preprocessing_is_shown_by_scaling_each_sample(layout: str) -> None:
    values = np.array([[[-1.0, 0.0], [1.0, 3.0]], [[10.0, 10.0], [10.0, 10.0]]])
    array = values[:, None] if layout == "NCHW" else values[..., None]
    pictures = shown(prepare(array, (None, *array.shape[1:])))
    assert pictures is not None and pictures.shape == (2, 2, 2, 3)
    np.testing.assert_array_equal(pictures[0, ..., 0], [[0, 64], [128, 255]])
    assert not pictures[1].any()


def test_arrays_of_other_channel_counts_are_shown_in_grey() -> None:
    array = np.random.default_rng(0).normal(size=(1, 6, 8, 8))
    pictures = shown(prepare(array, (None, 6, 8, 8), layout="NCHW", preprocess="unit"))
    mean = array.mean(axis=1)[0]
    expected = np.rint(255 * (mean - mean.min()) / np.ptp(mean))
    assert pictures is not None
    np.testing.assert_array_equal(pictures[0], expected[..., None].repeat(3, -1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    array = np.zeros((2, 3, 24, 24), np.float32)
    array[1, 2, 3, 4] = bad
    with pytest.raises(InvalidImage, match=r"NaN or infinity .*first at \(1, 2, 3, 4\)"):
        prepare(array, NCHW)


def test_overflow_in_the_models_dtype_is_refused() -> None:
    with pytest.raises(InvalidImage, match="as float16"):
        prepare(np.full((3, 24, 24), 1e6), NCHW, np.float16)


@pytest.mark.parametrize(
    ("array", "model", "message"),
    [
        (np.zeros((3, 25, 24)), NCHW, r"shape \(N, 3, 24, 24\), .* got \(3, 25, 24\)$"),
        (np.zeros((24, 24)), NCHW, r"got \(24, 24\)$"),
        (np.zeros((1, 24, 24, 3)), NCHW, r"looks like NHWC: pass array\.transpose\(0, 3, 1, 2\)"),
        (np.zeros((24, 24, 3)), NCHW, r"looks like HWC: pass array\.transpose\(2, 0, 1\)"),
        (np.zeros((3, 24, 24)), (None, 24, 24, 3), r"like CHW: pass array\.transpose\(1, 2, 0\)"),
        (np.zeros((1, 3, 24, 24)), (None, 24, 24, 3), r"NCHW: .*transpose\(0, 2, 3, 1\)"),
        (np.zeros((3, 24, 24), int), NCHW, "must be float32, .* got int64"),
        (np.zeros((3, 24, 24), bool), NCHW, "got bool"),
        (np.zeros((3, 24, 24), complex), NCHW, "got complex128"),
        (np.array(["cat.png"]), NCHW, "got <U7"),
        (np.zeros((3, 24, 24), np.uint8), NCHW, r"uint8 of shape \(3, 24, 24\): a picture must be"),
        (np.zeros((2, 24, 24, 3), np.uint8), NCHW, "several a list of these"),
        (np.zeros((24, 24, 3), np.uint16), NCHW, "got uint16"),
        (np.zeros((0, 3, 24, 24)), NCHW, "is empty"),
    ],
)
def test_arrays_that_do_not_fit(array: NDArray[Any], model: Any, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        prepare(array, model, preprocess="unit")


def test_the_transposition_that_a_message_proposes_works() -> None:
    array = np.random.default_rng(0).normal(size=(2, 24, 24, 3))
    with pytest.raises(InvalidImage, match=r"\.transpose\((.*)\)") as caught:
        prepare(array, NCHW)
    proposed = re.search(r"transpose\(([^)]*)\)", str(caught.value))
    assert proposed is not None
    axes = [int(axis) for axis in proposed[1].split(",")]
    prepared = prepare(array.transpose(axes), NCHW, np.float64).array
    np.testing.assert_array_equal(prepared[:, 1], array[..., 1])


# --- a real network on real photos --------------------------------------------------------------


def photo_classes(shared_data: Path, names: list[str]) -> dict[str, str]:
    """Each photo's first class by SqueezeNet 1.1, as the data's own list records it."""
    classes = {}
    with (shared_data / "MANIFEST.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if row["file"].startswith("photos/"):
                stated = re.search(r"squeezenet1\.1 top1=([^;]*)", row["notes"])
                number = re.search(
                    r"ImageNet class (\d+) .*top-1 right for squeezenet1\.1", row["notes"]
                )
                if stated:
                    classes[row["file"]] = stated[1].strip()
                elif number:
                    classes[row["file"]] = names[int(number[1])]
    return classes


def test_squeezenet_recognises_every_photo_with_the_caffe_preset(shared_data: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    models = shared_data / "models"
    lines = (models / "imagenet_synsets.txt").read_text(encoding="utf-8").splitlines()
    names = [line.partition(" ")[2] for line in lines]
    expected = photo_classes(shared_data, names)
    assert len(expected) == 37
    session = onnxruntime.InferenceSession(models / "imagenet_squeezenet1.1_logits.onnx")
    photos = [shared_data / file for file in expected]
    array = prepare(photos, (None, 3, 227, 227), preprocess="caffe").array
    (logits,) = session.run(None, {"data": array})
    assert [names[index] for index in logits.argmax(axis=1)] == list(expected.values())
