"""The mathematics everyone shares: paths, times, the velocity protocol, samplers, closed-form teachers."""

from diffusion_opt.flow.mixture import GaussianMixtureVelocity
from diffusion_opt.flow.path import (
    clean_from_velocity,
    expand_time,
    interpolate,
    noise_from_velocity,
    randn,
    velocity_from_clean,
    velocity_from_noise,
    velocity_target,
)
from diffusion_opt.flow.samplers import SAMPLERS, adams_bashforth2, euler, heun
from diffusion_opt.flow.times import logit_normal_times, sampling_times, shift_times
from diffusion_opt.flow.velocity import ALL_TIMES, ClassCondition, Condition, Guided, VelocityModel

__all__ = [
    "ALL_TIMES",
    "SAMPLERS",
    "ClassCondition",
    "Condition",
    "GaussianMixtureVelocity",
    "Guided",
    "VelocityModel",
    "adams_bashforth2",
    "clean_from_velocity",
    "euler",
    "expand_time",
    "heun",
    "interpolate",
    "logit_normal_times",
    "noise_from_velocity",
    "randn",
    "sampling_times",
    "shift_times",
    "velocity_from_clean",
    "velocity_from_noise",
    "velocity_target",
]
