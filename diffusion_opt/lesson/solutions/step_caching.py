"""Solutions of lesson 05."""

import torch


def times_of_reuse(times, mask):
    return torch.cat([times[:-1][mask], times[-1:]])


def forecast(kept, t):
    if len(kept) == 1:
        return kept[0][1]
    (s, old), (r, new) = kept[-2:]
    return new + (new - old) * (t - r) / (r - s)


def computed_steps(changes, threshold):
    mask, total = [True], 0.0
    for change in changes:
        total += change
        mask.append(total >= threshold)
        if mask[-1]:
            total = 0.0
    mask[-1] = True
    return mask


SOLUTIONS = {
    "ex_05_1": times_of_reuse,
    "ex_05_2": forecast,
    "ex_05_3": computed_steps,
}
