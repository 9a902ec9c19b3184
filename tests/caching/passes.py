"""Passes without a transformer, for rules: whatever a rule looks at is given, and its decisions are read off."""

import torch
from torch import Tensor

from diffusion_opt.caching.step.stack import StackPass
from diffusion_opt.caching.step.step_cache import Rule


def stack_pass(
    modulated: Tensor | None = None,
    sample: Tensor | None = None,
    probe: Tensor | None = None,
    time: float = 0.5,
    step: tuple[int, int] | None = None,
) -> StackPass:
    """A pass of one stream, with the signals that a test gives."""
    given = next((signal for signal in (modulated, sample, probe) if signal is not None), torch.zeros(1, 5, 3))
    tokens = torch.zeros(len(given), 5, 3)
    return StackPass(
        context="cond",
        step=step,
        time=time,
        sample=tokens if sample is None else sample,
        streams={"hidden": tokens},
        modulation=lambda: tokens if modulated is None else modulated,
        probe=None if probe is None else {"hidden": probe},
    )


def decisions(rule: Rule, passes: list[StackPass], forced: tuple[int, ...] = (0,)) -> str:
    """What a rule says to passes in order, # computed and . skipped; those with an index in `forced` are computed."""
    said = [rule.skip(stack, forced=index in forced) for index, stack in enumerate(passes)]
    return "".join("." if skip else "#" for skip in said)


def plain(number: int) -> list[StackPass]:
    """Passes that say nothing, for rules that look at none."""
    return [stack_pass() for _ in range(number)]
