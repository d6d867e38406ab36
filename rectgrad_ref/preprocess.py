"""How a model wants its pictures: the recipe, its inverse, and where models say it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from .errors import InvalidImage

PathLike: TypeAlias = str | os.PathLike[str]
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
        self.check_channels(pixels.shape[-1])
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
        self.check_channels(values.shape[-1])
        lo, hi = self.value_range
        levels = (np.asarray(values, np.float64) * self.std + self.mean - lo) / (hi - lo) * 255
        pixels = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
        return pixels[..., ::-1] if self.channels == "BGR" else pixels

    def check_channels(self, count: int) -> None:
        """Refuse, by InvalidImage, a model whose number of channels does not suit this recipe."""
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
