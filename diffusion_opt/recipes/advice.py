"""What to do with this pipeline: which techniques apply, which are refused, which are useless here and why, in order.

`advise` tries each technique on the pipeline and takes it off again, so what it says is what would happen. A pipeline
without weights will do (`subjects/known`, `subjects/plan.skeleton`), because whether a technique fits is decided by
classes and settings. "Useless" is said of what would be taken and gain nothing or harm:

    a step cache on a student of few steps      a skipped step is a quarter of the path, with no near one
    a guidance cache without guidance passes    the scale is an input of the network, or guidance is off
    our solver in the place of UniPC            which is of second order itself
    a student of a student

What to expect is counted in passes, which are the same on every machine; how long a pass takes is not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffusers import DiffusionPipeline

from diffusion_opt.caching import EditRegionCache, GuidanceCache, TeaCache
from diffusion_opt.caching.comparison.contest import steps_of
from diffusion_opt.quantization import LowPrecisionAttention
from diffusion_opt.quantization.policy import choose
from diffusion_opt.recipes.recipe import Technique
from diffusion_opt.recipes.sampling import Compile, Solver
from diffusion_opt.recipes.search.space import FEW_STEPS
from diffusion_opt.subjects import Run, denoisers

Status = Literal["applies", "useless", "refused"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides over techniques."""

    pipeline: str
    networks: tuple[str, ...]
    steps: int
    distilled: bool
    guidance: Literal["a pass of its own", "an input of the network", "none"]
    scheduler: str
    second_order: bool  # the scheduler is one already
    width: int  # of a token inside the network; 0 if its configuration does not say

    @property
    def few(self) -> bool:
        """So few steps that none can be skipped."""
        return self.distilled or self.steps <= FEW_STEPS

    @property
    def passes(self) -> int:
        return self.steps * (2 if self.guidance == "a pass of its own" else 1)

    @classmethod
    def of(cls, pipe: DiffusionPipeline, run: Run) -> "Facts":
        """Raises ValueError for a pipeline without a denoising transformer."""
        networks = denoisers(pipe)
        first = next(iter(networks.values())).config
        scale = run.guidance_scale if run.guidance_scale is not None else pipe.config.get("default_guidance")
        if "true_cfg_scale" in run.arguments:
            scale = run.arguments["true_cfg_scale"]
        distilled = bool(pipe.config.get("is_distilled"))
        guidance = "none" if distilled or (scale is not None and scale <= 1) else "a pass of its own"
        if first.get("guidance_embeds"):
            guidance = "an input of the network"
        heads, head = first.get("num_attention_heads"), first.get("attention_head_dim")
        return cls(
            type(pipe).__name__, tuple(networks), steps_of(pipe, run), distilled, guidance,
            type(pipe.scheduler).__name__, "flow_shift" in pipe.scheduler.config, heads * head if heads and head else 0,
        )  # fmt: skip

    def describe(self) -> list[str]:
        """What the pipeline is, in sentences."""
        two = f", which share the {self.steps} steps" if len(self.networks) > 1 else ""
        kind = "a student of few steps" if self.few else "a teacher"
        return [
            f"{self.pipeline}: {kind}, {self.steps} steps with {self.scheduler}",
            f"it denoises with {' and '.join(self.networks)}{two}; guidance is {self.guidance}",
            f"a sample takes {self.passes} passes",
        ]


@dataclass(frozen=True, slots=True)
class Item:
    """One technique: what becomes of it here, why, what to expect, and what to type."""

    technique: str
    status: Status
    why: str
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Advice:
    """Facts about a pipeline, and the techniques in the order in which they are put on."""

    facts: Facts
    items: tuple[Item, ...]

    @property
    def commands(self) -> list[str]:
        """Everything to type, in order."""
        return [command for item in self.items for command in item.commands]

    def lines(self) -> list[str]:
        """The advice in words."""
        said = self.facts.describe()
        for title, status in (("in this order", "applies"), ("useless here", "useless"), ("refused", "refused")):
            chosen = [item for item in self.items if item.status == status]
            said += ["", title] if chosen else []
            for number, item in enumerate(chosen, 1):
                said.append(f"  {f'{number}. ' if status == 'applies' else ''}{item.technique}: {item.why}")
                said += [f"       {command}" for command in item.commands]
        return said


def advise(pipe: DiffusionPipeline, run: Run, model: str = "DIR", flags: Sequence[str] = ()) -> Advice:
    """Try every technique on a pipeline, with or without weights, and leave it as it was.

    `model` and `flags` (--prompts, --steps, …) stand in the commands. Raises ValueError for a pipeline without a
    denoising transformer.
    """
    facts = Facts.of(pipe, run)
    typed = Typed(model, " ".join(flags))
    makers: list[Callable[[DiffusionPipeline, Facts, Typed], Item]] = [
        _measure, _student, _solver, _weights, _attention, _step_cache, _guidance, _region, _compile, _search,
    ]  # fmt: skip
    return Advice(facts, tuple(make(pipe, facts, typed) for make in makers))


