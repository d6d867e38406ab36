"""From a picture file, PIL image or array to the model's input, and back to pixels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InvalidImage

Layout: TypeAlias = Literal["NCHW", "NHWC"]
Shape: TypeAlias = Sequence[int | None]
PathLike: TypeAlias = str | os.PathLike[str]
ImageLike: TypeAlias = PathLike | Image.Image | NDArray[Any]
PreprocessFunction: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[Any]]

_CHANNELS = ("RGB", "BGR", "grey")
_RESIZES = ("shortest", "squash", "none")
_FILTERS = tuple(name.lower() for name in Image.Resampling.__members__)


def _floats(name: str, values: ArrayLike) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in np.atleast_1d(np.asarray(values, np.float64)))
    except (TypeError, ValueError) as error:
        raise InvalidImage(f"Preprocess: {name} must be numbers, got {values!r}") from error
    if not np.isfinite(numbers).all():
        raise InvalidImage(f"Preprocess: {name} must be finite, got {values!r}")
    return numbers


def _one_of(choices: Sequence[str]) -> str:
    return f"one of {', '.join(choices)}"


def _is_range(values: tuple[float, ...]) -> bool:
    return len(values) == 2 and values[0] < values[1]


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value <= 1


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_size(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_length, value))


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a picture becomes a model's input: size, channel order, value range, mean and std.

    A pixel p in 0 … 255 becomes ``(lo + (hi - lo) * p / 255 - mean) / std``, computed in float64
    and rounded to the model's dtype.

    Parameters
    ----------
    value_range
        (lo, hi): the values of black and white before `mean` and `std`; (0, 1) for x/255.
    mean, std
        One number, or one per channel in the order of `channels`, in units of `value_range`.
    channels
        "RGB" or "BGR": the order of a model's three channels. A model with one channel gets the
        luma (ITU-R 601, Pillow's mode L) whatever the order; "grey" accepts no other model.
    resize
        "shortest": keep the aspect ratio and let the picture just cover the resized size;
        "squash": stretch both sides to it; "none": the picture must have the model's own size.
    crop_fraction
        The part of the resized picture, along each side, that the centre crop keeps: the resized
        size is floor(input size / crop_fraction).
    resize_size
        The resized size in pixels (the short side for "shortest", both for "squash") instead of a
        `crop_fraction`.
    interpolation
        A filter of Pillow's ``Image.Resampling`` in lower case. Pillow's filters are antialiased.
    size
        (height, width) of the crop where the model leaves them symbolic; its fixed sizes win,
        but `resize_size` is refused with another crop than the `size` it was made for.

    Raises
    ------
    InvalidImage
        A value is outside its range.

    Notes
    -----
    Sizes and offsets are rounded as torchvision does: the long side down, the crop's offset
    to the nearest even number at a half.
    """

    value_range: tuple[float, float]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: Literal["RGB", "BGR", "grey"] = "RGB"
    resize: Literal["shortest", "squash", "none"] = "shortest"
    crop_fraction: float = 1.0
    resize_size: int | None = None
    interpolation: str = "bilinear"
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("value_range", "mean", "std"):
            object.__setattr__(self, name, _floats(name, getattr(self, name)))
        if isinstance(self.size, list):
            object.__setattr__(self, "size", tuple(self.size))
        for name, valid, wanted in (
            ("value_range", _is_range(self.value_range), "(lo, hi) with lo < hi"),
            ("mean", len(self.mean) in (1, 3), "one number or three"),
            ("std", len(self.std) in (1, 3) and min(self.std) > 0, "one positive number or three"),
            ("channels", self.channels in _CHANNELS, _one_of(_CHANNELS)),
            ("resize", self.resize in _RESIZES, _one_of(_RESIZES)),
            ("crop_fraction", _is_fraction(self.crop_fraction), "above 0 and at most 1"),
            ("resize_size", self.resize_size is None or _is_length(self.resize_size), "above 0"),
            ("interpolation", self.interpolation in _FILTERS, _one_of(_FILTERS)),
            ("size", self.size is None or _is_size(self.size), "(height, width)"),
        ):
            if not valid:
                raise InvalidImage(
                    f"Preprocess: {name} must be {wanted}, got {getattr(self, name)!r}"
                )
        if self.resize_size is not None and self.crop_fraction != 1:
            raise InvalidImage("Preprocess: give resize_size or crop_fraction, not both")

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON's types (tuples as lists); `from_dict` reads them back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """A Preprocess from its fields by name.

        Raises
        ------
        InvalidImage
            A field is unknown, out of range, or the `value_range` is missing.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InvalidImage(
                f"preprocess has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}"
            )
        if "value_range" not in values:
            raise InvalidImage(
                "preprocess lacks 'value_range': [0, 1] for x/255, [0, 255] for raw pixels, "
                "[-1, 1] for x/127.5 - 1"
            )
        return cls(**values)

    def apply(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Model values of pixels.

        Parameters
        ----------
        pixels
            (..., 3) RGB or (..., 1) grey, uint8.

        Returns
        -------
        (..., 3) or (..., 1) float64, in the order of `channels`.

        Raises
        ------
        InvalidImage
            The number of channels does not suit `channels`, `mean` or `std`.
        """
        self._check_channels(pixels.shape[-1])
        lo, hi = self.value_range
        ordered = pixels[..., ::-1] if self.channels == "BGR" else pixels
        return (lo + (hi - lo) * ordered.astype(np.float64) / 255 - self.mean) / self.std

    def invert(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """The nearest pixels of model values: the inverse of `apply`, clipped to 0 … 255.

        Parameters
        ----------
        values
            (..., 3) in the order of `channels`, or (..., 1).

        Returns
        -------
        (..., 3) RGB or (..., 1) grey, uint8.

        Raises
        ------
        InvalidImage
            As for `apply`.
        """
        self._check_channels(values.shape[-1])
        lo, hi = self.value_range
        levels = (np.asarray(values, np.float64) * self.std + self.mean - lo) / (hi - lo) * 255
        pixels = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
        return pixels[..., ::-1] if self.channels == "BGR" else pixels

    def _check_channels(self, count: int) -> None:
        fitting = (1,) if self.channels == "grey" else (1, 3)
        if count not in fitting:
            raise InvalidImage(
                f"the model takes {count} channels, but preprocess with channels={self.channels!r} "
                f"makes {' or '.join(map(str, fitting))}; pass an array in the model's own shape"
            )
        if max(len(self.mean), len(self.std)) > count:
            raise InvalidImage(
                f"preprocess has mean {self.mean} and std {self.std} for three channels, "
                "but the model takes one"
            )


PreprocessLike: TypeAlias = PathLike | Preprocess | Mapping[str, Any] | PreprocessFunction

PRESETS: Mapping[str, Preprocess] = MappingProxyType(
    {
        "imagenet": Preprocess(
            value_range=(0, 1),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            crop_fraction=0.875,
            size=(224, 224),
        ),
        "inception": Preprocess(
            value_range=(-1, 1), crop_fraction=0.875, interpolation="bicubic", size=(299, 299)
        ),
        "mobilenet_tf": Preprocess(
            value_range=(0, 255), mean=(128,), std=(128,), crop_fraction=0.875
        ),
        "caffe": Preprocess(
            value_range=(0, 255), mean=(104, 117, 123), channels="BGR", resize_size=256
        ),
        "cifar10": Preprocess(value_range=(-1, 1), size=(32, 32)),
        "cifar10_standard": Preprocess(
            value_range=(0, 1),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2023, 0.1994, 0.2010),
            size=(32, 32),
        ),
        "cifar10_imagenet": Preprocess(
            value_range=(0, 1),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            size=(32, 32),
        ),
        "mnist": Preprocess(
            value_range=(0, 1), mean=(0.1307,), std=(0.3081,), channels="grey", size=(28, 28)
        ),
        "unit": Preprocess(value_range=(0, 1)),
        "signed": Preprocess(value_range=(-1, 1)),
        "raw": Preprocess(value_range=(0, 255)),
    }
)
"""Preprocessing by name.

- ``imagenet``: torchvision's and timm's ImageNet recipe (224 from a short side of 256).
- ``inception``: x/127.5 - 1, bicubic; timm's ``inception_v4.tf_in1k``.
- ``mobilenet_tf``: (x - 128)/128, the float form of TensorFlow Lite's quantised MobileNets.
- ``caffe``: BGR of 0 … 255 minus (104, 117, 123), short side 256 and a centre crop of the model's
  size (227 for SqueezeNet 1.1); also AlexNet, GoogLeNet, VGG.
- ``cifar10``: x/127.5 - 1, the RectGrad paper's CNN; ``cifar10_standard``: CIFAR-10's own mean and
  std; ``cifar10_imagenet``: ImageNet's mean and std, without a margin to crop.
- ``mnist``: MNIST's own mean and std.
- ``unit``, ``signed``, ``raw``: values in [0, 1], [-1, 1], [0, 255] and nothing else.
"""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` returns.

    Attributes
    ----------
    array
        The model's input, in its shape, axis order and dtype; the batch on axis 0.
    pictures
        (N, H, W, 3) RGB uint8: what each pixel of `array` looks like, for overlays. None where the
        input is no image (not 4-D, or its channel axis unknown and no `layout` given).
    preprocess
        What was applied to pictures, or presumed of arrays to show them; None where unknown.
    """

    array: NDArray[Any]
    pictures: NDArray[np.uint8] | None
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
    return Prepared(array, _shown(array, model.layout, recipe), recipe)


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
    with _readable(str(path)), Image.open(path) as image:
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


def resolve_preprocess(
    preprocess: PreprocessLike | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    model_path: PathLike | None = None,
) -> Preprocess | PreprocessFunction:
    """The preprocessing, from the first of these sources that there is; never a guess.

    1. `preprocess`: a name in `PRESETS`; a Preprocess; a function from the upright picture
       ((H, W, 3) RGB uint8) to the model's input, with or without batch axis; or the fields of a
       Preprocess, a Hugging Face ``preprocessor_config.json`` or a timm ``config.json``, as a dict
       or the path of a JSON file.
    2. `metadata`: the ONNX model's metadata_props, where they have ``Image.BitmapPixelFormat`` and
       ``Image.NominalPixelRange`` [1]_. They say nothing of the size: the short side is resized
       (bilinear) to the input's and the rest cropped.
    3. ``preprocessor_config.json``, then ``config.json``, in the folder of `model_path`.

    Raises
    ------
    InvalidImage
        There is none, or it asks for something that a Preprocess cannot do.

    References
    ----------
    .. [1] ONNX, "Metadata": https://github.com/onnx/onnx/blob/main/docs/MetadataProps.md
    """
    if preprocess is not None:
        return _explicit(preprocess)
    found = _from_metadata(metadata or {})
    if found is None and model_path is not None:
        found = _from_folder(Path(model_path).parent)
    if found is None:
        raise InvalidImage(
            f"how {model_path or 'the model'} wants its pictures is unknown: it has no "
            "Image.BitmapPixelFormat metadata, and no preprocessor_config.json or config.json "
            "beside it describes an image. Pass preprocess= a preset "
            f"({', '.join(PRESETS)}), a Preprocess or a JSON file, or an array that is "
            "preprocessed already"
        )
    return found


# --- pictures -----------------------------------------------------------------------------------


@contextmanager
def _readable(name: str) -> Iterator[None]:
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
        with _readable(name):
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
        recipe._check_channels(channels)
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


def _shown(
    array: NDArray[Any], layout: Layout | None, recipe: Preprocess | PreprocessFunction | None
) -> NDArray[np.uint8] | None:
    """(N, H, W, 3) picture of model input: exact where a fitting recipe is known, else scaled."""
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


def _shown_shape(shape: Shape) -> str:
    axes = ["N", *("?" if length is None else str(length) for length in shape[1:])]
    return f"({', '.join(axes)})"


# --- sources of a Preprocess --------------------------------------------------------------------


def _explicit(preprocess: PreprocessLike) -> Preprocess | PreprocessFunction:
    if isinstance(preprocess, Preprocess):
        return preprocess
    if isinstance(preprocess, Mapping):
        return _parsed(preprocess, "preprocess") or Preprocess.from_dict(preprocess)
    if isinstance(preprocess, (str, os.PathLike)):
        if str(preprocess) in PRESETS:
            return PRESETS[str(preprocess)]
        path = Path(preprocess)
        if not path.is_file():
            raise InvalidImage(
                f"preprocess {str(preprocess)!r} is neither a preset ({', '.join(PRESETS)}) "
                "nor a JSON file"
            )
        config = _read_json(path)
        return _parsed(config, str(path)) or Preprocess.from_dict(config)
    if callable(preprocess):
        return preprocess
    raise InvalidImage(
        "preprocess must be a preset's name, a Preprocess, a dict, a JSON file or a function, "
        f"got {type(preprocess).__name__}"
    )


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


_PIXEL_FORMATS: dict[str, Any] = {"gray8": "grey", "rgb8": "RGB", "bgr8": "BGR"}
_PIXEL_RANGES: dict[str, Any] = {
    "nominalrange_0_255": (0, 255),
    "nominalrange_16_235": (16, 235),
    "normalized_0_1": (0, 1),
    "normalized_1_1": (-1, 1),
}
# Pictures are sRGB, so a model that wants linear light is refused rather than misled.
_GAMMAS: dict[str, Any] = {"srgb": None}


def _from_metadata(metadata: Mapping[str, str]) -> Preprocess | None:
    # The ONNX document calls keys and values case-insensitive.
    given = {key.lower(): value for key, value in metadata.items()}
    if not given.keys() & {"image.bitmappixelformat", "image.nominalpixelrange"}:
        return None

    def choice(key: str, known: dict[str, Any]) -> Any:
        value = given.get(key.lower())
        if value is None or value.lower() not in known:
            found = "missing" if value is None else repr(value)
            raise InvalidImage(
                f"the model's metadata {key} is {found}; supported: {', '.join(known)}. "
                "Pass preprocess=, or an array that is preprocessed already"
            )
        return known[value.lower()]

    if "image.colorspacegamma" in given:
        choice("Image.ColorSpaceGamma", _GAMMAS)
    return Preprocess(
        channels=choice("Image.BitmapPixelFormat", _PIXEL_FORMATS),
        value_range=choice("Image.NominalPixelRange", _PIXEL_RANGES),
    )


def _from_folder(folder: Path) -> Preprocess | None:
    for name in ("preprocessor_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            found = _parsed(_read_json(path), str(path))
            if found is not None:
                return found
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidImage(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(config, dict):
        raise InvalidImage(f"{path}: must hold a JSON object, got a {type(config).__name__}")
    return config


def _parsed(config: Mapping[str, Any], source: str) -> Preprocess | None:
    """A timm or Hugging Face description; None where `config` is neither."""
    timm: Mapping[str, Any] = config.get("pretrained_cfg") or config
    try:
        if "crop_pct" in timm and "input_size" in timm:
            return _from_timm(timm)
        if any(key in config for key in ("image_mean", "do_resize", "do_normalize")):
            return _from_hugging_face(config)
    except KeyError as error:
        raise InvalidImage(f"{source}: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise InvalidImage(f"{source}: {error}") from error
    return None


def _from_timm(config: Mapping[str, Any]) -> Preprocess:
    """`pretrained_cfg` as timm's evaluation transform reads it; mean and std are of x/255."""
    mode = config.get("crop_mode") or "center"
    resizes: dict[str, Literal["shortest", "squash"]] = {"center": "shortest", "squash": "squash"}
    if mode not in resizes:
        raise InvalidImage(f"crop_mode {mode!r} is not supported; center and squash are")
    _, height, width = config["input_size"]
    return Preprocess(
        value_range=(0, 1),
        mean=config["mean"],
        std=config["std"],
        resize=resizes[mode],
        crop_fraction=config["crop_pct"],
        interpolation=config["interpolation"],
        size=(height, width),
    )


# What a plain number in "size" means, which each of these processors decides for itself.
_HUGGING_FACE_SHORTEST = ("Bit", "CLIP", "ConvNext", "MobileNetV1", "MobileNetV2", "MobileViT")
_HUGGING_FACE_SQUARE = ("Beit", "DeiT", "EfficientNet", "Siglip", "ViT")


def _from_hugging_face(config: Mapping[str, Any]) -> Preprocess:
    """`preprocessor_config.json` of the image processors whose resizing is known."""
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    family = kind
    for suffix in ("Fast", "ImageProcessor", "FeatureExtractor"):
        family = family.removesuffix(suffix)
    families = _HUGGING_FACE_SHORTEST + _HUGGING_FACE_SQUARE
    if family not in families:
        raise InvalidImage(f"image processor {kind!r} is not supported; {', '.join(families)} are")
    mean, std = np.zeros(1), np.ones(1)
    if config.get("do_normalize", "image_mean" in config):
        mean, std = np.asarray(config["image_mean"], float), np.asarray(config["image_std"], float)
    # EfficientNet's processor divides by std a second time for a network with its classifier.
    if config.get("include_top"):
        std = std * np.asarray(config["image_std"], float)
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    offset = 1.0 if config.get("rescale_offset") else 0.0
    return Preprocess(
        value_range=(-offset, 255 * factor - offset),
        mean=tuple(np.atleast_1d(mean)),
        std=tuple(np.atleast_1d(std)),
        channels="BGR" if config.get("do_flip_channel_order") else "RGB",
        **_hugging_face_resize(config, family),
    )


def _hugging_face_resize(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The fields of a Preprocess that say how to resize."""
    crop = config.get("do_center_crop", False)
    if not config.get("do_resize", True):
        if crop:
            raise InvalidImage("do_center_crop without do_resize is not supported")
        return {"resize": "none"}
    size = config["size"]
    if not isinstance(size, Mapping):
        square = {"height": size, "width": size}
        size = {"shortest_edge": size} if family in _HUGGING_FACE_SHORTEST else square
    how: dict[str, Any] = {"interpolation": Image.Resampling(config["resample"]).name.lower()}
    if set(size) == {"shortest_edge"}:
        edge = size["shortest_edge"]
        if family == "ConvNext":
            if edge >= 384:
                return how | {"resize": "squash", "size": (edge, edge)}
            short = int(edge / (config.get("crop_pct") or 224 / 256))
            return how | {"resize_size": short, "size": (edge, edge)}
        if not crop:
            raise InvalidImage("size.shortest_edge without do_center_crop leaves the size open")
        return how | {"resize_size": edge, "size": _height_width(config["crop_size"])}
    height, width = _height_width(size)
    if not crop:
        return how | {"resize": "squash", "size": (height, width)}
    if height != width:
        raise InvalidImage(f"a centre crop of {height}×{width} stretched pixels is not supported")
    return how | {
        "resize": "squash",
        "resize_size": height,
        "size": _height_width(config["crop_size"]),
    }


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return size["height"], size["width"]
    return size, size
