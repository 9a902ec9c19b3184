"""MagCache: skip while the residual has hardly changed its length, as calibrated beforehand.

Ma et al. 2025, "MagCache: Fast Video Generation with Magnitude-Aware Cache" (arXiv 2506.09045). The mean ratio of
residual lengths from one step to the next, g_i = mean_tokens |r_i| / |r_{i-1}|, is nearly the same for all prompts, so
it is measured once (`calibration.py`). While steps are skipped the ratios are multiplied, and their distance from 1
is what is summed:

    R <- R g_i,   e <- e + |1 - R|,   k <- k + 1
    skip if e <= threshold and k <= max_skips;  otherwise compute and set R = 1, e = 0, k = 0

The first `retention` of the steps is always computed. Ratios know lengths and not directions, and nothing of the prompt
at hand: like a step table this is a schedule, fixed by one number. Decisions are those of diffusers' `MagCacheConfig`
on the same ratios (a test holds them together), except that the last step is always computed here.
"""

from dataclasses import dataclass

from diffusers import DiffusionPipeline

from diffusion_opt.caching.calibration.calibrated_run import Belonging, check_near
from diffusion_opt.caching.calibration.step_calibration import StepCalibration
from diffusion_opt.caching.rules.base import ThresholdRule
from diffusion_opt.caching.step.predictors import PredictorName
from diffusion_opt.caching.step.stack import StackPass
from diffusion_opt.caching.step.technique import StepCacheTechnique, check_predictor, check_threshold


class MagnitudeRule(ThresholdRule):
    """The rule above. `ratios` has one entry a step, the first 1."""

    def __init__(
        self,
        threshold: float,
        ratios: tuple[float, ...],
        max_skips: int = 3,
        retention: float = 0.2,
        belonging: Belonging | None = None,
    ) -> None:
        super().__init__(threshold, belonging)
        self.ratios = ratios
        self.max_skips = max_skips
        self.retained = int(retention * len(ratios) + 0.5)  # steps; rounded as diffusers rounds
        self._forget()
        self._index = 0

    def start(self) -> None:
        super().start()
        self._forget()
        self._index = 0

    def skip(self, stack: StackPass, forced: bool) -> bool:
        """Raises ValueError in a run of more steps than there are ratios."""
        index = self.place(stack, self._index)
        self._index += 1
        if index >= len(self.ratios):
            raise ValueError(f"there are ratios for {len(self.ratios)} steps, this run has more: calibrate anew")
        if index < self.retained:
            return False
        self._ratio *= self.ratios[index]
        self._error += abs(1 - self._ratio)
        self._skips += 1
        if self.active and not forced and self._error <= self.threshold and self._skips <= self.max_skips:
            return True
        self._forget()
        return False

    def _forget(self) -> None:
        self._ratio, self._error, self._skips = 1.0, 0.0, 0


@dataclass(frozen=True, slots=True)
class MagCache(StepCacheTechnique):
    """Technique: step caching with the MagCache rule.

    `calibration` is the shipped name or the path of a calibration that `calibrate_step_cache` made.
    `predictor` is "reuse" as published; "forecast" is our default.
    """

    threshold: float  # summed distance of the magnitude ratio from 1; 0: none, bit-identical
    calibration: str
    predictor: PredictorName = "forecast"
    max_skips: int = 3  # in a row
    retention: float = 0.2  # share of the first steps that are always computed
    near: float = 0.0  # how far a run may be from the calibrated one (`calibrated_run.py`)

    def __post_init__(self) -> None:
        check_threshold(self.threshold, for_a_start=0.1)
        check_predictor(self.predictor)
        if self.max_skips < 1:
            raise ValueError(f"max_skips must be 1 or more, 3 as published, got {self.max_skips}")
        if not 0 <= self.retention <= 1:
            raise ValueError(f"retention is a share of the steps in [0, 1], 0.2 as published, got {self.retention}")
        check_near(self.near)

    def rule(self, pipe: DiffusionPipeline) -> MagnitudeRule:
        found = StepCalibration.load(self.calibration)
        belonging = Belonging(found.run, pipe, self.near)
        return MagnitudeRule(self.threshold, found.magnitude_ratios, self.max_skips, self.retention, belonging)

    def describe(self) -> str:
        return f"MagCache at {self.threshold:g} with {self.predictor}, at most {self.max_skips} skips in a row"
