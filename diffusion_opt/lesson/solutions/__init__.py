"""Solutions of the exercises, as they stand folded in the notebooks (a test compares the two), one file a lesson.

Written as a reader would write them, from the formula and with torch alone: `diffusion_opt.flow` has the same samplers
with checks, progress and hooks. Each function bears the name of its exercise's stub; `SOLUTIONS` maps the checks of
`diffusion_opt.lesson.checks` to them.
"""

from diffusion_opt.lesson.solutions import combine, fewer_steps, start_here, why_slow

LESSONS = (start_here, why_slow, fewer_steps, combine)
SOLUTIONS = {name: solution for lesson in LESSONS for name, solution in lesson.SOLUTIONS.items()}
