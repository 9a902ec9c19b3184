"""Solutions of lesson 04."""

import torch


def clipped_rounding(x, amax, bits):
    s = (2 ** (bits - 1) - 1) / amax
    inside = x.clamp(-amax, amax)  # its gradient is 1 inside and 0 outside
    return inside + ((inside * s).round() / s - inside).detach()


def distillation_loss(student, teacher, x):
    with torch.no_grad():
        target = teacher(x)
    return (student(x) - target).square().sum() / target.square().sum()


def two_in_a_byte(codes):
    halves = codes.view(torch.uint8) & 15
    return halves[:, ::2] | halves[:, 1::2] << 4


SOLUTIONS = {
    "ex_04_1": clipped_rounding,
    "ex_04_2": distillation_loss,
    "ex_04_3": two_in_a_byte,
}
