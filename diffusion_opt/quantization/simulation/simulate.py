"""Simulated quantization of named linear layers through nvidia-modelopt, put on and taken off.

modelopt puts a quantizer before each linear layer for its input and one for its weight. In simulation ("fake
quantization") a tensor is rounded to the format's grid and computed with in float, so the images are those of the
format while time and memory are not. The gradient passes straight through the rounding, which is all that training
under quantization asks.

modelopt converts a whole model at once, attention and LayerNorm included. On diffusers' attention classes that replaces
the attention call by one without a gradient, even where its quantizers are off, and training fails; on LayerNorm it
rounds inputs that nobody asked to round. So conversion is followed by pruning, before anything is calibrated: every
module but the named layers gets its own class back. Each format then runs its algorithm with the other formats' layers
off, since smoothing and SVDQuant act on every layer they find on.

SmoothQuant and SVDQuant move part of a weight elsewhere. The weights from before are kept, and `restore` puts them
back: what it leaves computes what it computed, bit for bit. Factors of SVDQuant's branch are rounded to bfloat16, as a
checkpoint stores them, and the residual is taken after that rounding, so it makes up for it.
"""

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from diffusion_opt.quantization.formats import Format, quant_config
from diffusion_opt.quantization.simulation import cpu_backend
from diffusion_opt.quantization.simulation.input_ranges import InputHistograms

UNDO = "_diffusion_opt_simulated"  # attribute of the transformer that holds what `restore` needs
Ranges = Literal["max", "percentile", "mse"]


@dataclass(frozen=True, slots=True)
class Simulated:
    """What was done to a transformer: the formats by layer, and what it takes to undo them."""

    formats: dict[str, Format]
    added: dict[str, set[str]]  # attributes that modelopt gave to each module, by the module's name
    weights: dict[str, torch.Tensor]  # of layers whose algorithm changes them, as they were


def simulated_formats(transformer: nn.Module) -> dict[str, Format]:
    """The format of each layer that is quantized in simulation; empty if none is."""
    state = getattr(transformer, UNDO, None)
    return {} if state is None else dict(state.formats)


@torch.no_grad()
def simulate(
    transformer: nn.Module,
    layers: Mapping[str, Format],
    forward_loop: Callable[[], Any],
    ranges: Ranges = "max",
    percentile: float = 99.99,
) -> None:
    """Quantize the named `nn.Linear`s in place; `forward_loop` runs the model on calibration data.

    It is called once or, for algorithms in stages, several times, and should show the same data each time. `ranges`
    says what the fixed range of an input is: the largest value seen, a percentile of the sizes seen, or the range of
    least squared error. The transformer is unchanged if this raises: ImportError without modelopt or onnx, ValueError
    for layers that cannot be quantized, RuntimeError if modelopt did something else than asked.
    """
    check_layers(transformer, layers)
    fixed = [name for name, format in layers.items() if format.static_input]
    if ranges != "max" and not fixed:
        raise ValueError(f"ranges={ranges!r} needs a format whose inputs have one fixed range, as int8 and fp8 have")
    quantize, calibrate = _modelopt()
    cpu_backend.register()
    before = _attributes(transformer)
    weights = {n: transformer.get_submodule(n).weight.detach().clone() for n, f in layers.items() if f.changes_weights}
    try:
        with _quiet(), _finite_inputs(transformer, layers):
            quantize(transformer, quant_config(layers))
            _prune(transformer, before, set(layers))
            for group in _by_algorithm(layers):
                with _only(transformer, layers, group):
                    calibrate(transformer, _algorithm(layers[group[0]]), lambda _: forward_loop())
                _without_branch(transformer, layers)
        for name, format in layers.items():
            if format.rank:
                _store_branch_in_half(transformer.get_submodule(name))
        if ranges != "max":
            _fit_ranges(transformer, layers, fixed, forward_loop, ranges, percentile)
        _check_took_effect(transformer, layers)
    except BaseException:
        _undo(transformer, _added(transformer, before), weights)
        raise
    setattr(transformer, UNDO, Simulated(dict(layers), _added(transformer, before), weights))


