"""Given pictures: smooth random ones, and a mask of a corner."""

import numpy as np
from PIL import Image


def picture(side: int, seed: int = 0) -> Image.Image:
    """A colored picture of side x side pixels."""
    values = np.random.RandomState(seed).randint(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((side, side), Image.Resampling.BILINEAR)


def corner(side: int) -> Image.Image:
    """A mask whose upper left quarter is white: to be painted anew."""
    values = np.zeros((side, side), np.uint8)
    values[: side // 2, : side // 2] = 255
    return Image.fromarray(values)
