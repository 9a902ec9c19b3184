"""Calibrate the rules on your own pipeline: record a few real generations, keep what each rule needs.

At every step of every sample, in every guidance branch, three numbers are taken from the stack's main stream:

    x = d(m_i, m_{i-1})       change of block 0's modulated input, which a cache can see at run time
    y = d(r_i, r_{i-1})       change of the stack's residual, which it cannot;  d(a, b) = mean|a - b| / mean|b|
    g = mean_tokens |r_i| / |r_{i-1}|

From one pass of recording come TeaCache's curve y = f(x), isotonic (`curve.py`), and the polynomial of degree 4 beside
it (`polynomial.py`), MagCache's ratios, the mean of g at each step, and the step table, the mean of y at each step.
How well x explains y is said by R^2, and the step table is the control that looks at no signal at all: where it wins, a
fixed table of steps would serve as well as the rule. The R^2 are taken on the recorded pairs themselves, so they
flatter; the table most, which has one free value a step.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.caching.calibration.calibrated_run import CalibratedRun
from diffusion_opt.caching.calibration.curve import IsotonicCurve, explained_variance, fit_isotonic, relative_change
from diffusion_opt.caching.calibration.polynomial import PolynomialCurve, fit_polynomial
from diffusion_opt.caching.calibration.stored import find_stored, read_stored
from diffusion_opt.caching.step.stack import StackCut, StackPass
from diffusion_opt.caching.step.technique import check_one_transformer
from diffusion_opt.datasets.writing import write_json
from diffusion_opt.models.block_stack import Streams


@dataclass(frozen=True, slots=True)
class StepCalibration:
    """What a recording gave: curve and polynomial for TeaCache, ratios for MagCache, the table for the control."""

    run: CalibratedRun
    num_pairs: int  # recorded pairs (x, y)
    curve: IsotonicCurve
    r2: float  # variance of the residual's change that the curve explains, on the recorded pairs
    polynomial: PolynomialCurve
    r2_polynomial: float
    step_table: tuple[float, ...]  # mean change of the residual from each step to the next; one less than steps
    r2_step_table: float
    magnitude_ratios: tuple[float, ...]  # mean ratio of the residual's length to that of the step before; the first 1

    def __post_init__(self) -> None:
        steps = self.run.num_inference_steps
        if len(self.step_table) != steps - 1 or len(self.magnitude_ratios) != steps:
            raise ValueError(
                f"{steps} steps have {steps - 1} changes and {steps} ratios, "
                f"got {len(self.step_table)} and {len(self.magnitude_ratios)}"
            )

    def describe(self) -> str:
        """One line: what was measured, and how the fits do against the control."""
        return (
            f"{self.num_pairs} pairs, {self.run.describe()}: R2 {self.r2:.3f} isotonic, {self.r2_polynomial:.3f} as a "
            f"polynomial; no-signal control (mean of each step): R2 {self.r2_step_table:.3f}"
        )

    def save(self, path: str | Path) -> None:
        write_json(Path(path), asdict(self), indent=1)

    @classmethod
    def load(cls, name: str | Path) -> "StepCalibration":
        """Read a saved calibration by shipped name or path.

        Raises FileNotFoundError if there is none and ValueError if the file is not a calibration.
        """
        path = find_stored(name, "calibration", "make one by calibrate_step_cache and save it")
        parts = {"run": CalibratedRun, "curve": IsotonicCurve, "polynomial": PolynomialCurve}
        return cls(**read_stored(cls, path, "calibration", **parts))


@dataclass(slots=True)
class _Pairs:
    """What one step of one context gave, for each sample of the batch."""

    step: int  # the earlier of the two
    input_change: Float[Tensor, " b"]
    residual_change: Float[Tensor, " b"]
    ratio: Float[Tensor, " b"]


class _Recorder:
    """A controller that skips nothing and keeps, for each context and step, how input and residual changed."""

    probe_blocks = 0

    def __init__(self) -> None:
        self.pairs: list[_Pairs] = []
        self._last: dict[str | None, tuple[int, Tensor, Tensor]] = {}

    def begin(self, stack: StackPass) -> None:
        return None

    def computed(self, stack: StackPass, residual: Streams) -> None:
        modulated, main = stack.modulated(), next(iter(residual.values()))
        step = 0
        if stack.context in self._last:
            before, old_modulated, old = self._last[stack.context]
            step = before + 1
            ratio = (main.float().norm(dim=-1) / old.float().norm(dim=-1).clamp_min(1e-8)).mean(1)
            changes = relative_change(modulated, old_modulated), relative_change(main, old), ratio
            self.pairs.append(_Pairs(before, *(change.double().cpu() for change in changes)))
        self._last[stack.context] = (step, modulated, main)

    def finished(self, stack: StackPass, output: Tensor) -> None:
        """The output is of no interest here."""

    def end_generation(self) -> None:
        self._last = {}


def calibrate_step_cache(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    num_inference_steps: int,
    guidance_scale: float,
    generator: torch.Generator,
    batch_size: int = 10,
    **call: object,
) -> StepCalibration:
    """Generate once from each prompt, in batches, and fit what the rules need to every step of every sample.

    All guidance branches count. `call` goes to the pipeline (height, width, num_frames, …). Raises ValueError without
    prompts, with fewer than two steps, and as `calibrate_runs` does.
    """
    if not prompts or num_inference_steps < 2:
        raise ValueError(f"calibration needs prompts and two steps, got {len(prompts)} prompts, {num_inference_steps=}")

    def generate(start: int) -> None:
        pipe(
            prompt=list(prompts[start : start + batch_size]),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type="latent",
            **call,
        )

    return calibrate_runs(pipe, [partial(generate, start) for start in range(0, len(prompts), batch_size)])


def calibrate_runs(pipe: DiffusionPipeline, generations: Sequence[Callable[[], object]]) -> StepCalibration:
    """Fit what the rules need to `generations`, each of which calls the pipeline once, all with the same settings.

    For pipelines that want more than a prompt. The pipeline is left as it was. Raises ValueError without generations,
    or if the pipeline cannot be cut or has a step cache on it.
    """
    if not generations:
        raise ValueError("calibration needs a generation or more, got none")
    check_one_transformer(pipe)
    recorder = _Recorder()
    cut = StackCut(pipe.transformer, recorder)
    cut.attach(pipe.transformer)
    try:
        for generate in generations:
            generate()
            recorder.end_generation()  # SD3's pipeline does not tell
        run = CalibratedRun.of(pipe)
    finally:
        cut.detach(pipe.transformer)
    return _fit(run, recorder.pairs)


def _fit(run: CalibratedRun, pairs: list[_Pairs]) -> StepCalibration:
    step = torch.cat([torch.full(pair.ratio.shape, pair.step) for pair in pairs])
    x = torch.cat([pair.input_change for pair in pairs])
    y = torch.cat([pair.residual_change for pair in pairs])
    ratio = torch.cat([pair.ratio for pair in pairs])
    steps = range(run.num_inference_steps - 1)
    table = torch.stack([y[step == i].mean() for i in steps])
    curve, polynomial = fit_isotonic(x, y), fit_polynomial(x, y)

    def r2(fitted: IsotonicCurve | PolynomialCurve) -> float:
        return explained_variance(y, torch.tensor([fitted(change) for change in x.tolist()], dtype=y.dtype))

    return StepCalibration(
        run=run,
        num_pairs=len(y),
        curve=curve,
        r2=r2(curve),
        polynomial=polynomial,
        r2_polynomial=r2(polynomial),
        step_table=tuple(table.tolist()),
        r2_step_table=explained_variance(y, table[step]),
        magnitude_ratios=(1.0, *(float(ratio[step == i].mean()) for i in steps)),
    )
