"""Linear layers exchanged for layers that really compute in 8 bits, and exchanged back.

`DynamicInt8` (CPU) and `W8A8` (GPU) differ in how a layer multiplies. Which layers they take, what they refuse and how
they are undone is the same, and stands here. All denoisers of a pipeline are exchanged, or none.

What `put_back` leaves is the pipeline as it would be without the technique: if the model was moved or cast in between,
the layers that were kept aside go the same way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffusion_opt.models.fingerprint import forget, same_model
from diffusion_opt.quantization.guards import (
    EIGHT_BIT,
    NO_STATE_DICT,
    close_doors,
    close_saving,
    open_doors,
    open_saving,
    refuse_offloading,
)
from diffusion_opt.quantization.policy import LayerChoice, choose
from diffusion_opt.quantization.simulation.simulate import check_type
from diffusion_opt.subjects import denoisers

UNDO = "_diffusion_opt_float_layers"  # attribute of a transformer that holds what `put_back` puts back


class EightBitLinear(nn.Module):
    """What stands in the place of an `nn.Linear` and holds its weights in 8 bits; a state dict it has none."""

    in_features: int
    out_features: int
    scales: Tensor
    bias: Tensor | None

    @property
    def kind(self) -> str:
        """The name of this kind of weights in a saved pipeline."""
        raise NotImplementedError

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    @property
    def weight_bytes(self) -> int:
        """Bytes that the layer holds."""
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor | None]:
        """The tensors to save, by name: codes, scales, and the bias if there is one."""
        raise NotImplementedError

    def _save_to_state_dict(self, *_: Any) -> None:
        raise RuntimeError(NO_STATE_DICT.format(what="8-bit layers"))


@dataclass(frozen=True, slots=True)
class KeptAside:
    """The float layers of a transformer by name, by which technique, and the type that the rest had then."""

    technique: str
    floats: dict[str, nn.Linear]  # empty if their memory was freed
    dtype: torch.dtype


def exchange(
    pipe: DiffusionPipeline,
    technique: str,
    choose_layers: Callable[[nn.Module], Mapping[str, nn.Linear]],
    make: Callable[[nn.Linear], EightBitLinear],
    reversible: bool,
) -> None:
    """Exchange the chosen layers of all denoisers. If `reversible`, the float layers are kept aside, else freed.

    All new layers are made before the first is put in, so the pipeline is unchanged if anything raises.
    """
    networks = denoisers(pipe)
    chosen = {name: choose_layers(network) for name, network in networks.items()}
    made = {name: {n: make(layer) for n, layer in layers.items()} for name, layers in chosen.items()}
    for name, network in networks.items():
        with same_model(network, technique):
            for layer_name, layer in made[name].items():
                network.set_submodule(layer_name, layer)
        floats = dict(chosen[name]) if reversible else {}
        # a plain object, so that the modules it keeps are no part of the model
        setattr(network, UNDO, KeptAside(technique, floats, _type_of_rest(network)))
        close_doors(network, EIGHT_BIT)
    close_saving(pipe, EIGHT_BIT["save_pretrained"])


def layers_to_replace(
    transformer: nn.Module, min_width: int, skip: Sequence[str], multiple_of: int = 1, hint: str = ""
) -> dict[str, nn.Linear]:
    """The layers that the policy, `min_width` and `skip` leave, by name; features must come in multiples.

    Raises ValueError if layers are exchanged already, none is left (with the `hint`), one is not a plain `nn.Linear`,
    or offloading or layerwise casting holds them.
    """
    choices = choose(transformer, min_width, skip)
    there = next((name for name, m in transformer.named_modules() if isinstance(m, EightBitLinear)), None)
    if there is not None:
        raise ValueError(f"this transformer has 8-bit linears already, {there} for one: remove them first")
    chosen = {c.name: c.layer for c in choices if c.quantized and not any(n % multiple_of for n in _features(c))}
    if not chosen:
        widest = max((min(_features(choice)) for choice in choices), default=0)
        multiples = f" and features in multiples of {multiple_of}" if multiple_of > 1 else ""
        raise ValueError(
            f"nothing to quantize with min_width={min_width} and skip={skip}{multiples}: the widest layer has "
            f"{widest}{hint}"
        )
    for name, layer in chosen.items():
        if type(layer) is not nn.Linear:
            raise ValueError(f"{name} is a {type(layer).__name__}, not a plain nn.Linear: undo that first")
        check_type(name, layer)
    refuse_offloading(transformer, "quantize the pipeline first and turn it on afterwards")
    return chosen


def put_back(pipe: DiffusionPipeline, technique: str) -> None:
    """Put the very float layers back, where the model is now and in its type. Raises ValueError if there are none."""
    networks = denoisers(pipe).values()
    for network in networks:
        kept = getattr(network, UNDO, None)
        if kept is None or kept.technique != technique:
            raise ValueError(f"cannot remove {technique} from this pipeline: it was not applied")
        if not kept.floats:
            raise ValueError(f"cannot remove {technique} from this pipeline: it was applied with reversible=False")
        refuse_offloading(network, f"turn it off before {technique} is removed, or open the pipeline anew")
    for network in networks:
        kept = getattr(network, UNDO)
        dtype = _type_of_rest(network)
        for name, layer in kept.floats.items():
            device = network.get_submodule(name).scales.device
            layer.to(device, None if dtype == kept.dtype else dtype)
            network.set_submodule(name, layer)
        delattr(network, UNDO)
        open_doors(network)
        forget(network)
    open_saving(pipe)


def _type_of_rest(network: nn.Module) -> torch.dtype:
    """The type of most parameters that are left beside the 8-bit layers."""
    types = [p.dtype for p in network.parameters() if p.is_floating_point()]
    return max(set(types), key=types.count, default=torch.float32)


def _features(choice: LayerChoice) -> tuple[int, int]:
    return choice.layer.in_features, choice.layer.out_features
