"""Solutions of lesson 02."""

from itertools import pairwise

import torch


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

SOLUTIONS = {
    "ex_02_1": heun_by_hand,
    "ex_02_2": adams_bashforth_by_hand,
    "ex_02_3": chosen_shift,
}
