"""What a technique buys and costs: quality (FD, KID, precision/recall), speed, memory, and exact arithmetic."""

from diffusion_opt.evaluation.cost import Cost, UncountedWorkError, count
from diffusion_opt.evaluation.distances import frechet_distance, kernel_distance, moments, precision_recall
from diffusion_opt.evaluation.features import METRIC_NAME, FashionFeatures, embed, load_features
from diffusion_opt.evaluation.judges import Number, Own, RealPictures, at_teacher_quality, judge_named, judged
from diffusion_opt.evaluation.machine import machine
from diffusion_opt.evaluation.measurement import Measurement, Protocol, Rung, measure_together, speedup
from diffusion_opt.evaluation.modes import mode_shares, modes_covered, stray_share
from diffusion_opt.evaluation.point_distances import mmd, sliced_wasserstein
from diffusion_opt.evaluation.quality import Quality, TeacherGap, compare, quality, teacher_gap
from diffusion_opt.evaluation.reference import Reference, floor_distance, load_reference
from diffusion_opt.evaluation.speed import StoresPacked, Timing, interleaved, peak_memory, timed, weight_bytes

__all__ = [
    "METRIC_NAME",
    "Cost",
    "FashionFeatures",
    "Measurement",
    "Number",
    "Own",
    "Protocol",
    "Quality",
    "RealPictures",
    "Reference",
    "Rung",
    "StoresPacked",
    "TeacherGap",
    "Timing",
    "UncountedWorkError",
    "at_teacher_quality",
    "compare",
    "count",
    "embed",
    "floor_distance",
    "frechet_distance",
    "interleaved",
    "judge_named",
    "judged",
    "kernel_distance",
    "load_features",
    "load_reference",
    "machine",
    "measure_together",
    "mmd",
    "mode_shares",
    "modes_covered",
    "moments",
    "peak_memory",
    "precision_recall",
    "quality",
    "sliced_wasserstein",
    "speedup",
    "stray_share",
    "teacher_gap",
    "timed",
    "weight_bytes",
]
