"""Solutions of lesson 06."""

import torch
from torch.nn import functional as F


def slot_gigabytes(layers, tokens, width, bytes_each, contexts, steps):
    numbers = 2 * layers * tokens * width  # a key and a value
    return contexts * steps * numbers * bytes_each / 1e9


def grow(active, ring):
    near = F.max_pool2d(active[None].float(), 2 * ring + 1, stride=1, padding=ring)
    return near[0].bool()


def keep_outside(x, clean, noise, region, r):
    known = (1 - r) * clean + r * noise
    return torch.where(region[:, None], x, known)


SOLUTIONS = {
    "ex_06_1": slot_gigabytes,
    "ex_06_2": grow,
    "ex_06_3": keep_outside,
}
