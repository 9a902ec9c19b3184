"""A fair contest of sampling policies: one pipeline, one set of noises, one currency.

The currency is the **full step**: multiply-accumulates, counted over everything that really runs
(`evaluation.count`), divided by those of one step of the uncached pipeline, guidance passes included. A policy may
spend a budget of so many full steps and not one operation more. A cache pays for the head and tail of its skipped
steps out of the same purse, so with a budget of 10 it computes 9 steps or so, where plain sampling takes 10.

Three judges, since no single one is fair to all. Errors are relative L2 distances of final latents, mean over held-out
noises, to

    the Euler run in full            what a cache of that run tries to reproduce
    the Adams-Bashforth run in full  the same for the second-order solver
    the finely solved ODE            what all of them try to approximate: Adams-Bashforth with four times the steps

The last judge is the one that a cache's makers rarely call: a run of fewer steps by a better solver can be nearer to
the truth than the teacher it is said to be worse than.
"""

import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from diffusion_opt.caching.calibration.step_calibration import StepCalibration, calibrate_step_cache
from diffusion_opt.caching.rules import FixedSchedule
from diffusion_opt.caching.schedules.recording import GenerationTask, generation_tasks, relative_error
from diffusion_opt.caching.schedules.search import even_mask
from diffusion_opt.caching.step.technique import StepCacheTechnique
from diffusion_opt.evaluation import count
from diffusion_opt.models import FlowMatchAdamsBashforthScheduler
from diffusion_opt.subjects import Run

Solver = Literal["euler", "adams_bashforth2"]
SCHEDULERS = {"euler": FlowMatchEulerDiscreteScheduler, "adams_bashforth2": FlowMatchAdamsBashforthScheduler}
Scope = Callable[[DiffusionPipeline], AbstractContextManager]


def uncached(pipe: DiffusionPipeline) -> AbstractContextManager:
    """The scope of a plain run."""
    return nullcontext()


def scope_of(technique: StepCacheTechnique) -> Scope:
    """One of our techniques as a scope: on the pipeline within, off it behind."""

    @contextmanager
    def scope(pipe: DiffusionPipeline) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "skipped none", falling polynomials: the errors say so too
            technique.apply(pipe)
            try:
                yield
            finally:
                technique.remove(pipe)

    return scope


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to sample, ready to run: solver, steps, and what is on the pipeline meanwhile."""

    label: str
    steps: int
    solver: Solver = "euler"
    scope: Scope = uncached
    schedule: FixedSchedule | None = None  # the technique behind the scope, if it is a schedule


def scheduled(schedule: FixedSchedule, solver: Solver) -> Setting:
    """A schedule on a solver's full run."""
    return Setting(schedule.describe(), len(schedule.mask), solver, scope_of(schedule), schedule)


def steps_of(pipe: DiffusionPipeline, run: Run) -> int:
    """Steps of a run; where it leaves them to the pipeline, the pipeline's own. Raises ValueError if it names none."""
    usual = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    found = run.num_inference_steps or getattr(pipe.config, "default_steps", None) or usual
    if not isinstance(found, int):
        raise ValueError(f"{type(pipe).__name__} has no steps of its own: give Run(…, num_inference_steps=…)")
    return found


def check_solvable(pipe: DiffusionPipeline) -> None:
    """Raise ValueError unless Euler steps in the pipeline's own times are what its scheduler does, or approximates."""
    scheduler = pipe.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"a comparison runs the Euler and the Adams-Bashforth scheduler of flow matching in the place of the "
            f"pipeline's own, and {type(scheduler).__name__} has other times: set pipe.scheduler = "
            "FlowMatchEulerDiscreteScheduler(shift=…) to compare"
        )


