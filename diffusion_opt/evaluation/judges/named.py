"""Judges by name, and several of them in one run."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_opt.evaluation.judges.clips import ClipsJudge
from diffusion_opt.evaluation.judges.fashion import FashionJudge
from diffusion_opt.evaluation.judges.imagenet import ImageNetJudge
from diffusion_opt.evaluation.judges.judge import Judge, Number, Prompts
from diffusion_opt.evaluation.judges.own import Own
from diffusion_opt.evaluation.judges.paired import PairedJudge
from diffusion_opt.evaluation.judges.portraits import PortraitsJudge
from diffusion_opt.evaluation.judges.real import RealPictures
from diffusion_opt.evaluation.judges.statistics import StatisticsJudge
from diffusion_opt.names import add, nearest

JUDGES: dict[str, Callable[..., Judge]] = {
    "fashion": FashionJudge,
    "imagenet": ImageNetJudge,
    "statistics": StatisticsJudge,
    "paired": PairedJudge,
    "clips": ClipsJudge,
    "portraits": PortraitsJudge,
}
Chosen = str | Judge | Callable[..., Any]


def register(name: str, judge: Callable[..., Judge]) -> None:
    """Add a judge from outside, see `diffusion_opt.plugins`: what makes one of settings (resamples=, seed=).

    Raises ValueError for a name that is taken, or is no word.
    """
    add("judge", name, judge, JUDGES)


def judge_named(chosen: Chosen, **settings: Any) -> Judge:
    """A judge by name with its settings (resamples=, seed=), a judge as it is, or any callable as a judge of its own.

    Raises ValueError for an unknown name, listing those there are.
    """
    if isinstance(chosen, str):
        if chosen not in JUDGES:
            hint = nearest(chosen, JUDGES)
            raise ValueError(f"no judge {chosen!r}{hint}: there are {', '.join(JUDGES)}, or a function or metric")
        return JUDGES[chosen](**settings)
    if hasattr(chosen, "measure") and hasattr(chosen, "name"):
        return chosen
    if not callable(chosen):
        raise ValueError(f"a judge is a name, a function or a metric, got {type(chosen).__name__}")
    name = getattr(chosen, "__name__", type(chosen).__name__)
    return Own("own" if not name.isidentifier() else name, chosen)


def named_apart(judges: list[Judge]) -> list[Judge]:
    """The judges as they are. Raises ValueError if two have one name, since their numbers would too."""
    names = [judge.name for judge in judges]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two judges are called {twice[0]!r}: give one of them another name, Own('name', function)")
    return judges


def judged(
    judges: Iterable[Chosen],
    pictures: Tensor,
    prompts: Prompts,
    *,
    real: RealPictures | Tensor | str | Path | None = None,
    teacher: Tensor | None = None,
    **settings: Any,
) -> dict[str, Number]:
    """The numbers of several judges side by side, each named after its judge.

    `settings` go to judges that are given by name. Raises ValueError as the judges do, and if two have one name.
    """
    chosen = named_apart([judge_named(judge, **settings) for judge in judges])
    real = None if real is None else RealPictures.of(real)
    found: dict[str, Number] = {}
    for judge in chosen:
        found |= judge.measure(pictures, prompts, real=real, teacher=teacher)
    return found
