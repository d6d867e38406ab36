"""From a picture file, PIL image or array to the model's input, and back to pixels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InvalidImage
from .preprocess import (
    PathLike,
    Preprocess,
    PreprocessFunction,
    PreprocessLike,
    resolve_preprocess,
)

Layout: TypeAlias = Literal["NCHW", "NHWC"]
Shape: TypeAlias = Sequence[int | None]
ImageLike: TypeAlias = PathLike | Image.Image | NDArray[Any]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` returns.

    Attributes
    ----------
    array
        The model's input, in its shape, axis order and dtype; the batch on axis 0.
    layout
        The axis order of `array`; None where it is no image (not 4-D, or its channel axis unknown).
    preprocess
        What was applied to pictures, or presumed of arrays to show them; None where unknown.
    """

    array: NDArray[Any]
    layout: Layout | None
    preprocess: Preprocess | PreprocessFunction | None


def prepare(
    images: ImageLike | Sequence[ImageLike],
    input_shape: Shape,
    input_dtype: DTypeLike = np.float32,
    *,
    layout: Layout | None = None,
    preprocess: PreprocessLike | None = None,
    metadata: Mapping[str, str] | None = None,
    model_path: PathLike | None = None,
) -> Prepared:
    """One image, or a list of images of any sizes, as a batch for a model.

    Parameters
    ----------
    images
        Each a picture (a path, a PIL image, or a uint8 array of shape (H, W), (H, W, 3) or
        (H, W, 4)), which is preprocessed; or an array of the model's own dtype kind and shape, with
        or without the batch axis, which is preprocessed already and passes untouched (but for
        rounding to `input_dtype`). A uint8 array of another shape is refused; one that fits an
        integer model's own shape is taken as preprocessed.
    input_shape
        The model input's shape with its batch axis, None for a symbolic length, such as
        (None, 3, 224, 224). Its axis 0 does not limit the number of images.
    input_dtype
        The model input's dtype.
    layout
        The meaning of the four axes; by default what `infer_layout` finds.
    preprocess, metadata, model_path
        Where the preprocessing comes from: see `resolve_preprocess`. Arrays need none of them; a
        known one is then inverted to show them.

    Raises
    ------
    InvalidImage
        A picture cannot be read; an array has another shape or kind than the model's input, or NaN
        or infinity in it; the preprocessing is unknown or does not fit the model.
    """
    items = list(images) if isinstance(images, (list, tuple)) else [images]
    if not items:
        raise InvalidImage("no images given")
    model = _ModelInput(tuple(input_shape), np.dtype(input_dtype), layout)
    names = [_name(item, index, len(items)) for index, item in enumerate(items)]
    loaded = [_load(item, model, name) for item, name in zip(items, names, strict=True)]
    needed = any(isinstance(item, Image.Image) for item in loaded)
    model = model.with_layout(needed)
    recipe = _recipe(preprocess, metadata, model_path, needed)
    batches = [_batch(item, model, recipe, name) for item, name in zip(loaded, names, strict=True)]
    if len({array.shape[1:] for array in batches}) > 1:
        sizes = ", ".join(f"{n} {a.shape[1:]}" for n, a in zip(names, batches, strict=True))
        raise InvalidImage(f"the images of one call must have one size, got {sizes}")
    array = np.ascontiguousarray(np.concatenate(batches))
    return Prepared(array, model.layout, recipe)


def pictures(
    array: NDArray[Any], layout: Layout | None, recipe: Preprocess | PreprocessFunction | None
) -> NDArray[np.uint8] | None:
    """What each pixel of a model's input looks like.

    Returns
    -------
    (N, H, W, 3) RGB uint8: the inverse of the recipe where a fitting one is known, else each sample
    scaled to 0 … 255. None without a layout.
    """
    if layout is None:
        return None
    values = np.moveaxis(array, 1, -1) if layout == "NCHW" else array
    if isinstance(recipe, Preprocess):
        with suppress(InvalidImage):
            return _as_rgb(recipe.invert(values))
    values = np.asarray(values, np.float64)
    if values.shape[-1] not in (1, 3):
        values = values.mean(axis=-1, keepdims=True)
    lo = values.min(axis=(1, 2, 3), keepdims=True)
    extent = values.max(axis=(1, 2, 3), keepdims=True) - lo
    return _as_rgb(np.rint(255 * (values - lo) / np.where(extent > 0, extent, 1)).astype(np.uint8))


