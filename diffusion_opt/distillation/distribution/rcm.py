"""Trajectory and distribution together: the student keeps to the teacher's paths and matches its distribution.

Losses along trajectories cover every mode, since each noise has its own path, and blur the details; distribution
matching is sharp and seeks modes. Their sum has both virtues (rCM, Zheng et al. 2025, arXiv 2510.08431; AnyFlow, arXiv
2605.13724):

    loss = trajectory_weight * trajectory + matching

The trajectory loss is any callable that gives the losses of one step for the same student: the `losses` of a
`FlowMapDistillation` (rCM: its "scm" setting or, free of Jacobian-vector products, "consistency"; AnyFlow: "flow_map"),
of an `OdeDistillation`, … It is computed on the student's turns only. rCM weighs its normalized trajectory loss by 100;
ours is not normalized, and 1 is the place to start.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_opt.distillation.distribution.dmd import DistributionMatching
from diffusion_opt.distillation.distribution.rollout import Noised

TrajectoryLoss = Callable[[torch.Generator, int], dict[str, Tensor]]  # (generator, batch size) -> losses with "loss"


@dataclass(kw_only=True)
class RegularizedMatching(DistributionMatching):
    """A `Distiller` as `DistributionMatching` with a loss along trajectories, `trajectory`, for the same student."""

    trajectory: TrajectoryLoss
    trajectory_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trajectory_weight <= 0:
            raise ValueError(
                f"trajectory_weight must be positive, got {self.trajectory_weight}; without a trajectory loss use "
                "DistributionMatching"
            )

    def student_losses(self, batch: Noised, generator: torch.Generator) -> dict[str, Tensor]:
        """The matching loss and `trajectory`, summed in "loss", and what the alarms read."""
        losses = super().student_losses(batch, generator)
        trajectory = self.trajectory(generator, len(batch.x))["loss"]
        return losses | {"trajectory": trajectory, "loss": losses["loss"] + self.trajectory_weight * trajectory}
