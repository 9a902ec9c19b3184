"""One record for what a technique buys and costs, and the protocol under which two such records may be compared.

`measure_together` takes all rungs of a comparison at once: every rung makes images from the same noise and labels (one
seed a batch), its arithmetic is counted on the first of them, its memory watched on another, and then all rungs are
timed in turns. A speed-up is a ratio of medians from one such run; `speedup` refuses anything else and names the first
thing that differs. The first rung is the teacher, with whose images the others' are compared pair by pair.

A rung is no more than a function from labels and a generator to images, and the transformer whose passes and bytes are
counted, so pipelines, samplers over a `VelocityModel` and students all fit.
"""

import json
import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusion_opt.evaluation.cost import Cost, count
from diffusion_opt.evaluation.machine import machine
from diffusion_opt.evaluation.quality import RESAMPLES, Quality, quality
from diffusion_opt.evaluation.speed import Timing, interleaved, peak_memory, weight_bytes

Generate = Callable[[Int[Tensor, " b"], torch.Generator], Float[Tensor, "b 1 s s"]]


@dataclass(frozen=True, slots=True)
class Rung:
    """Something that makes images, and the network inside."""

    generate: Generate  # (labels, generator) -> images in [-1, 1]; draws its initial noise first, so that seeds pair
    transformer: nn.Module


@dataclass(frozen=True, slots=True)
class Protocol:
    """The circumstances of a measurement."""

    run: str  # one value for all that were timed in turns in one process
    batch_size: int  # images a timed call makes
    num_samples: int  # images behind the quality, 0 for none
    seed: int  # batch i draws its noise from seed + i
    rounds: int  # timed turns
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
    macs: int  # multiply-accumulates an image, mean over a call
    quality: Quality | None
    protocol: Protocol
    machine: dict

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
        expected = {item.name for item in fields(cls)}
        if wrong := expected ^ set(stored):
            raise ValueError(f"not a Measurement: field {sorted(wrong)[0]!r} is missing or unknown")
        stored["protocol"] = Protocol(**stored["protocol"])
        stored["quality"] = None if stored["quality"] is None else Quality.from_dict(stored["quality"])
        return cls(**stored)

    def save(self, path: Path) -> None:
        """Write the JSON to a file."""
        path.write_text(self.to_json() + "\n")


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
    rounds: int = 5,
    seed: int = 0,
    resamples: int = RESAMPLES,
    device: str = "cpu",
    progress: bool = True,
    images: dict[str, Tensor] | None = None,
) -> dict[str, Measurement]:
    """Measure all rungs under one protocol, the first one being the teacher of the others.

    `num_samples=0` leaves quality out. A dict passed as `images` receives each rung's images, for grids.
    Raises ValueError for no rungs and for sample or batch counts that make no sense.
    """
    if not rungs:
        raise ValueError("nothing to measure: pass at least one rung, the teacher first")
    if batch_size < 1 or num_samples < 0 or num_samples == 1:
        raise ValueError(f"need batch_size >= 1 and num_samples 0 or >= 2, got {batch_size} and {num_samples}")
    kept = {} if images is None else images
    labels = torch.arange(max(num_samples, batch_size)) % num_classes
    costs: dict[str, Cost] = {}
    with tqdm(total=len(rungs) * math.ceil(len(labels) / batch_size), disable=not progress, leave=False) as bar:
        for name, rung in rungs.items():
            bar.set_description(f"generate {name}")
            kept[name], costs[name] = _generate(rung, labels, batch_size, seed, bar)
    calls = {name: _call(rung, labels[:batch_size], seed) for name, rung in rungs.items()}
    memory = {name: peak_memory(call, device) for name, call in calls.items()}
    timings = interleaved(calls, rounds=rounds, progress=progress)
    first = next(iter(rungs))
    protocol = Protocol(
        run=uuid.uuid4().hex,
        batch_size=batch_size,
        num_samples=num_samples,
        seed=seed,
        rounds=rounds,
        threads=torch.get_num_threads(),
        dtype=str(kept[first].dtype).removeprefix("torch."),
        device=device,
    )

    def judge(name: str) -> Quality | None:
        if num_samples == 0:
            return None
        teacher = None if name == first else kept[first][:num_samples]
        made = kept[name][:num_samples]
        return quality(made, labels[:num_samples], teacher_images=teacher, resamples=resamples, seed=seed)

    here = machine()
    return {
        name: _record(name, rung, timings[name], memory[name], costs[name], judge(name), protocol, here)
        for name, rung in rungs.items()
    }


def _call(rung: Rung, labels: Int[Tensor, " b"], seed: int) -> Callable[[], Tensor]:
    """One call that always starts from the same noise."""
    return lambda: rung.generate(labels, torch.Generator().manual_seed(seed))


def _generate(
    rung: Rung, labels: Int[Tensor, " n"], batch_size: int, seed: int, bar: tqdm
) -> tuple[Float[Tensor, "n 1 s s"], Cost]:
    """Images of all labels on the CPU, and the cost of the first batch."""
    made: list[Tensor] = []
    cost = None
    for index, batch in enumerate(labels.split(batch_size)):
        call = _call(rung, batch, seed + index)
        if cost is None:
            cost = count(lambda call=call: made.append(call().detach().cpu()), rung.transformer)
        else:
            made.append(call().detach().cpu())
        if len(made[-1]) != len(batch):
            raise ValueError(f"asked for {len(batch)} images, got a tensor of shape {tuple(made[-1].shape)}")
        bar.update()
    return torch.cat(made), cost


def _record(
    name: str,
    rung: Rung,
    timing: Timing,
    memory: int | None,
    cost: Cost,
    judged: Quality | None,
    protocol: Protocol,
    here: dict,
) -> Measurement:
    return Measurement(
        name=name,
        latency_s=timing.median_s,
        latency_iqr_s=timing.iqr_s,
        images_per_call=protocol.batch_size,
        peak_memory_bytes=memory,
        weight_bytes=weight_bytes(rung.transformer),
        nfe=cost.nfe,
        macs=round(cost.macs / protocol.batch_size),
        quality=judged,
        protocol=protocol,
        machine=here,
    )
