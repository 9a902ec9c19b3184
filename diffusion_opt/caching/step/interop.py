"""Take a calibration or a schedule elsewhere: to diffusers' MagCache and to cache-dit.

What was measured here serves libraries that cannot measure it. diffusers' `MagCacheConfig` prints the ratios of its own
calibration and returns none; ours go straight into it. cache-dit runs any hand-made mask of steps (1 computes, 0
caches, as here) with

    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**cache_dit_mask(schedule)))

and a searched one is such a mask. Differences remain: diffusers' MagCache may skip the last step; cache-dit runs its
first `Fn_compute_blocks` blocks at cached steps too, and predicts by its own calibrator, of which TaylorSeer of order 1
is the nearest to `forecast`.
"""

from collections.abc import Sequence
from typing import Any

from diffusers import MagCacheConfig

from diffusion_opt.caching.calibration.step_calibration import StepCalibration
from diffusion_opt.caching.rules.fixed import FixedSchedule
from diffusion_opt.caching.rules.magnitude import MagCache
from diffusion_opt.caching.step.predictors import PredictorName


def mag_cache_config(technique: MagCache) -> MagCacheConfig:
    """The configuration with which diffusers' MagCache decides as ours does, for `transformer.enable_cache`.

    Raises FileNotFoundError or ValueError as `StepCalibration.load` does. diffusers does not look at the model: that it
    is the calibrated one is the caller's to know.
    """
    ratios = StepCalibration.load(technique.calibration).magnitude_ratios
    return MagCacheConfig(
        threshold=technique.threshold,
        max_skip_steps=technique.max_skips,
        retention_ratio=technique.retention,
        num_inference_steps=len(ratios),
        mag_ratios=list(ratios),
    )


def cache_dit_mask(schedule: FixedSchedule) -> dict[str, Any]:
    """Arguments of cache-dit's `DBCacheConfig` that make it compute the steps of a schedule and no others."""
    return {
        "num_inference_steps": len(schedule.mask),
        "steps_computation_mask": [int(computed) for computed in schedule.mask],
        "steps_computation_policy": "static",
    }


def from_cache_dit_mask(mask: Sequence[int], predictor: PredictorName = "forecast") -> FixedSchedule:
    """A schedule from a mask as `cache_dit.steps_mask` makes them.

    Raises ValueError for entries other than 0 and 1, and as `FixedSchedule` does.
    """
    if set(mask) - {0, 1}:
        raise ValueError(f"a cache-dit mask has ones (compute) and zeros (cache), got {list(mask)}")
    return FixedSchedule(tuple(bool(computed) for computed in mask), predictor)
