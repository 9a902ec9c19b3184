"""bfloat16: half the bytes, hardly an error, and fast where the processor has units for it.

A bfloat16 number keeps float32's 8 bits of exponent and 7 of its 23 bits of fraction, so nothing overflows and nothing
needs a scale: relative rounding error at most 2^-8. It is what large models run in on GPUs. On a CPU it is fast only
with instructions for it: AMX multiplies 16 x 32 tiles of bfloat16 in one; without them torch emulates it, many times
slower than float32, and the technique refuses.

The denoisers alone are cast. Latents, scheduler and everything else stay in float32: inputs are rounded on the way in
and the velocity is widened on the way out, so that steps add up without loss. Times, position ids, guidance and masks
keep their precision. Modules that a class keeps in float32 (`_keep_in_fp32_modules`: norms and time embedders of Wan)
stay so, as diffusers does when it opens such a model in bfloat16.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffusion_opt.quantization.guards import HALF, close_doors, open_doors, refuse_offloading
from diffusion_opt.subjects import denoisers

UNDO = "_diffusion_opt_bfloat16_undo"  # attribute of a transformer: hooks, and the float32 tensors
EXACT = (
    "time",
    "sigma",
    "guidance",
    "ids",
    "mask",
    "coords",
    "rotary",
    "rope",
    "rate",
)  # in names: what is not rounded

TYPE_OF_TIME = ("HunyuanVideo15Transformer3DModel",)  # embeds times in the type they come in, so they must be rounded


def fast_here(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 in hardware."""
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported())
    return torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True, slots=True)
class Undo:
    """What `remove` needs: each cast tensor by its module and its name there, and the hooks."""

    floats: tuple[tuple[nn.Module, str, Tensor], ...]
    hooks: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Bfloat16:
    """Technique: the transformers compute in bfloat16. With `require_fast` it refuses where that would be slower."""

    require_fast: bool = True

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Cast in place and return the pipeline, unchanged if this raises.

        Raises ValueError if a transformer is not float32 throughout, if the machine is slow at bfloat16, or if
        offloading holds the layers.
        """
        networks = denoisers(pipe).values()
        for network in networks:
            refuse_offloading(network, "apply bfloat16 first and turn it on afterwards")
            other = next((f"{n} is {p.dtype}" for n, p in network.named_parameters() if p.dtype != torch.float32), None)
            if other is not None:
                raise ValueError(f"bfloat16 starts from a float32 transformer, but {other}")
        device = next(next(iter(networks)).parameters()).device
        if self.require_fast and not fast_here(device):
            raise ValueError(
                f"{device.type} here has no bfloat16 units (AMX on a CPU), it would be slower than float32; "
                "Bfloat16(require_fast=False) applies it for its accuracy alone"
            )
        for network in networks:
            floats = tuple(_to_round(network))
            for module, name, data in floats:
                _set(module, name, data.to(torch.bfloat16))
            hooks = (
                network.register_forward_pre_hook(_round_inputs, with_kwargs=True),
                network.register_forward_hook(_widen_output),
            )
            setattr(network, UNDO, Undo(floats, hooks))
            close_doors(network, HALF)
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Put the float32 weights back, on the device of the model now. Raises ValueError if it is not applied."""
        networks = denoisers(pipe).values()
        if not all(hasattr(network, UNDO) for network in networks):
            raise ValueError("cannot remove bfloat16 from this pipeline: it was not applied")
        for network in networks:
            refuse_offloading(network, "turn it off before bfloat16 is removed, or open the pipeline anew")
        for network in networks:
            undo: Undo = getattr(network, UNDO)
            delattr(network, UNDO)
            for hook in undo.hooks:
                hook.remove()
            for module, name, data in undo.floats:
                _set(module, name, data.to(getattr(module, name).device))
            open_doors(network)

    def describe(self) -> str:
        return "bfloat16"


def _to_round(network: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Each floating tensor of a network but those that its class keeps in float32."""
    exact = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    found = []
    for path, module in network.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_floating_point() and not exact.intersection((*path.split("."), name)):
                found.append((module, name, tensor.data))
    return found


def _set(module: nn.Module, name: str, data: Tensor) -> None:
    getattr(module, name).data = data


def _round_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Latents, text and pictures in bfloat16; what says where and when keeps its precision."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    exact = tuple(part for part in EXACT if part != "time") if type(module).__name__ in TYPE_OF_TIME else EXACT
    rounded = {name: value if any(part in name for part in exact) else _round(value) for name, value in given.items()}
    return tuple(rounded.pop(name) for name in names[: len(args)]), rounded


def _round(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_round(part) for part in value)
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _widen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_widen(part) for part in value)
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def _widen_output(_: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, tuple):
        return _widen(output)
    for name, part in output.items():
        output[name] = _widen(part)
    return output