def restore(transformer: nn.Module) -> None:
    """Take every quantizer out and put changed weights back. Raises ValueError if there are none."""
    state = getattr(transformer, UNDO, None)
    if state is None:
        raise ValueError("cannot remove modelopt's quantizers from this pipeline: they were not applied")
    delattr(transformer, UNDO)
    _undo(transformer, state.added, state.weights)


def check_layers(transformer: nn.Module, layers: Mapping[str, Format]) -> None:
    """Raise ValueError unless these are plain linear layers with finite weights that their formats can hold."""
    if not layers:
        raise ValueError("nothing to quantize: no layer was named")
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    for name, format in layers.items():
        if name not in linears:
            raise ValueError(f"{name!r} is no linear layer; their names are like {', '.join(list(linears)[-3:])}")
        layer = linears[name]
        if type(layer) is not nn.Linear:
            raise ValueError(f"{name} is a {type(layer).__name__}, not a plain nn.Linear: undo that first")
        if not bool(layer.weight.isfinite().all()):
            raise ValueError(f"{name} has weights that are inf or NaN: they have no scale")
        if format.rank > min(layer.weight.shape):
            raise ValueError(
                f"{name} is {tuple(layer.weight.shape)}: a branch of rank {format.rank} would be all of it"
            )


def _modelopt() -> tuple[Callable, Callable]:
    """modelopt's `quantize` and `calibrate`; importing takes seconds, and warns of versions it has not tested."""
    for package, install in (("modelopt", "nvidia-modelopt"), ("onnx", "onnx")):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed: pip install {install}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization import calibrate, quantize
    return quantize, calibrate


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """modelopt prints what it inserts, and warns of what `_check_took_effect` looks at."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"modelopt\.")
        yield


@contextlib.contextmanager
def _finite_inputs(transformer: nn.Module, layers: Mapping[str, Format]) -> Iterator[None]:
    """Inside, a layer that meets inf or NaN raises ValueError with its name."""

    def check(name: str, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not bool(args[0].isfinite().all()):
            raise ValueError(f"{name} met inf or NaN in calibration: the model or its inputs are broken")

    handles = [transformer.get_submodule(name).register_forward_pre_hook(partial(check, name)) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_algorithm(layers: Mapping[str, Format]) -> list[list[str]]:
    """Layers that can be calibrated in one go; those with a branch first, then in order of first appearance."""
    groups: dict[tuple, list[str]] = {}
    for name, format in layers.items():
        groups.setdefault((format.algorithm, format.rank, format.alpha), []).append(name)
    return sorted(groups.values(), key=lambda names: layers[names[0]].rank == 0)


def _algorithm(format: Format) -> dict[str, Any]:
    extra = {"smoothquant": {"alpha": format.alpha}, "svdquant": {"lowrank": format.rank}}
    return {"method": format.algorithm, **extra.get(format.algorithm, {})}


def _quantizers(transformer: nn.Module, layers: Mapping[str, Format], names: list[str]) -> list[nn.Module]:
    """The quantizers that the formats of these layers have."""
    kinds = {name: ("weight", "input") if layers[name].input is not None else ("weight",) for name in names}
    return [transformer.get_submodule(f"{name}.{kind}_quantizer") for name in names for kind in kinds[name]]


@contextlib.contextmanager
def _only(transformer: nn.Module, layers: Mapping[str, Format], names: list[str]) -> Iterator[None]:
    """Quantizers of all other layers are off inside."""
    others = _quantizers(transformer, layers, [name for name in layers if name not in set(names)])
    for quantizer in others:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in others:
            quantizer.enable()


def _fit_ranges(
    transformer: nn.Module,
    layers: Mapping[str, Format],
    names: list[str],
    forward_loop: Callable[[], Any],
    ranges: Ranges,
    percentile: float,
) -> None:
    """Replace the largest input seen by a better range, from histograms of a second run in full precision."""
    quantizers = {name: transformer.get_submodule(f"{name}.input_quantizer") for name in names}
    histograms = InputHistograms({name: float(quantizer.amax) for name, quantizer in quantizers.items()})
    with _only(transformer, layers, []), histograms.watching(transformer):
        forward_loop()
    for name, quantizer in quantizers.items():
        if ranges == "percentile":
            best = histograms.percentile(name, percentile)
        else:
            best = histograms.least_error(name, partial(_rounded, quantizer))
        quantizer.amax = torch.as_tensor(best, dtype=quantizer.amax.dtype)


def _rounded(quantizer: nn.Module, x: torch.Tensor, amax: float) -> torch.Tensor:
    """x as the quantizer would round it, had it this range."""
    quantizer.amax = torch.as_tensor(amax, dtype=quantizer.amax.dtype)
    return quantizer(x)


def _without_branch(transformer: nn.Module, layers: Mapping[str, Format]) -> None:
    """SVDQuant anywhere makes modelopt look for a branch everywhere: tell quantizers of INT4 blocks that there is none.

    It also makes their type when they are calibrated, so the formats with a branch go first (`_by_algorithm`).
    """
    for name in layers if any(format.rank for format in layers.values()) else ():
        quantizer = transformer.get_submodule(f"{name}.weight_quantizer")
        if not hasattr(quantizer, "svdquant_lora_a"):
            quantizer.svdquant_lora_a = quantizer.svdquant_lora_b = None


def _store_branch_in_half(layer: nn.Module) -> None:
    """Round both factors of SVDQuant's branch to bfloat16, and let the residual make up for it."""
    quantizer = layer.weight_quantizer
    whole = layer.weight.double() + quantizer.svdquant_lora_b.double() @ quantizer.svdquant_lora_a.double()
    for name in ("_svdquant_lora_a", "_svdquant_lora_b"):
        factor = getattr(quantizer, name)
        setattr(quantizer, name, factor.bfloat16().to(factor.dtype).contiguous())  # rows as a file has them, too
    branch = quantizer.svdquant_lora_b.double() @ quantizer.svdquant_lora_a.double()
    layer.weight.copy_(whole - branch)
    quantizer.amax = layer.weight.abs().amax().to(quantizer.amax)


