"""The comparison: every policy at equal cost, in one run, with one line each.

    compare(pipe, budgets=(20, 15, 10, 7)).table()

For each budget of full steps each contestant (`contestants.py`) says how it would spend it, runs on the same held-out
noises, and is judged by all three judges (`contest.py`). A line without numbers says why: a cache that cannot run on
this pipeline, or that costs more than the budget however it is set, has lost, but it is not left out.

Lines are made one at a time and can be kept: `lines` takes those that are known and goes on behind them. Timings are
taken at the end, in turns, so that a slow minute of the machine touches all alike. Whether the arithmetic that a cache
spares is time that it spares is read off the two ratios beside each other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers import DiffusionPipeline

from diffusion_opt.caching.comparison.baselines import CannotRunError
from diffusion_opt.caching.comparison.contest import Contest, Setting, Solver, scheduled
from diffusion_opt.caching.comparison.contestants import Contestant, Group, contestants
from diffusion_opt.caching.rules import FixedSchedule
from diffusion_opt.caching.rules.fixed import marks
from diffusion_opt.caching.schedules.search import SearchSettings
from diffusion_opt.caching.step.predictors import PredictorName
from diffusion_opt.datasets.writing import read_json, write_json
from diffusion_opt.evaluation import interleaved, machine
from diffusion_opt.subjects import Run

if TYPE_CHECKING:
    from rich.console import Group as Tables

JUDGES = {"euler": "Euler run", "adams_bashforth2": "2nd-order run", "ode": "exact path"}
OURS: tuple[Group, ...] = ("searched",)


@dataclass(frozen=True, slots=True)
class Line:
    """What one policy made of one budget."""

    policy: str
    group: Group
    budget: int  # full steps that it could spend
    setting: str  # how it spent them
    reason: str | None  # why there are no numbers
    spent: float | None  # full steps, counted
    errors: dict[str, float] | None  # mean relative L2 distance of final latents to each judge
    solver: Solver = "euler"
    mask: str | None = None  # of a schedule: # computed, . skipped
    predictor: PredictorName | None = None  # of a schedule

    def __post_init__(self) -> None:
        if (self.reason is None) != (self.errors is not None and self.spent is not None):
            raise ValueError(f"a line has either numbers or a reason, got {self.spent}, {self.errors}, {self.reason!r}")

    @classmethod
    def of(
        cls, contestant: Contestant, budget: int, setting: Setting, spent: float, errors: dict[str, float]
    ) -> "Line":
        """A line with numbers."""
        schedule = setting.schedule
        return cls(
            policy=contestant.name,
            group=contestant.group,
            budget=budget,
            setting=setting.label,
            reason=None,
            spent=spent,
            errors=errors,
            solver=setting.solver,
            mask=None if schedule is None else marks(schedule.mask),
            predictor=None if schedule is None else schedule.predictor,
        )

    def again(self) -> Setting | None:
        """The setting that made the line, of plain runs and schedules; the others would have to be tuned anew."""
        if self.group == "fewer steps":
            return Setting(self.setting, self.budget, self.solver)
        if self.mask is None:
            return None
        return scheduled(FixedSchedule(tuple(mark == "#" for mark in self.mask), self.predictor), self.solver)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All lines, and the circumstances they were made under."""

    lines: tuple[Line, ...]
    teacher_errors: dict[str, dict[str, float]]  # of the uncached runs, by solver: to each judge
    seconds: dict[str, float]  # median of a call of `batch_size` images, by "policy @ budget"; "full" is the teacher
    steps: int
    guidance: float | None  # None: the pipeline's own
    num_samples: int
    batch_size: int
    macs_of_a_step: float  # multiply-accumulates of a full step of one sample
    seed: int
    machine: dict

    def save(self, path: str | Path) -> None:
        write_json(Path(path), asdict(self), indent=1)

    @classmethod
    def load(cls, path: str | Path) -> "Comparison":
        """Read what `save` wrote. Raises ValueError for a file of other fields."""
        stored = read_json(Path(path), "compare again")
        if set(stored) != {field.name for field in fields(cls)}:
            raise ValueError(f"{path} is no comparison: it has the fields {', '.join(sorted(stored))}")
        return cls(**stored | {"lines": tuple(Line(**line) for line in stored["lines"])})

    def at(self, budget: int) -> list[Line]:
        """The lines of one budget."""
        return [line for line in self.lines if line.budget == budget]

    def best(self, budget: int, judge: str, ours: bool) -> Line:
        """Who comes nearest to a judge at a budget: of the searched schedules, or of everybody else.

        Raises ValueError if there is nobody.
        """
        able = [line for line in self.at(budget) if line.errors is not None and (line.group in OURS) == ours]
        if not able:
            raise ValueError(f"no policy with numbers at a budget of {budget}: there are {self.budgets}")
        return min(able, key=lambda line: line.errors[judge])

    @property
    def budgets(self) -> list[int]:
        return sorted({line.budget for line in self.lines}, reverse=True)

    def time_ratios(self) -> dict[str, tuple[float, float]]:
        """Of each timed policy its share of the teacher's arithmetic, and of the teacher's time."""
        spent = {timed_name(line): line.spent for line in self.lines}
        return {
            name: (spent[name] / self.steps, seconds / self.seconds["full"])
            for name, seconds in self.seconds.items()
            if name != "full"
        }

    def table(self) -> "Tables":
        """One table for each budget, for a terminal; the least error in each column is bold."""
        from rich.console import Group as Tables
        from rich.text import Text

        note = (
            f"Errors: relative distance of final latents, mean over {self.num_samples} held-out noises. Cost: exact "
            f"arithmetic in full steps, of which the teacher takes {self.steps}. Time: share of the teacher's. The "
            "teacher itself is "
            f"{self.teacher_errors['euler']['ode']:.4f} off the exact path (Euler), "
            f"{self.teacher_errors['adams_bashforth2']['ode']:.4f} (second order)."
        )
        return Tables(*(self._table(budget) for budget in self.budgets), Text(note, style="dim"))

    def _table(self, budget: int):
        from rich.table import Table

        table = Table(title=f"What {budget} of {self.steps} steps can buy", title_justify="left", expand=False)
        table.add_column("policy")
        for name in ("cost", *(f"off the {judge}" for judge in JUDGES.values()), "time"):
            table.add_column(name, justify="right")
        lines, ratios = self.at(budget), self.time_ratios()
        able = [line for line in lines if line.errors is not None]
        least = {judge: min(line.errors[judge] for line in able) for judge in JUDGES} if able else {}
        for before, line in zip([None, *lines], lines, strict=False):
            if before is not None and before.group != line.group:
                table.add_section()
            if line.errors is None:
                table.add_row(line.policy, f"[dim]{_short(line.reason)}[/dim]", *[""] * 4)
                continue
            errors = (_marked(line.errors[judge], line.errors[judge] == least[judge]) for judge in JUDGES)
            time = ratios.get(timed_name(line))
            table.add_row(line.policy, f"{line.spent:.2f}", *errors, "" if time is None else f"{time[1]:.3f}")
        return table


