"""Attention in low precision as a technique: q, k, v and the weights in INT8, FP8 or NVFP4.

    LowPrecisionAttention("nvfp4", keep_dense=(1, 1)).apply(pipe)       # sample at once (PTQ), or train (QAT)

`kernels.attention_backend` switches the attention of a pipeline for as long as a `with` lasts. A technique has to
outlive the call that made it, travel with copies of the pipeline, go into a recipe and come off again. So the same
switch is thrown here and left: the backend is written on the attention processors of this pipeline, and what they had
before is kept beside the transformer for `remove`. No class is touched, no processor replaced, and every family whose
attention goes through diffusers' dispatcher is served (FLUX.2, LTX-2, Wan). The operation behind the name is
`low_precision_attention`: the kernels' forward, with a gradient.

Not everything bears four bits: `keep_dense` leaves out blocks at the two ends, and `times` leaves out the beginning or
the end of a generation (SageAttention3, Zhang et al. 2025, arXiv 2505.11594, advises more bits for its first and last
steps). modelopt quantizes q, k and v with one scale a tensor and no smoothing, never reaches the weights of these
models, does not know LTX-2's attention, and its wrapper has no gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn

from diffusion_opt.kernels.diffusers_backend import put_back, register_backend, switchable, transformers_of
from diffusion_opt.models import BlockStack, block_stack
from diffusion_opt.quantization.attention.gradient import AttentionFormat, check_format, low_precision_attention

UNDO = "_diffusion_opt_attention"  # attribute of the transformer that holds the switch


@dataclass(frozen=True, slots=True)
class LowPrecisionAttention:
    """Technique: attention with q, k, v and its weights rounded to a format, and a gradient through all roundings."""

    format: AttentionFormat = "nvfp4"
    smooth: bool = True  # take the mean of the keys off before rounding; NVFP4: of blocks of queries too
    keep_dense: Sequence[int] = (0, 0)  # blocks at the beginning and at the end that stay as they are
    times: Sequence[float] = (0.0, 1.0)  # passes outside of these times stay as they are; t = 1 is noise

    def __post_init__(self) -> None:
        check_format(self.format)
        for name, kind in (("keep_dense", int), ("times", float)):
            object.__setattr__(self, name, _pair(name, getattr(self, name), kind))
        if not 0 <= self.times[0] <= self.times[1] <= 1:
            raise ValueError(f"times must be (lowest, highest) within [0, 1], got {self.times}")

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Switch the attention of the pipeline's transformers and return the pipeline, unchanged if this raises.

        Raises ValueError if an attention module does not go through diffusers' dispatcher, if `keep_dense` leaves
        nothing, if a family says no time while `times` asks for it, or if attention is switched already.
        """
        transformers = transformers_of(pipe)
        if any(hasattr(transformer, UNDO) for transformer in transformers):
            raise ValueError("attention of this pipeline is in low precision already: remove that first")
        found = [(transformer, switchable(transformer, self.keep_dense)) for transformer in transformers]
        stacks = [None if self.times == (0.0, 1.0) else block_stack(transformer) for transformer in transformers]
        backend = self._backend()
        for (transformer, modules), stack in zip(found, stacks, strict=True):
            switch = _Switch(self, backend, [module.processor for _, module in modules], stack)
            if stack is None:
                switch.turn(True)
            else:
                switch.hook = transformer.register_forward_pre_hook(switch.before_pass, with_kwargs=True)
            setattr(transformer, UNDO, switch)
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Give every processor the backend it had. Raises ValueError if attention was not switched."""
        transformers = transformers_of(pipe)
        if not all(hasattr(transformer, UNDO) for transformer in transformers):
            raise ValueError("cannot remove low-precision attention from this pipeline: it was not applied")
        for transformer in transformers:
            switch: _Switch = getattr(transformer, UNDO)
            switch.turn(False)
            if switch.hook is not None:
                switch.hook.remove()
            delattr(transformer, UNDO)

    def describe(self) -> str:
        """One line."""
        parts = [f"{self.format.upper()} attention" + ("" if self.smooth else " without smoothing")]
        if any(self.keep_dense):
            parts.append("{} first and {} last blocks dense".format(*self.keep_dense))
        if self.times != (0.0, 1.0):
            parts.append("for times {:g} to {:g}".format(*self.times))
        return ", ".join(parts)

    def _backend(self) -> AttentionBackendName:
        """The name under which diffusers finds the operation."""
        name = f"diffopt-trainable-{self.format}" + ("" if self.smooth else "-rough")
        register_backend(name, partial(_attend, self.format, self.smooth))
        return AttentionBackendName(name)


def attention_of(transformer: nn.Module) -> LowPrecisionAttention | None:
    """The technique that is on a transformer."""
    switch = getattr(transformer, UNDO, None)
    return None if switch is None else switch.technique


def _attend(
    format: AttentionFormat, smooth: bool, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    return low_precision_attention(q, k, v, mask, scale, format=format, smooth=smooth)


class _Switch:
    """The processors of one transformer, what they had before, and, for `times`, a hook that turns them pass by pass.

    Plain data, so that a deep copy of the transformer has a switch for its own processors.
    """

    def __init__(
        self,
        technique: LowPrecisionAttention,
        backend: AttentionBackendName,
        processors: list[object],
        stack: BlockStack | None,
    ) -> None:
        self.technique, self.backend, self.times, self.stack = technique, backend, technique.times, stack
        self.before = [(processor, vars(processor).get("_attention_backend")) for processor in processors]
        self.hook = None

    def turn(self, on: bool) -> None:
        """Low precision on, or all as it was before."""
        for processor, chosen in self.before:
            put_back(processor, self.backend if on else chosen)

    def before_pass(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook: on or off by the time of this pass. Raises ValueError for a batch of several times."""
        if "timestep" not in kwargs:
            raise ValueError(f"times={self.times} needs the time of a pass: give {type(module).__name__} timestep=…")
        time = self.stack.time(kwargs["timestep"])
        if time is None:
            raise ValueError(f"times={self.times} needs passes at one time, and the samples of this one are at several")
        self.turn(self.times[0] <= time <= self.times[1])


def _pair(name: str, values: Sequence[float], kind: type) -> tuple:
    """Two numbers of a kind as a tuple (JSON has lists only). Raises ValueError for anything else."""
    if isinstance(values, str) or len(values) != 2:
        raise ValueError(f"{name} must be two numbers, got {values!r}")
    return tuple(kind(value) for value in values)
