"""EasyCache: no calibration at all; how fast the output follows the input is measured as the run goes.

Zhou et al. 2025, "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching" (arXiv
2507.02860). With x_t what the transformer is called with and v_t what it returns, the rate at which one follows the
other is nearly constant over long stretches. It is measured at computed steps, c after the computed step c':

    k   = |v_c - v_c'| / |x_c - x_c'|                     |.| the mean absolute value
    acc <- acc + k |x_t - x_t'| / |v_c|                   t' the step before t, computed or not; c the last computed
    skip while acc < threshold;  otherwise compute and set acc to 0

The first `warmup` steps are always computed. The signal is free: it needs no block, no norm and no file. Its weakness
is that k is as old as the last computed step, so it goes stale in long rows of skips. Published, the method caches
output minus input of the whole transformer; here, as for all rules, it is the residual of the block stack.
"""

from dataclasses import dataclass

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.caching.rules.base import AccumulatingRule
from diffusion_opt.caching.step.predictors import PredictorName
from diffusion_opt.caching.step.stack import StackPass
from diffusion_opt.caching.step.technique import StepCacheTechnique, check_predictor, check_threshold
from diffusion_opt.models.block_stack import Streams


def _size(x: Float[Tensor, "b *s"]) -> Float[Tensor, " b"]:
    return x.abs().flatten(1).mean(1)


class EasyCacheRule(AccumulatingRule):
    """The rule above; rates are taken for each sample and the mean over samples decides."""

    def __init__(self, threshold: float, warmup: int = 3) -> None:
        super().__init__(threshold)
        self.warmup = warmup
        self._reset()

    def start(self) -> None:
        super().start()
        self._reset()

    def _reset(self) -> None:
        self._passes = 0
        self._rate: Tensor | None = None  # k of each sample
        self._previous: Tensor | None = None  # x of the pass before
        self._anchor: tuple[Tensor, Tensor] | None = None  # x and v of the last computed pass
        self._is_computed = False

    def skip(self, stack: StackPass, forced: bool) -> bool:
        early = self._passes < self.warmup or self._rate is None
        self._passes += 1
        self._is_computed = False
        return super().skip(stack, forced or early)

    def change(self, stack: StackPass) -> float:
        previous, self._previous = self._previous, stack.sample
        if self._rate is None:
            return 0.0
        moved = self._rate * _size(stack.sample - previous)
        return float((moved / _size(self._anchor[1])).mean())

    def computed(self, stack: StackPass, residual: Streams) -> None:
        self._is_computed = True

    def finished(self, stack: StackPass, output: Float[Tensor, "b *s"]) -> None:
        if not self._is_computed:
            return
        if self._anchor is not None:
            x, v = self._anchor
            moved = _size(stack.sample - x)
            if bool((moved > 0).all()):  # a second call with the same latent says nothing of the rate
                self._rate = _size(output - v) / moved
        self._anchor = stack.sample, output


@dataclass(frozen=True, slots=True)
class EasyCache(StepCacheTechnique):
    """Technique: step caching with the EasyCache rule. `predictor` is "reuse" as published."""

    threshold: float  # expected relative change of the output since the last computed step; 0: none, bit-identical
    predictor: PredictorName = "forecast"
    warmup: int = 3  # steps always computed; 10 of 50 as published

    def __post_init__(self) -> None:
        check_threshold(self.threshold, for_a_start=0.1)
        check_predictor(self.predictor)
        if self.warmup < 0:
            raise ValueError(f"warmup is a number of steps, 0 or more, got {self.warmup}")

    def rule(self, pipe: DiffusionPipeline) -> EasyCacheRule:
        return EasyCacheRule(self.threshold, self.warmup)

    def describe(self) -> str:
        return f"EasyCache at {self.threshold:g} with {self.predictor}"