def timed_name(line: Line) -> str:
    """Key of a line among the timings."""
    return f"{line.policy} @ {line.budget}"


def _marked(error: float, least: bool) -> str:
    return f"[bold]{error:.4f}[/bold]" if least else f"{error:.4f}"


def _short(reason: str | None) -> str:
    text = reason or ""
    return text if len(text) <= 60 else text[:59] + "…"


def lines(
    contest: Contest,
    budgets: Sequence[int],
    search: SearchSettings,
    only: Sequence[str] | None = None,
    known: Mapping[tuple[str, int], Line] | None = None,
) -> Iterator[tuple[Line, Setting | None]]:
    """The lines one by one, with the setting of each (None: no numbers, or a known line that was tuned).

    `only` names the policies to run. Raises ValueError for a name that there is not.
    """
    everyone = contestants(contest, search)
    if unknown := set(only or ()) - set(everyone):
        raise ValueError(f"no policy is called {sorted(unknown)[0]!r}: there are {', '.join(everyone)}")
    for budget in budgets:
        for name, contestant in everyone.items():
            if only is not None and name not in only:
                continue
            if known is not None and (name, budget) in known:
                yield known[name, budget], known[name, budget].again()
                continue
            try:
                setting = contestant.spend(contest, budget)
                outputs, spent = contest.spent(setting, contest.tasks(setting.steps))
            except CannotRunError as error:
                yield Line(name, contestant.group, budget, "", str(error), None, None), None
                continue
            yield Line.of(contestant, budget, setting, spent, contest.errors(outputs)), setting


def timings(contest: Contest, settings: Mapping[str, Setting], rounds: int) -> dict[str, float]:
    """Seconds of one batch of each setting and of the teacher ("full"), medians over turns taken one after another."""
    everyone = {"full": contest.full("euler"), **settings}
    calls = {
        name: partial(contest.sample, setting, contest.tasks(setting.steps, contest.batch_size)[0])
        for name, setting in everyone.items()
    }
    found = interleaved(calls, rounds=rounds, min_turn_s=0.0, progress=contest.progress)
    return {name: timing.median_s for name, timing in found.items()}


def conclude(contest: Contest, found: Sequence[Line], seconds: Mapping[str, float]) -> Comparison:
    """Lines and timings with the circumstances they were made under."""
    return Comparison(
        lines=tuple(found),
        teacher_errors={solver: contest.errors(contest.judges[solver]) for solver in ("euler", "adams_bashforth2")},
        seconds=dict(seconds),
        steps=contest.steps,
        guidance=contest.run.guidance_scale,
        num_samples=contest.num_samples,
        batch_size=contest.batch_size,
        macs_of_a_step=contest.macs_of_a_step,
        seed=contest.seed,
        machine=machine(),
    )


def compare(
    pipe: DiffusionPipeline,
    budgets: Sequence[int] = (20, 15, 10, 7),
    num_samples: int = 32,
    seed: int = 30_000,
    run: Run | None = None,
    search: SearchSettings | None = None,
    only: Sequence[str] | None = None,
    rounds: int = 3,
    progress: bool = True,
) -> Comparison:
    """Everyone at every budget; the pipeline is left as it was.

    `run` None is one of each class of a class-conditional pipeline. `rounds` turns of timing for each policy with
    numbers; 0: none. `only` names the policies to run. Raises ValueError as `Contest` does, and for unknown names.
    """
    contest = Contest(pipe, run, num_samples, seed, progress=progress)
    made = list(lines(contest, budgets, search or SearchSettings(), only))
    settings = {timed_name(line): setting for line, setting in made if setting is not None}
    seconds = timings(contest, settings, rounds) if rounds else {}
    return conclude(contest, [line for line, _ in made], seconds)
