"""bfloat16: half the bytes, hardly an error, and fast where the processor has units for it.

A bfloat16 number keeps float32's 8 bits of exponent and 7 of its 23 bits of fraction, so nothing overflows and nothing
needs a scale: relative rounding error at most 2^-8. It is what large models run in on GPUs. On a CPU it is fast only
with instructions for it: AMX multiplies 16 x 32 tiles of bfloat16 in one; without them torch emulates it, many times
slower than float32, and the technique refuses.

The transformer alone is cast. Latents, scheduler and everything else stay in float32: inputs are rounded on the way in
and the velocity is widened on the way out, so that steps add up without loss.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

UNDO = "_diffusion_opt_bfloat16_undo"  # attribute of the transformer: hooks, and the float32 tensors


def fast_here(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 in hardware."""
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported())
    return torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True, slots=True)
class Bfloat16:
    """Technique: the transformer computes in bfloat16. With `require_fast` it refuses where that would be slower."""

    require_fast: bool = True

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Cast in place and return the pipeline.

        Raises ValueError if the transformer is not float32 throughout, or if the machine is slow at bfloat16.
        """
        transformer = pipe.transformer
        other = next((f"{n} is {p.dtype}" for n, p in transformer.named_parameters() if p.dtype != torch.float32), None)
        if other is not None:
            raise ValueError(f"bfloat16 starts from a float32 transformer, but {other}")
        device = next(transformer.parameters()).device
        if self.require_fast and not fast_here(device):
            raise ValueError(
                f"{device.type} here has no bfloat16 units (AMX on a CPU), it would be slower than float32; "
                "Bfloat16(require_fast=False) applies it for its accuracy alone"
            )
        tensors = dict([*transformer.named_parameters(), *transformer.named_buffers()])
        kept = {name: tensor.data for name, tensor in tensors.items() if tensor.is_floating_point()}
        for name, data in kept.items():
            tensors[name].data = data.to(torch.bfloat16)
        hooks = (
            transformer.register_forward_pre_hook(_round_inputs, with_kwargs=True),
            transformer.register_forward_hook(_widen_output),
        )
        setattr(transformer, UNDO, (kept, hooks))
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Put the float32 weights back. Raises ValueError if the technique is not applied."""
        if not hasattr(pipe.transformer, UNDO):
            raise ValueError("cannot remove bfloat16 from this pipeline: it was not applied")
        kept, hooks = getattr(pipe.transformer, UNDO)
        delattr(pipe.transformer, UNDO)
        for hook in hooks:
            hook.remove()
        tensors = dict([*pipe.transformer.named_parameters(), *pipe.transformer.named_buffers()])
        for name, data in kept.items():
            tensors[name].data = data

    def describe(self) -> str:
        return "bfloat16"


_STREAMS = (
    "hidden_states", "encoder_hidden_states", "pooled_projections",
    "audio_hidden_states", "audio_encoder_hidden_states",
)  # fmt: skip


def _round_inputs(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Latents and text in bfloat16; position ids keep their precision (the class rounds times to its latents' type)."""
    streams = {name: kwargs[name].to(torch.bfloat16) for name in _STREAMS if isinstance(kwargs.get(name), Tensor)}
    return args, kwargs | streams


def _widen_output(_: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(part.float() if isinstance(part, Tensor) else part for part in output)
    for name, part in output.items():
        if isinstance(part, Tensor):
            output[name] = part.float()
    return output
