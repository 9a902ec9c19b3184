"""Which student to make: the plan, what makes a plan senseless, and the times a student is sampled at.

Every option has an effect or is refused. A guidance scale does nothing for a method that learns from the data alone, an
interval of times nothing without guidance, a ladder of times nothing for a student of evenly spaced jumps: each is
refused before anything is loaded, because a record that names an option says that it was followed.
"""

from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from diffusion_opt.distillation.builders import RENOISED, ladder
from diffusion_opt.distillation.methods import PAIRS, Method, method_named
from diffusion_opt.distillation.trajectory import PairConfig
from diffusion_opt.flow import ALL_TIMES
from diffusion_opt.flow.velocity import check_interval
from diffusion_opt.subjects import Sampling, Subject
from diffusion_opt.subjects.class_conditional import GUIDANCE_RANGE
from diffusion_opt.subjects.subject import check_ladder
from diffusion_opt.training.settings import changed


@dataclass(frozen=True, slots=True)
class StudentPlan:
    """Which student to make.

    Raises ValueError for a method that does not exist, does not serve that many steps, or does not use what is given.
    """

    teacher: str  # shipped name, folder or hub name
    method: str  # a name in METHODS
    steps: int  # of the student
    guidance: float | None = None  # scale that is distilled in; None: the teacher's own
    start: str | None = None  # shipped name or folder of the student to start from; None: the teacher
    pairs: PairConfig | None = None  # None: PAIRS at this guidance
    num_images: int | None = None  # real samples to use; None: all
    classes: tuple[str, ...] = ()  # of these classes only; none given: all
    lora_rank: int | None = None  # train adapters of this rank, folded in at the end; None: all weights
    guidance_interval: tuple[float, float] = ALL_TIMES  # times at which guidance counts, see `Guided`
    fake_updates: int | None = None  # of the critic between two of the student; None: the method's own
    times: tuple[float, ...] | None = None  # at which the student is trained and sampled; None: the method's own
    method_settings: dict[str, Any] = field(default_factory=dict)  # what is changed of the method, by name

    def __post_init__(self) -> None:
        method = method_named(self.method)
        if self.steps not in method.presets:
            served = ", ".join(str(steps) for steps in method.presets)
            raise ValueError(f"{self.method} makes students of {served} steps, got {self.steps}")
        if (self.num_images is not None or self.classes) and method.images == "none":
            raise ValueError(f"{self.method} uses no images: leave out their number and classes")
        if self.pairs is not None and not method.pairs:
            raise ValueError(f"{self.method} uses no trajectories: leave out their settings")
        if self.fake_updates is not None and method.kind != "distribution":
            raise ValueError(f"{self.method} has no fake score or discriminator: leave out the number of its updates")
        if self.num_images is not None and self.num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {self.num_images}")
        if self.lora_rank is not None and not method.adapts:
            raise ValueError(f"{self.method} takes an exact derivative, which adapters do not have: train all weights")
        if self.method_settings and method.settings is None:
            raise ValueError(f"{self.method} has no settings of its own, got {', '.join(self.method_settings)}")
        made = changed(method.settings, self.method_settings)  # what was text is recorded as the value that it became
        values = {name: attrgetter(name)(made) for name in sorted(self.method_settings)}
        object.__setattr__(self, "method_settings", values)
        _check_guidance(self, method)
        if self.times is not None:
            if method.sampling != "start":
                raise ValueError(f"{self.method} trains at times of its own: leave out the times")
            check_ladder(self.times)
            if len(self.times) != self.steps:
                raise ValueError(f"a student of {self.steps} steps has as many times, got {self.times}")

    @property
    def pair_config(self) -> PairConfig:
        """The trajectories of the plan. Raises ValueError while the guidance is left to the teacher."""
        if self.pairs is not None:
            return self.pairs
        if self.guidance is None:
            raise ValueError("the guidance is not settled: see settled()")
        return replace(PAIRS, guidance_scale=self.guidance, guidance_interval=self.guidance_interval)

    def settled(self, subject: Subject) -> "StudentPlan":
        """The plan with the teacher's own guidance where none was given; 1, none, for methods that know no guidance."""
        method, plan = method_named(self.method), self
        if plan.guidance is None:
            plan = replace(plan, guidance=subject.default_guidance if method.guided else 1.0)
        if method.pairs and plan.pairs is None and subject.batch is not None:
            plan = replace(plan, pairs=replace(plan.pair_config, shard_size=subject.batch))
        return plan


def _check_guidance(plan: StudentPlan, method: Method) -> None:
    check_interval(plan.guidance_interval)
    limited = plan.guidance_interval != ALL_TIMES
    if limited and "guidance" in (plan.method, method.network):
        raise ValueError(f"{plan.method} learns the scale itself, at all times: leave out the guidance interval")
    if not method.guided and (limited or plan.guidance not in (None, 1)):
        raise ValueError(
            f"{plan.method} learns from the images and not from a guided teacher: leave out guidance and its interval"
        )
    if limited and plan.guidance == 1:
        raise ValueError("a guidance scale of 1 is no guidance, at any time: leave out the guidance interval")
    low, high = GUIDANCE_RANGE
    if method.network == "guidance" and plan.guidance is not None and not low <= plan.guidance <= high:
        raise ValueError(f"students of {plan.method} take guidance {low:g} … {high:g}, got {plan.guidance:g}")
    if plan.pairs is not None and plan.guidance is not None:
        theirs = (plan.pairs.guidance_scale, tuple(plan.pairs.guidance_interval))
        if theirs != (plan.guidance, tuple(plan.guidance_interval)):
            raise ValueError(
                f"the trajectories have guidance {theirs[0]:g} in {theirs[1]}, the plan {plan.guidance:g} in "
                f"{plan.guidance_interval}: say the same twice, or leave one out"
            )


def sampling_of(plan: StudentPlan, method: Method, two_time: bool, steps: int | None = None) -> Sampling:
    """How the plan's student is sampled; `two_time` says whether its network knows the length of its jumps.

    `steps` takes the place of the plan's, for students of the way.
    """
    steps = steps or plan.steps
    if method.sampling == "teacher":
        return Sampling(steps, as_teacher=True, keeps_guidance=not method.guided)
    if method.sampling == "any":
        return Sampling(steps)
    if method.sampling == "renoise":
        return Sampling(steps, tuple(RENOISED.values()), renoise=True)
    if method.sampling == "start" and not two_time and steps > 1:
        return Sampling(steps, (plan.times or RENOISED[steps],), renoise=True)
    return Sampling(steps, (plan.times or (method.ladders or {}).get(steps) or ladder(steps),))
