"""One cheap look at a recipe: a few samples, the arithmetic of their calls, and the loss of the search's judge.

The recipe is put on the pipeline itself and taken off again, so nothing is copied and any size fits. The first batch is
counted (`evaluation.count`), the next ones are timed; all recipes make the same samples from the same noise.
"""

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusion_opt.evaluation.cost import count
from diffusion_opt.evaluation.judges import judged
from diffusion_opt.evaluation.judges.judge import Number
from diffusion_opt.evaluation.speed import timed, weight_bytes
from diffusion_opt.recipes.measuring import as_rung, run_under
from diffusion_opt.recipes.recipe import Recipe
from diffusion_opt.recipes.search.goal import Objective, loss
from diffusion_opt.subjects import Run


@dataclass(frozen=True, slots=True)
class Look:
    """What a trial found."""

    macs: int  # multiply-accumulates a sample
    seconds: float  # a sample, on a machine as it happened to be
    weight_bytes: int
    loss: float  # of the search's judge
    nfe: int

    def cost(self, objective: Objective) -> float:
        return float(self.macs) if objective.cost == "macs" else self.seconds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Made:
    """Samples of one recipe and what they took."""

    pictures: Tensor
    macs: int
    seconds: float
    weight_bytes: int
    nfe: int


class Bench:
    """A pipeline on which recipes are looked at, with the teacher's own samples as what they are compared with."""

    def __init__(self, pipe: DiffusionPipeline, run: Run, objective: Objective, samples: int) -> None:
        self.pipe, self.run, self.objective, self.samples = pipe, run, objective, samples
        self.teacher = self._make()
        self.teachers = self._number(self.teacher.pictures) if not objective.judge.startswith("paired.") else None

    def look(self, recipe: Recipe) -> Look:
        """Put on, look, take off. Raises ValueError if a technique refuses or the judge cannot judge."""
        made = self.teacher if not recipe.techniques else self._under(recipe)
        number = self._number(made.pictures)
        lost = loss(self.objective.judge, number, self.teachers)
        return Look(made.macs, made.seconds, made.weight_bytes, lost, made.nfe)

    def _under(self, recipe: Recipe) -> Made:
        recipe.apply(self.pipe)
        try:
            return self._make()
        finally:
            recipe.remove(self.pipe)

    def _number(self, pictures: Tensor) -> Number:
        asked = [self.run.prompts[i % len(self.run.prompts)] for i in range(len(pictures))]
        name = self.objective.judge.partition(".")[0]
        found = judged([name], pictures, asked, real=self.objective.real, teacher=self.teacher.pictures)
        if self.objective.judge not in found:
            raise ValueError(f"{name} gives {', '.join(found)}, and no {self.objective.judge}")
        return found[self.objective.judge]

    def _make(self) -> Made:
        rung = as_rung(self.pipe, run_under(self.pipe, self.run))
        pictures, seconds, cost, first = [], [], None, 0
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", UserWarning)  # a cache that skips nothing is a point like any other
            for batch in self.run.batches(self.samples):
                asked = [self.run.prompts[i % len(self.run.prompts)] for i in batch]

                def call(asked: list[str] = asked, seed: int = self.run.seed + batch.start) -> Tensor:
                    return rung.generate(asked, torch.Generator().manual_seed(seed)).detach().cpu()

                if cost is None:
                    made: list[Tensor] = []
                    cost, first = count(lambda call=call, made=made: made.append(call()), rung.transformer), len(batch)
                    pictures.append(made[0])
                else:
                    picture, taken = timed(call)
                    pictures.append(picture)
                    seconds.append(taken / len(batch))
            if not seconds:  # one batch: timed apart from its count
                seconds.append(timed(call)[1] / first)
        return Made(
            torch.cat(pictures), round(cost.macs / first), min(seconds), weight_bytes(rung.transformer), cost.nfe
        )
