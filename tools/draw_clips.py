"""Draw the pictures and scenes of the clips once: `python tools/draw_clips.py icons.json` writes `data/clips/*.png`.

`icons.json` comes from the npm package `@iconify-json/fluent-emoji-flat` (MIT). Pictures are rasterized by resvg at
256 px, cropped to a square around what is drawn, and averaged down to 64 px: four texels for each pixel of a frame.
Scenes are the SVG below, 64x64 px, one texel a pixel, each with landmarks of its own. Needs `pip install resvg_py`,
which nothing else here does.
"""

import io
import json
import sys
from pathlib import Path

import resvg_py
from PIL import Image

from diffusion_opt.datasets import data_dir, write_sums
from diffusion_opt.datasets.clips.sheet import FOLDER, PICTURES, SCENES

TEXELS, SCENE = 64, 64  # texels of a picture, pixels of a scene


def circle(x: float, y: float, r: float, fill: str, opacity: float = 1.0) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{r}" fill="{fill}" opacity="{opacity}"/>'


def ellipse(x: float, y: float, rx: float, ry: float, fill: str, opacity: float = 1.0) -> str:
    return f'<ellipse cx="{x}" cy="{y}" rx="{rx}" ry="{ry}" fill="{fill}" opacity="{opacity}"/>'


def rect(x: float, y: float, w: float, h: float, fill: str, opacity: float = 1.0) -> str:
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{fill}" opacity="{opacity}"/>'


def shape(path: str, fill: str, opacity: float = 1.0) -> str:
    return f'<path d="{path}" fill="{fill}" opacity="{opacity}"/>'


def line(path: str, color: str, width: float) -> str:
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width}" stroke-linecap="round"/>'


def sky(*colors: str) -> str:
    """A vertical gradient over the whole scene."""
    last = len(colors) - 1
    stops = "".join(f'<stop offset="{i / last}" stop-color="{color}"/>' for i, color in enumerate(colors))
    return f'<linearGradient id="sky" x1="0" y1="0" x2="0" y2="1">{stops}</linearGradient>' + rect(
        0, 0, 64, 64, "url(#sky)"
    )


def cloud(x: float, y: float, opacity: float = 0.8) -> str:
    parts = ((0, 0, 4), (4.5, -1.5, 5), (9.5, 0, 3.8), (4.5, 1.4, 4))
    return "".join(circle(x + dx, y + dy, r, "#fff", opacity) for dx, dy, r in parts)


def fir(x: float, y: float, size: float, fill: str) -> str:
    """A fir whose trunk stands at (x, y)."""
    tiers = "".join(
        f"M{x - w * size} {y - low * size}L{x} {y - high * size}L{x + w * size} {y - low * size}Z"
        for w, low, high in ((0.45, 0.2, 0.75), (0.35, 0.5, 1.0), (0.25, 0.78, 1.2))
    )
    return rect(x - 0.08 * size, y - 0.25 * size, 0.16 * size, 0.25 * size, "#5b4231") + shape(tiers, fill)


def stars(places: str) -> str:
    pairs = (pair.split(",") for pair in places.split())
    return "".join(circle(float(x), float(y), 0.7, "#fff", 0.9) for x, y in pairs)


def house(x: float, y: float, wall: str, roof: str) -> str:
    """A house 13 px wide whose left foot stands at (x, y)."""
    return (
        rect(x, y - 9, 13, 9, wall)
        + shape(f"M{x - 2} {y - 9}L{x + 6.5} {y - 16}L{x + 15} {y - 9}Z", roof)
        + rect(x + 2, y - 5, 3.4, 5, "#4c3a33")
        + rect(x + 7.5, y - 6.5, 3.4, 3.4, "#ffe9a8")
    )


