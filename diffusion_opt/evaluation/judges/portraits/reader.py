"""A network that reads a portrait: its style and the value of each attribute, from 128 x 128 pixels.

DiceBear's parts always lie at the same place, so position is what tells a mouth from a chin. The network therefore
keeps it: convolutions down to an 8 x 8 grid, a few channels of each of its 64 places side by side, one hidden layer,
and a linear head for the style and for each attribute. A head knows the values of all styles; `read` allows those that
the style in question has. With the style that a prompt asks for, an attribute is judged even where the style is
blurred.

Normalization is over groups of channels and never over the batch, so a picture is read alike in any company. Pictures
are rounded to 8 bits first, as a file holds them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_opt.datasets import CorruptFileError, data_dir, read_json, verify, write_json, write_tensors
from diffusion_opt.datasets.portraits import ATTRIBUTES, STYLES, Portrait
from diffusion_opt.evaluation.features import as_saved

SIZE = 128  # pixels
FOLDER = "portraits"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
NAMES = ("style", *dict.fromkeys(name for table in ATTRIBUTES.values() for name in table))
VALUES: dict[str, tuple[str, ...]] = {  # of each head, over all styles
    name: STYLES
    if name == "style"
    else tuple(dict.fromkeys(v for table in ATTRIBUTES.values() for v in table.get(name, ())))
    for name in NAMES
}


@dataclass(frozen=True, slots=True)
class ReaderConfig:
    """Architecture; stored beside the weights with the values of each head, which must be those of the tables."""

    widths: tuple[int, ...] = (48, 64, 96, 128)
    kept: int = 20  # channels of each of the 64 places that the hidden layer sees
    hidden: int = 160


class Reader(nn.Module):
    """From pictures in [-1, 1] to logits for each head."""

    def __init__(self, config: ReaderConfig | None = None) -> None:
        super().__init__()
        self.config = config or ReaderConfig()
        first, second, third, last = self.config.widths
        self.trunk = nn.Sequential(
            nn.PixelUnshuffle(4),
            *_convolution(48, first),
            *_convolution(first, second, stride=2),
            *_convolution(second, third),
            *_convolution(third, last, stride=2),
            *_convolution(last, last),
            nn.Conv2d(last, self.config.kept, 1),
            nn.Flatten(),
            nn.Linear(64 * self.config.kept, self.config.hidden),
            nn.SiLU(),
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(self.config.hidden, len(values)) for name, values in VALUES.items()}
        )

    def forward(self, pictures: Float[Tensor, "b 3 128 128"]) -> dict[str, Float[Tensor, "b _"]]:
        found = self.trunk(pictures)
        return {name: head(found) for name, head in self.heads.items()}


def _convolution(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()


def allowed_values(style: str, name: str) -> Bool[Tensor, " v"]:
    """Which values of a head a style has."""
    table = ATTRIBUTES[style].get(name, ())
    return torch.tensor([value in table for value in VALUES[name]])


def targets(portraits: Sequence[Portrait]) -> dict[str, Int[Tensor, " n"]]:
    """The number of each portrait's value in each head; -100, which losses skip, where it has none."""
    found = {name: [getattr(p, name) for p in portraits] for name in NAMES}
    return {
        name: torch.tensor([-100 if value is None else VALUES[name].index(value) for value in values])
        for name, values in found.items()
    }


@dataclass(frozen=True, eq=False)
class Reading:
    """Logits of each head for a number of pictures, and what they say."""

    logits: dict[str, Float[Tensor, "n _"]]

    @property
    def styles(self) -> list[str]:
        """The style that each picture shows."""
        return [STYLES[index] for index in self.logits["style"].argmax(1).tolist()]

    def portraits(self, styles: Sequence[str | None] | None = None) -> list[Portrait]:
        """What each picture shows. `styles` fixes the style of some (None: the one it shows) whose attributes are read.

        Raises ValueError for another number of styles than of pictures.
        """
        shown = self.styles
        given = [None] * len(shown) if styles is None else list(styles)
        if len(given) != len(shown):
            raise ValueError(f"one style for each picture, or None: got {len(given)} for {len(shown)} pictures")
        rows = [{name: self.logits[name][row] for name in NAMES} for row in range(len(shown))]
        return [_portrait(asked or seen, row) for asked, seen, row in zip(given, shown, rows, strict=True)]


