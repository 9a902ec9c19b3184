"""`diffusion-opt plan`: what a generation takes in memory and arithmetic, before a weight is read.

    diffusion-opt plan black-forest-labs/FLUX.2-klein-4B --prompts "a cat" --height 1024 --width 1024 --steps 4
    diffusion-opt plan DIR --prompts "a cat" --dtype bfloat16
    diffusion-opt plan flux2-dev --recipe fast.json --gpu h200       its configuration ships: no network, no folder

Of a name of the hub only configs and tokenizers are fetched. A folder may hold no weights at all.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from diffusion_opt.cli.options import ASKED, OPENING, Asked, MaybePath, MaybeText, Model, Opening, check_model
from diffusion_opt.names import KNOWN

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusion_opt.subjects.plan import Plan


def plan(
    model: Model,
    asked: Asked = ASKED,
    opening: Opening = OPENING,
    recipe: MaybePath = None,
    gpu: MaybeText = None,
) -> None:
    """Say how many bytes the weights of each part take, what a pass and a generation cost, and what caches would keep.

    The pipeline's own call is made on tensors without content, and the passes of its networks are counted.

    Args:
        model: shipped name, folder (weights are not needed), hub name (only configs are fetched), or the name of a
            model whose configuration ships: flux2-dev, flux2-klein-base, flux2-klein, ltx-2, wan2.1, wan2.2.
        recipe: JSON file of techniques: what each does to weights, passes, arithmetic and what caches keep.
        gpu: a100, rtx4090, h100, h200, b200 or rtx5090, for the time that its roofline allows.
    """
    is_known = model in KNOWN or model in KNOWN.values()
    if not is_known:
        check_model(model)
        asked.check(model)
    if recipe is not None and not recipe.is_file():
        raise ValueError(f"--recipe {recipe} is not there")
    opening.plugins()
    import torch

    from diffusion_opt.cli.advise import without_weights
    from diffusion_opt.models.opening import AUTO, as_dtype, stored_dtype
    from diffusion_opt.models.zoo import configs_of
    from diffusion_opt.recipes import Recipe, outlook
    from diffusion_opt.subjects import plan as plans

    hardware = None if gpu is None else outlook.gpu_named(gpu)
    techniques = Recipe() if recipe is None else Recipe.load(recipe)
    stored = torch.bfloat16 if is_known else stored_dtype(configs_of(model))
    dtype = stored if opening.dtype == AUTO else as_dtype(opening.dtype)
    with torch.random.fork_rng(devices=[]):
        pipe, run, _ = without_weights(model, asked)
        found = plans.plan(pipe, run, dtype)
    said = [*lines(found, run.batch_size), *kept(found, pipe)]
    if is_known:
        from diffusion_opt.subjects import known

        number, counted = known.find(model).text_encoder_parameters
        said.append(f"the text encoder comes on top, {_size(number * dtype.itemsize)}: {counted}")
    if recipe is not None or hardware is not None:
        said += ["what the recipe does", *outlook.lines(outlook.outlook(found, pipe, techniques, hardware), hardware)]
    for line in said:
        print(line)


def lines(found: "Plan", batch_size: int) -> list[str]:
    """The plan in words."""
    name = str(found.dtype).removeprefix("torch.")
    said = [f"weights in {name}"]
    for part, size in sorted(found.weight_bytes.items(), key=lambda item: -item[1]):
        said.append(f"  {part:18s} {_size(size):>10s}  {found.parameters[part]:,} parameters")
    said.append(f"  {'in all':18s} {_size(sum(found.weight_bytes.values())):>10s}")
    for one in found.passes:
        shapes = ", ".join(f"{key} {tuple(shape)}" for key, shape in list(one.shapes.items())[:2])
        said += [
            f"a pass of {one.network}, {one.count} of {found.num_passes} ({batch_size} in a call: {shapes})",
            f"  {'arithmetic':18s} {_count(one.macs):>10s} multiply-accumulates",
            f"  {'activations':18s} {_size(one.activation_bytes):>10s}  most of them alive at once, attention in full",
        ]
    return [
        *said,
        f"a generation of {found.steps} steps",
        f"  {'passes':18s} {found.num_passes:>10,d}",
        f"  {'arithmetic':18s} {_count(found.macs):>10s} multiply-accumulates of the passes alone",
    ]


def kept(found: "Plan", pipe: "DiffusionPipeline") -> list[str]:
    """What caches keep beside the weights, in words; a cache that does not know the class says so."""
    from diffusion_opt.caching import size_of, slot_bytes

    said = ["what caches keep of each step, all its passes together"]
    if not found.anchor_bytes:
        return [*said, f"  step and region caches do not know {type(pipe.transformer).__name__}"]
    said.append(
        f"  {'step cache':18s} {_size(found.anchor_bytes):>10s}  for each anchor: 1 to reuse, 2 or 3 to forecast"
    )
    first = found.first
    samples, tokens, _ = next(iter(first.streams.values()))
    text = first.shapes["encoder_hidden_states"][1] if "Flux2" in type(pipe.transformer).__name__ else 0
    try:
        size = replace(size_of(getattr(pipe, first.network), tokens, text), native_bytes=found.dtype.itemsize)
    except ValueError as error:
        return [*said, f"  {'region cache':18s} {'none':>10s}  {error}"]
    slots = slot_bytes(size) * samples * found.num_passes // found.steps
    said.append(
        f"  {'region cache':18s} {_size(slots):>10s}  keys and values; of all {found.steps} steps where it streams"
    )
    return said


def _size(number: int) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e8 else f"{number / 1e6:,.2f} MB"


def _count(number: int) -> str:
    return f"{number / 1e12:,.2f} T" if number >= 1e11 else f"{number / 1e9:,.3f} G"