DRAWN = {
    "beach": sky("#6ec6ee", "#c6ecf7", "#eaf7f3")
    + circle(51, 12, 6, "#ffe27a")
    + rect(0, 36, 64, 12, "#2f9fc4")
    + rect(0, 40, 64, 1.2, "#8ad6e6")
    + shape("M0 47Q20 42 40 47T64 46V64H0Z", "#f1dca7")
    + line("M11 55Q13 42 9 31", "#8a5a35", 2.4)
    + "".join(line(f"M9 31Q{9 + dx * 0.6} {25 + dy} {9 + dx} {31 + dy}", "#2f8f4e", 2.6)
              for dx, dy in ((-8, 3), (-7, -4), (3, -7), (9, -1), (8, 5)))
    + shape("M44 58L56 58L50 49Z", "#d9bd7f"),
    "meadow": sky("#8fd0f4", "#dff3fb", "#f4fbe8")
    + cloud(8, 12)
    + cloud(42, 20, 0.6)
    + shape("M0 44Q16 32 34 42T64 38V64H0Z", "#9ccf73")
    + shape("M0 52Q22 42 44 50T64 50V64H0Z", "#74b556")
    + rect(50, 34, 2.6, 12, "#7b5a3c")
    + circle(51, 30, 7, "#4e9a49")
    + "".join(circle(x, y, 1.1, c) for x, y, c in ((8, 57, "#fff"), (18, 60, "#ff9ec7"), (30, 57, "#fff"),
              (40, 60, "#ffd95a"), (58, 58, "#ff9ec7"), (24, 54, "#ffd95a"))),
    "forest": sky("#b9d8c2", "#dcebd6", "#a8c79a")
    + "".join(fir(x, 46, s, "#7fae8b") for x, s in ((6, 20), (19, 25), (33, 21), (47, 26), (60, 20)))
    + rect(0, 46, 64, 18, "#6f9960")
    + fir(9, 60, 28, "#356b4a")
    + fir(55, 61, 31, "#2f6043")
    + ellipse(33, 57, 6, 3, "#8b8f8b"),
    "desert": sky("#f7b267", "#f9d6a1", "#fbeccb")
    + circle(14, 14, 6.5, "#fff0bd")
    + shape("M20 44L30 25L37 25L46 44Z", "#c97f56")
    + shape("M30 25L37 25L39 30L29 30Z", "#dd9a6d")
    + shape("M0 46Q20 38 40 45T64 42V64H0Z", "#e7b871")
    + shape("M0 56Q24 48 48 55T64 54V64H0Z", "#d6a05a")
    + line("M53 57V38M53 50H47V44M53 47H59V41", "#4f8a4c", 3.4),
    "snow": sky("#a9c3e6", "#d6e3f3", "#eef4fa")
    + shape("M-4 44L14 18L30 44Z", "#8ea5c6")
    + shape("M14 18L8.5 26L12 28L15 25L19 27L19.5 26.5Z", "#fff")
    + shape("M20 44L42 13L66 44Z", "#7d96ba")
    + shape("M42 13L35 23L40 26L43 22L49 26L50 23.4Z", "#fff")
    + shape("M0 45Q18 39 36 44T64 42V64H0Z", "#f7fbff")
    + circle(52, 55, 5, "#dbe7f4")
    + circle(52, 47.5, 3.4, "#e3edf7")
    + shape("M52 47.5L57 48.4L52 49Z", "#f08a3c")
    + circle(51, 46.4, 0.6, "#333")
    + rect(49.4, 42.4, 5.2, 1.6, "#44506b")
    + fir(10, 59, 15, "#4d7a6c"),
    "ocean": sky("#3fb8d6", "#1f7fb5", "#12507f")
    + "".join(shape(f"M{x} 0L{x + 5} 0L{x + d + 9} 64L{x + d - 6} 64Z", "#fff", 0.08) for x, d in ((8, -8), (30, 4),
              (48, 10)))
    + shape("M0 56Q18 51 36 56T64 54V64H0Z", "#d8c08a")
    + line("M10 57V44M10 52Q4 50 5 43M10 50Q16 48 15 41", "#ef6f7c", 3)
    + line("M54 58Q50 50 54 44T54 32", "#3fa06b", 3)
    + line("M59 58Q62 52 59 47T60 40", "#2f8a58", 2.6)
    + "".join(circle(x, y, r, "#d9f5ff", 0.55) for x, y, r in ((24, 14, 2), (28, 8, 1.3), (22, 22, 1.2))),
    "night": sky("#141b45", "#2b3470", "#5a4f8f")
    + stars("6,8 14,20 22,5 31,14 40,7 58,24 61,6 36,26 9,32")
    + circle(49, 14, 7, "#fdf3c8")
    + circle(46, 12, 1.4, "#e3d6a2")
    + circle(51, 16.5, 1, "#e3d6a2")
    + shape("M0 50Q20 40 42 48T64 46V64H0Z", "#232a52")
    + house(9, 55, "#3a3f68", "#1b2044")
    + fir(44, 58, 15, "#1a2547"),
    "city": sky("#f2a07b", "#f7c9a8", "#fbe6cf")
    + circle(32, 34, 9, "#ffe0a0")
    + rect(0, 30, 11, 34, "#8b86a8") + rect(13, 38, 9, 26, "#a29cb9") + rect(24, 33, 8, 31, "#938dad")
    + rect(45, 26, 9, 38, "#8b86a8") + rect(56, 36, 8, 28, "#a29cb9") + rect(34, 42, 9, 22, "#a8a2bd")
    + rect(49, 18, 1, 8, "#8b86a8")
    + "".join(rect(x, y, 1.8, 2.2, "#fff0b8") for x in (2.5, 6.5, 47, 50.5) for y in (34, 40, 46))
    + "".join(rect(x, y, 1.8, 2.2, "#fff0b8") for x in (26, 29, 15.5, 18.5, 58, 61) for y in (41, 47))
    + rect(0, 56, 64, 8, "#5e6076")
    + "".join(rect(x, 59.4, 6, 1.2, "#f3e6c3") for x in (3, 16, 29, 42, 55)),
    "space": sky("#0d0b24", "#1d1440", "#2c1b4f")
    + ellipse(20, 44, 26, 10, "#6b3fa0", 0.28)
    + stars("5,6 17,11 28,4 38,18 60,10 8,27 26,30 46,38 58,30 12,56 34,58 50,60 61,50")
    + circle(47, 20, 8, "#d98e5f")
    + shape("M40 17Q47 20 54 17L54.6 20Q47 23.4 39.2 20.6Z", "#efb98c")
    + '<ellipse cx="47" cy="20" rx="14" ry="3.2" fill="none" stroke="#f3dcb6" stroke-width="1.4" '
    'transform="rotate(-18 47 20)"/>'
    + circle(11, 47, 5, "#5fa8c9")
    + circle(9.5, 45.5, 1.2, "#4789aa"),
    "volcano": sky("#5b3a52", "#a4525a", "#e08a5c")
    + shape("M6 56L26 22L38 22L60 56Z", "#4a3440")
    + shape("M26 22L38 22L40 27L36 25L33 31L30 25L24.4 26Z", "#ff7a3d")
    + ellipse(32, 22, 6.2, 1.7, "#ffc04d")
    + "".join(circle(x, y, r, "#3e2b38", 0.55) for x, y, r in ((31, 15, 4), (36, 9, 5), (44, 5, 5)))
    + rect(0, 55, 64, 9, "#33242e")
    + shape("M0 59Q10 56 20 59T40 59T64 58V62H0Z", "#ff8a3d", 0.9),
    "farm": sky("#a4d8f2", "#e4f4fa", "#f7f3d7")
    + cloud(38, 11)
    + rect(0, 44, 64, 20, "#c9b458")
    + "".join(shape(f"M{32 + d * 0.25} 44L{32 + d} 64L{36 + d} 64L{32.8 + d * 0.25} 44Z", "#a8923c", 0.7)
              for d in (-44, -30, -16, -3, 10, 24, 38))
    + rect(6, 33, 16, 14, "#c8453c")
    + shape("M4 34L8 27L14 23L20 27L24 34Z", "#8a2f2c")
    + rect(11, 39, 6, 8, "#f6ead6")
    + rect(51, 30, 2.4, 18, "#8c8f96")
    + "".join(line(f"M52 30L{52 + dx} {30 + dy}", "#eef0f2", 2) for dx, dy in ((8, -4), (4, 8), (-8, 4), (-4, -8))),
    "candy": sky("#ffd3e6", "#ffe7f1", "#fff6e5")
    + shape("M0 46Q16 36 32 45T64 42V64H0Z", "#f7a8c4")
    + shape("M0 55Q20 47 42 54T64 53V64H0Z", "#c99be0")
    + rect(11, 34, 1.8, 22, "#fff")
    + circle(12, 29, 7.5, "#ff6f91")
    + '<path d="M12 29m-4.6 0a4.6 4.6 0 1 1 4.6 4.6a2.6 2.6 0 1 1 0-5" fill="none" stroke="#fff" stroke-width="1.6"/>'
    + line("M52 57V40Q52 33 57 34Q61 35 60 40", "#fff", 3.6)
    + "".join(line(f"M50.8 {y}L53.2 {y - 2}", "#ff5d73", 1.6) for y in (56, 51, 46, 41))
    + circle(34, 50, 2.4, "#7fd6c2") + circle(26, 58, 2, "#ffd45e"),
}  # fmt: skip


