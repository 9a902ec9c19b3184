"""Solutions of lesson 10."""

from dataclasses import replace

import torch

from diffusion_opt.distillation.distribution.failures import FAILURES


def push(x, x_t, t, v_teacher, v_fake):
    t = t.reshape(-1, *[1] * (x.ndim - 1))  # one time for each picture
    distance = (x - (x_t - t * v_teacher)).abs().flatten(1).mean(1)  # one number for each picture
    return t * (v_teacher - v_fake) / distance.reshape(t.shape)


def weight_of(f, r):
    second = torch.func.vmap(torch.func.grad(torch.func.grad(f)))
    return second(r) * r**2


repaired = replace(FAILURES["slow_fake_score"], fake_rate=2.0)

SOLUTIONS = {
    "ex_10_1": push,
    "ex_10_2": repaired,
    "ex_10_3": weight_of,
}