@dataclass(frozen=True, slots=True)
class Typed:
    """The beginnings of commands."""

    model: str
    flags: str

    def __call__(self, command: str, more: str = "") -> str:
        return " ".join(part for part in ("diffusion-opt", command, self.model, self.flags, more) if part)


def _tried(name: str, pipe: DiffusionPipeline, technique: Technique, useless: str | None, item: Any) -> Item:
    """The item if the pipeline takes the technique and it is of use."""
    try:
        technique.apply(pipe)
    except ValueError as error:
        return Item(name, "refused", str(error))
    technique.remove(pipe)
    return Item(name, "useless", useless) if useless else Item(name, "applies", *item)


def _measure(pipe: DiffusionPipeline, facts: Facts, typed: Typed) -> Item:
    return Item("a baseline", "applies", "measure before you change anything", (typed("measure"),))


def _student(pipe: DiffusionPipeline, facts: Facts, typed: Typed) -> Item:
    if facts.few:
        return Item("a student of few steps", "useless", f"it is one already, of {facts.steps} steps")
    gain = f"{facts.passes} passes become 4: the largest gain there is, and the only one that takes training"
    flags = f" {typed.flags}" if typed.flags else ""
    without = flags.replace(f" --steps {facts.steps}", "")  # --steps of distill are the student's
    command = f"diffusion-opt distill --teacher {typed.model}{without} --steps 4 --method dmd2 --out runs/student"
    return Item("a student of few steps", "applies", gain, (command,))


def _solver(pipe: DiffusionPipeline, facts: Facts, typed: Typed) -> Item:
    useless = None
    if facts.few:
        useless = f"its {facts.steps} steps are the times it was trained for"
    elif facts.second_order:
        useless = f"{facts.scheduler} is of second order itself: take fewer of its own steps"
    half = max(2, facts.steps // 2)
    item = (f"second order at one pass a step: try {half} steps in place of {facts.steps}", ())
    return _tried("another solver", pipe, Solver(half), useless, item)


def _weights(pipe: DiffusionPipeline, facts: Facts, typed: Typed) -> Item:
    name = "weights in 8 bits or fewer"
    for network in denoisers(pipe).values():
        choices = choose(network, 0, ())
        layers = [choice for choice in choices if choice.quantized]
        if not layers:
            return Item(name, "refused", "no linear layer of this network is one that the policy would quantize")
        numbers = sum(choice.layer.weight.numel() for choice in layers)
    share = numbers / sum(parameter.numel() for parameter in network.parameters())
    why = f"{len(layers)} linear layers, {share:.0%} of the parameters; before any cache is calibrated"
    if facts.few:
        why += "; a student shows rounding first, so look at more than 8 bits of it before fewer"
    return Item(name, "applies", why, (typed("quantize", "--format fp8 --out runs/fp8"),))


def _attention(pipe: DiffusionPipeline, facts: Facts, typed: Typed) -> Item:
    why = "on a GPU with a kernel for it"
    if facts.width:
        why += f"; it matters from some {6 * facts.width:,} tokens on, where attention is half of the arithmetic"
    return _tried("attention in 8 bits", pipe, LowPrecisionAttention("int8"), None, (why, ()))


def _step_cache(pipe: DiffusionPipeline, facts: Facts, typed: Typed) -> Item:
    useless = f"{facts.steps} steps leave nothing to skip: none lies near another" if facts.few else None
    why = "skips steps that hardly change; calibrate it last, on the network as it then is"
    commands = (
        typed("cache calibrate", "--out runs/cache"),
        typed("cache search", "--out runs/cache"),
        typed("cache compare", "--out runs/cache"),
    )
    if len(denoisers(pipe)) > 1:
        why, commands = "skips steps that hardly change, in each network by itself; calibration serves one network", ()
    return _tried("a step cache", pipe, TeaCache(0.2), useless, (why, commands))


def _guidance(pipe: DiffusionPipeline, facts: Facts, typed: Typed) -> Item:
    useless = None
    if facts.guidance != "a pass of its own":
        useless = f"guidance is {facts.guidance}: there is no pass to spare"
    every, times = facts.steps + -(-facts.steps // 2), "half of"
    why = f"at every second step: {facts.passes} passes become about {every}; an interval spares {times} them for good"
    return _tried("guidance at some steps only", pipe, GuidanceCache(2), useless, (why, ()))


def _region(pipe: DiffusionPipeline, facts: Facts, typed: Typed) -> Item:
    why = "only for edits and streams, where part of a picture stays: `EditRegionCache`, `StreamingRegionCache`"
    return _tried("a region cache", pipe, EditRegionCache(), None, (why, ()))


def _compile(pipe: DiffusionPipeline, facts: Facts, typed: Typed) -> Item:
    return _tried("torch.compile", pipe, Compile(), None, ("last; the first call of each shape pays for it", ()))


def _search(pipe: DiffusionPipeline, facts: Facts, typed: Typed) -> Item:
    why = "the joint space of what applies, and the fastest within 5 % of the pipeline as it comes"
    save = f"diffusion-opt apply {typed.model} --recipe runs/search/pick.json --out runs/fast"
    return Item("settings", "applies", why, (typed("search", "--out runs/search"), save))
