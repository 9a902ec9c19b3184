"""What each technique of a recipe does to a plan: weights, passes, arithmetic, what caches keep, and time at best.

A `Plan` (`subjects/plan.py`) counts a generation on tensors without content. Techniques change it one after another:

    a student, a solver   the number of passes
    weights in n bits     bytes of the layers that the policy quantizes, scales included, and the rate of their products
    attention in 8 bits   the rate of scores and values
    a guidance cache      passes beside the first of each step, by the schedule's times
    a step cache          keeps anchors; how many steps it skips depends on the prompt, so what one skipped step spares
                          is said and no more. A fixed interval and a fixed schedule say their steps themselves

Time is the roofline's, a lower bound that no machine beats and most miss by a factor: per pass

    max( 2 macs of linears / peak(their type) + 2 macs of attention / peak(its type),  bytes of weights / memory rate )
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffusion_opt.caching import FixedInterval, FixedSchedule, GuidanceCache
from diffusion_opt.kernels.gate.roofline import HARDWARE, Hardware
from diffusion_opt.names import KNOWN, SHIPPED, nearest
from diffusion_opt.quantization import PTQ, W8A8, Bfloat16, DynamicInt8, LowPrecisionAttention
from diffusion_opt.quantization.formats import FLOAT_BITS, format_named
from diffusion_opt.quantization.policy import choose
from diffusion_opt.recipes.recipe import REUSED, Recipe, Technique, kind_of
from diffusion_opt.recipes.sampling import Solver, Student
from diffusion_opt.subjects import denoisers
from diffusion_opt.subjects.plan import Plan

GPUS = {"a100": 80, "rtx4090": 89, "h100": 90, "h200": 90, "b200": 100, "rtx5090": 120}  # name -> row of HARDWARE
_OF_LAYERS = ("min_width", "skip", "first_blocks", "last_blocks")  # settings that choose layers
H100_GB_PER_S = 3350  # NVIDIA H100 SXM datasheet; the rest of its chip is the H200's


@dataclass(frozen=True, slots=True)
class Outlook:
    """A generation after some techniques, for one call's batch."""

    technique: str
    weight_bytes: int  # of the denoising networks
    activation_bytes: int  # of one pass
    cache_bytes: int  # what caches keep beside them
    passes: float
    macs: float
    seconds: float | None  # at the roofline; None without a GPU
    note: str = ""


@dataclass(frozen=True, slots=True)
class _State:
    """What techniques change. Numbers of one step are those of the plan."""

    steps: float
    first: float  # passes of a step that every computed step takes
    others: float  # further passes of a step: guidance
    saved: Mapping[str, int]  # change of the bytes of each network's weights
    linear: str  # type of products of linears
    attention: str
    cache_bytes: int
    note: str


def gpu_named(name: str) -> Hardware:
    """A GPU of the table. Raises ValueError for another, with the nearest."""
    key = name.lower().replace(" ", "").replace("-", "")
    if key not in GPUS:
        raise ValueError(f"no GPU {name!r}{nearest(key, GPUS)}: there are {', '.join(GPUS)}")
    found = HARDWARE[GPUS[key]]
    return replace(found, name="H100 SXM", memory_gb_per_s=H100_GB_PER_S) if key == "h100" else found


def outlook(plan: Plan, pipe: DiffusionPipeline, recipe: Recipe, gpu: Hardware | None = None) -> list[Outlook]:
    """The plan as it comes, and after each technique of the recipe.

    `pipe` is the pipeline the plan was made of, its scheduler as the plan's call left it. Raises ValueError for a
    student whose steps are not known here, for layers with a format each, and for a GPU without the products.
    """
    contexts = Fraction(plan.num_passes, plan.steps)
    own = {torch.float32: "tf32", torch.bfloat16: "bf16", torch.float16: "fp16"}[plan.dtype]
    one = min(Fraction(1), contexts)
    state = _State(plan.steps, float(one), float(contexts - one), {}, own, own, 0, "")
    rows = [_row("as it comes", plan, pipe, state, gpu)]
    for technique in recipe.techniques:
        state = _after(replace(state, note=""), technique, plan, pipe)
        rows.append(_row(technique.describe(), plan, pipe, state, gpu))
    return rows


