"""A second-order diffusers scheduler that costs one evaluation a step, and a way to put it in the place of others.

`FlowMatchEulerDiscreteScheduler` is first order. The two-step Adams-Bashforth formula of
`diffusion_opt.flow.adams_bashforth2` reuses the velocity of the step before, so it is as cheap and, at equal steps,
closer to the exact path. diffusers' `FlowMatchHeunDiscreteScheduler` is second order too but pays two evaluations per
step. This class inherits its grid, shift and configuration, so either can stand where the other stood:

    pipe.scheduler = FlowMatchAdamsBashforthScheduler.from_config(pipe.scheduler.config)

Wan and Sana come with UniPC and DPM-Solver++ "with flow sigmas". They solve the same equation, but name the shift
differently (`flow_shift`, which `from_config` of another class would drop without a word) and space their times
differently. `flow_scheduler` knows both and keeps shift and times, and refuses schedulers of other equations.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
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
        per_token_timesteps: Tensor | None = None,
        **_: Any,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Float[Tensor, "b *s"]]:
        """One step from `timestep` to the next of the grid; `model_output` is the velocity there.

        Raises ValueError for a configuration with `stochastic_sampling`, since this is a method for the noiseless path,
        and for tokens that stand at different times.
        """
        if per_token_timesteps is not None:
            raise ValueError("Adams-Bashforth takes one time for all tokens, here each has its own: use Euler")
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


class _EvenTimes:
    """Times that are even before the shift and end one step before the last one of the span, as multistep solvers'."""

    _begins_at_one: ClassVar[bool]  # or at 1 - 1 / num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As in diffusers; times that are given are taken as they are."""
        if sigmas is None and timesteps is None:
            least = 1 / self.config.num_train_timesteps
            span = (1, least) if self._begins_at_one else (1 - least, 0)
            sigmas = np.linspace(*span, num_inference_steps + 1)[:-1]
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)


class UniPCTimesEulerScheduler(_EvenTimes, FlowMatchEulerDiscreteScheduler, SchedulerMixin):
    """Euler's method at the times of UniPC with flow sigmas."""

    _begins_at_one = True


class UniPCTimesAdamsBashforthScheduler(_EvenTimes, FlowMatchAdamsBashforthScheduler, SchedulerMixin):
    """Adams-Bashforth at the times of UniPC with flow sigmas."""

    _begins_at_one = True


class DPMTimesEulerScheduler(_EvenTimes, FlowMatchEulerDiscreteScheduler, SchedulerMixin):
    """Euler's method at the times of DPM-Solver++ with flow sigmas."""

    _begins_at_one = False


class DPMTimesAdamsBashforthScheduler(_EvenTimes, FlowMatchAdamsBashforthScheduler, SchedulerMixin):
    """Adams-Bashforth at the times of DPM-Solver++ with flow sigmas."""

    _begins_at_one = False


_EULER_AND_BETTER = {  # by the scheduler that is replaced, in this order
    UniPCMultistepScheduler: (UniPCTimesEulerScheduler, UniPCTimesAdamsBashforthScheduler),
    DPMSolverMultistepScheduler: (DPMTimesEulerScheduler, DPMTimesAdamsBashforthScheduler),
    UniPCTimesEulerScheduler: (UniPCTimesEulerScheduler, UniPCTimesAdamsBashforthScheduler),
    UniPCTimesAdamsBashforthScheduler: (UniPCTimesEulerScheduler, UniPCTimesAdamsBashforthScheduler),
    DPMTimesEulerScheduler: (DPMTimesEulerScheduler, DPMTimesAdamsBashforthScheduler),
    DPMTimesAdamsBashforthScheduler: (DPMTimesEulerScheduler, DPMTimesAdamsBashforthScheduler),
    FlowMatchEulerDiscreteScheduler: (FlowMatchEulerDiscreteScheduler, FlowMatchAdamsBashforthScheduler),
    FlowMatchAdamsBashforthScheduler: (FlowMatchEulerDiscreteScheduler, FlowMatchAdamsBashforthScheduler),
    FlowMatchHeunDiscreteScheduler: (FlowMatchEulerDiscreteScheduler, FlowMatchAdamsBashforthScheduler),
}


def flow_scheduler(found: SchedulerMixin, second_order: bool) -> SchedulerMixin:
    """Adams-Bashforth (or Euler) with the shift and the times of the scheduler that was found.

    Raises ValueError for a scheduler that solves another equation, follows it with noise, or is not known here.
    """
    kind, config = type(found).__name__, found.config
    if config.get("stochastic_sampling") or "sde" in config.get("algorithm_type", "") or "LCM" in kind:
        raise ValueError(f"{kind} adds noise at each step, and a solver of the noiseless path cannot take its place")
    flow = kind.startswith("FlowMatch") or "shift" in config
    if not flow and not (config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"):
        what = config.get("prediction_type", "something else")
        raise ValueError(f"{kind} integrates a network that predicts {what}, and this solver follows velocities")
    if type(found) not in _EULER_AND_BETTER:
        known = ", ".join(scheduler.__name__ for scheduler in _EULER_AND_BETTER)
        raise ValueError(f"the times of {kind} are not known here; there are {known}")
    if config.get("final_sigmas_type", "zero") != "zero" or config.get("thresholding"):
        raise ValueError(f"{kind} does not end at zero or clips samples, which no other solver here does")
    chosen = _EULER_AND_BETTER[type(found)][second_order]
    if "flow_shift" not in config:
        return chosen.from_config(config)
    kept = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal")
    return chosen(shift=config["flow_shift"] or 1.0, **{name: config[name] for name in kept if name in config})
