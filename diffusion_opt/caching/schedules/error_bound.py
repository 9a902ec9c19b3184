"""A knob in units of error: at most so far from the full run, with so much confidence.

Thresholds mean nothing from one model to the next. What a user wants to say is: the cached result may be 3 % off, for
nine prompts in ten. Take a family of schedules m_1 (computes everything) … m_J (hardly anything), fixed beforehand, and
n calibration prompts. Let e_i(j) be the error of prompt i under m_j, and E_i(j) = max over j' <= j of e_i(j'), which
can only grow with j. Choose the most aggressive schedule with

    (#{i : E_i(j) > eps} + 1) / (n + 1)  <=  alpha = 1 - confidence

By conformal risk control (Angelopoulos et al. 2022, arXiv 2208.02814, theorem 1, with the loss 1{E > eps}) a new prompt
that is exchangeable with the n ones then has P(error > eps) <= alpha, whatever the model and the distribution of
errors. The probability is over calibration and prompt together; of one calibration, violations scatter around it. The
running maximum is what makes the theorem hold although a schedule with fewer steps is now and then the better one; it
costs nothing else. With alpha = 0.1 the +1 needs n >= 9. A new kind of prompt, or another model, voids the bound.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from diffusion_opt.caching.calibration.calibrated_run import Belonging, CalibratedRun, watched
from diffusion_opt.caching.calibration.stored import find_stored, read_stored
from diffusion_opt.caching.rules import FixedSchedule
from diffusion_opt.caching.schedules.recording import GenerationTask, generation_tasks, relative_error
from diffusion_opt.caching.schedules.schedule import ScheduleRule
from diffusion_opt.caching.schedules.search import Mask
from diffusion_opt.caching.step.predictors import PredictorName
from diffusion_opt.caching.step.technique import StepCacheTechnique
from diffusion_opt.datasets.writing import write_json
from diffusion_opt.subjects import Run

CALIBRATED = 20_000  # samples of a run from here on are for the bound
ErrorMeasure = Callable[[Float[Tensor, "b *s"], Float[Tensor, "b *s"]], Float[Tensor, " b"]]


def check_confidence(confidence: float) -> None:
    """Raise ValueError unless a confidence lies inside (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a probability inside (0, 1), 0.9 for a start, got {confidence}")


def least_samples(confidence: float) -> int:
    """The fewest calibration samples with which any schedule can qualify: (0 + 1) / (n + 1) <= 1 - confidence."""
    check_confidence(confidence)
    return math.ceil(1 / (1 - confidence) - 1 - 1e-9)


def choose(errors: Float[Tensor, "n j"], max_error: float, confidence: float) -> int:
    """The index of the most aggressive schedule that keeps the bound; `errors` of each sample under each schedule.

    Schedules are ordered, the gentlest first. Raises ValueError if there are too few samples for this confidence, or if
    not even the first schedule qualifies.
    """
    num_samples, least = len(errors), least_samples(confidence)
    if num_samples < least:
        raise ValueError(
            f"confidence {confidence:g} needs {least} calibration samples or more, got {num_samples}: "
            "calibrate with more, or ask for less confidence"
        )
    worst = errors.cummax(dim=1).values
    violations = (worst > max_error).sum(dim=0)
    allowed = math.floor((1 - confidence) * (num_samples + 1) + 1e-9) - 1
    qualified = (violations <= allowed).nonzero().flatten()
    if not len(qualified):
        needed = float(worst[:, 0].sort(descending=True).values[allowed])
        raise ValueError(
            f"no schedule keeps the error at {max_error:g} with confidence {confidence:g}: the gentlest of them needs "
            f"max_rel_error {needed:.2g} or more"
        )
    return int(qualified[-1])


@dataclass(frozen=True, slots=True)
class ErrorBound:
    """An ordered family of schedules, and the error of each calibration sample under each of them."""

    run: CalibratedRun
    predictor: PredictorName
    masks: tuple[Mask, ...]  # the gentlest first
    errors: tuple[tuple[float, ...], ...]  # of each sample, one for each mask

    def __post_init__(self) -> None:
        if not self.masks or not self.errors or any(len(row) != len(self.masks) for row in self.errors):
            raise ValueError(f"an error bound needs, for each sample, one error for each of {len(self.masks)} masks")
        computed = [sum(mask) for mask in self.masks]
        if computed != sorted(set(computed), reverse=True):
            raise ValueError(f"schedules are ordered by computed steps, most first, got {computed}")
        for mask in self.masks:
            FixedSchedule(mask, self.predictor)  # raises if the cache could not honor it
            if len(mask) != self.run.num_inference_steps:
                raise ValueError(f"a mask of {len(mask)} steps cannot serve {self.run.describe()}: calibrate anew")

    def mask(self, max_rel_error: float, confidence: float) -> Mask:
        """The most aggressive schedule that keeps the bound. Raises ValueError as `choose` does."""
        return self.masks[choose(torch.tensor(self.errors), max_rel_error, confidence)]

    def save(self, path: str | Path) -> None:
        write_json(Path(path), asdict(self), indent=None)

    @classmethod
    def load(cls, name: str | Path) -> "ErrorBound":
        """Read a calibration by shipped name or path.

        Raises FileNotFoundError if there is none and ValueError if the file is not one.
        """
        path = find_stored(name, "error bound", "make one with `diffusion-opt cache search --bound-samples 100`")
        return cls(**read_stored(cls, path, "error bound", run=CalibratedRun))


def schedule_errors(
    pipe: DiffusionPipeline,
    masks: Sequence[Mask],
    predictor: PredictorName,
    tasks: Sequence[GenerationTask],
    measure: ErrorMeasure = relative_error,
    progress: bool = False,
) -> Float[Tensor, "n j"]:
    """The error of every sample of the tasks under every mask, by running them all.

    `measure` compares final latents with those of the full run; any function of the two will do.
    """
    rows = []
    with tqdm(total=len(tasks) * (len(masks) + 1), desc="errors", unit="run", disable=not progress) as bar:
        for task in tasks:
            reference = task.run(pipe)
            bar.update()
            columns = []
            for mask in masks:
                technique = FixedSchedule(mask, predictor)
                technique.apply(pipe)
                try:
                    columns.append(measure(task.run(pipe), reference).cpu())
                finally:
                    technique.remove(pipe)
                bar.update()
            rows.append(torch.stack(columns, dim=1))
    return torch.cat(rows)


def calibrate_error_bound(
    pipe: DiffusionPipeline,
    run: Run,
    masks: Sequence[Mask],
    predictor: PredictorName,
    num_samples: int = 100,
    measure: ErrorMeasure = relative_error,
    progress: bool = False,
) -> ErrorBound:
    """Run a family of schedules on samples of a run. The mask that computes everything is put in front.

    The samples are other ones than those that masks are searched with and judged by, or the bound would not hold. Each
    prompt is taken in turn: a bound holds for prompts like these. Raises ValueError for a run that the pipeline cannot
    make and for masks of different lengths.
    """
    run.check(pipe)
    if len({len(mask) for mask in masks}) != 1:
        raise ValueError(f"an error bound needs masks of one length, got {sorted({len(mask) for mask in masks})}")
    tasks = generation_tasks(run, num_samples, first=CALIBRATED)
    everything = (True,) * len(masks[0])
    ordered = (everything, *sorted((mask for mask in masks if not all(mask)), key=sum, reverse=True))
    with watched(pipe) as watch:
        errors = schedule_errors(pipe, ordered[1:], predictor, tasks, measure, progress)
        made = watch.run()
    rows = tuple((0.0, *row) for row in errors.tolist())
    return ErrorBound(made, predictor, ordered, rows)


@dataclass(frozen=True, slots=True)
class ErrorBoundedCache(StepCacheTechnique):
    """Technique: the most aggressive schedule whose error exceeds `max_rel_error` for one prompt in ten, or fewer.

    "One in ten" is 1 - `confidence`. If the calibration has no schedule that skips and keeps the bound, applying it
    raises: it never runs uncached in silence.
    """

    max_rel_error: float  # |cached - full| / |full| of the final latents
    calibration: str  # shipped name or path of a saved `ErrorBound`
    confidence: float = 0.9

    def __post_init__(self) -> None:
        check_confidence(self.confidence)
        if not 0 < self.max_rel_error < math.inf:
            raise ValueError(f"max_rel_error must be above 0, 0.03 for a start, got {self.max_rel_error}")

    @property
    def predictor(self) -> PredictorName:
        return ErrorBound.load(self.calibration).predictor

    def rule(self, pipe: DiffusionPipeline) -> ScheduleRule:
        """Raises ValueError for another model, or if no schedule that skips anything keeps the bound."""
        bound = ErrorBound.load(self.calibration)
        belonging = Belonging(bound.run, pipe)
        mask = bound.mask(self.max_rel_error, self.confidence)
        if all(mask):
            gentlest = torch.tensor(bound.errors)[:, 1]
            raise ValueError(
                f"only the full run keeps the error at {self.max_rel_error:g} with confidence {self.confidence:g}: "
                f"computing {sum(bound.masks[1])} of {len(mask)} steps is off by up to {float(gentlest.max()):.2g}; "
                "allow a larger error"
            )
        return ScheduleRule(mask, belonging)

    def describe(self) -> str:
        return f"error at most {self.max_rel_error:g} with confidence {self.confidence:g}"