def _after(state: _State, technique: Technique, plan: Plan, pipe: DiffusionPipeline) -> _State:
    """The state with one more technique."""
    if isinstance(technique, Solver):
        return replace(state, steps=technique.steps)
    if isinstance(technique, Student):
        return replace(state, steps=steps_of_student(technique.model), others=0.0)
    if isinstance(technique, Bfloat16):
        halved = {name: -plan.parameters[name] * (plan.dtype.itemsize - 2) for name in denoisers(pipe)}
        return replace(state, saved=halved, linear="bf16", attention="bf16")
    if isinstance(technique, PTQ | W8A8 | DynamicInt8):
        return replace(state, saved=_saved(technique, plan, pipe), linear=_rate(technique, state.linear))
    if isinstance(technique, LowPrecisionAttention):
        return replace(state, attention="int8" if technique.format == "int8" else "fp8")
    if isinstance(technique, GuidanceCache):
        return replace(state, others=state.others * _guided_share(technique, pipe))
    if kind_of(technique) is REUSED:
        return _cached(state, technique, plan)
    return replace(state, note="changes no count: how fast it makes a pass is for a measurement")


def _cached(state: _State, technique: Technique, plan: Plan) -> _State:
    """A cache of steps or of tokens."""
    predictor = getattr(technique, "predictor", None)
    if predictor is None:
        return replace(state, note="keeps keys and values: see what caches keep in the plan")
    anchors = {"reuse": 1, "hermite": 3}.get(str(predictor), 2)
    kept = state.cache_bytes + anchors * plan.anchor_bytes
    if isinstance(technique, FixedInterval | FixedSchedule):
        mask = getattr(technique, "mask", None)
        share = sum(mask) / len(mask) if mask else 1 / technique.every
        return replace(state, first=state.first * share, others=state.others * share, cache_bytes=kept)
    spared = plan.macs / plan.steps
    return replace(state, cache_bytes=kept, note=f"each step it skips spares {spared / 1e12:.3g} T; how many depends")


def steps_of_student(model: str) -> int:
    """The steps of a student by its name. Raises ValueError if its name does not say."""
    from diffusion_opt.subjects import known

    if model in KNOWN or model in KNOWN.values():
        return int(known.find(model).run["num_inference_steps"])
    if model in SHIPPED:
        from diffusion_opt.models.opening import read_index

        return int(read_index(SHIPPED[model].folder)["default_steps"])
    raise ValueError(f"how many steps the student {model} takes is not known without opening it: plan it by its folder")


def _saved(technique: Technique, plan: Plan, pipe: DiffusionPipeline) -> dict[str, int]:
    """By how many bytes the weights of each network change, scales included."""
    found = {}
    bits = _bits(technique, pipe)
    for name, network in denoisers(pipe).items():
        before = sum(layer.weight.numel() for layer in _layers(network, technique)) * plan.dtype.itemsize
        found[name] = bits[name] // 8 - before
    return found


def _bits(technique: Technique, pipe: DiffusionPipeline) -> dict[str, int]:
    """Bits of the quantized layers of each network, scales included."""
    if isinstance(technique, PTQ):
        if technique.layers is not None:
            raise ValueError("a PTQ with a format for each layer is not planned: measure its folder")
        form = format_named(technique.format)
        return {
            name: sum(form.weight_bits(layer.out_features, layer.in_features) for layer in _layers(network, technique))
            for name, network in denoisers(pipe).items()
        }
    return {
        name: sum(layer.weight.numel() * 8 + FLOAT_BITS * layer.out_features for layer in _layers(network, technique))
        for name, network in denoisers(pipe).items()
    }


