"""The exact picture of a portrait: an SVG composed of parts, then rendered.

`data/portraits/parts.json.gz` holds, for each style, a frame and its parts as texts with marks: `{mouth}` is replaced
by the chosen part of the group `mouth` (by nothing if none is chosen), `{hair:color}` by six hex digits, until no mark
is left. For the same choices the result equals what DiceBear returns, byte by byte: `tools/portraits/extract.mjs`
checks it and keeps checksums for our tests. resvg renders it on the CPU without fonts, GPU or randomness.
"""

import gzip
import io
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion_opt.datasets.integrity import CorruptFileError, verify
from diffusion_opt.datasets.portraits.portrait import Portrait
from diffusion_opt.datasets.portraits.tables import TABLES
from diffusion_opt.names import data_dir

_MARK = re.compile(r"\{([A-Za-z]+)(:color)?\}")
_DEPTH = 8  # parts within parts; no style nests deeper than 3


@cache
def styles() -> Mapping[str, Any]:
    """The parts of each style as extracted. Raises CorruptFileError for a missing or altered file."""
    folder = data_dir() / "portraits"
    verify(folder)
    try:
        return json.loads(gzip.decompress((folder / "parts.json.gz").read_bytes()))["styles"]
    except (OSError, ValueError, KeyError) as error:
        raise CorruptFileError(f"{folder / 'parts.json.gz'} cannot be read ({error}); restore it with git") from error


def compose(style: str, parts: Mapping[str, str], colors: Mapping[str, str], size: int = 128) -> str:
    """The SVG of one choice of parts and colors of a style, as DiceBear writes it."""
    entry = styles()[style]

    def fill(mark: re.Match) -> str:
        name, is_color = mark.group(1), mark.group(2)
        if is_color:
            return colors[name]
        if name == "size":
            return str(size)
        return entry["parts"][name][parts[name]] if name in parts else ""

    svg = entry["frame"]
    for _ in range(_DEPTH):
        if not _MARK.search(svg):
            return svg
        svg = _MARK.sub(fill, svg)
    raise CorruptFileError(f"parts of {style} contain one another; restore data/portraits with git")


def svg_of(portrait: Portrait, size: int = 128) -> str:
    """The SVG of a portrait, `size` pixels wide and high."""
    style = TABLES[portrait.style]
    parts, colors = dict(style.fixed), dict(style.fixed_colors)
    for attribute, choices in style.parts.items():
        parts |= choices[getattr(portrait, attribute)]
    for attribute, names in style.colors.items():
        value = getattr(portrait, attribute)
        colors |= {name: style.hex(attribute, value) if value else "000000" for name in names}
    unset = {name: "000000" for name in styles()[portrait.style]["colors"]}
    return compose(portrait.style, parts, unset | colors, size)


def draw(portrait: Portrait, size: int = 128) -> UInt8[Tensor, "3 size size"]:
    """The exact picture of a portrait, 0 … 255. Raises ValueError for a size below 8 pixels."""
    import resvg_py

    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg_of(portrait, size), skip_system_fonts=True))
    pixels = np.array(Image.open(io.BytesIO(png)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def draw_many(portraits: Sequence[Portrait], size: int = 128, progress: bool = True) -> UInt8[Tensor, "n 3 size size"]:
    """The exact pictures of several portraits, with a progress bar where there are many."""
    shown = tqdm(portraits, desc="drawing portraits", unit="picture", disable=not progress or len(portraits) < 200)
    out = torch.empty(len(portraits), 3, size, size, dtype=torch.uint8)
    for row, portrait in enumerate(shown):
        out[row] = draw(portrait, size)
    return out