def rasterized(body: str, box: str, size: int) -> Image.Image:
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def picture(icons: dict, name: str) -> Image.Image:
    """One picture, square around what is drawn, 64x64 texels with straight alpha."""
    whole = rasterized(icons["icons"][name]["body"], f"0 0 {icons['width']} {icons['height']}", 256)
    left, top, right, bottom = whole.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    side = max(right - left, bottom - top)
    x, y = round((left + right - side) / 2), round((top + bottom - side) / 2)
    square = whole.crop((x, y, x + side, y + side))
    return square.convert("RGBa").resize((TEXELS, TEXELS), Image.Resampling.BOX).convert("RGBA")


def strip(images: list[Image.Image], mode: str) -> Image.Image:
    side = images[0].width
    whole = Image.new(mode, (side * len(images), side))
    for index, image in enumerate(images):
        whole.paste(image.convert(mode), (side * index, 0))
    return whole


def main(icons_file: Path) -> None:
    icons = json.loads(icons_file.read_text())
    icons = {"width": icons.get("width", 16), "height": icons.get("height", 16), "icons": icons["icons"]}
    folder = data_dir() / FOLDER
    strip([picture(icons, name) for name in PICTURES], "RGBA").save(folder / "pictures.png", optimize=True)
    strip([rasterized(DRAWN[name], "0 0 64 64", SCENE) for name in SCENES], "RGB").save(
        folder / "scenes.png", optimize=True
    )
    write_sums(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
