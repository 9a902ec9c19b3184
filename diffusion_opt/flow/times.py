"""Which times a network is trained at, and which times a sampler visits.

Training draws t from a logit-normal distribution (Esser et al. 2024, arXiv 2403.03206, section 3.1): a sigmoid of a
normal variable, dense in the middle of [0, 1] where the velocity is hardest to predict. Sampling walks down a grid
from t = 1 to t = 0. A shift s bends either towards the noise, as large images need (same paper, equation 23):

    t' = s t / (1 + (s - 1) t) = s t / (s t + 1 - t);      the second form leaves both ends exact in floating point.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def shift_times(t: Float[Tensor, "*b"], shift: float) -> Float[Tensor, "*b"]:
    """Bend times in [0, 1] towards noise (shift > 1) or data (shift < 1); 0 and 1 stay where they are.

    Raises ValueError if shift is not positive.
    """
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}")
    return shift * t / (shift * t + (1 - t))


def logit_normal_times(
    num: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Float[Tensor, " num"]:
    """Draw `num` training times in (0, 1): sigmoid(mean + std * n), n standard normal, then shifted.

    Raises ValueError if std or shift is not positive.
    """
    if std <= 0:
        raise ValueError(f"std must be positive, got {std}")
    normal = torch.randn(num, generator=generator, device=generator.device)
    return shift_times(torch.sigmoid(mean + std * normal), shift)


def sampling_times(num_steps: int, shift: float = 1.0) -> Float[Tensor, " steps_plus_1"]:
    """The grid a sampler visits: num_steps + 1 times from 1 down to 0, evenly spaced before the shift (float64).

    Raises ValueError if num_steps < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return shift_times(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)
