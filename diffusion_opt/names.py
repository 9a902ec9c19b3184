"""What a user may call by name, and where the shipped files lie. Imports nothing heavy.

The command line checks names with this module before it imports torch, so a typing error is answered in a moment and
not after the seconds that torch, diffusers and modelopt take. Every other room may use it: it lies at the bottom.
"""

import difflib
import os
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ShippedModel:
    """A model of this repository; how it was made and how good it is stands in its card, `folder / "README.md"`."""

    name: str
    summary: str
    teacher: str | None = None  # None: trained on data; otherwise the shipped model it was distilled from
    quantized_from: str | None = None  # the shipped model that this one holds in fewer bits

    @property
    def folder(self) -> Path:
        """Its folder. Raises FileNotFoundError as `data_dir` does."""
        return data_dir() / "models" / self.name


SHIPPED = {
    model.name: model
    for model in (
        ShippedModel("fashion", "Fashion-MNIST 28x28, hidden 256, 49 tokens, 4.6 M parameters: the teacher"),
        ShippedModel("fashion-4step", "4 steps, guidance 2 distilled in", "fashion"),
        ShippedModel("fashion-4step-interval", "4 steps, guidance 2 from t = 0.3 to 0.9 distilled in", "fashion"),
        ShippedModel("fashion-4step-int8", "fashion-4step on the INT8 kernel of the CPU", "fashion", "fashion-4step"),
        ShippedModel("fashion-4step-nvfp4", "fashion-4step in 4.5 bits per weight", "fashion", "fashion-4step"),
        ShippedModel("fashion-2step", "2 steps, guidance 2 from t = 0.3 to 0.8 distilled in", "fashion"),
        ShippedModel("fashion-1step", "1 step, guidance 2 from t = 0.3 to 0.8 distilled in", "fashion"),
        ShippedModel("fashion-micro", "Fashion-MNIST 16x16, hidden 128, 16 tokens, 1.2 M: trains in minutes"),
        ShippedModel("portraits", "portraits 128x128 asked for in words, 4.6 M with text encoder and VAE; unfinished"),
    )
}

KNOWN = {  # models whose configurations are shipped (`subjects/known`), by their names on the hub
    "flux2-dev": "black-forest-labs/FLUX.2-dev",
    "flux2-klein-base": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux2-klein": "black-forest-labs/FLUX.2-klein-4B",
    "ltx-2": "Lightricks/LTX-2",
    "wan2.1": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan2.1-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.2": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
}

METHODS = (  # of distillation, as `distillation/methods.py` registers them; plugins bring others
    "finetune", "guidance", "ode", "reflow", "progressive", "flow_map", "shortcut", "mean_flow", "mean_flow_difference",
    "mean_flow_data", "consistency", "tcm", "consistency_training", "scm", "lcm", "refine", "dmd2", "dmd2_gan",
    "f_distill", "sid", "sida", "ladd", "rcm",
)  # fmt: skip


JUDGES = ("fashion", "imagenet", "statistics", "paired", "clips")  # of pictures, as `evaluation/judges` holds them


def data_dir() -> Path:
    """The folder of shipped data and weights: `data/` of the repository, or DIFFUSION_OPT_DATA.

    Raises FileNotFoundError, with the remedy, if it does not exist.
    """
    override, folder = os.environ.get("DIFFUSION_OPT_DATA"), _data_place()
    if folder.is_dir():
        return folder
    if override:
        raise FileNotFoundError(f"DIFFUSION_OPT_DATA points to {folder}, which is not a folder")
    raise FileNotFoundError(
        "shipped models and data are not part of the installed package: they lie in the folder data/ of its "
        "repository. Set DIFFUSION_OPT_DATA to that folder of a clone"
    )


def _data_place() -> Path:
    override = os.environ.get("DIFFUSION_OPT_DATA")
    return Path(override) if override else Path(__file__).resolve().parents[1] / "data"


def is_shipped(folder: Path) -> bool:
    """Whether this is the folder of a shipped model."""
    return folder.name in SHIPPED and folder.resolve().parent == (_data_place() / "models").resolve()


def nearest(word: str, choices: Iterable[str]) -> str:
    """` (did you mean …?)` for a word that is close to one of the choices, otherwise nothing."""
    found = difflib.get_close_matches(word.lower(), list(choices), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def add(what: str, name: str, value: Any, table: MutableMapping[str, Any]) -> None:
    """Put something from outside into a table of names; twice the same does no harm.

    Raises ValueError for a name that is taken, or is no word.
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"a {what}'s name is a lower-case word with underscores, got {name!r}")
    if table.get(name, value) != value:
        raise ValueError(f"there is a {what} {name!r} already: choose another name")
    table[name] = value


def check_method(method: str) -> None:
    """Raise ValueError, with the nearest name, unless this is a method of distillation; hyphens are underscores."""
    if method.replace("-", "_") not in METHODS:
        raise ValueError(
            f"no method {method!r}{nearest(method.replace('-', '_'), METHODS)}: there are {', '.join(METHODS)}"
        )


def check_name(name: str | Path) -> None:
    """Raise ValueError unless this can be a model: a shipped name, a folder that exists, or a name of the hub."""
    text = str(name)
    if text in SHIPPED or Path(name).is_dir():
        return
    owner, _, rest = text.partition("/")
    hub = isinstance(name, str) and owner and rest and "/" not in rest and not text.startswith((".", "~"))
    if hub and not Path(owner).is_dir():
        return
    parent = Path(name).expanduser().parent
    beside = [path.parent.name for path in sorted(parent.glob("*/model_index.json"))]
    hint = nearest(text, SHIPPED) or nearest(Path(name).name, beside)
    if hub:
        listed = f": it holds {', '.join(beside)}" if beside and not hint else ""
        raise ValueError(
            f"unknown model {text!r}{hint}: the folder {owner} has no {rest}{listed}. "
            f"For a model of the hub by that name, run this where no folder is named {owner}"
        )
    raise ValueError(
        f"unknown model {text!r}{hint}: use one of {', '.join(SHIPPED)}, a folder that holds a pipeline, "
        "or a hub name such as 'black-forest-labs/FLUX.2-klein-4B'"
    )
