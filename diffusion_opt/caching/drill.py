"""A drill of what caches remember: something happens between two generations, and the second must not know.

Each try makes two pipelines with the same weights. On one a technique is applied, a first sample is made, it is
disturbed, and a second sample is made. On the other nothing ever happened: what of the disturbance lasts (an adapter, a
cast, a schedule) is done first, then the technique is applied and the second sample is made alone. Both must be equal
bit for bit, or be refused alike. Then the technique is taken off, and the plain pipeline must be back, to the bit too.

    passing    another size, other steps, guidance off, canceled, an error in a callback, one step, a second pipeline
               around the same parts, another thread
    lasting    an adapter that comes, is scaled, disabled or deleted, weights written to, a cast there and back, another
               attention backend, a shifted schedule

Everything random is drawn from one seed. Pipelines are handed in, so the drill knows no family.
"""

import contextlib
import copy
import random
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

from diffusion_opt.caching.calibration.step_calibration import calibrate_step_cache
from diffusion_opt.caching.guidance_cache import GuidanceCache
from diffusion_opt.caching.region import ChunkRegionCache, GenerationRegionCache, StreamingRegionCache
from diffusion_opt.caching.rules import EasyCache, FirstBlockCache, FixedInterval, FixedSchedule, StepTable, TeaCache
from diffusion_opt.caching.schedules.compiled import CompiledSchedule
from diffusion_opt.evaluation.drill import Outcome
from diffusion_opt.subjects import Run

STEPS = 4
TECHNIQUES: tuple[Any, ...] = (
    FixedInterval(2, "reuse"),
    FixedSchedule((True, False, True, False)),
    TeaCache(0.5, "reuse"),
    FirstBlockCache(0.5, "reuse"),
    EasyCache(0.5, "reuse", warmup=1),
    GuidanceCache(2, "reuse"),
    GuidanceCache(1, interval=(0.3, 0.8)),
    ChunkRegionCache(0.3),
    GenerationRegionCache(0.5, refresh_every=2),
    StreamingRegionCache(0.0, probe=0.0),  # another noise changes all tokens, so nothing of the frame before is reused
)
COMPILED = (CompiledSchedule((True, False, True, False), backend="eager"),)  # traced, and run by torch as it stands


class _StopError(Exception):
    """What a callback raises."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A pipeline that can be made again and again with the same weights, and how it is called."""

    make: Callable[[], DiffusionPipeline]
    run: Run

    def sample(self, pipe: DiffusionPipeline, index: int, **call: Any) -> Tensor:
        """Latents of one sample."""
        return self.run.generate(pipe, [index], **{"num_inference_steps": STEPS} | call)


def _stop(*_: Any) -> None:
    raise _StopError


