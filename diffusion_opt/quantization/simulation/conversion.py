"""What modelopt makes of modules, taken back: all of it, or all but the layers that were named.

modelopt converts a whole model at once, attention and LayerNorm included: each module gets a class of its own and new
attributes. On diffusers' attention classes that replaces the attention call by one without a gradient, even where its
quantizers are off, and training fails; on LayerNorm it rounds inputs that nobody asked to round. So conversion is
followed by pruning: every module but the named layers gets its own class back.

Everything here speaks of modules and not of names. A LoRA wraps a layer, and its name is then another one; offloading
and casting hold the `forward` of the class that the layer had (`guards.follow_class`).
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import Tensor, nn

from diffusion_opt.quantization.exact import apply_keeping
from diffusion_opt.quantization.guards import follow_class

Added = tuple[tuple[nn.Module, frozenset[str]], ...]  # modules, and the attributes that modelopt gave to each


def exact_range(quantizer: nn.Module) -> None:
    """The range in float32, and out of reach of casts; modelopt finds it in the type of the model."""
    if quantizer.amax is not None:
        quantizer._amax = quantizer._amax.float()
    quantizer._apply = partial(_moved, quantizer)


def _moved(quantizer: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` of a quantizer: its range goes to another device and keeps its type, the rest is cast too."""
    apply_keeping(quantizer, ("_amax",), fn, recurse)
    return quantizer


def attributes(root: nn.Module) -> dict[nn.Module, frozenset[str]]:
    return {module: frozenset({*vars(module), *module._modules}) for module in root.modules()}


def added(root: nn.Module, before: Mapping[nn.Module, frozenset[str]]) -> Added:
    """Each module of before with the attributes and submodules that modelopt gave to it."""
    others = {"_diffusers_hook"}  # diffusers adds it in a pipeline call, and hooks put on later live there
    return tuple((m, frozenset({*vars(m), *m._modules} - names - others)) for m, names in before.items())


def prune(root: nn.Module, before: Mapping[nn.Module, frozenset[str]], keep: set[nn.Module]) -> None:
    """Give every converted module but the kept ones its class back; the root keeps modelopt's record."""
    undo(tuple((module, names) for module, names in added(root, before) if module is not root and module not in keep))


def undo(
    converted: Iterable[tuple[nn.Module, frozenset[str]]], weights: Iterable[tuple[nn.Module, Tensor]] = ()
) -> None:
    """Give modules their own class back, delete what was added to them, and put weights back."""
    from modelopt.torch.opt.dynamic import DynamicModule

    for module, names in converted:
        is_converted = isinstance(module, DynamicModule)
        while isinstance(module, DynamicModule):  # SVDQuant converts a converted layer once more
            module.export()
        for attribute in names:
            if hasattr(module, attribute):
                delattr(module, attribute)
        if is_converted:
            follow_class(module)
    for module, weight in weights:
        module.weight.data.copy_(weight)
