"""Distill FLUX.2, Wan or LTX-2 with the code that distills the small models of this repository.

    python examples/distill_large.py --model black-forest-labs/FLUX.2-klein-base-4B --plan --processes 8
    python examples/distill_large.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dry-run
    torchrun --nproc-per-node 8 examples/distill_large.py --model Lightricks/LTX-2 --prompts prompts.txt --device cuda

`--plan` prints what each process needs in memory, and loads nothing. `--dry-run` makes two steps of training with tiny
random weights: same classes, same path through the code. Without either the published weights are opened (from the hub,
or from a folder given as `--weights`), prompts are encoded, and the student is trained and saved.

Student and fake score are adapters on the frozen teacher (`training/lora.py`), or with `--rank 0` networks of their
own. Read `README.md` beside this file first: none of this has been run on the published weights.
"""

import copy
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import tyro
from diffusers import DiffusionPipeline
from large_models import MODELS, Flux2Latents, Large
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusion_opt.datasets import ImageData
from diffusion_opt.distillation.distribution import DistributionMatching
from diffusion_opt.distillation.trajectory import FlowMapDistillation
from diffusion_opt.flow import Guided
from diffusion_opt.models import TokenCondition, flow_map_transformer
from diffusion_opt.models.prompt_table import PromptTable
from diffusion_opt.training import Distiller, TrainConfig, TrainResult, memory, process_group, shard, train
from diffusion_opt.training.lora import Adapted, LoraSettings, adapters, checkpoint_blocks

LADDER = {1: (1.0,), 2: (1.0, 0.5), 4: (1.0, 0.9, 0.75, 0.5)}  # times from which a student of so many steps jumps


@dataclass(frozen=True)
class Options:
    """Distill a large model, or plan or rehearse that."""

    model: Literal[*MODELS]  # hub name
    method: Literal["dmd2", "flow_map"] = "dmd2"  # flow_map: FLUX.2 only, with --latents
    plan: bool = False  # print the memory each process needs, and stop
    dry_run: bool = False  # two steps with tiny random weights
    weights: str | None = None  # folder of the pipeline, if not from the hub
    prompts: Path | None = None  # text file, one prompt a line
    latents: Path | None = None  # safetensors with "latents" (N, …) and "prompts" (N,), line numbers, for flow_map
    steps: Literal[1, 2, 4] = 4  # of the student (dmd2)
    guidance: float = 4.0  # scale that is distilled in
    rank: int = 64  # of the adapters; 0: train whole networks
    processes: int = 8  # for the plan; a run takes what torchrun started
    micro_batch: int = 1  # samples at a time on each process
    accumulate: int = 8  # micro-batches a step, over all processes
    train_steps: int = 2000
    learning_rate: float = 2e-5
    shard_teacher: bool = False  # FSDP2 for the frozen teacher; whole networks in training are always sharded
    device: Literal["cpu", "cuda"] = "cpu"
    out: Path = Path("runs/large")


def build_method(options: Options, teacher: nn.Module, num_prompts: int, data: ImageData | None) -> Distiller:
    """The method around a frozen teacher."""
    large, guided = MODELS[options.model], Guided(teacher, options.guidance)
    if options.method == "flow_map":
        if not large.two_time:
            raise ValueError(f"flow_map needs a slot for a second time, which {options.model} has not; use dmd2")
        transformer = flow_map_transformer(teacher.transformer)
        student = Flux2Latents(transformer, teacher.embedder, teacher._vae[0], two_time=True)
        student.transformer.float().requires_grad_(True).enable_gradient_checkpointing()
        return FlowMapDistillation(student, guided, data)
    if options.rank:
        networks = adapters(teacher, ("student", "fake_score"), LoraSettings(options.rank))
        checkpoint_blocks(teacher.transformer)
    else:
        networks = {name: copy.deepcopy(teacher) for name in ("student", "fake_score")}
        for network in networks.values():
            network.transformer.float().requires_grad_(True).enable_gradient_checkpointing()
    shape = teacher.sample_shape if hasattr(teacher, "sample_shape") else _shapes(large, options)[0]
    warmup = 1 if options.dry_run else 50
    return DistributionMatching(
        **networks,
        teacher=guided,
        image_shape=shape,
        num_classes=num_prompts,
        times=LADDER[options.steps],
        warmup=warmup,
    )


def _shapes(large: Large, options: Options) -> tuple[tuple[int, ...], ...]:
    return large.tiny_shapes if options.dry_run else large.shapes


def plan(options: Options) -> str:
    """The memory that each process needs, as a table; nothing is loaded and nothing computed."""
    large, world_size = MODELS[options.model], options.processes
    with torch.device("meta"):
        transformer = large.build(options.dry_run).to(torch.bfloat16)
        teacher = large.velocity(transformer, None, _shapes(large, options)).requires_grad_(False)
        needs = [memory.need_of_frozen("teacher (base)", teacher, world_size, options.shard_teacher)]
        method = build_method(options, teacher, 1, None)
    sharded = tuple(method.roles) if _whole(options) else ()
    for number, (name, role) in enumerate(method.roles.items()):
        needs.append(memory.need_of_role(name, role.network, world_size, number == 0, name in sharded))
    student = method.roles["student"].network
    needs.append(memory.Need("one micro-batch", activations=_activations(options, large, student)))
    return f"{options.model}, {options.method}, {world_size} processes\n{memory.table(needs)}"


