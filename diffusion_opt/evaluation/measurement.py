"""One record for what a technique buys and costs, and the protocol under which two such records may be compared.

`measure_together` takes all rungs of a comparison at once. Every rung makes the same batches (one seed a batch), and
the making is the timing: the rungs take turns batch by batch, A B C A B C ..., so a slow minute touches all of them.
The first batch is not timed; on it the arithmetic is counted and the memory watched. A speed-up is a ratio of medians
from one such run; `speedup` refuses anything else and names the first thing that differs. The first rung is the
teacher, with whose images the others' are compared pair by pair.

A rung is no more than a function from prompts and a generator to pictures, and the transformer whose passes and bytes
are counted, so pipelines, samplers over a `VelocityModel` and students all fit. Prompts are class numbers unless texts
are given; pictures may have any size, one channel or three, and be clips. Who judges is chosen by name (`judges`): the
numbers of all stand side by side in `judged`, and the judge of the shipped data leaves its full record in `quality`.
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusion_opt.datasets.writing import write_text
from diffusion_opt.evaluation.cost import Cost, count
from diffusion_opt.evaluation.judges.fashion import FashionJudge, numbers_of
from diffusion_opt.evaluation.judges.judge import Judge, Number
from diffusion_opt.evaluation.judges.named import Chosen, judge_named, named_apart
from diffusion_opt.evaluation.judges.real import RealPictures
from diffusion_opt.evaluation.machine import machine
from diffusion_opt.evaluation.quality import RESAMPLES, Quality
from diffusion_opt.evaluation.speed import Timing, peak_memory, timed, weight_bytes

Asked = Int[Tensor, " b"] | Sequence[str]  # class numbers, or prompts
Generate = Callable[[Asked, torch.Generator], Tensor]


@dataclass(frozen=True, slots=True)
class Rung:
    """Something that makes pictures, and the network inside."""

    generate: Generate  # (labels or prompts, generator) -> pictures in [-1, 1]; draws its noise first, so seeds pair
    transformer: nn.Module


@dataclass(frozen=True, slots=True)
class Protocol:
    """The circumstances of a measurement."""

    run: str  # one value for all that were timed in turns in one process
    batch_size: int  # images a timed call makes
    num_samples: int  # images behind the quality, 0 for none
    seed: int  # batch i draws its noise from seed + i
    rounds: int  # timed turns of each
    threads: int  # of torch on the CPU
    dtype: str  # of the images
    device: str

    def first_difference(self, other: "Protocol") -> tuple[str, object, object] | None:
        """Name and both values of the first field that differs."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if mine != theirs:
                return item.name, mine, theirs
        return None


