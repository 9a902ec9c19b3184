"""When to compute: one rule a file, each with the technique that puts it on a pipeline."""

from diffusion_opt.caching.rules.easycache import EasyCache, EasyCacheRule
from diffusion_opt.caching.rules.first_block import FirstBlockCache, FirstBlockRule
from diffusion_opt.caching.rules.fixed import FixedInterval, FixedSchedule, IntervalRule, MaskRule
from diffusion_opt.caching.rules.magnitude import MagCache, MagnitudeRule
from diffusion_opt.caching.rules.step_table import StepTable, StepTableRule
from diffusion_opt.caching.rules.teacache import TeaCache, TeaCacheRule

__all__ = [
    "EasyCache",
    "EasyCacheRule",
    "FirstBlockCache",
    "FirstBlockRule",
    "FixedInterval",
    "FixedSchedule",
    "IntervalRule",
    "MagCache",
    "MagnitudeRule",
    "MaskRule",
    "StepTable",
    "StepTableRule",
    "TeaCache",
    "TeaCacheRule",
]
