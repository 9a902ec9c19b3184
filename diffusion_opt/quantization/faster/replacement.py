"""Linear layers exchanged for layers that really compute in 8 bits, and exchanged back.

`DynamicInt8` (CPU) and `W8A8` (GPU) differ in how a layer multiplies. Which layers they take, what they refuse and how
they are undone is the same, and stands here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffusion_opt.quantization.policy import LayerChoice, choose

UNDO = "_diffusion_opt_float_layers"  # attribute of the transformer that holds what `put_back` puts back


class EightBitLinear(nn.Module):
    """What stands in the place of an `nn.Linear` and holds its weights in 8 bits; a state dict it has none."""

    in_features: int
    out_features: int
    scales: Tensor
    bias: Tensor | None

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    @property
    def weight_bytes(self) -> int:
        """Bytes that the layer holds."""
        raise NotImplementedError

    def _save_to_state_dict(self, *_: Any) -> None:
        raise RuntimeError(
            "8-bit weights have no state dict: save with save_quantized(pipe, folder), or call the technique's "
            "remove(pipe) before saving"
        )


def layers_to_replace(
    transformer: nn.Module, min_width: int, skip: Sequence[str], multiple_of: int = 1, hint: str = ""
) -> dict[str, nn.Linear]:
    """The layers that the policy, `min_width` and `skip` leave, by name; features must come in multiples.

    Raises ValueError if the family has no policy, layers are exchanged already, none is left (with the `hint`), or one
    is not a plain `nn.Linear`.
    """
    choices = choose(transformer, min_width, skip)
    there = next((name for name, m in transformer.named_modules() if isinstance(m, EightBitLinear)), None)
    if there is not None:
        raise ValueError(f"this transformer has 8-bit linears already, {there} for one: remove them first")
    chosen = {c.name: c.layer for c in choices if c.quantized and not any(n % multiple_of for n in _features(c))}
    if not chosen:
        widest = max(min(_features(choice)) for choice in choices)
        multiples = f" and features in multiples of {multiple_of}" if multiple_of > 1 else ""
        raise ValueError(
            f"nothing to quantize with min_width={min_width} and skip={skip}{multiples}: the widest layer has "
            f"{widest}{hint}"
        )
    other = next((name for name, layer in chosen.items() if type(layer) is not nn.Linear), None)
    if other is not None:
        raise ValueError(f"{other} is a {type(chosen[other]).__name__}, not a plain nn.Linear: undo that first")
    return chosen


def replace(transformer: nn.Module, layers: Mapping[str, EightBitLinear], reversible: bool) -> None:
    """Put the layers in. If `reversible`, those they replace are kept aside, out of the model and its measured bytes.

    Otherwise their memory is freed.
    """
    floats = {name: transformer.get_submodule(name) for name in layers} if reversible else {}
    for name, layer in layers.items():
        transformer.set_submodule(name, layer)
    setattr(transformer, UNDO, floats)  # a plain dict, so its modules are no part of the model


def put_back(transformer: nn.Module, technique: str) -> None:
    """Put the very float layers back. Raises ValueError if there are none to put back."""
    floats = getattr(transformer, UNDO, None)
    if not floats:
        why = "it was applied with reversible=False" if floats is not None else "it was not applied"
        raise ValueError(f"cannot remove {technique} from this pipeline: {why}")
    for name, layer in floats.items():
        transformer.set_submodule(name, layer)
    delattr(transformer, UNDO)


def _features(choice: LayerChoice) -> tuple[int, int]:
    return choice.layer.in_features, choice.layer.out_features