@dataclass(frozen=True, slots=True)
class Measurement:
    """Latency, memory, arithmetic and quality of one rung. `latency_s` is for one call of `images_per_call` images."""

    name: str
    latency_s: float  # median
    latency_iqr_s: float
    images_per_call: int
    peak_memory_bytes: int | None  # rise during a call; None where the system cannot tell
    weight_bytes: int
    nfe: int  # transformer passes a call
    macs: int  # multiply-accumulates per image, mean over a call
    quality: Quality | None  # full record of the judge "fashion", if it was asked
    protocol: Protocol
    machine: dict
    judged: dict[str, Number] = field(default_factory=dict)  # numbers of all judges, "<judge>.<number>"

    @property
    def ms_per_image(self) -> float:
        return 1000 * self.latency_s / self.images_per_call

    def to_json(self) -> str:
        """JSON text with every field; `from_json` is the inverse."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Measurement":
        """Read what `to_json` wrote. Raises ValueError if a field is missing or unknown."""
        stored = json.loads(text)
        required = {item.name for item in fields(cls) if item.default_factory is MISSING}
        known = {item.name for item in fields(cls)}
        if wrong := (required - set(stored)) | (set(stored) - known):
            raise ValueError(f"not a Measurement: field {sorted(wrong)[0]!r} is missing or unknown")
        stored["protocol"] = Protocol(**stored["protocol"])
        stored["quality"] = None if stored["quality"] is None else Quality.from_dict(stored["quality"])
        stored["judged"] = {name: Number(**number) for name, number in stored.get("judged", {}).items()}
        return cls(**stored)

    def save(self, path: Path) -> None:
        """Write the JSON to a file."""
        write_text(path, self.to_json() + "\n")


def speedup(baseline: Measurement, fast: Measurement) -> float:
    """How many times faster `fast` makes an image than `baseline`.

    Raises ValueError naming the first mismatch of protocol or machine: ratios hold within one interleaved run only.
    """
    difference = baseline.protocol.first_difference(fast.protocol)
    if difference is None and baseline.machine != fast.machine:
        keys = [key for key in baseline.machine if baseline.machine[key] != fast.machine.get(key)]
        difference = f"machine {keys[0]}", baseline.machine[keys[0]], fast.machine.get(keys[0])
    if difference is not None:
        name, mine, theirs = difference
        raise ValueError(
            f"{baseline.name!r} and {fast.name!r} were measured under different protocols: {name} is {mine!r} and "
            f"{theirs!r}; measure both in one call of measure_together"
        )
    return baseline.ms_per_image / fast.ms_per_image


def measure_together(
    rungs: Mapping[str, Rung],
    *,
    num_samples: int = 1000,
    batch_size: int = 50,
    num_classes: int = 10,
    prompts: Sequence[str] | None = None,
    rounds: int = 5,
    seed: int = 0,
    resamples: int = RESAMPLES,
    device: str = "cpu",
    progress: bool = True,
    images: dict[str, Tensor] | None = None,
    judges: Sequence[Chosen] = ("fashion",),
    real: RealPictures | Tensor | str | Path | None = None,
) -> dict[str, Measurement]:
    """Measure all rungs under one protocol, the first one being the teacher of the others.

    Each rung gets at least `rounds` timed turns; more samples give more. `num_samples=0` leaves quality out. Prompts
    are repeated in turn; without any, rungs get class numbers 0 … `num_classes` - 1. `judges` are names, functions or
    metrics (`evaluation.judges`), and compare with `real`; one that needs the teacher's pictures leaves the teacher
    out. A dict passed as `images` receives each rung's pictures, for grids. Raises ValueError for no rungs, for sample,
    batch or round counts that make no sense, and, before the second batch is made, for a judge that cannot judge.
    """
    if not rungs:
        raise ValueError("nothing to measure: pass at least one rung, the teacher first")
    if batch_size < 1 or rounds < 1 or num_samples < 0 or num_samples == 1:
        raise ValueError(
            f"need batch_size >= 1, rounds >= 1 and num_samples 0 or >= 2, got {batch_size}, {rounds} and {num_samples}"
        )
    real = None if real is None else RealPictures.of(real)
    panel = _panel(judges, resamples, seed, len(rungs) == 1 and real is None) if num_samples else []
    asked = _asked(prompts, num_classes, max(num_samples, batch_size))
    batches = [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]
    batches += [batches[0]] * (1 + rounds - sum(len(batch) == batch_size for batch in batches))  # timed, not judged
    taken = {name: _Taken() for name in rungs}
    with tqdm(total=len(rungs) * len(batches), disable=not progress, leave=False) as bar:
        for index, batch in enumerate(batches):
            for name, rung in rungs.items():
                bar.set_description(name)
                _turn(rung, batch, seed + index, index == 0, len(batch) == batch_size, device, taken[name])
                for judge in panel if index == 0 else ():
                    judge.check(*_at_least_two(taken[name].images[0], batch), real)
                bar.update()
    made = {name: torch.cat(turns.images)[: len(asked)] for name, turns in taken.items()}
    if images is not None:
        images.update(made)
    first = next(iter(rungs))
    protocol = Protocol(
        run=uuid.uuid4().hex,
        batch_size=batch_size,
        num_samples=num_samples,
        seed=seed,
        rounds=len(taken[first].seconds),
        threads=torch.get_num_threads(),
        dtype=str(made[first].dtype).removeprefix("torch."),
        device=device,
    )
    here, records = machine(), {}
    for name, rung in rungs.items():
        opinions = _opinions(panel, made[name], asked, real, made[first])
        records[name] = _record(name, rung, taken[name], opinions, protocol, here)
    return records


def _at_least_two(pictures: Tensor, asked: Asked) -> tuple[Tensor, Asked]:
    """A first batch to check judges with; one of a single picture twice, since later batches add to it."""
    if len(pictures) > 1:
        return pictures, asked
    return torch.cat([pictures] * 2), asked.repeat(2) if isinstance(asked, Tensor) else [*asked] * 2


def _panel(judges: Sequence[Chosen], resamples: int, seed: int, alone: bool) -> list[Judge]:
    """The judges. Raises ValueError if one compares with a teacher or real pictures and there is neither (`alone`)."""
    panel = named_apart([judge_named(judge, resamples=resamples, seed=seed) for judge in judges])
    if lonely := [judge.name for judge in panel if alone and ("teacher" in judge.needs or judge.name == "statistics")]:
        raise ValueError(f"{lonely[0]!r} has nothing to compare one rung with: pass its teacher as the rung before it")
    return panel


def _asked(prompts: Sequence[str] | None, num_classes: int, num: int) -> Asked:
    """What is asked of a rung, sample by sample."""
    if prompts is None:
        return torch.arange(num) % num_classes
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts are a list of at least one text, got {prompts!r}")
    return [prompts[index % len(prompts)] for index in range(num)]


def _opinions(
    panel: Sequence[Judge], made: Tensor, asked: Asked, real: RealPictures | None, teacher: Tensor
) -> tuple[Quality | None, dict[str, Number]]:
    """The full record of the judge of the shipped data, if it is on the panel, and the numbers of all."""
    record, numbers, itself = None, {}, made is teacher
    for judge in panel:
        if isinstance(judge, FashionJudge):
            record = judge.quality(made, asked, None if itself else teacher)
            numbers |= numbers_of(record)
        elif not (itself and "teacher" in judge.needs):
            numbers |= judge.measure(made, asked, real=real, teacher=teacher)
    return record, numbers


@dataclass
class _Taken:
    """What the turns of one rung left behind."""

    images: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cost: Cost | None = None
    memory: int | None = None


def _turn(rung: Rung, asked: Asked, seed: int, first: bool, whole: bool, device: str, taken: _Taken) -> None:
    """One batch of one rung: counted and watched if it is the first, otherwise timed if it is whole."""

    def call() -> Tensor:
        return rung.generate(asked, torch.Generator().manual_seed(seed)).detach().cpu()

    made: list[Tensor] = []
    if first:
        rung.generate(asked[:2], torch.Generator().manual_seed(seed))  # lazy set-up is not this rung's memory

        def watch() -> None:
            taken.cost = count(lambda: made.append(call()), rung.transformer)

        taken.memory = peak_memory(watch, device)
    else:
        image, seconds = timed(call)
        made.append(image)
        taken.seconds += [seconds] if whole else []
    if len(made[0]) != len(asked):
        raise ValueError(f"asked for {len(asked)} images, got a tensor of shape {tuple(made[0].shape)}")
    taken.images.append(made[0])


def _record(
    name: str,
    rung: Rung,
    taken: _Taken,
    opinions: tuple[Quality | None, dict[str, Number]],
    protocol: Protocol,
    here: dict,
) -> Measurement:
    timing = Timing(tuple(taken.seconds), repeats=1)
    return Measurement(
        name=name,
        latency_s=timing.median_s,
        latency_iqr_s=timing.iqr_s,
        images_per_call=protocol.batch_size,
        peak_memory_bytes=taken.memory,
        weight_bytes=weight_bytes(rung.transformer),
        nfe=taken.cost.nfe,
        macs=round(taken.cost.macs / protocol.batch_size),
        quality=opinions[0],
        protocol=protocol,
        machine=here,
        judged=opinions[1],
    )
