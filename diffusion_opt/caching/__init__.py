"""Do not compute again what hardly changed: step caches as rule x predictor on the block stack.

The rules are in `rules`, searched schedules in `schedule`, those that keep an error bound in `error_bound`. Caches that
recompute some of the tokens are in `region`.
"""

from diffusion_opt.caching.calibration.calibrated_run import CalibratedRun
from diffusion_opt.caching.calibration.step_calibration import StepCalibration, calibrate_runs, calibrate_step_cache
from diffusion_opt.caching.guidance_cache import GuidanceCache, guidance_cache_report
from diffusion_opt.caching.region import (
    MODEL_SIZES,
    ChunkAccumulators,
    ChunkRegionCache,
    EditRegionCache,
    GenerationRegionCache,
    ModelSize,
    ReferenceRegionCache,
    RegionPass,
    RegionReport,
    RollingKeyValues,
    StreamingRegionCache,
    edit,
    region_report,
    reset_region_cache,
    set_region,
    size_of,
    slot_bytes,
    slot_table,
    stream,
)
from diffusion_opt.caching.rules import (
    EasyCache,
    FirstBlockCache,
    FixedInterval,
    FixedSchedule,
    MagCache,
    StepTable,
    TeaCache,
)
from diffusion_opt.caching.schedules.compiled import CompiledSchedule, compiled_schedule_report
from diffusion_opt.caching.schedules.error_bound import ErrorBound, ErrorBoundedCache
from diffusion_opt.caching.schedules.schedule import CacheSchedule, ScheduledCache
from diffusion_opt.caching.step.hooks import cache_context
from diffusion_opt.caching.step.predictors import PREDICTORS, Extrapolation, Hermite
from diffusion_opt.caching.step.report import StepCacheReport, anchor_bytes, step_cache_report

__all__ = [
    "MODEL_SIZES",
    "PREDICTORS",
    "CacheSchedule",
    "CalibratedRun",
    "ChunkAccumulators",
    "ChunkRegionCache",
    "CompiledSchedule",
    "EasyCache",
    "EditRegionCache",
    "ErrorBound",
    "ErrorBoundedCache",
    "Extrapolation",
    "FirstBlockCache",
    "FixedInterval",
    "FixedSchedule",
    "GenerationRegionCache",
    "GuidanceCache",
    "Hermite",
    "MagCache",
    "ModelSize",
    "ReferenceRegionCache",
    "RegionPass",
    "RegionReport",
    "RollingKeyValues",
    "ScheduledCache",
    "StepCacheReport",
    "StepCalibration",
    "StepTable",
    "StreamingRegionCache",
    "TeaCache",
    "anchor_bytes",
    "cache_context",
    "calibrate_runs",
    "calibrate_step_cache",
    "compiled_schedule_report",
    "edit",
    "guidance_cache_report",
    "region_report",
    "reset_region_cache",
    "set_region",
    "size_of",
    "slot_bytes",
    "slot_table",
    "step_cache_report",
    "stream",
]
