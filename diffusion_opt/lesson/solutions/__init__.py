"""Solutions of the exercises, as they stand folded in the notebooks (a test compares the two), one file a lesson.

Written as a reader would write them, from the formula and with torch alone: `diffusion_opt.flow` has the same samplers
with checks, progress and hooks. Each function bears the name of its exercise's stub; `SOLUTIONS` maps the checks of
`diffusion_opt.lesson.checks` to them.
"""

from diffusion_opt.kernels.runtime import HAS_TRITON
from diffusion_opt.lesson.solutions import (
    combine,
    cost_and_data,
    distribution_distillation,
    fewer_steps,
    low_precision_attention,
    quantization_ptq,
    quantization_qat,
    region_cache,
    start_here,
    step_caching,
    the_ruler,
    trajectory_distillation,
    what_a_diffusion_model_is,
    why_slow,
)

LESSONS = (
    start_here,
    what_a_diffusion_model_is,
    why_slow,
    fewer_steps,
    the_ruler,
    quantization_ptq,
    quantization_qat,
    step_caching,
    region_cache,
    low_precision_attention,
    trajectory_distillation,
    distribution_distillation,
    cost_and_data,
    combine,
)
if HAS_TRITON:  # Linux only; the lessons on kernels need it
    from diffusion_opt.lesson.solutions import triton_attention

    LESSONS += (triton_attention,)
SOLUTIONS = {name: solution for lesson in LESSONS for name, solution in lesson.SOLUTIONS.items()}
