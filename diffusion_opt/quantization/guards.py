"""What must not happen to a transformer while its layers are quantized, and what may without breaking it.

diffusers lets anyone save a transformer or fuse a LoRA into it at any time. On quantized layers both go wrong without a
word: `save_pretrained` writes smoothed weights and leaves out the smoothing, so what is opened again is another model;
`fuse_lora` changes weights whose ranges are fixed, and `remove` would then put the weights of before back. So a
technique closes these methods on the transformer it acts on: they raise ValueError with the remedy, and `remove` opens
them again. Only this instance is touched, never a class.

Hooks of diffusers and accelerate (offloading, layerwise casting, caches) hold the `forward` that a layer had when they
were put on. `follow_class` points them at the one that the layer's class has now.
"""

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from diffusers import DiffusionPipeline
from torch import nn

_DOORS = ("save_pretrained", "fuse_lora", "load_lora_adapter", "add_adapter")
_LORA = (
    "take the quantization off with the technique's remove(pipe) or open the float pipeline, load and fuse the LoRA "
    "there (pipe.fuse_lora(), then pipe.unload_lora_weights()), and quantize it again"
)
_FUSING = f"a LoRA cannot be fused into weights whose rounding is fixed: {_LORA}"

FLOAT_SAVE = (
    "a pipeline that is quantized in simulation has no float weights to save: call pack(pipe) and save_quantized(pipe, "
    "folder), or the technique's remove(pipe) and save the float pipeline"
)
SIMULATED = {"fuse_lora": _FUSING}
PACKED = {
    "save_pretrained": "packed weights are saved with save_quantized(pipe, folder) and opened with load(folder)",
    **dict.fromkeys(("fuse_lora", "load_lora_adapter", "add_adapter"), f"packed layers take no LoRA: {_LORA}"),
}
EIGHT_BIT = {
    "save_pretrained": "8-bit weights are saved with save_quantized(pipe, folder) and opened with load(folder)",
    **dict.fromkeys(("fuse_lora", "load_lora_adapter", "add_adapter"), f"8-bit layers take no LoRA: {_LORA}"),
}
HALF = {"fuse_lora": _FUSING}
NO_STATE_DICT = (
    "{what} have no state dict, which saving, pickling and loading a LoRA ask for. To save: save_quantized(pipe, "
    "folder). To add a LoRA: " + _LORA
)


@dataclass(frozen=True, slots=True)
class _Closed:
    """A method that says why it cannot be called."""

    reason: str

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(self.reason)


def close_doors(transformer: nn.Module, reasons: Mapping[str, str]) -> None:
    """Let these methods of the transformer raise ValueError with the reason."""
    for name, reason in reasons.items():
        setattr(transformer, name, _Closed(reason))


def open_doors(transformer: nn.Module) -> None:
    """Give the transformer the methods of its class back."""
    for name in _DOORS:
        vars(transformer).pop(name, None)


def close_saving(pipe: DiffusionPipeline, reason: str) -> None:
    """Let the pipeline's `save_pretrained` raise before it writes a file; its networks refuse only in their turn."""
    pipe.save_pretrained = _Closed(reason)


def open_saving(pipe: DiffusionPipeline) -> None:
    """Give the pipeline its `save_pretrained` back."""
    vars(pipe).pop("save_pretrained", None)


def refuse_adapters(transformer: nn.Module, act: str) -> None:
    """Raise ValueError if LoRA layers stand on a transformer; `act` is what is not done to such a one."""
    for name, module in transformer.named_modules():
        if ".lora_" in name and isinstance(module, nn.Linear):
            raise ValueError(
                f"{name} is a LoRA layer: fuse it with pipe.fuse_lora() and pipe.unload_lora_weights() before you {act}"
            )


def refuse_offloading(transformer: nn.Module, remedy: str) -> None:
    """Raise ValueError if offloading or layerwise casting holds the layers of a transformer; `remedy` is told."""
    for name, module in transformer.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        kept = next((hook for hook in ("group_offloading", "layerwise_casting") if hook in hooks), None)
        if kept is None and name and getattr(module, "_hf_hook", None) is not None:
            kept = "sequential CPU offloading"
        if kept is not None:
            raise ValueError(
                f"{name or 'the transformer'} is under {kept.replace('_', ' ')}, which holds its layers: {remedy}"
            )


def follow_class(module: nn.Module) -> None:
    """Let hooks on a module whose class was changed call the `forward` of its class as it is now."""

    def is_own(method: Any) -> bool:
        return isinstance(method, types.MethodType) and method.__self__ is module and method.__name__ == "forward"

    now = types.MethodType(type(module).forward, module)
    for reference in getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ()):
        for name in ("forward", "original_forward"):
            if is_own(getattr(reference, name)):
                setattr(reference, name, now)
    if is_own(vars(module).get("_old_forward")):  # accelerate's
        module._old_forward = now
