"""A judge from anything that can be called: a function of pictures and prompts, or a torchmetrics metric.

    Own("brightness", lambda pictures, prompts: pictures.mean((1, 2, 3)))
    Own("clip", CLIPScore("openai/clip-vit-base-patch16"), values="bytes")
    Own("fid", FrechetInceptionDistance(feature=network, normalize=True), values="unit")

A function gives a number, a dict of numbers, or one value per picture, whose mean gets a bootstrap interval. A metric
is fed as its `update` asks: `real=` with real and generated pictures in turn, `target` with the teacher's pictures of
the same noise, a second argument called anything with "text" with the prompts. Its result is one number or a dict.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_opt.evaluation.features import as_saved
from diffusion_opt.evaluation.judges.judge import Number, Prompts, as_frames, mean_interval
from diffusion_opt.evaluation.judges.real import RealPictures

Values = Literal["signed", "unit", "bytes"]  # [-1, 1], [0, 1], uint8


def in_range(pictures: Tensor, values: Values) -> Tensor:
    """Pictures of [-1, 1] in the range that somebody else's code expects."""
    if values == "signed":
        return pictures
    unit = (as_saved(pictures) + 1) / 2
    return unit if values == "unit" else (unit * 255).round().byte()


@dataclass(frozen=True)
class Own:
    """A judge of the user's; `needs` names what it must be given of "real" and "teacher"."""

    name: str
    function: Callable[..., Any]  # (pictures, prompts) -> number, dict of numbers or one value per picture; or a metric
    values: Values = "signed"

    def __post_init__(self) -> None:
        if self.values not in ("signed", "unit", "bytes"):
            raise ValueError(f"values must be 'signed', 'unit' or 'bytes', got {self.values!r}")
        if "." in self.name or not self.name:
            raise ValueError(f"a judge's name stands before the dot of its numbers, so it has none: {self.name!r}")

    @property
    def needs(self) -> frozenset[str]:
        wanted = _update_arguments(self.function)
        return frozenset({"real"} & wanted | ({"teacher"} if "target" in wanted else set()))

    def check(self, pictures: Tensor, prompts: Prompts, real: RealPictures | None) -> None:
        """Raises ValueError for other shapes than pictures and clips."""
        as_frames(pictures)

    def measure(
        self,
        pictures: Tensor,
        prompts: Prompts,
        *,
        real: RealPictures | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Number]:
        """Raises ValueError for what it needs and does not get, and for a result that is no number."""
        frames = as_frames(pictures)
        asked = [prompt for prompt in prompts for _ in range(len(frames) // len(pictures))]
        given = {"real": real, "teacher": teacher}
        if missing := [name for name in sorted(self.needs) if given[name] is None]:
            raise ValueError(f"the judge {self.name!r} needs {missing[0]} pictures: pass {missing[0]}=")
        if hasattr(self.function, "update"):
            result = self._metric(frames, asked, real, teacher)
        else:
            result = self.function(in_range(frames, self.values), asked)
        return self._numbers(result, len(frames))

    def _metric(self, frames: Tensor, prompts: list, real: RealPictures | None, teacher: Tensor | None) -> Any:
        metric, wanted = copy.deepcopy(self.function), _update_arguments(self.function)
        metric.reset()
        shown = in_range(frames, self.values)
        if "real" in wanted:
            metric.update(in_range(real.pictures, self.values), real=True)
            metric.update(shown, real=False)
        elif "target" in wanted:
            metric.update(shown, in_range(as_frames(teacher), self.values))
        elif any("text" in name for name in wanted):
            metric.update(shown, [str(prompt) for prompt in prompts])
        else:
            metric.update(shown)
        return metric.compute()

    def _numbers(self, result: Any, num: int) -> dict[str, Number]:
        if isinstance(result, dict):
            named = {f"{self.name}.{key}": value for key, value in result.items()}
        else:
            named = {f"{self.name}.{_word(self.function)}": result}
        return {key: self._number(key, value, num) for key, value in named.items()}

    def _number(self, key: str, value: Any, num: int) -> Number:
        found = torch.as_tensor(value).detach().double().cpu()
        if found.numel() == 1:
            return Number(found.item(), num, self.name)
        if found.shape != (num,):
            raise ValueError(
                f"{key} must be one number, or one for each of {num} pictures; got shape {tuple(found.shape)}"
            )
        return Number(found.mean().item(), num, self.name, *mean_interval(found))


def _update_arguments(function: Callable[..., Any]) -> set[str]:
    """Names of the arguments of a metric's `update`; none for a plain function."""
    update = getattr(function, "update", None)
    return set() if update is None else set(inspect.signature(update).parameters)


def _word(function: Callable[..., Any]) -> str:
    """What a single number of this function is called."""
    return "value" if not hasattr(function, "update") else type(function).__name__