class Contest:
    """Runs settings on the same held-out noises, and knows what they cost and how far off they are.

    `seed` is the number of the first held-out sample of the run. Thresholds and schedules have noises of their own,
    half a million samples on. All is made when first needed. Raises ValueError for a run that the pipeline cannot make,
    and for a scheduler that is not one of flow matching, which the two solvers cannot replace.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        run: Run | None = None,
        num_samples: int = 32,
        seed: int = 30_000,
        batch_size: int = 8,
        tuning_samples: int = 10,
        fine_steps: int | None = None,
        progress: bool = True,
    ) -> None:
        self.pipe = pipe
        self.run = Run.for_pipeline(pipe) if run is None else run
        self.run.check(pipe)
        check_solvable(pipe)
        self.steps = steps_of(pipe, self.run)
        self.num_samples = num_samples
        self.seed = seed
        self.batch_size = batch_size
        self.tuning_samples = tuning_samples
        self.fine_steps = fine_steps or 4 * self.steps
        self.progress = progress
        self._tuning_references: dict[Solver, Tensor] = {}
        self._folder = tempfile.TemporaryDirectory()

    def tasks(self, steps: int, num_samples: int | None = None) -> tuple[GenerationTask, ...]:
        """Held-out batches; the first samples are the same for any number of them."""
        return self._tasks(steps, num_samples or self.num_samples, self.seed, self.batch_size)

    def tuning_task(self, steps: int) -> GenerationTask:
        """One batch of other noises."""
        return self._tasks(steps, self.tuning_samples, self.seed + 500_000, self.tuning_samples)[0]

    def _tasks(self, steps: int, number: int, first: int, batch_size: int) -> tuple[GenerationTask, ...]:
        run = replace(self.run, num_inference_steps=steps, batch_size=batch_size)
        return generation_tasks(run, number, first)

    def sample(self, setting: Setting, task: GenerationTask) -> Float[Tensor, "b *s"]:
        """One batch under a setting. Raises CannotRunError for a baseline that does not fit the pipeline."""
        with self.solver(setting.solver), setting.scope(self.pipe):
            return task.run(self.pipe)

    @contextmanager
    def solver(self, name: Solver) -> Iterator[None]:
        """The pipeline's scheduler is this one within."""
        before = self.pipe.scheduler
        self.pipe.scheduler = SCHEDULERS[name].from_config(before.config)
        try:
            yield
        finally:
            self.pipe.scheduler = before

    def outputs(self, setting: Setting, num_samples: int | None = None) -> Float[Tensor, "n *s"]:
        """Final latents of the held-out samples."""
        tasks = self.tasks(setting.steps, num_samples)
        bar = tqdm(tasks, desc=setting.label, unit="batch", leave=False, disable=not self.progress)
        return torch.cat([self.sample(setting, task) for task in bar])

    def spent(self, setting: Setting, tasks: Sequence[GenerationTask]) -> tuple[Float[Tensor, "n *s"], float]:
        """Final latents of some batches, and their arithmetic in full steps."""
        made: list[Tensor] = []
        macs = count(lambda: made.extend(self.sample(setting, task) for task in tasks)).macs
        outputs = torch.cat(made)
        return outputs, macs / len(outputs) / self.macs_of_a_step

    def tuning_cost(self, setting: Setting) -> float:
        """Full steps that a setting takes on the tuning batch."""
        return self.spent(setting, [self.tuning_task(setting.steps)])[1]

    def tuning_reference(self, solver: Solver) -> Float[Tensor, "b *s"]:
        """What the uncached run makes of the tuning batch."""
        if solver not in self._tuning_references:
            self._tuning_references[solver] = self.sample(self.full(solver), self.tuning_task(self.steps))
        return self._tuning_references[solver]

    @cached_property
    def calibration(self) -> StepCalibration:
        """What TeaCache, MagCache and the step table need, from one generation of each prompt."""
        noises = self.run.seed + self.seed + 600_000
        return calibrate_step_cache(self.pipe, replace(self.run, num_inference_steps=self.steps, seed=noises))

    @cached_property
    def calibration_path(self) -> str:
        """Where it is saved, for techniques to read; it goes with the contest."""
        path = Path(self._folder.name) / "calibration.json"
        self.calibration.save(path)
        return str(path)

    @cached_property
    def macs_of_a_step(self) -> float:
        """Multiply-accumulates of one uncached step of one sample, all guidance passes together."""
        task = self._tasks(1, 2, self.seed, 2)[0]
        return count(lambda: self.sample(Setting("one step", 1), task)).macs / 2

    @cached_property
    def two_passes(self) -> bool:
        """Whether guidance is a second pass of each step."""
        calls: list[int] = []
        handle = self.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            self.sample(Setting("one step", 1), self._tasks(1, 1, self.seed, 1)[0])
        finally:
            handle.remove()
        return len(calls) > 1

    @cached_property
    def skipped_step(self) -> float:
        """What a step costs in which no block runs, in full steps."""
        mask = even_mask(2, 1)
        setting = Setting("one step of two", 2, scope=scope_of(FixedSchedule(mask, "reuse")))
        return self.spent(setting, self._tasks(2, 2, self.seed, 2))[1] - 1

    def affordable(self, budget: float) -> int:
        """Steps that a cache can compute within a budget, all others skipped. Raises ValueError if not even one."""
        number = int((budget - self.steps * self.skipped_step) / (1 - self.skipped_step) + 1e-9)
        if number < 1:
            least = 1 + (self.steps - 1) * self.skipped_step
            raise ValueError(f"a cached run of {self.steps} steps costs {least:.2f} full steps or more, got {budget}")
        return number

    def full(self, solver: Solver) -> Setting:
        """The uncached run."""
        return Setting(f"{self.steps} steps in full, {solver}", self.steps, solver)

    @cached_property
    def judges(self) -> dict[str, Float[Tensor, "n *s"]]:
        """What outputs are compared with, by name."""
        judges = {solver: self.outputs(self.full(solver)) for solver in get_args(Solver)}
        return judges | {"ode": self.outputs(Setting("finely solved ODE", self.fine_steps, "adams_bashforth2"))}

    def errors(self, outputs: Float[Tensor, "n *s"]) -> dict[str, float]:
        """Mean relative error of the held-out samples to each judge."""
        return {name: float(relative_error(outputs, judge).mean()) for name, judge in self.judges.items()}
