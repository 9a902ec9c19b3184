"""Guidance distillation: the two passes of classifier-free guidance become one.

A guided step costs two passes of the network, with the condition and without. Their mixture is itself a velocity field,
so a student can learn it directly (Meng et al. 2022, arXiv 2210.03142, section 3.1):

    v_w = v_null + w (v_cond - v_null),      loss = | u(x_t, t, c, w) - v_w |^2,      w ~ U[lowest, highest]

With one scale w is a constant and the student an ordinary network. Over a range w is an input: FLUX.2's class has a
slot for it, the one that the guidance-distilled FLUX.2 [dev] uses, and after training the pipeline's `guidance_scale`
goes there (`guidance_range` in its config). Two conventions are in use; in ours, that of diffusers, w = 1 is no
guidance, where the paper writes w = 0.

This halves the cost of a step and leaves the number of steps as it was; it is the first half of LCM (`lcm` in
`flow_map_distillation.METHODS`: consistency distillation with w as an input, Luo et al. 2023, arXiv 2310.04378).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.flow import (
    Condition,
    VelocityModel,
    expand_time,
    interpolate,
    logit_normal_times,
    randn,
)
from diffusion_opt.subjects import Samples
from diffusion_opt.training import Role


def guided_velocity(
    model: VelocityModel,
    x_t: Float[Tensor, "b *s"],
    t: Float[Tensor, " b"],
    condition: Condition,
    scale: Float[Tensor, " b"],
) -> Float[Tensor, "b *s"]:
    """v_null + w (v_cond - v_null) with a scale w for each sample; `flow.Guided` is the same for one scale."""
    conditional, unconditional = model(x_t, t, condition), model(x_t, t, condition.drop())
    return unconditional + expand_time(scale, x_t) * (conditional - unconditional)


def draw_scales(num: int, scales: tuple[float, float], generator: torch.Generator) -> Float[Tensor, " num"]:
    """Scales (num,) drawn evenly from a range (lowest, highest)."""
    low, high = scales
    return low + (high - low) * torch.rand(num, generator=generator, device=generator.device)


def check_scales(scales: tuple[float, float]) -> None:
    """Raises ValueError unless 0 <= lowest <= highest."""
    if not 0 <= scales[0] <= scales[1]:
        raise ValueError(f"guidance scales must rise from at least 0, (lowest, highest), got {scales}")


@dataclass
class GuidanceDistillation:
    """A `Distiller` that fits one pass of `student` to two of the unguided `teacher`, on noised pictures of `data`.

    `scales` (lowest, highest): over a range the student is called with `guidance=w` (B,); with equal ends it is called
    without. Raises ValueError for scales out of order.
    """

    student: nn.Module
    teacher: VelocityModel
    data: Samples
    scales: tuple[float, float]

    def __post_init__(self) -> None:
        check_scales(self.scales)

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Role(self.student)}

    def turn(self, step: int) -> str:
        return "student"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str = "student") -> dict[str, Tensor]:
        """Mean squared difference between the student's pass and the guided teacher's."""
        x, condition = self.data.draw(batch_size, generator)
        t = logit_normal_times(batch_size, generator)
        x_t = interpolate(x, randn(tuple(x.shape), generator), t)
        scale = draw_scales(batch_size, self.scales, generator)
        with torch.no_grad():
            target = guided_velocity(self.teacher, x_t, t, condition, scale)
        given = {} if self.scales[0] == self.scales[1] else {"guidance": scale}
        loss = (self.student(x_t, t, condition, **given) - target).square().mean()
        return {"loss": loss, "squared_error": loss.detach()}
