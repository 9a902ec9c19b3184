"""Solutions of the exercises, as they stand folded in the notebooks (a test compares the two).

Written as a reader would write them, from the formula and with torch alone: `diffusion_opt.flow` has the same samplers
with checks, progress and hooks. Each function bears the name of its exercise's stub; `SOLUTIONS` maps the checks of
`diffusion_opt.lesson.checks` to them.
"""

from itertools import pairwise

import torch

from diffusion_opt.recipes import Recipe, Solver


def clean_prediction(x_t, v, t):
    t = t.reshape(-1, 1, 1, 1)  # one time per picture, ready to multiply (B, C, H, W)
    return x_t - t * v


def attention_macs(num_tokens, width):
    projections = 4 * num_tokens * width * width  # queries, keys, values, output
    scores = num_tokens * num_tokens * width  # every query with every key
    values = num_tokens * num_tokens * width  # every query gathers every value
    return projections + scores + values


def amdahl(share, factor):
    return 1 / ((1 - share) + share / factor)


def heun_by_hand(model, x, times):
    for t, r in pairwise(times.tolist()):
        v = model(x, torch.full((len(x),), t))
        v_end = model(x + (r - t) * v, torch.full((len(x),), r))
        x = x + (r - t) * (v + v_end) / 2
    return x


def adams_bashforth_by_hand(model, x, times):
    previous = None
    for t, r in pairwise(times.tolist()):
        h = r - t
        v = model(x, torch.full((len(x),), t))
        slope = v if previous is None else v + h / (2 * previous[1]) * (v - previous[0])
        x = x + h * slope
        previous = (v, h)
    return x


chosen_shift = 0.4

conflict = ("student", "solver")


def predicted_speedup(macs, rate, new_macs, new_rate, overhead_s):
    before = overhead_s + macs / rate
    after = overhead_s + new_macs / new_rate
    return before / after


my_recipe = Recipe((Solver(2),))

SOLUTIONS = {
    "ex_00_1": clean_prediction,
    "ex_01_1": attention_macs,
    "ex_01_2": amdahl,
    "ex_02_1": heun_by_hand,
    "ex_02_2": adams_bashforth_by_hand,
    "ex_02_3": chosen_shift,
    "ex_12_1": conflict,
    "ex_12_2": predicted_speedup,
    "ex_12_3": my_recipe,
}
