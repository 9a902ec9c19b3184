"""Simulated quantization of named linear layers through nvidia-modelopt, put on and taken off.

modelopt puts a quantizer before each linear layer for its input and one for its weight. In simulation ("fake
quantization") a tensor is rounded to the format's grid and computed with in float, so the images are those of the
format while time and memory are not. The gradient passes straight through the rounding, which is all that training
under quantization asks.

modelopt converts more than it is asked to; `conversion.py` takes the rest back before anything is calibrated. Each
format then runs its algorithm with the other formats' layers off, since smoothing and SVDQuant act on every layer they
find on.

SmoothQuant and SVDQuant move part of a weight elsewhere. The weights from before are kept, and `restore` puts them
back: what it leaves computes what it computed, bit for bit. It knows modules and not names, so a LoRA that wraps a
layer, and hooks that offloading or casting put on it, may come and go in between. Factors of SVDQuant's branch are
rounded to bfloat16, as a checkpoint stores them, and the residual is taken after that rounding, so it makes up for it.

Ranges are float32 whatever the model computes in, and a cast of the model does not reach them: a scale in another type
would be another scale. Nothing is calibrated where no format has a range to find. While layers are quantized two doors
of the transformer are closed (`guards.py`): saving it as if it were a float model, and fusing a LoRA into its weights.
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
from torch import Tensor, nn

from diffusion_opt.models.fingerprint import forget, identity, remember
from diffusion_opt.quantization.formats import Format, quant_config
from diffusion_opt.quantization.guards import (
    FLOAT_SAVE,
    SIMULATED,
    close_doors,
    open_doors,
    refuse_adapters,
    refuse_offloading,
)
from diffusion_opt.quantization.simulation import cpu_backend
from diffusion_opt.quantization.simulation.conversion import Added, added, attributes, exact_range, prune, undo
from diffusion_opt.quantization.simulation.input_ranges import InputHistograms

UNDO = "_diffusion_opt_simulated"  # attribute of the transformer that holds what `restore` needs
COMPUTED = (torch.float32, torch.bfloat16, torch.float16)  # types that a linear layer multiplies in
Ranges = Literal["max", "percentile", "mse"]


@dataclass(frozen=True, slots=True)
class Simulated:
    """What was done to a transformer: the formats by layer, and what it takes to undo them."""

    formats: dict[str, Format]
    layers: tuple[nn.Module, ...]  # the very modules that have quantizers, in the order of `formats`
    added: Added  # modules, and the attributes that modelopt gave to each
    weights: tuple[tuple[nn.Module, Tensor], ...]  # of layers whose algorithm changes them, as they were


def simulated_formats(transformer: nn.Module) -> dict[str, Format]:
    """The format of each layer that is quantized in simulation; empty if none is."""
    state = getattr(transformer, UNDO, None)
    return {} if state is None else dict(state.formats)


def simulate(
    transformer: nn.Module,
    layers: Mapping[str, Format],
    forward_loop: Callable[[], Any] | None,
    ranges: Ranges = "max",
    percentile: float = 99.99,
    least: int = 1,
) -> None:
    """Quantize the named `nn.Linear`s in place; `forward_loop` runs the model on calibration data.

    It is called once or, for algorithms in stages, several times, and should show the same data each time; it is not
    called where no format has anything to calibrate, and may then be None. `ranges` says what the fixed range of an
    input is: the largest value seen, a percentile of the sizes seen, or the range of least squared error. The
    transformer is unchanged if this raises: ImportError without modelopt or onnx; ValueError for layers that cannot be
    quantized, for a LoRA that is not fused, and for a layer that saw fewer than `least` samples; RuntimeError if
    modelopt did something else than asked.
    """
    simulate_networks({"": transformer}, {"": layers}, forward_loop, ranges, percentile, least)


@torch.no_grad()
def simulate_networks(
    networks: Mapping[str, nn.Module],
    layers: Mapping[str, Mapping[str, Format]],
    forward_loop: Callable[[], Any] | None,
    ranges: Ranges = "max",
    percentile: float = 99.99,
    least: int = 1,
) -> None:
    """`simulate` for all denoisers of a pipeline at once: one calibration, in which every network is still in float.

    Both mappings have the same keys. Either all networks are quantized or, if this raises, none.
    """
    for name, network in networks.items():
        refuse_adapters(network, "quantize")
        check_layers(network, layers[name])
        refuse_offloading(network, "quantize the pipeline first and turn it on afterwards")  # modelopt bypasses hooks
    alone = len(networks) == 1
    root = next(iter(networks.values())) if alone else nn.ModuleDict(dict(networks))
    named = {n if alone else f"{key}.{n}": format for key, own in layers.items() for n, format in own.items()}
    fixed = [name for name, format in named.items() if format.static_input]
    if ranges != "max" and not fixed:
        raise ValueError(f"ranges={ranges!r} needs a format whose inputs have one fixed range, as int8 and fp8 have")
    sources = {key: identity(network) for key, network in networks.items()}
    before = attributes(root)
    weights = {n: root.get_submodule(n).weight.detach().clone() for n, f in named.items() if f.changes_weights}
    try:
        _quantize(root, named, before, forward_loop, least)
        if ranges != "max":
            _fit_ranges(root, named, fixed, forward_loop, ranges, percentile)
        _check_took_effect(root, named)
    except BaseException:
        undo(added(root, before), ((root.get_submodule(name), weight) for name, weight in weights.items()))
        raise
    changed = added(root, before)
    for key, network in networks.items():
        _keep(network, layers[key], changed, weights, prefix="" if alone else f"{key}.")
        remember(network, sources[key], "simulated")


def _keep(
    network: nn.Module,
    layers: Mapping[str, Format],
    converted: Added,
    weights: Mapping[str, Tensor],
    prefix: str,
) -> None:
    """Keep what `restore` needs on a network, and close its doors."""
    inside = set(network.modules())
    own = tuple((module, names) for module, names in converted if module in inside)
    changed = tuple(
        (network.get_submodule(name), weights[prefix + name]) for name in layers if prefix + name in weights
    )
    modules = tuple(network.get_submodule(name) for name in layers)
    setattr(network, UNDO, Simulated(dict(layers), modules, own, changed))
    close_doors(network, SIMULATED)
    network.save_pretrained = partial(_save, network)


def _save(transformer: nn.Module, *args: Any, **settings: Any) -> None:
    """`save_pretrained` of a simulated transformer: for modelopt's export alone, which has codes where weights were.

    Raises ValueError as long as the weights are floats: saved so, they would come back without their rounding, and
    smoothed ones without their smoothing.
    """
    if any(layer.weight.dtype in COMPUTED for layer in getattr(transformer, UNDO).layers):
        raise ValueError(FLOAT_SAVE)
    type(transformer).save_pretrained(transformer, *args, **settings)


def restore(transformer: nn.Module) -> None:
    """Take every quantizer out and put changed weights back. Raises ValueError if there are none."""
    state = getattr(transformer, UNDO, None)
    if state is None:
        raise ValueError("cannot remove modelopt's quantizers from this pipeline: they were not applied")
    delattr(transformer, UNDO)
    open_doors(transformer)
    forget(transformer)
    undo(state.added, state.weights)


def _quantize(
    root: nn.Module,
    layers: Mapping[str, Format],
    before: Mapping[nn.Module, frozenset[str]],
    forward_loop: Callable[[], Any] | None,
    least: int,
) -> None:
    """Put quantizers on the named layers, calibrate them, and fix their ranges in float32."""
    quantize, calibrate = _modelopt()
    cpu_backend.register()
    with _quiet(), _watched_inputs(root, layers) as samples:
        quantize(root, quant_config(layers))
        prune(root, before, {root.get_submodule(name) for name in layers})
        for group in _by_algorithm(layers):
            needs_data = any(layers[name].needs_data for name in group)
            with _only(root, layers, group):
                calibrate(root, _algorithm(layers[group[0]]), (lambda _: forward_loop()) if needs_data else None)
            _without_branch(root, layers)
    for name, format in layers.items():
        if format.needs_data and samples[name] < least:
            raise ValueError(
                f"{name} saw {samples[name]} samples in calibration, and at least {least} are needed: is this layer "
                "used at all in this run? Run more steps or leave the layer out with skip"
            )
        if format.rank:
            _store_branch_in_half(root.get_submodule(name))
    for quantizer in _quantizers(root, layers, list(layers)):
        exact_range(quantizer)


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
        check_type(name, layer)
        if not bool(layer.weight.isfinite().all()):
            raise ValueError(f"{name} has weights that are inf or NaN: they have no scale")
        if format.rank > min(layer.weight.shape):
            raise ValueError(
                f"{name} is {tuple(layer.weight.shape)}: a branch of rank {format.rank} would be all of it"
            )
    if getattr(transformer, UNDO, None) is not None:
        raise ValueError("this transformer is quantized in simulation already: remove that first")


def check_type(name: str, layer: nn.Linear) -> None:
    """Raise ValueError for weights in a type that has no arithmetic, as layerwise casting leaves them."""
    if layer.weight.dtype not in COMPUTED:
        raise ValueError(
            f"the weights of {name} are stored in {layer.weight.dtype}: quantize the pipeline before layerwise "
            f"casting, or open it in one of {', '.join(map(str, COMPUTED))}"
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
def _watched_inputs(root: nn.Module, layers: Mapping[str, Format]) -> Iterator[dict[str, int]]:
    """Inside, a layer that meets inf or NaN raises ValueError with its name, and the samples each has seen are counted.

    A pass of b samples counts b times. Algorithms in stages show their data several times, which counts again.
    """
    samples = dict.fromkeys(layers, 0)

    def check(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not bool(args[0].isfinite().all()):
            raise ValueError(f"{name} met inf or NaN in calibration: the model or its inputs are broken")
        samples[name] += len(args[0])

    handles = [root.get_submodule(name).register_forward_pre_hook(partial(check, name)) for name in layers]
    try:
        yield samples
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
    forward_loop: Callable[[], Any] | None,
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
