"""The curve of TeaCache: which change of the output goes with which change of the input.

TeaCache needs f, from the change of block 0's modulated input to the change of the stack's residual. The published
curves are polynomials of degree 4 fitted to one model and one setting. Several are negative or fall on part of their
range (that of Wan2.1-14B gives -13 for no change at all), and used with another model they are silently wrong. Here the
fit keeps to what is known about f:

    f(0) = 0,  f never falls,  f is linear between knots and constant beyond what was seen

by isotonic regression (pool adjacent violators; Barlow et al. 1972): sort by input change; while a value is below the
one before, replace both by their mean. A saved curve carries the model's fingerprint, the scheduler, steps and
guidance, and refuses to serve others.
"""

import hashlib
import json
from bisect import bisect_right
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.datasets import data_dir


def relative_change(new: Float[Tensor, "b *s"], old: Float[Tensor, "b *s"]) -> Float[Tensor, " b"]:
    """d = mean|new - old| / mean|old| of each sample; 0 where nothing changed, infinite if all of old is 0."""
    difference = (new - old).abs().flatten(1).mean(1, dtype=torch.float32)
    size = old.abs().flatten(1).mean(1, dtype=torch.float32)
    return torch.where(difference == 0, 0.0, difference / size)


def fingerprint(transformer: nn.Module) -> str:
    """Which model this is: a digest of its configuration and of the weights outside its blocks.

    Blocks are left out on purpose: quantizing them makes no other model of it, and embedders and modulation alone tell
    checkpoints apart. Also fast, on the largest models too.
    """
    digest = hashlib.sha256(transformer.__class__.__name__.encode())
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(transformer.named_parameters()):
        if "transformer_blocks." not in name:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def run_settings(pipe: DiffusionPipeline) -> tuple[str, int, float]:
    """Scheduler class, number of timesteps and guidance scale of the run under way, or of the last one.

    Guidance counts as 1, none, on a pipeline that was never called.
    """
    guidance = float(getattr(pipe, "guidance_scale", 1.0))
    return type(pipe.scheduler).__name__, len(pipe.scheduler.timesteps), guidance


def interpolate(knots: tuple[float, ...], values: tuple[float, ...], x: float) -> float:
    """Linear between the knots, constant beyond the last; x is at least the first."""
    if x >= knots[-1]:
        return values[-1]
    right = bisect_right(knots, x)
    (x0, x1), (y0, y1) = knots[right - 1 : right + 1], values[right - 1 : right + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def fit_curve(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Knots and values of the isotonic fit of y to x, beginning with (0, 0).

    Each knot is the mean of the pairs that were pooled. Raises ValueError if a change is negative or not finite, or if
    no input ever changed.
    """
    if not bool((x >= 0).all() and (y >= 0).all() and x.isfinite().all() and y.isfinite().all()):
        raise ValueError("changes must be finite and 0 or more; an infinite one means that a residual was all zero")
    if not x.numel() or float(x.max()) == 0:
        raise ValueError("the modulated input never changed, so there is nothing to fit: is the model trained?")
    pools: list[Tensor] = []  # sum of x, sum of y, number of pairs; a pool's knot is the mean of its pairs
    for index in torch.argsort(x, stable=True):
        pool = torch.stack([x[index], y[index], torch.ones_like(x[index])])
        while pools and _out_of_order(pools[-1], pool):
            pool = pools.pop() + pool
        pools.append(pool)
    knots = [(float(pool[0] / pool[2]), float(pool[1] / pool[2])) for pool in pools if pool[0] > 0]
    return (0.0, *(knot[0] for knot in knots)), (0.0, *(knot[1] for knot in knots))


def _out_of_order(before: Float[Tensor, "3"], pool: Float[Tensor, "3"]) -> bool:
    """Whether the mean of y does not rise from one pool to the next, or the mean of x does not."""
    return bool((before[:2] / before[2] >= pool[:2] / pool[2]).any())


def explained_variance(y: Float[Tensor, " n"], fitted: Float[Tensor, " n"]) -> float:
    """R^2: 1 for a perfect fit, 0 for one no better than the mean."""
    return 1 - float((y - fitted).square().sum() / (y - y.mean()).square().sum())


@dataclass(frozen=True, slots=True)
class TeaCacheCurve:
    """A calibrated f: linear between the knots, 0 at 0, never falling, constant beyond the last knot."""

    changes: tuple[float, ...]  # knots: relative change of the modulated input, rising from 0
    rescaled: tuple[float, ...]  # f at the knots: relative change of the residual
    model: str  # `fingerprint`
    scheduler: str  # class name
    num_inference_steps: int
    guidance_scale: float
    num_pairs: int
    r2: float  # variance of the residual's change that f explains, on the recorded pairs
    r2_step_table: float  # the same for the control, the mean of each step
    step_table: tuple[float, ...]  # that control: mean change of the residual from each step to the next

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.changes))
        monotone = all(a <= b for a, b in pairwise(self.rescaled))
        if len(self.changes) != len(self.rescaled) or len(self.changes) < 2 or self.changes[0] or self.rescaled[0]:
            raise ValueError(f"a curve needs two knots or more, the first (0, 0), got {self.changes}, {self.rescaled}")
        if not (rising and monotone):
            raise ValueError(
                f"the knots of a curve rise and its values never fall, got {self.changes}, {self.rescaled}"
            )

    def __call__(self, change: float) -> float:
        """The change of the residual that goes with a relative `change` of the modulated input."""
        return interpolate(self.changes, self.rescaled, change)

    def check_model(self, pipe: DiffusionPipeline) -> None:
        """Raise ValueError unless this is the model that was calibrated."""
        found = fingerprint(pipe.transformer)
        if found != self.model:
            raise ValueError(f"this curve was calibrated on model {self.model}, this one is {found}: calibrate anew")

    def check_run(self, pipe: DiffusionPipeline) -> None:
        """Raise ValueError unless scheduler, steps and guidance of the run under way are the calibrated ones."""
        found = run_settings(pipe)
        wanted = (self.scheduler, self.num_inference_steps, self.guidance_scale)
        if found != wanted:
            raise ValueError(
                "this curve was calibrated for {} with {} steps and guidance {:g}, ".format(*wanted)
                + "this run is {} with {} steps and guidance {:g}: calibrate anew".format(*found)
            )

    def describe(self) -> str:
        """One line: what was measured, and how the fit does against the control."""
        return (
            f"{self.num_pairs} pairs, {self.num_inference_steps} steps of {self.scheduler}, guidance "
            f"{self.guidance_scale:g}: R2 {self.r2:.3f} with {len(self.changes) - 1} knots; "
            f"no-signal control (mean of each step): R2 {self.r2_step_table:.3f}"
        )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "TeaCacheCurve":
        """Read a saved curve, at `path` or at `path` below the data folder.

        Raises FileNotFoundError if there is none and ValueError if the file is not a curve.
        """
        found = next((place for place in (Path(path), data_dir() / path) if place.is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"no TeaCache curve at {path} or {data_dir() / path}: make one by calibrate_teacache"
            )
        try:
            stored = json.loads(found.read_text())
        except ValueError as error:
            raise ValueError(f"{found} is not valid JSON ({error}): calibrate anew") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(stored, dict) or set(stored) != names:
            raise ValueError(f"{found} is not a TeaCache curve: it must hold exactly {', '.join(sorted(names))}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()})
