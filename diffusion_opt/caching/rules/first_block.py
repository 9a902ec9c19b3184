"""First-block cache: run one block, and skip the others while what it does has hardly changed.

ParaAttention's first block cache (Cheng 2024, no paper), which diffusers has as `FirstBlockCacheConfig` and cache-dit
generalizes to the first n blocks. With r1_t the residual of block 0 (its output minus its input),

    skip if d(r1_t, r1_c) < threshold          c the last computed step,  d(a, b) = mean|a - b| / mean|b|

Block 0 has seen prompt, latent and time, so its residual says more than the input alone, needs no calibration, and
costs one block at each skipped step: 1 / L of the stack. The comparison is with the last *computed* step, not with the
step before, so the error of a row of skips does not go unseen.

diffusers' version cuts at the blocks and cannot run FLUX.2 or LTX-2. Here the probe is the cut's own, for every family,
and a skipped step adds the predicted residual of the other blocks to what block 0 has just computed.
"""

from dataclasses import dataclass

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.caching.calibration.curve import relative_change
from diffusion_opt.caching.rules.base import ThresholdRule
from diffusion_opt.caching.step.predictors import PredictorName
from diffusion_opt.caching.step.stack import StackPass
from diffusion_opt.caching.step.technique import StepCacheTechnique, check_predictor, check_threshold


class FirstBlockRule(ThresholdRule):
    """The rule above, on the main stream."""

    probe_blocks = 1

    def __init__(self, threshold: float) -> None:
        super().__init__(threshold)
        self._last_computed: Float[Tensor, "b n d"] | None = None

    def start(self) -> None:
        super().start()
        self._last_computed = None

    def skip(self, stack: StackPass, forced: bool) -> bool:
        residual = next(iter(stack.probe.values()))
        last = self._last_computed
        if not forced and last is not None and float(relative_change(residual, last).mean()) < self.threshold:
            return True
        self._last_computed = residual
        return False


@dataclass(frozen=True, slots=True)
class FirstBlockCache(StepCacheTechnique):
    """Technique: step caching with the first-block rule. `predictor` is "reuse" in ParaAttention and diffusers."""

    threshold: float  # change of block 0's residual since the last computed step; 0: none, bit-identical
    predictor: PredictorName = "forecast"

    def __post_init__(self) -> None:
        check_threshold(self.threshold, for_a_start=0.1)
        check_predictor(self.predictor)

    def rule(self, pipe: DiffusionPipeline) -> FirstBlockRule:
        return FirstBlockRule(self.threshold)

    def describe(self) -> str:
        return f"first-block cache at {self.threshold:g} with {self.predictor}"
