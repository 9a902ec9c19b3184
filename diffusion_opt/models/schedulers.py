"""A second-order diffusers scheduler that costs one evaluation a step.

`FlowMatchEulerDiscreteScheduler` is first order. The two-step Adams-Bashforth formula of
`diffusion_opt.flow.adams_bashforth2` reuses the velocity of the step before, so it is as cheap and, at equal steps,
closer to the exact path. diffusers' `FlowMatchHeunDiscreteScheduler` is second order too but pays two evaluations a
step. This class inherits its grid, shift and configuration, so either can stand where the other stood:

    pipe.scheduler = FlowMatchAdamsBashforthScheduler.from_config(pipe.scheduler.config)
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from jaxtyping import Float
from torch import Tensor


# `SchedulerMixin` is named because from_pretrained looks it up in this module to tell what kind of part this is.
class FlowMatchAdamsBashforthScheduler(FlowMatchEulerDiscreteScheduler, SchedulerMixin):
    """x <- x + h [v + (h / 2h') (v - v')], h the step in sigma, v' and h' those of the step before (first: Euler)."""

    _previous: tuple[Tensor, float] | None = None

    def step(
        self,
        model_output: Float[Tensor, "b *s"],
        timestep: float | Float[Tensor, ""],
        sample: Float[Tensor, "b *s"],
        return_dict: bool = True,
        **_,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Float[Tensor, "b *s"]]:
        """One step from `timestep` to the next of the grid; `model_output` is the velocity there.

        Raises ValueError for a configuration with `stochastic_sampling`: this is a method for the noiseless path.
        """
        if self.config.stochastic_sampling:
            raise ValueError(
                "stochastic_sampling is True, but Adams-Bashforth follows the path without noise; set False"
            )
        if self.step_index is None:
            self._init_step_index(timestep)
            self._previous = None  # a new generation, wherever it starts, knows nothing of the last one
        h = float(self.sigmas[self.step_index + 1] - self.sigmas[self.step_index])
        velocity = model_output.to(torch.float32)
        slope = velocity
        if self._previous is not None:
            earlier, earlier_h = self._previous
            slope = velocity + h / (2 * earlier_h) * (velocity - earlier)
        self._previous = (velocity, h)
        moved = (sample.to(torch.float32) + h * slope).to(sample.dtype)
        self._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=moved) if return_dict else (moved,)
