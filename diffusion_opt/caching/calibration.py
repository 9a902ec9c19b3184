"""Calibrate TeaCache on your own pipeline: record a few real generations, fit the curve.

At every step of every sample, in both guidance branches, two changes since the step before are recorded: that of block
0's modulated input, x, which a cache can see at run time, and that of the stack's residual, y, which it cannot.
`curve.py` fits y = f(x). Two numbers say what the fit is worth: its R^2, and that of a control that looks at no signal
at all, the mean of y at each step. Where the control wins, a fixed table of steps would serve as well as the rule. Both
are taken on the recorded pairs themselves, so they flatter; the table more, which has one free value a step.
"""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.caching.curve import (
    TeaCacheCurve,
    explained_variance,
    fingerprint,
    fit_curve,
    interpolate,
    relative_change,
    run_settings,
)
from diffusion_opt.caching.stack import StackCut, StackInput


class _Recorder:
    """A controller that skips nothing and keeps, for each context and step, how input and residual changed."""

    def __init__(self) -> None:
        self.pairs: list[tuple[int, Tensor, Tensor]] = []  # (step, input change (B,), residual change (B,))
        self._last: dict[str | None, tuple[int, Tensor, Tensor]] = {}

    def begin(self, stack: StackInput) -> None:
        return None

    def computed(self, stack: StackInput, residual: Float[Tensor, "b n d"]) -> None:
        modulated = stack.modulated()
        step = 0
        if stack.context in self._last:
            before, old_modulated, old_residual = self._last[stack.context]
            step = before + 1
            changes = relative_change(modulated, old_modulated), relative_change(residual, old_residual)
            self.pairs.append((before, *(change.cpu() for change in changes)))
        self._last[stack.context] = (step, modulated, residual)

    def end_generation(self) -> None:
        self._last = {}


def calibrate_teacache(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    num_inference_steps: int,
    guidance_scale: float,
    generator: torch.Generator,
    batch_size: int = 10,
) -> TeaCacheCurve:
    """Generate once from each prompt, in batches, and fit the curve to what was seen at every step of every sample.

    Both guidance branches count. The pipeline is left as it was. Raises ValueError without prompts, with fewer than
    two steps, or if the pipeline cannot be cut or has a step cache on it.
    """
    if not prompts or num_inference_steps < 2:
        raise ValueError(f"calibration needs prompts and two steps, got {len(prompts)} prompts, {num_inference_steps=}")
    recorder = _Recorder()
    cut = StackCut(pipe.transformer, recorder)
    cut.attach(pipe.transformer)
    try:
        for start in range(0, len(prompts), batch_size):
            pipe(
                prompt=list(prompts[start : start + batch_size]),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=generator,
                output_type="latent",
            )
        scheduler, steps, guidance = run_settings(pipe)
    finally:
        cut.detach(pipe.transformer)
    order = torch.cat([torch.full(change.shape, step) for step, change, _ in recorder.pairs])
    x, y = (torch.cat([pair[i] for pair in recorder.pairs]).double() for i in (1, 2))
    table = torch.stack([y[order == step].mean() for step in range(steps - 1)])
    changes, rescaled = fit_curve(x, y)
    fitted = torch.tensor([interpolate(changes, rescaled, float(value)) for value in x], dtype=y.dtype)
    return TeaCacheCurve(
        changes=changes,
        rescaled=rescaled,
        model=fingerprint(pipe.transformer),
        scheduler=scheduler,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_pairs=len(y),
        r2=explained_variance(y, fitted),
        r2_step_table=explained_variance(y, table[order]),
        step_table=tuple(table.tolist()),
    )
