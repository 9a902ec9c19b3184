"""The times a student was trained for, in a scheduler of its own: what makes any pipeline sample it right.

A student of few steps is trained at a handful of times. diffusers' schedulers choose times themselves, and each
pipeline asks them in its own way: FLUX.2 hands over evenly spaced ones, Wan a number, LTX-2 both for two streams. Here
the scheduler knows its ladders and takes them whatever it is asked, or refuses a number of steps that it has none for:

    StudentScheduler(ladders=[[1.0, 0.9, 0.75, 0.5]], renoise=True)

It is saved with the pipeline, so `from_pretrained` of diffusers itself opens the student and samples it right.

With `renoise` a step predicts the picture and noises it again. The pipelines of diffusers do not hand their generator
to the scheduler, and the global one would not repeat a seed. So this noise comes from generators seeded by the bits of
the sample that the generation began with, which the run's generator drew: the same seed gives the same picture, and
the same sample does so in any batch.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from jaxtyping import Float
from torch import Tensor

EVEN = 1e-3  # how near to evenly spaced the times are that pipelines hand over of their own accord


class StudentScheduler(FlowMatchEulerDiscreteScheduler, SchedulerMixin):
    """Euler steps, or predictions that are noised again, at the times of training.

    `ladders`: falling times for each number of steps, 1 first and the final 0 left out. Raises ValueError for others.
    """

    @register_to_config
    def __init__(
        self,
        ladders: Sequence[Sequence[float]] = ((1.0,),),
        renoise: bool = False,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
    ) -> None:
        for ladder in ladders:
            if not ladder or ladder[0] != 1 or ladder[-1] <= 0 or list(ladder) != sorted(set(ladder), reverse=True):
                raise ValueError(f"a ladder falls from 1.0 and leaves out the final 0, got {list(ladder)}")
        self.register_to_config(ladders=[[float(t) for t in ladder] for ladder in ladders])
        # The parent's own __init__ would put a dozen options in the config that have no effect here.
        self._shift, self._step_index, self._begin_index = 1.0, None, None
        self._take(self.config.ladders[-1], "cpu")
        self.sigma_min, self.sigma_max = float(self.sigmas[-2]), 1.0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | np.ndarray | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        """Take the ladder with so many steps; a shift `mu` has no say, and neither have evenly spaced times.

        Raises ValueError for a number of steps without a ladder, and for times of the caller that are not its own.
        """
        given = None if sigmas is None else [float(t) for t in sigmas]
        steps = num_inference_steps if given is None else len(given)
        ladder = next((own for own in self.config.ladders if len(own) == steps), None)
        if ladder is None:
            served = ", ".join(str(len(own)) for own in self.config.ladders)
            raise ValueError(f"this student was trained for {served} steps, got num_inference_steps={steps}")
        even = [1 - i / steps for i in range(steps)]
        if given is not None and not any(_near(given, own) for own in (even, ladder)):
            raise ValueError(f"this student was trained at the times {ladder}, got sigmas={given}: leave them out")
        self._take(ladder, device)

    def _take(self, ladder: Sequence[float], device: str | torch.device | None) -> None:
        """Begin a generation at these times."""
        self.num_inference_steps = len(ladder)
        self.sigmas = torch.tensor([*ladder, 0.0], dtype=torch.float32, device=device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self._step_index, self._begin_index = None, None
        self._seeds: list[int] | None = None

    def step(
        self,
        model_output: Float[Tensor, "b *s"],
        timestep: float | Float[Tensor, ""],
        sample: Float[Tensor, "b *s"],
        *_: object,
        return_dict: bool = True,
        **__: object,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Float[Tensor, "b *s"]]:
        """One step of the ladder; `model_output` is the velocity."""
        if self.step_index is None:
            self._init_step_index(timestep)
        if self._seeds is None or len(self._seeds) != len(sample):
            self._seeds = [_seed(one) for one in sample]
        sigma, after = (float(self.sigmas[self.step_index + i]) for i in (0, 1))
        velocity, x_t = model_output.float(), sample.float()
        if self.config.renoise:
            moved = (1 - after) * (x_t - sigma * velocity)
            if after:
                moved = moved + after * self._noise(x_t)
        else:
            moved = x_t + (after - sigma) * velocity
        self._step_index += 1
        moved = moved.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def _noise(self, like: Float[Tensor, "b *s"]) -> Float[Tensor, "b *s"]:
        """Noise of this step, for each sample its own; drawn on the CPU, so that it is the same on every device."""
        generators = (torch.Generator().manual_seed((seed + self.step_index) % 2**63) for seed in self._seeds)
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like)


def _near(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) < EVEN for a, b in zip(one, other, strict=True))


def _seed(sample: Float[Tensor, " *s"]) -> int:
    """A seed that is a function of the sample's bits."""
    content = sample.detach().float().cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1
