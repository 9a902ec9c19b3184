"""Solutions of lesson 12."""

from diffusion_opt.recipes import Recipe, Solver


def predicted_speedup(macs, rate, new_macs, new_rate, overhead_s):
    before = overhead_s + macs / rate
    after = overhead_s + new_macs / new_rate
    return before / after


conflict = ("solver", "scheduled_cache")

my_recipe = Recipe((Solver(2),))

SOLUTIONS = {
    "ex_12_1": conflict,
    "ex_12_2": predicted_speedup,
    "ex_12_3": my_recipe,
}