def _activations(options: Options, large: Large, student: nn.Module) -> int:
    """What autograd keeps of the student's pass with gradient, blocks checkpointed."""
    base = student.base if isinstance(student, Adapted) else student
    shape = base.sample_shape if hasattr(base, "sample_shape") else _shapes(large, options)[0]
    length, width = large.tiny_text if options.dry_run else large.text
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=base is student):
        memory.fake_weights(base, student)
        text = TokenCondition(torch.empty(options.micro_batch, length, width), torch.empty(1, length, width))
        x, t = torch.empty(options.micro_batch, *shape), torch.empty(options.micro_batch)
        second = {"r": t} if options.method == "flow_map" else {}
        return memory.kept_with_checkpointing(lambda: student(x, t, text, **second), base, base.transformer)


def _whole(options: Options) -> bool:
    """Whether whole networks are trained, and not adapters."""
    return not options.rank or options.method == "flow_map"


def load_teacher(options: Options) -> tuple[nn.Module, int]:
    """The frozen teacher on its device, and the number of prompts it knows."""
    large = MODELS[options.model]
    if options.dry_run:
        torch.manual_seed(0)
        with TemporaryDirectory() as folder:  # opened as published weights are: some parts stay in float32
            large.build(tiny=True).save_pretrained(folder)
            transformer = large.transformer.from_pretrained(folder, dtype=torch.bfloat16)
        encoded = torch.randn(4, *large.tiny_text)
    else:
        if options.prompts is None:
            raise ValueError("give --prompts, a text file with one prompt a line; --dry-run and --plan need none")
        lines = [line for line in options.prompts.read_text().splitlines() if line.strip()]
        name = options.weights or options.model
        pipe = DiffusionPipeline.from_pretrained(name, dtype=torch.bfloat16, use_safetensors=True).to(options.device)
        with torch.no_grad():
            encoded = large.encode(pipe, [*lines, ""])
        transformer = pipe.transformer
        del pipe  # text encoder and decoder leave the memory
    prompts = PromptTable(encoded[:-1], encoded[-1:])
    teacher = large.velocity(transformer, prompts, _shapes(large, options)).requires_grad_(False)
    return teacher.to(options.device), prompts.num_prompts


def _data(options: Options, num_prompts: int) -> ImageData | None:
    if options.method != "flow_map":
        return None
    if options.dry_run:
        shape = MODELS[options.model].tiny_shapes[0]
        stored = {"latents": torch.randn(4, *shape), "prompts": torch.arange(4) % num_prompts}
    elif options.latents is None:
        raise ValueError('flow_map learns on pictures: give --latents, safetensors with "latents" and "prompts"')
    else:
        stored = load_file(options.latents, device=options.device)
    return ImageData(stored["latents"].float(), stored["prompts"], tuple(str(i) for i in range(num_prompts)))


def distill(options: Options) -> TrainResult:
    """Train the student (or rehearse it) and save it below `out`."""
    with process_group(options.device) as among:
        teacher, num_prompts = load_teacher(options)
        if options.shard_teacher and not _whole(options):
            shard(teacher)  # before it has adapters, which each process holds whole
        method = build_method(options, teacher, num_prompts, _data(options, num_prompts))
        if options.shard_teacher:
            shard(teacher)  # after it has been copied
        config = TrainConfig(
            steps=2 if options.dry_run else options.train_steps,
            batch_size=options.micro_batch * options.accumulate,
            accumulate=options.accumulate,
            sharded=tuple(method.roles) if _whole(options) else (),
            learning_rate=options.learning_rate,
            betas=(0.0, 0.999),
            ema_decay=0.98,
            log_every=1 if options.dry_run else 20,
        )
        halves = options.device == "cuda" and bool(config.sharded)  # float32 weights, bfloat16 products
        with torch.autocast("cuda", torch.bfloat16) if halves else nullcontext():
            result = train(method, config, options.out, progress=among.is_main)
        if among.is_main:
            save(result.ema, options)
        return result


def save(student: nn.Module, options: Options) -> None:
    """An adapter as `load_lora_weights` opens it, a whole network as `from_pretrained` does; and how it is sampled."""
    if isinstance(student, Adapted):
        tensors: dict[str, Tensor] = {name: value.contiguous() for name, value in student.state_dict().items()}
        save_file(tensors, options.out / "pytorch_lora_weights.safetensors")
    else:
        student.transformer.save_pretrained(options.out / "transformer")
    times = LADDER[options.steps] if options.method == "dmd2" else None
    told = {"model": options.model, "method": options.method, "guidance": options.guidance, "times": times}
    (options.out / "student.json").write_text(json.dumps(told, indent=2))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.plan:
        print(plan(options))
    else:
        result = distill(options)
        print(f"{result.step} steps, {result.images} samples; student in {options.out}")


if __name__ == "__main__":
    main()
