"""Solutions of lesson 08."""

import torch


def smooth(q, k, scale):
    mean = k.mean(2, keepdim=True)
    return k - mean, scale * (q @ mean.mT).squeeze(-1)


def score_gradient(p, rounded, values, grad_out):
    grad_p = grad_out @ values.mT  # straight through the rounding
    delta = (p * grad_p).sum(-1, keepdim=True)
    return p * (grad_p - delta)


def window_table(tiles, width):
    place = torch.arange(tiles)
    begin = (place - width // 2).clamp(0, max(0, tiles - width))[:, None]
    return (place >= begin) & (place < begin + width)


SOLUTIONS = {
    "ex_08_1": smooth,
    "ex_08_2": score_gradient,
    "ex_08_3": window_table,
}