def _as_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:-1], 3)))


def load_picture(path: PathLike) -> Image.Image:
    """The picture in a file as upright RGB, 8 bits a channel.

    EXIF orientation is applied, transparency laid on white, 16-bit grey scaled by 1/257; palette,
    grey, CMYK and other colour spaces are converted by Pillow. Of an animation, the first frame.

    Raises
    ------
    InvalidImage
        The file is missing, a folder, no picture, damaged, has no defined range (32-bit or float
        pixels) or has so many pixels that Pillow takes it for a decompression bomb.
    """
    with readable(str(path)), Image.open(path) as image:
        return _upright_rgb(image, str(path))


def infer_layout(shape: Shape) -> Layout:
    """The axis order of a model input: the channels are whichever of axes 1 and 3 has 1, 3 or 4.

    A length of 1 or 3 goes before 4, so (N, 3, 4, 4) is "NCHW".

    Raises
    ------
    InvalidImage
        Both axes or neither could be the channels, or there are not four axes.
    """
    if len(shape) != 4:
        raise InvalidImage(
            f"a picture needs a model input with four axes, this one is {_shown_shape(shape)}; "
            "pass an array in that shape"
        )
    for counts in ((1, 3), (4,)):
        first, last = shape[1] in counts, shape[3] in counts
        if first != last:
            return "NCHW" if first else "NHWC"
        if first:
            break
    raise InvalidImage(
        f"cannot tell the channel axis of a model input of shape {_shown_shape(shape)}; "
        "say layout='NCHW' or layout='NHWC'"
    )