def _cancel(pipe: DiffusionPipeline, step: int, time: Any, kept: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = True
    return kept


def _beside(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A second pipeline around the same networks; scheduler and tokenizers, which threads cannot share, copied."""
    parts = {
        name: part if isinstance(part, nn.Module) else copy.deepcopy(part) for name, part in pipe.components.items()
    }
    other = type(pipe)(**parts, **_settings(pipe))
    other.set_progress_bar_config(disable=True)
    return other


def _settings(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What the pipeline's constructor takes beside its parts."""
    return {name: value for name, value in pipe.config.items() if name == "is_distilled"}


def _in_a_thread(subject: Subject, pipe: DiffusionPipeline) -> None:
    """A generation in another thread, while one is made here."""
    other = _beside(pipe)
    thread = threading.Thread(target=lambda: subject.sample(other, 5))
    thread.start()
    subject.sample(pipe, 6)
    thread.join()


PASSING: dict[str, Callable[[Subject, DiffusionPipeline], object]] = {
    "another size": lambda subject, pipe: subject.sample(pipe, 3, height=64, width=32),
    "other steps": lambda subject, pipe: subject.sample(pipe, 3, num_inference_steps=STEPS + 2),
    "a run of one step": lambda subject, pipe: subject.sample(pipe, 3, num_inference_steps=1),
    "guidance off": lambda subject, pipe: subject.sample(pipe, 3, guidance_scale=1.0),
    "a canceled run": lambda subject, pipe: subject.sample(pipe, 3, callback_on_step_end=_cancel),
    "an error in a callback": lambda subject, pipe: subject.sample(pipe, 3, callback_on_step_end=_stop),
    "a second pipeline": lambda subject, pipe: subject.sample(_beside(pipe), 3),
    "another thread": _in_a_thread,
}


def _adapter(transformer: nn.Module) -> None:
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformer.add_adapter(config)


def _scaled(transformer: nn.Module) -> None:
    _adapter(transformer)
    transformer.set_adapters(["default"], [0.3])


def _disabled(transformer: nn.Module) -> None:
    _adapter(transformer)
    transformer.disable_adapters()


def _deleted(transformer: nn.Module) -> None:
    _adapter(transformer)
    transformer.delete_adapters(["default"])


@torch.no_grad()
def _written(transformer: nn.Module) -> None:
    for weight in transformer.parameters():
        weight.mul_(1.25)


LASTING: dict[str, Callable[[DiffusionPipeline], object]] = {
    "an adapter comes": lambda pipe: _adapter(pipe.transformer),
    "an adapter, scaled": lambda pipe: _scaled(pipe.transformer),
    "an adapter, disabled": lambda pipe: _disabled(pipe.transformer),
    "an adapter, deleted": lambda pipe: _deleted(pipe.transformer),
    "weights written to": lambda pipe: _written(pipe.transformer),
    "a cast there and back": lambda pipe: pipe.transformer.to(torch.bfloat16).to(torch.float32),
    "another backend": lambda pipe: pipe.transformer.set_attention_backend("native"),
    "a shifted schedule": lambda pipe: setattr(
        pipe, "scheduler", type(pipe.scheduler).from_config(pipe.scheduler.config, shift=3.0)
    ),
}


def _attempt(make: Callable[[], Any]) -> Any:
    """What was asked for, or what a refusal said."""
    try:
        return make()
    except ValueError as error:
        return str(error)


def _alike(one: Tensor | str, other: Tensor | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return torch.equal(one, other)


def calibrated(subject: Subject, folder: Path) -> tuple[Any, ...]:
    """Techniques calibrated on this pipeline, by a file in `folder`; both refuse a pipeline of other weights or times.

    None where the pipeline has no step cache.
    """
    found = _attempt(lambda: calibrate_step_cache(subject.make(), replace(subject.run, num_inference_steps=STEPS)))
    if isinstance(found, str):
        return ()
    path = folder / "calibration.json"
    found.save(path)
    return TeaCache(5.0, "reuse", curve=str(path)), StepTable(5.0, str(path), "reuse")


def one_try(subject: Subject, technique: Any, disturbance: str) -> str:
    """What comes of one disturbance: held, refused, or a text that says what went wrong."""
    pipe, alone = subject.make(), subject.make()
    technique.apply(pipe)
    _attempt(lambda: subject.sample(pipe, 0))
    if disturbance in PASSING:
        with contextlib.suppress(_StopError, ValueError, IndexError):  # LTX's scheduler has no run of one step
            PASSING[disturbance](subject, pipe)
    else:
        LASTING[disturbance](pipe)
        LASTING[disturbance](alone)
    dense = subject.sample(alone, 1)
    found = _attempt(lambda: subject.sample(pipe, 1))
    expected = _attempt(lambda: subject.sample(technique.apply(alone), 1))  # a calibration may refuse to be put on
    if not _alike(found, expected):
        return f"{technique.describe()}: {disturbance} changed what came after it"
    technique.remove(pipe)
    if not torch.equal(subject.sample(pipe, 1), dense):
        return f"{technique.describe()}: after {disturbance} its removal did not bring the pipeline back"
    return "refused" if isinstance(found, str) else "held"


def _serves(technique: Any, pipe: DiffusionPipeline) -> bool:
    return _attempt(lambda: technique.apply(pipe)) is pipe


def drill(subjects: Mapping[str, Subject], tries: int, seed: int = 0, compiled: bool = False) -> list[Outcome]:
    """`tries` disturbances drawn at random over pipelines, techniques and kinds, a row for each kind of disturbance.

    Each kind comes equally often, and techniques are drawn from those that serve the pipeline, calibrated ones among
    them, and `compiled` ones if asked for: each trace takes seconds.
    """
    draw = random.Random(seed)
    kinds = (*PASSING, *LASTING)
    ends: dict[str, list[str]] = {kind: [] for kind in kinds}
    with warnings.catch_warnings(), TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", UserWarning)  # runs of few steps in which a cache skips nothing say so
        serving = []
        for name, subject in sorted(subjects.items()):
            (place := Path(folder) / name).mkdir()
            offered = TECHNIQUES + calibrated(subject, place) + (COMPILED if compiled else ())
            serving += [(name, technique) for technique in offered if _serves(technique, subject.make())]
        for number in range(tries):
            kind = kinds[number % len(kinds)]
            name, technique = draw.choice(serving)
            end = one_try(subjects[name], technique, kind)
            ends[kind].append(end if end in ("held", "refused") else f"{name}, {end}")
    return [Outcome.of("cache", kind, found) for kind, found in ends.items() if found]
