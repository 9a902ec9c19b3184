"""Checks of the exercises: `checks.ex_02_1(my_answer)`, one file a lesson.

Each check answers in one of three ways. A stub (`...`, None, or a function that returns one of them or raises
NotImplementedError) gets "not yet" and no error, so that a notebook with open exercises runs to its end; `hint("05_2")`
gives one hint at a time. A wrong answer raises WrongAnswerError; where it equals a typical mistake, the message says
which one. A right answer gets "correct: …" with what to take along, and `use(mine, otherwise)` hands it out from there
on. An error inside the reader's own function is left as it is.
"""

from diffusion_opt.lesson.checks.answers import WrongAnswerError, use
from diffusion_opt.lesson.checks.combine import ex_12_1, ex_12_2, ex_12_3
from diffusion_opt.lesson.checks.cost_and_data import ex_11_1, ex_11_2, ex_11_3
from diffusion_opt.lesson.checks.distribution_distillation import ex_10_1, ex_10_2, ex_10_3
from diffusion_opt.lesson.checks.fewer_steps import SHARP_RING, ex_02_1, ex_02_2, ex_02_3, shift_error
from diffusion_opt.lesson.checks.hints import hint
from diffusion_opt.lesson.checks.low_precision_attention import ex_08_1, ex_08_2, ex_08_3
from diffusion_opt.lesson.checks.quantization_ptq import ex_03_1, ex_03_2, ex_03_3
from diffusion_opt.lesson.checks.quantization_qat import ex_04_1, ex_04_2, ex_04_3
from diffusion_opt.lesson.checks.region_cache import ex_06_1, ex_06_2, ex_06_3
from diffusion_opt.lesson.checks.start_here import ex_00_1
from diffusion_opt.lesson.checks.step_caching import ex_05_1, ex_05_2, ex_05_3
from diffusion_opt.lesson.checks.the_ruler import ex_02b_1, ex_02b_2
from diffusion_opt.lesson.checks.trajectory_distillation import FAILED_STUDENTS, ex_09_1, ex_09_2, ex_09_3
from diffusion_opt.lesson.checks.triton_attention import ex_07_1, ex_07_2, ex_07_3
from diffusion_opt.lesson.checks.what_a_diffusion_model_is import ex_00b_1, ex_00b_2
from diffusion_opt.lesson.checks.why_slow import ex_01_1, ex_01_2

__all__ = [
    "FAILED_STUDENTS",
    "SHARP_RING",
    "WrongAnswerError",
    "ex_00_1",
    "ex_00b_1",
    "ex_00b_2",
    "ex_01_1",
    "ex_01_2",
    "ex_02_1",
    "ex_02_2",
    "ex_02_3",
    "ex_02b_1",
    "ex_02b_2",
    "ex_03_1",
    "ex_03_2",
    "ex_03_3",
    "ex_04_1",
    "ex_04_2",
    "ex_04_3",
    "ex_05_1",
    "ex_05_2",
    "ex_05_3",
    "ex_06_1",
    "ex_06_2",
    "ex_06_3",
    "ex_07_1",
    "ex_07_2",
    "ex_07_3",
    "ex_08_1",
    "ex_08_2",
    "ex_08_3",
    "ex_09_1",
    "ex_09_2",
    "ex_09_3",
    "ex_10_1",
    "ex_10_2",
    "ex_10_3",
    "ex_11_1",
    "ex_11_2",
    "ex_11_3",
    "ex_12_1",
    "ex_12_2",
    "ex_12_3",
    "hint",
    "shift_error",
    "use",
]