def _check_took_effect(transformer: nn.Module, layers: Mapping[str, Format]) -> None:
    """Raise unless exactly the quantizers asked for are on, with a range wherever there should be one."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    on = {name for name, m in transformer.named_modules() if isinstance(m, TensorQuantizer) and m.is_enabled}
    wanted = {}
    for name, format in layers.items():
        wanted[f"{name}.weight_quantizer"] = format.weight
        if format.input is not None:
            wanted[f"{name}.input_quantizer"] = format.input
    if on != set(wanted):
        raise RuntimeError(f"modelopt did not do what was asked: {sorted(on ^ set(wanted))[0]} differs")
    for name, numbers in wanted.items():
        amax = transformer.get_submodule(name).amax
        if amax is None and numbers.calibrated:
            raise RuntimeError(f"{name} saw no data in calibration: is this layer used at all?")


def _attributes(transformer: nn.Module) -> dict[str, set[str]]:
    return {name: {*vars(module), *module._modules} for name, module in transformer.named_modules()}


def _added(transformer: nn.Module, before: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Attributes and submodules that modelopt gave to each module of before."""
    others = {"_diffusers_hook"}  # diffusers adds it in a pipeline call, and hooks put on later live there
    now = _attributes(transformer)
    return {name: now[name] - names - others for name, names in before.items()}


def _prune(transformer: nn.Module, before: Mapping[str, set[str]], keep: set[str]) -> None:
    """Give every converted module but the kept ones its class back; the root keeps modelopt's record."""
    added = _added(transformer, before)
    _undo(transformer, {name: names for name, names in added.items() if name and name not in keep}, {})


def _undo(transformer: nn.Module, added: Mapping[str, set[str]], weights: Mapping[str, torch.Tensor]) -> None:
    """Give modules their own class back, delete what was added to them, and put weights back."""
    from modelopt.torch.opt.dynamic import DynamicModule

    for name, names in added.items():
        module = transformer.get_submodule(name)
        while isinstance(module, DynamicModule):  # SVDQuant converts a converted layer once more
            module.export()
        for attribute in names:
            if hasattr(module, attribute):
                delattr(module, attribute)
    for name, weight in weights.items():
        transformer.get_submodule(name).weight.data.copy_(weight)
