"""Encoded images to arrays, by Pillow: whatever the file holds becomes 8 bits, one channel or three."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fsam_core import backends
from fsam_core.errors import one_line

GREY = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I")  # Pillow's modes without colour
Item = str | bytes
"""A file's path, or its content."""


class Form(NamedTuple):
    """What every image of a set is brought to. resize: images of another size are scaled and cropped to it."""

    height: int
    width: int
    channels: int
    resize: bool


class Decoded(NamedTuple):
    """pixels: uint8 [N, H, W, C], 0 where an image cannot be used. reasons: why not, by its place."""

    pixels: np.ndarray
    reasons: dict[int, str]


def opened(item: Item) -> Any:
    """The image, its pixels loaded. Raises whatever Pillow does for one that is damaged."""
    backends.require("PIL.Image")
    from PIL import Image

    with Image.open(item if isinstance(item, str) else io.BytesIO(item)) as image:
        image.load()
    return image


def decode(items: Sequence[Item], form: Form) -> Decoded:
    """The images as arrays; one that is damaged or of another size is left out, with the reason."""
    pixels = np.zeros((len(items), form.height, form.width, form.channels), np.uint8)
    reasons: dict[int, str] = {}
    for i, item in enumerate(items):
        try:
            pixels[i] = as_array(opened(item), form)
        except _WrongSize as error:
            reasons[i] = str(error)
        except Exception as error:  # Pillow's decoders raise many kinds
            reasons[i] = f"cannot be decoded: {one_line(error)}"
    return Decoded(pixels, reasons)


def as_array(image: Any, form: Form) -> np.ndarray:
    """A loaded image in that form, uint8 [H, W, C]; transparent pixels are seen on white, 16 bits become their upper 8.

    Raises ValueError where the size is another and `resize` is not set.
    """
    image = _in_8_bits(image)
    if image.size != (form.width, form.height):
        if not form.resize:
            raise _WrongSize(
                f"is {image.height} x {image.width}, others are {form.height} x {form.width}: --image-size N "
                "brings all to one size"
            )
        from PIL import Image, ImageOps

        image = ImageOps.fit(image, (form.width, form.height), Image.Resampling.BICUBIC)
    image = image.convert("L" if form.channels == 1 else "RGB")
    return np.asarray(image).reshape(form.height, form.width, form.channels)


class _WrongSize(ValueError):
    pass


def _in_8_bits(image: Any) -> Any:
    """The image in mode L or RGB."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values >> 8 if values.max(initial=0) > 255 else values).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(below, image)
    return image.convert("L" if image.mode in GREY else "RGB")
