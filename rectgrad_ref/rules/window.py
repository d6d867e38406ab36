"""The geometry that convolution and pooling share: which input cells each kernel offset reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .registry import Array

if TYPE_CHECKING:
    from ..graph import Node

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """A sliding window over padded spatial axes.

    Attributes
    ----------
    input, output : tuple of int
        Spatial extents without padding.
    kernel_shape, strides, dilations, pads : tuple of int
        ONNX's attributes; `pads` are all begins, then all ends.
    """

    input: Shape
    output: Shape
    kernel_shape: Shape
    strides: Shape
    dilations: Shape
    pads: Shape

    @classmethod
    def of(cls, node: Node) -> Window:
        """The window of a Conv or pooling node."""
        return cls._make(node, node.input_shapes[0], node.output_shapes[0])

    @classmethod
    def of_transpose(cls, node: Node) -> Window:
        """The window of the convolution whose transpose the ConvTranspose node is."""
        return cls._make(node, node.output_shapes[0], node.input_shapes[0])

    @classmethod
    def _make(cls, node: Node, source: Shape, result: Shape) -> Window:
        return cls(
            source[2:],
            result[2:],
            node["kernel_shape"],
            node["strides"],
            node["dilations"],
            node["pads"],
        )

    @property
    def declared_input(self) -> Shape:
        """Extents with `pads`."""
        rank = len(self.input)
        return tuple(n + self.pads[i] + self.pads[rank + i] for i, n in enumerate(self.input))

    @property
    def padded_input(self) -> Shape:
        """Extents that hold both the padded input and every window (``ceil_mode`` needs more)."""
        reached = (
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip(
                self.output, self.strides, self.kernel_shape, self.dilations, strict=True
            )
        )
        return tuple(map(max, self.declared_input, reached))

    def offsets(self) -> Iterator[tuple[Shape, tuple[Any, ...]]]:
        """Kernel offsets in row-major order, each with the index of the cells that it reads."""
        for k in itertools.product(*(range(n) for n in self.kernel_shape)):
            slices = (
                slice(i * d, i * d + s * (n - 1) + 1, s)
                for i, d, s, n in zip(k, self.dilations, self.strides, self.output, strict=True)
            )
            yield k, (..., *slices)

    def pad(self, x: Array, value: float) -> Array:
        """Surround the spatial axes with `value`, up to `padded_input`."""
        if self.padded_input == self.input:
            return x
        padded = np.full_like(x, value, shape=(*x.shape[:2], *self.padded_input))
        padded[self._inside] = x
        return padded

    def crop(self, padded: Array) -> Array:
        """Undo `pad`."""
        return padded[self._inside]

    @property
    def _inside(self) -> tuple[Any, ...]:
        begins = self.pads[: len(self.input)]
        return (..., *(slice(b, b + n) for b, n in zip(begins, self.input, strict=True)))