@torch.inference_mode()
def look(pictures: Float[Tensor, "n 3 128 128"], reader: Reader | None = None, batch_size: int = 100) -> Reading:
    """One pass of the reader over pictures in [-1, 1]. Raises ValueError for another size, NaN and infinity."""
    check_pictures(pictures)
    reader = reader or load_reader()
    device = next(reader.parameters()).device
    parts = [reader(as_saved(part.to(device).float())) for part in pictures.split(batch_size)]
    return Reading({name: torch.cat([part[name].float().cpu() for part in parts]) for name in NAMES})


def read(
    pictures: Float[Tensor, "n 3 128 128"], styles: Sequence[str | None] | None = None, reader: Reader | None = None
) -> list[Portrait]:
    """What each picture shows, see `Reading.portraits` and `look`."""
    return look(pictures, reader).portraits(styles)


def _portrait(style: str, logits: dict[str, Float[Tensor, " v"]]) -> Portrait:
    values = {
        name: VALUES[name][int(logits[name].masked_fill(~allowed_values(style, name), -torch.inf).argmax())]
        for name in ATTRIBUTES[style]
    }
    if values["hair"] == "bald":
        del values["hair_color"]
    return Portrait(style, **values)


def check_pictures(pictures: Tensor) -> None:
    """Raise ValueError unless these are finite color pictures of 128 x 128 pixels."""
    if pictures.ndim != 4 or tuple(pictures.shape[1:]) != (3, SIZE, SIZE):
        raise ValueError(f"portraits are (n, 3, {SIZE}, {SIZE}) in [-1, 1], got {tuple(pictures.shape)}")
    if not pictures.isfinite().all():
        raise ValueError("pictures hold NaN or infinity; the sampler diverged")


def save_reader(reader: Reader, folder: Path) -> None:
    """Write config and half-precision weights; the caller seals the folder with `datasets.write_sums`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, {**asdict(reader.config), "values": VALUES})
    write_tensors(folder / WEIGHTS_FILE, {name: tensor.half() for name, tensor in reader.state_dict().items()})


@cache
def open_reader(folder: Path) -> Reader:
    """The reader in a folder, in float32. Raises CorruptFileError for a missing or altered file or other tables."""
    verify(folder)
    stored = read_json(folder / CONFIG_FILE, "restore it with git")
    if stored.pop("values") != json.loads(json.dumps(VALUES)):
        raise CorruptFileError(f"{folder} reads other attributes than the tables have; train it again")
    reader = Reader(ReaderConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}))
    weights = load_file(folder / WEIGHTS_FILE)
    if wrong := set(weights) ^ set(reader.state_dict()):
        raise CorruptFileError(f"{folder / WEIGHTS_FILE} does not fit this network: {sorted(wrong)[0]!r}")
    reader.load_state_dict(weights)
    return reader.float().eval().requires_grad_(False)


def load_reader() -> Reader:
    """The shipped reader."""
    return open_reader(data_dir() / "features" / FOLDER)


def loss(logits: dict[str, Float[Tensor, "b _"]], asked: dict[str, Int[Tensor, " b"]]) -> Float[Tensor, ""]:
    """Sum over heads of the cross-entropy, each over the portraits that have the attribute."""
    return sum(
        F.cross_entropy(logits[name], asked[name], ignore_index=-100, reduction="sum", label_smoothing=0.02)
        for name in NAMES
    ) / len(asked["style"])
