"""Compute again only the tokens that changed, and let them attend to the keys and values of the others."""

from diffusion_opt.caching.region.chunks import ChunkAccumulators
from diffusion_opt.caching.region.edit import edit
from diffusion_opt.caching.region.planner import MODEL_SIZES, ModelSize, size_of, slot_bytes, slot_table
from diffusion_opt.caching.region.rolling import RollingKeyValues
from diffusion_opt.caching.region.session import RegionPass, RegionReport
from diffusion_opt.caching.region.streaming import stream
from diffusion_opt.caching.region.technique import (
    ChunkRegionCache,
    EditRegionCache,
    GenerationRegionCache,
    ReferenceRegionCache,
    StreamingRegionCache,
    region_report,
    reset_region_cache,
    set_region,
)

__all__ = [
    "MODEL_SIZES",
    "ChunkAccumulators",
    "ChunkRegionCache",
    "EditRegionCache",
    "GenerationRegionCache",
    "ModelSize",
    "ReferenceRegionCache",
    "RegionPass",
    "RegionReport",
    "RollingKeyValues",
    "StreamingRegionCache",
    "edit",
    "region_report",
    "reset_region_cache",
    "set_region",
    "size_of",
    "slot_bytes",
    "slot_table",
    "stream",
]