# --- pictures -----------------------------------------------------------------------------------


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn what reading a picture may raise into InvalidImage about `name`."""
    try:
        yield
    except InvalidImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidImage(f"{name}: too many pixels to be read safely ({error})") from error
    except FileNotFoundError as error:
        raise InvalidImage(f"{name}: no such picture file") from error
    except IsADirectoryError as error:
        raise InvalidImage(f"{name}: a folder, not a picture file") from error
    except UnidentifiedImageError as error:
        raise InvalidImage(f"{name}: not a picture in a format that Pillow reads") from error
    # Pillow's decoders let through whatever a damaged file makes their parsing raise.
    except Exception as error:
        raise InvalidImage(f"{name}: damaged, truncated or unreadable picture: {error}") from error


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise InvalidImage(f"{name} has no pixels: its size is {image.width}×{image.height}")
    # Pillow opens 16-bit PGM as mode I; any other I, and F, comes without a range to scale from.
    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode in ("I", "F") and not sixteen_bit:
        raise InvalidImage(
            f"{name}: pixels of mode {image.mode} (32 bits) have no defined range; "
            "convert the picture to 8 or 16 bits a channel"
        )
    upright = ImageOps.exif_transpose(image)
    if sixteen_bit:
        levels = np.rint(np.asarray(upright) / 257).astype(np.uint8)
        return Image.fromarray(levels).convert("RGB")
    if upright.has_transparency_data:
        opaque = upright.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return upright.convert("RGB")


def _resized_and_cropped(
    picture: Image.Image, size: tuple[int, int], recipe: Preprocess, name: str
) -> Image.Image:
    """The part of `picture` that the model sees, of `size` = (height, width)."""
    height, width = size
    if recipe.resize == "none":
        if (picture.height, picture.width) != size:
            raise InvalidImage(
                f"{name} is {picture.height}×{picture.width} (height × width), the model takes "
                f"{height}×{width}, and preprocess has resize='none'"
            )
        return picture
    if recipe.resize_size is not None and recipe.size not in (None, size):
        raise InvalidImage(
            f"preprocess resizes to {recipe.resize_size} pixels for a crop of {recipe.size}, "
            f"but the model takes {size}"
        )
    new_height, new_width = _resized_size(picture, size, recipe)
    if new_height < height or new_width < width:
        raise InvalidImage(
            f"preprocess resizes to {recipe.resize_size} pixels, fewer than the model's "
            f"{height}×{width} (height × width)"
        )
    # A picture of a few pixels by thousands would grow without bound on its long side.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and new_height * new_width > limit:
        raise InvalidImage(
            f"{name} is too elongated ({picture.height}×{picture.width}): resized to cover "
            f"{height}×{width} it would have {new_height * new_width} pixels"
        )
    resample = Image.Resampling[recipe.interpolation.upper()]
    resized = picture.resize((new_width, new_height), resample)
    top, left = round((new_height - height) / 2), round((new_width - width) / 2)
    return resized.crop((left, top, left + width, top + height))


def _resized_size(
    picture: Image.Image, size: tuple[int, int], recipe: Preprocess
) -> tuple[int, int]:
    """(height, width) before the crop."""
    if recipe.resize_size is not None:
        height = width = recipe.resize_size
    else:
        height, width = (int(length / recipe.crop_fraction) for length in size)
    if recipe.resize == "squash":
        return height, width
    if height * picture.width >= width * picture.height:
        return height, picture.width * height // picture.height
    return picture.height * width // picture.width, width


# --- arrays -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ModelInput:
    """What the model takes; `layout` None: not known, or not needed."""

    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]
    layout: Layout | None

    def __post_init__(self) -> None:
        if self.dtype.kind not in "fiu":
            raise InvalidImage(f"the model's input is {self.dtype}, which holds no pixel values")
        if self.layout not in ("NCHW", "NHWC", None):
            raise InvalidImage(f"layout must be 'NCHW' or 'NHWC', got {self.layout!r}")
        if self.layout is not None and len(self.shape) != 4:
            raise InvalidImage(
                f"layout={self.layout!r} needs a model input with four axes, "
                f"this one is {_shown_shape(self.shape)}"
            )

    def with_layout(self, needed: bool) -> _ModelInput:
        """This input with its layout settled; where not `needed`, an unknown one stays None."""
        try:
            return replace(self, layout=self.layout or infer_layout(self.shape))
        except InvalidImage:
            if needed:
                raise
            return self

    def picture_shape(self) -> tuple[int | None, int | None, int | None]:
        """(channels, height, width)."""
        if self.layout == "NCHW":
            return self.shape[1], self.shape[2], self.shape[3]
        return self.shape[3], self.shape[1], self.shape[2]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether `shape` is this input's, with or without the batch axis."""
        own = self.shape[1:]
        sample = shape[1:] if len(shape) == len(self.shape) else shape
        return len(sample) == len(own) and all(
            length in (None, got) for length, got in zip(own, sample, strict=True)
        )


def _name(item: Any, index: int, count: int) -> str:
    """What messages call an image."""
    if isinstance(item, (str, os.PathLike)):
        return str(item)
    kind = "array" if hasattr(item, "__array__") else "image"
    return f"the {kind}" if count == 1 else f"{kind} {index + 1} of {count}"


def _load(item: Any, model: _ModelInput, name: str) -> Image.Image | NDArray[Any]:
    """An upright RGB picture, or an array that is the model's input."""
    if isinstance(item, (str, os.PathLike)):
        return load_picture(item)
    if isinstance(item, Image.Image):
        with readable(name):
            return _upright_rgb(item, name)
    if not hasattr(item, "__array__"):
        raise InvalidImage(
            f"{name} must be a path, a PIL image or an array, got {type(item).__name__}"
        )
    array = np.asarray(item)
    preprocessed = model.dtype.kind in "iu" and model.fits(array.shape)
    if array.dtype == np.uint8 and _has_picture_shape(array.shape) and not preprocessed:
        if not array.size:
            raise InvalidImage(f"{name} has no pixels: its shape is {array.shape}")
        return _upright_rgb(Image.fromarray(array), name)
    return _checked(array, model, name)


def _has_picture_shape(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))


