"""Do not compute again what hardly changed: step caches as rule x predictor on the block stack."""

from diffusion_opt.caching.calibration import calibrate_teacache
from diffusion_opt.caching.curve import TeaCacheCurve
from diffusion_opt.caching.predictors import PREDICTORS, Extrapolation
from diffusion_opt.caching.step_cache import StepCacheReport, step_cache_report
from diffusion_opt.caching.teacache import TeaCache

__all__ = [
    "PREDICTORS",
    "Extrapolation",
    "StepCacheReport",
    "TeaCache",
    "TeaCacheCurve",
    "calibrate_teacache",
    "step_cache_report",
]
