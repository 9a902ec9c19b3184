"""`diffusion-opt plan`: what a generation takes in memory and arithmetic, before a weight is read.

    diffusion-opt plan black-forest-labs/FLUX.2-klein-4B --prompts "a cat" --height 1024 --width 1024 --steps 4
    diffusion-opt plan DIR --prompts "a cat" --dtype bfloat16

Of a name of the hub only configs and tokenizers are fetched. A folder may hold no weights at all.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_opt.cli.options import ASKED, OPENING, Asked, Model, Opening, check_model
from diffusion_opt.names import SHIPPED

if TYPE_CHECKING:
    from diffusion_opt.subjects.plan import Plan


def plan(model: Model, asked: Asked = ASKED, opening: Opening = OPENING) -> None:
    """Say how many bytes the weights of each part take, and what a pass and a generation cost.

    The pipeline's own call is made on tensors without content and stopped at its first pass; that pass is counted.

    Args:
        model: shipped name, folder (weights are not needed) or hub name (only configs are fetched).
    """
    check_model(model)
    asked.check(model)
    import torch

    from diffusion_opt.models.opening import AUTO, as_dtype, stored_dtype
    from diffusion_opt.subjects import plan as plans

    folder = _configs(model)
    dtype = stored_dtype(folder) if opening.dtype == AUTO else as_dtype(opening.dtype)
    with torch.random.fork_rng(devices=[]):
        pipe = plans.skeleton(folder)
        run = asked.run(pipe)
        found = plans.plan(pipe, run, dtype)
    for line in lines(found, run.num_inference_steps or 1, run.batch_size):
        print(line)


def lines(found: "Plan", steps: int, batch_size: int) -> list[str]:
    """The plan in words."""
    name = str(found.dtype).removeprefix("torch.")
    said = [f"weights in {name}"]
    for part, size in sorted(found.weight_bytes.items(), key=lambda item: -item[1]):
        said.append(f"  {part:18s} {_size(size):>10s}  {found.parameters[part]:,} parameters")
    said.append(f"  {'in all':18s} {_size(sum(found.weight_bytes.values())):>10s}")
    first = found.first
    shapes = ", ".join(f"{key} {tuple(shape)}" for key, shape in list(first.shapes.items())[:2])
    passes = found.passes(steps, batch_size)
    said += [
        f"a pass of {first.network} ({batch_size} in a call: {shapes})",
        f"  {'arithmetic':18s} {_count(first.macs):>10s} multiply-accumulates",
        f"  {'activations':18s} {_size(first.activation_bytes):>10s}  most of them alive at once, attention in full",
        f"a generation of {steps} steps",
        f"  {'passes':18s} {passes:>10,d}  {'two a step, for guidance' if passes > steps else 'one a step'}",
        f"  {'arithmetic':18s} {_count(passes * first.macs):>10s} multiply-accumulates of the passes alone",
    ]
    return said


def _configs(model: str) -> Path:
    """The folder with the configs. Raises OSError if they cannot be fetched."""
    if model in SHIPPED:
        return SHIPPED[model].folder
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=["*.safetensors.index.json"]))
    except OSError as error:
        raise OSError(f"cannot read the configs of {model} from the hub: {str(error).splitlines()[0]}") from error


def _size(number: int) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e8 else f"{number / 1e6:,.2f} MB"


def _count(number: int) -> str:
    return f"{number / 1e12:,.2f} T" if number >= 1e11 else f"{number / 1e9:,.3f} G"