def _checked(array: NDArray[Any], model: _ModelInput, name: str) -> NDArray[Any]:
    """`array` with its batch axis and the model's dtype."""
    own = _shown_shape(model.shape)
    if array.dtype == np.uint8 and model.dtype.kind == "f":
        raise InvalidImage(
            f"{name} is uint8 of shape {array.shape}: a picture must be (H, W), (H, W, 3) or "
            f"(H, W, 4), several a list of these, and a preprocessed array must be {model.dtype} "
            f"of shape {own}"
        )
    if array.dtype != model.dtype and not array.dtype.kind == model.dtype.kind == "f":
        raise InvalidImage(f"{name} must be {model.dtype}, as the model's input, got {array.dtype}")
    if not model.fits(array.shape):
        raise InvalidImage(
            f"{name} must have the model input's shape {own}, with or without the batch axis, "
            f"got {array.shape}{_axis_order_hint(array, model)}"
        )
    if not array.size:
        raise InvalidImage(f"{name} is empty: shape {array.shape}")
    return _cast(array if array.ndim == len(model.shape) else array[None], model, name)


def _axis_order_hint(array: NDArray[Any], model: _ModelInput) -> str:
    """A remedy where moving the channel axis would make `array` fit."""
    if len(model.shape) != 4 or array.ndim not in (3, 4):
        return ""
    for source, target, seen, order in (
        (-1, -3, "NHWC", (0, 3, 1, 2)),
        (-3, -1, "NCHW", (0, 2, 3, 1)),
    ):
        if model.fits(np.moveaxis(array, source, target).shape):
            axes = order if array.ndim == 4 else tuple(axis - 1 for axis in order[1:])
            return f"; it looks like {seen[-array.ndim :]}: pass array.transpose{axes}"
    return ""


def _cast(values: NDArray[Any], model: _ModelInput, name: str) -> NDArray[Any]:
    """`values` in the model's dtype, which must be able to hold them."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(model.dtype, copy=False)
    if not np.isfinite(cast).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(cast))[0])
        raise InvalidImage(f"{name} has NaN or infinity (as {model.dtype}), first at {where}")
    if model.dtype.kind in "iu" and not np.array_equal(cast, values):
        raise InvalidImage(
            f"{name}: the model takes {model.dtype}, but preprocess makes values that it cannot "
            "hold; preprocess='raw' makes 0 … 255"
        )
    return cast


def _batch(
    image: Image.Image | NDArray[Any],
    model: _ModelInput,
    recipe: Preprocess | PreprocessFunction | None,
    name: str,
) -> NDArray[Any]:
    """The model's input for one loaded image: of a picture a batch of one, of an array itself."""
    if isinstance(image, np.ndarray):
        return image
    if not isinstance(recipe, Preprocess):
        assert recipe is not None
        made = np.asarray(recipe(np.asarray(image)))
        return _checked(made, model, f"what preprocess makes of {name}")
    channels, height, width = model.picture_shape()
    if channels is not None:
        recipe.check_channels(channels)
    size = _target_size(image, height, width, recipe)
    if channels == 1 or recipe.channels == "grey":
        image = image.convert("L")
    crop = np.asarray(_resized_and_cropped(image, size, recipe, name))
    values = recipe.apply(crop.reshape(1, *size, -1))
    return _cast(np.moveaxis(values, -1, 1) if model.layout == "NCHW" else values, model, name)


def _target_size(
    picture: Image.Image, height: int | None, width: int | None, recipe: Preprocess
) -> tuple[int, int]:
    """(height, width) of the model's input, from the model's where they are fixed."""
    if height is None or width is None:
        own = (picture.height, picture.width) if recipe.resize == "none" else None
        free = recipe.size or own
        if free is None:
            raise InvalidImage(
                "the model leaves its input's height or width symbolic and preprocess has no "
                "size; pass a Preprocess with size=(height, width)"
            )
        return height or free[0], width or free[1]
    return height, width


def _shown_shape(shape: Shape) -> str:
    axes = ["N", *("?" if length is None else str(length) for length in shape[1:])]
    return f"({', '.join(axes)})"


def _recipe(
    preprocess: PreprocessLike | None,
    metadata: Mapping[str, str] | None,
    model_path: PathLike | None,
    needed: bool,
) -> Preprocess | PreprocessFunction | None:
    """The preprocessing; where not `needed`, None instead of an error that nobody asked for."""
    try:
        return resolve_preprocess(preprocess, metadata=metadata, model_path=model_path)
    except InvalidImage:
        if needed or preprocess is not None:
            raise
        return None