def _rate(technique: Technique, before: str) -> str:
    """The type in which a GPU multiplies the linears of a technique; weights alone in fewer bits change none."""
    if isinstance(technique, DynamicInt8):
        return "int8"
    if isinstance(technique, W8A8):
        return "int8" if technique.numbers == "int8" else "fp8"
    form = format_named(technique.format)
    if form.input is None:
        return before
    if max(form.weight.bits, form.input.bits) > 4:
        return "int8" if isinstance(form.input.num_bits, int) else "fp8"
    return "int4" if isinstance(form.input.num_bits, int) else "fp4"


def _layers(network: nn.Module, technique: Technique) -> list[nn.Linear]:
    """The layers that a technique quantizes: those of the policy that its settings leave."""
    settings = {name: getattr(technique, name) for name in _OF_LAYERS if hasattr(technique, name)}
    return [choice.layer for choice in choose(network, **settings) if choice.quantized]


def _guided_share(technique: GuidanceCache, pipe: DiffusionPipeline) -> float:
    """The share of guidance passes that are computed: of times in the interval, every n-th; the others when due."""
    times = [float(time) / pipe.scheduler.config.num_train_timesteps for time in pipe.scheduler.timesteps]
    low, high = technique.interval
    inside = sum(low <= time <= high for time in times) / len(times)
    return inside / technique.every


def _row(name: str, plan: Plan, pipe: DiffusionPipeline, state: _State, gpu: Hardware | None) -> Outlook:
    """Sums of one state."""
    networks = denoisers(pipe)
    weights = {network: plan.parameters[network] * plan.dtype.itemsize for network in networks}
    weights = {network: size + state.saved.get(network, 0) for network, size in weights.items()}
    passes = state.steps * (state.first + state.others)
    each = plan.macs / plan.num_passes
    seconds = None if gpu is None else passes * _seconds(plan, state, weights, gpu)
    return Outlook(
        name, sum(weights.values()), plan.first.activation_bytes, state.cache_bytes, passes, passes * each, seconds,
        state.note,
    )  # fmt: skip


def _seconds(plan: Plan, state: _State, weights: Mapping[str, int], gpu: Hardware) -> float:
    """Of a pass, the mean over the kinds of passes, at the roofline."""
    missing = {kind for kind in (state.linear, state.attention) if kind not in gpu.flops_per_cycle}
    if missing:
        raise ValueError(
            f"{gpu.name} multiplies no {', '.join(sorted(missing))}, only {', '.join(gpu.flops_per_cycle)}"
        )
    total = 0.0
    for one in plan.passes:
        linear = 2 * (one.macs - one.attention_macs) / (gpu.peak_tflops(state.linear) * 1e12)
        attention = 2 * one.attention_macs / (gpu.peak_tflops(state.attention) * 1e12)
        read = weights[one.network] / (gpu.memory_gb_per_s * 1e9)
        total += one.count * max(linear + attention, read)
    return total / plan.num_passes


def lines(rows: Sequence[Outlook], gpu: Hardware | None) -> list[str]:
    """A table in words, 80 columns and the names below."""
    at_best = "" if gpu is None else f"{'at best, s':>11s}"
    said = [f"{'':3s}{'weights':>10s}{'activ.':>9s}{'caches':>9s}{'passes':>8s}{'T MACs':>11s}{at_best}"]
    for number, row in enumerate(rows):
        time = "" if row.seconds is None else f"{row.seconds:11.3g}"
        said.append(
            f"{number:<3d}{row.weight_bytes / 1e9:7.2f} GB{row.activation_bytes / 1e9:6.2f} GB"
            f"{row.cache_bytes / 1e9:6.2f} GB{row.passes:8.4g}{row.macs / 1e12:11,.4g}{time}"
        )
    said += [f"{number}  {row.technique}" + (f": {row.note}" if row.note else "") for number, row in enumerate(rows)]
    if gpu is not None:
        said.append(f"at best: the roofline of {gpu.name} ({gpu.source}), a bound and no forecast; networks alone")
    return said
