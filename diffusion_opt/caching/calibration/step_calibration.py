"""Calibrate the rules on your own pipeline: record a few real generations, keep what each rule needs.

At every step of every sample, in every guidance branch, three numbers are taken from the stack's main stream:

    x = d(m_i, m_{i-1})       change of block 0's modulated input, which a cache can see at run time
    y = d(r_i, r_{i-1})       change of the stack's residual, which it cannot;  d(a, b) = mean|a - b| / mean|b|
    g = mean_tokens |r_i| / |r_{i-1}|

From one pass of recording come TeaCache's curve y = f(x), isotonic (`curve.py`), and the polynomial of degree 4 beside
it (`polynomial.py`), MagCache's ratios, the mean of g at each step, and the step table, the mean of y at each step.
How well x explains y is said by R^2, and the step table is the control that looks at no signal at all: where it wins, a
fixed table of steps would serve as well as the rule. The R^2 are taken on the recorded pairs themselves, so they
flatter; the table most, which has one free value per step.

Decisions are taken on the first pass of a step, so what is fitted is the kind of that pass: all contexts that call the
transformer with equal settings (arguments that are no tensors), as "cond" and "uncond" do. LTX-2 has passes of two
further kinds, in which blocks are perturbed or video and audio isolated. They follow the decision and answer another
law; of them the calibration tells by how much more or less they change.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.caching.calibration.calibrated_run import CalibratedRun, watched
from diffusion_opt.caching.calibration.curve import IsotonicCurve, explained_variance, fit_isotonic, relative_change
from diffusion_opt.caching.calibration.polynomial import PolynomialCurve, fit_polynomial
from diffusion_opt.caching.calibration.stored import find_stored, read_stored
from diffusion_opt.caching.step.generation import DEFAULT_CONTEXT
from diffusion_opt.caching.step.stack import Shape, StackCut, StackPass, check_can_cut
from diffusion_opt.caching.step.technique import check_one_transformer
from diffusion_opt.datasets.writing import write_json
from diffusion_opt.models.block_stack import Given, Streams
from diffusion_opt.subjects import Run


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
    further: tuple[tuple[str, float], ...] = ()  # passes of other kinds: their mean change, in that of the fitted kind

    def __post_init__(self) -> None:
        steps = self.run.num_passes
        numbers = (*self.step_table, *self.magnitude_ratios, self.r2, self.r2_polynomial, self.r2_step_table)
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("a calibration holds finite numbers, and this one has NaN or infinity: calibrate anew")
        if len(self.step_table) != steps - 1 or len(self.magnitude_ratios) != steps:
            raise ValueError(
                f"{steps} steps have {steps - 1} changes and {steps} ratios, "
                f"got {len(self.step_table)} and {len(self.magnitude_ratios)}"
            )

    def describe(self) -> str:
        """One line: what was measured, and how the fits do against the control."""
        others = "".join(f"; {name} changes {share:.2f} times as much" for name, share in self.further)
        return (
            f"{self.num_pairs} pairs, {self.run.describe()}: R2 {self.r2:.3f} isotonic, {self.r2_polynomial:.3f} as a "
            f"polynomial; no-signal control (mean of each step): R2 {self.r2_step_table:.3f}{others}"
        )

    def warn_of_curve(self) -> None:
        """A UserWarning if the input's change says less of the residual's than its mean does."""
        if self.r2 <= 0:
            warnings.warn(
                f"the curve of this calibration explains nothing (R2 {self.r2:.2f}; the mean of each step: "
                f"{self.r2_step_table:.2f}): use StepTable, or search a schedule",
                UserWarning,
                stacklevel=3,
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
        self.pairs: dict[str, list[_Pairs]] = {}
        self._last: dict[str, tuple[int, Tensor, Tensor]] = {}

    def begin(self, stack: StackPass) -> None:
        return None

    def computed(self, stack: StackPass, residual: Streams) -> None:
        name = stack.context or DEFAULT_CONTEXT
        modulated, main = stack.modulated(), next(iter(residual.values()))
        step = 0 if name not in self._last else self._last[name][0] + 1
        if stack.running is not None:
            step = stack.running.place
        if name in self._last:
            before, old_modulated, old = self._last[name]
            ratio = (main.float().norm(dim=-1) / old.float().norm(dim=-1).clamp_min(1e-8)).mean(1)
            changes = relative_change(modulated, old_modulated), relative_change(main, old), ratio
            self.pairs.setdefault(name, []).append(_Pairs(before, *(change.double().cpu() for change in changes)))
        self._last[name] = (step, modulated, main)

    def finished(self, stack: StackPass, output: Tensor) -> None:
        """The output is of no interest here."""

    def end_generation(self) -> None:
        self._last = {}


def calibrate_step_cache(pipe: DiffusionPipeline, run: Run) -> StepCalibration:
    """Generate once from each prompt of a run, `run.batch_size` at a time, and fit what the rules need to every step.

    Raises ValueError for a run that the pipeline cannot make, for fewer than two steps, and as `calibrate_runs` does.
    """
    check_one_transformer(pipe)
    check_can_cut(pipe.transformer)
    run.check(pipe)
    if run.num_inference_steps == 1:
        raise ValueError("calibration needs two steps or more, got num_inference_steps=1")
    return calibrate_runs(pipe, [partial(run.generate, pipe, batch) for batch in run.batches(len(run.prompts))])


def calibrate_runs(pipe: DiffusionPipeline, generations: Sequence[Callable[[], object]]) -> StepCalibration:
    """Fit what the rules need to `generations`, each of which calls the pipeline once, all with the same settings.

    The pipeline is left as it was. Warns (UserWarning) of a curve that explains nothing. Raises ValueError without
    generations, if the pipeline cannot be cut or has a step cache on it, or if a run has a single step.
    """
    if not generations:
        raise ValueError("calibration needs a generation or more, got none")
    check_one_transformer(pipe)
    recorder = _Recorder()
    cut = StackCut(pipe.transformer, recorder, pipe)
    cut.attach(pipe.transformer)
    try:
        with torch.no_grad(), watched(pipe) as watch:
            for generate in generations:
                generate()
                recorder.end_generation()  # SD3's pipeline does not tell
            run = watch.run()
    finally:
        cut.detach(pipe.transformer)
    if not recorder.pairs:
        raise ValueError("calibration needs runs of two steps or more, and these had one")
    found = _fit(run, *_by_kind(recorder.pairs, cut.shapes))
    found.warn_of_curve()
    return found


def _by_kind(
    pairs: dict[str, list[_Pairs]], calls: dict[str | None, Given]
) -> tuple[list[_Pairs], dict[str, list[_Pairs]]]:
    """The pairs of the leading kind of pass, and those of each context of another kind."""
    settings = {
        name or DEFAULT_CONTEXT: {key: value for key, value in call.items() if not isinstance(value, Shape)}
        for name, call in calls.items()
    }
    leading = settings[next(iter(pairs))]
    further = {name: found for name, found in pairs.items() if settings[name] != leading}
    return [pair for name, found in pairs.items() if name not in further for pair in found], further


def _fit(run: CalibratedRun, pairs: list[_Pairs], further: dict[str, list[_Pairs]]) -> StepCalibration:
    step = torch.cat([torch.full(pair.ratio.shape, pair.step - run.begin) for pair in pairs])
    x = torch.cat([pair.input_change for pair in pairs])
    y = torch.cat([pair.residual_change for pair in pairs])
    ratio = torch.cat([pair.ratio for pair in pairs])
    steps = range(run.num_passes - 1)
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
        further=tuple(
            (name, float(torch.cat([pair.residual_change for pair in other]).mean() / y.mean()))
            for name, other in further.items()
        ),
    )
