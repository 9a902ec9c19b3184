"""How the shipped models are made: a teacher from images, a student from a teacher by any of the methods.

    make_teacher("fashion", config, out)                               flow matching on the training images
    make_student(StudentPlan("fashion", "flow_map", 4, 1.5), …)        one of `methods.METHODS`

Both work in a folder (checkpoint, metrics), resume from it, and leave an ordinary pipeline in `<folder>/pipeline`, with
the scheduler, the times and the guidance it was made for. The folder also keeps the plan in `student.json` and refuses
to go on with another one: what decides over the weights is the plan, the `TrainConfig`, and nothing else. The quality
each shipped model reached is in its card.
"""

import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusion_opt.datasets import ImageData, load_fashion_mnist
from diffusion_opt.distillation.builders import RENOISED, Task, ladder
from diffusion_opt.distillation.flow_matching import FlowMatching
from diffusion_opt.distillation.methods import PAIRS, Method, method_named
from diffusion_opt.distillation.trajectory import METHODS as SETTINGS
from diffusion_opt.distillation.trajectory import OdePairs, PairConfig, generate_pairs
from diffusion_opt.flow import ALL_TIMES
from diffusion_opt.models import (
    SIZES,
    TinyFlux2Pipeline,
    build_pipeline,
    flow_map_transformer,
    load,
    set_ladders,
    velocity_model,
)
from diffusion_opt.training import TrainConfig, TrainResult, processes, train
from diffusion_opt.training.lora import Adapted, LoraSettings, adapters, merged

# Measured results: the model's card, data/models/<name>/README.md.
TEACHERS = {
    "fashion": TrainConfig(minutes=66, learning_rate=8e-4, warmup_steps=200, ema_decay=0.9995),
    "fashion-micro": TrainConfig(minutes=10, learning_rate=1e-3, warmup_steps=100, ema_decay=0.998),
}
PIPELINE = "pipeline"
PLAN = "student.json"


@dataclass(frozen=True, slots=True)
class StudentPlan:
    """Which student to make.

    Raises ValueError for a method that does not exist, does not serve that many steps, or does not use what is given.
    """

    teacher: str  # shipped name or folder
    method: str  # a name in METHODS
    steps: int  # of the student
    guidance: float  # scale that is distilled in
    start: str | None = None  # shipped name or folder of the student to start from; None: the teacher
    pairs: PairConfig | None = None  # None: PAIRS at this guidance
    num_images: int | None = None  # training images to use; None: all
    classes: tuple[str, ...] = ()  # of these classes only; none given: all
    lora_rank: int | None = None  # train adapters of this rank, folded in at the end; None: all weights
    guidance_interval: tuple[float, float] = ALL_TIMES  # times at which guidance counts, see `Guided`
    fake_updates: int | None = None  # of the critic between two of the student; None: the method's own

    def __post_init__(self) -> None:
        method = method_named(self.method)
        if self.steps not in method.presets:
            served = ", ".join(str(steps) for steps in method.presets)
            raise ValueError(f"{self.method} makes students of {served} steps, got {self.steps}")
        if (self.num_images is not None or self.classes) and method.images == "none":
            raise ValueError(f"{self.method} uses no images: leave out their number and classes")
        if self.pairs is not None and not method.pairs:
            raise ValueError(f"{self.method} uses no trajectories: leave out their settings")
        if self.fake_updates is not None and method.kind != "distribution":
            raise ValueError(f"{self.method} has no fake score or discriminator: leave out the number of its updates")
        if self.guidance_interval != ALL_TIMES and "guidance" in (self.method, method.network):
            raise ValueError(f"{self.method} learns the scale itself, at all times: leave out the guidance interval")
        if self.num_images is not None and self.num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {self.num_images}")

    @property
    def pair_config(self) -> PairConfig:
        if self.pairs is not None:
            return self.pairs
        return replace(PAIRS, guidance_scale=self.guidance, guidance_interval=self.guidance_interval)


def make_teacher(
    size: str, config: TrainConfig, out: Path, device: str = "cpu", progress: bool = True
) -> tuple[TinyFlux2Pipeline, TrainResult]:
    """Train a teacher from scratch (or resume) and save it to `out/pipeline`.

    Raises ValueError for an unknown size, or if `out` holds a run with other settings.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    pipe = build_pipeline(SIZES[size], seed=config.seed).to(device)
    data = on_device(load_fashion_mnist("train", SIZES[size].image_size), device)
    result = train(FlowMatching(velocity_model(pipe).train(), data), config, out, progress)
    _keep_average(pipe, result, out)
    return pipe, result


def make_student(
    plan: StudentPlan,
    config: TrainConfig,
    out: Path,
    pairs_folder: Path | None = None,
    device: str = "cpu",
    progress: bool = True,
    method: Method | None = None,
) -> tuple[TinyFlux2Pipeline, TrainResult]:
    """Distill a student (or resume) and save it to `out/pipeline`; students of the way go to `out/steps-<n>/pipeline`.

    Trajectories are made in `pairs_folder`, by default `out/pairs`, and shared by all students that name it. `method`
    takes the place of the plan's, for experiments with its options. Raises ValueError if a folder holds work of another
    plan or other settings, or the start does not fit the method.
    """
    method = method or method_named(plan.method)
    _check(out, plan)
    pipe = student_pipeline(plan, method, device)
    network = velocity_model(load(plan.teacher, device=device)).eval().requires_grad_(False)
    student = velocity_model(pipe).train().requires_grad_(True)
    lora = None if plan.lora_rank is None else LoraSettings(plan.lora_rank)
    size, channels = pipe.vae.config.sample_size, pipe.vae.config.in_channels
    task = Task(
        student=student if lora is None else adapters(student, ("student",), lora)["student"],
        network=network,
        guidance=plan.guidance,
        guidance_interval=plan.guidance_interval,
        steps=plan.steps,
        image_shape=(channels, size, size),
        num_classes=pipe.class_embedder.num_classes,
        data=None if method.images == "none" else on_device(training_images(size, plan), device),
        lora=lora,
        fake_updates=plan.fake_updates,
        seed=config.seed,
    )
    if method.pairs:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            task = replace(task, pairs=_pairs(task, plan, pairs_folder or out / "pairs", device, progress))
    _note(out, plan, finished=False)
    results = method.fit(task, config, out, progress)
    for steps, result in results.items():
        made = pipe if steps == plan.steps else copy.deepcopy(pipe)
        as_student(made, method, steps)
        _keep_average(made, result, out if steps == plan.steps else out / f"steps-{steps}")
    _note(out, plan, finished=result.finished)
    return made, result


def student_pipeline(plan: StudentPlan, method: Method, device: str = "cpu") -> TinyFlux2Pipeline:
    """The pipeline a student begins as: the start's or the teacher's, with the inputs its method needs.

    Raises ValueError without a start where the method needs one, and for a start that does not fit.
    """
    if method.starts is not None and plan.start is None:
        raise ValueError(f"{plan.method} starts from a student, by default one of {method.starts[plan.steps]}; name it")
    pipe = load(plan.start or plan.teacher, device=device)
    if pipe.config.guidance_range is not None or (method.network == "one time" and pipe.config.flow_map):
        slot = "a jump" if pipe.config.flow_map else "a guidance scale"
        raise ValueError(f"{plan.method} cannot start from {plan.start}: its network takes {slot} as an input")
    most = max(map(len, pipe.config.ladders)) if pipe.config.ladders else pipe.config.default_steps
    fixed = pipe.config.is_distilled and not pipe.config.flow_map
    if method.network == "start" and plan.steps > 1 and fixed and most == 1:
        raise ValueError(f"{plan.start} was made for one step, which is too few to start {plan.steps} steps from")
    if method.network in ("two times", "guidance") and not pipe.transformer.config.guidance_embeds:
        pipe.transformer = flow_map_transformer(pipe.transformer)
    if method.network == "two times":
        pipe.register_to_config(flow_map=True)
    if method.network == "guidance":
        pipe.register_to_config(guidance_range=list(SETTINGS[plan.method].guidance), default_guidance=plan.guidance)
    as_student(pipe, method, plan.steps)
    return pipe


def as_student(pipe: TinyFlux2Pipeline, method: Method, steps: int) -> None:
    """Give the pipeline the scheduler, times and defaults with which students of this method are sampled."""
    guidance = 1.0 if pipe.config.guidance_range is None else pipe.config.default_guidance
    if method.sampling == "any":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.register_to_config(is_distilled=True)
    elif method.sampling == "renoise":
        set_ladders(pipe, list(RENOISED.values()), renoise=True)
    elif method.sampling == "path" or (method.sampling == "start" and (pipe.config.flow_map or steps == 1)):
        set_ladders(pipe, [ladder(steps)], renoise=False)
    elif method.sampling == "start":
        set_ladders(pipe, [RENOISED[steps]], renoise=True)
    pipe.register_to_config(default_steps=steps, default_guidance=guidance)


def training_images(size: int, plan: StudentPlan) -> ImageData:
    """The training images, or the plan's part of them: a smaller number is a part of a larger one.

    Raises ValueError for an unknown class.
    """
    data = load_fashion_mnist("train", size)
    if unknown := [name for name in plan.classes if name not in data.class_names]:
        raise ValueError(f"classes must be some of {', '.join(data.class_names)}, got {unknown[0]!r}")
    wanted = [data.class_names.index(name) for name in plan.classes or data.class_names]
    index = torch.isin(data.labels, torch.tensor(wanted)).nonzero()[:, 0][: plan.num_images]
    return ImageData(data.images[index], data.labels[index], data.class_names)


def on_device(data: ImageData, device: str) -> ImageData:
    """The same images on a device."""
    return ImageData(data.images.to(device), data.labels.to(device), data.class_names)


def _pairs(task: Task, plan: StudentPlan, folder: Path, device: str, progress: bool) -> OdePairs:
    with processes().main_first():
        pairs = generate_pairs(
            task.network, task.image_shape, task.num_classes, plan.pair_config, folder, device=device, progress=progress
        )
    return pairs.to(device)


def _check(out: Path, plan: StudentPlan) -> None:
    """Raises ValueError if the folder holds the student of another plan."""
    path, now = out / PLAN, json.loads(json.dumps(asdict(plan)))
    if path.is_file():
        found = json.loads(path.read_text())
        if different := [name for name in now if found.get(name) != now[name]]:
            name = different[0]
            raise ValueError(
                f"{out} holds a student with {name}={found.get(name)!r}, now {now[name]!r}; choose another folder"
            )


def _note(out: Path, plan: StudentPlan, finished: bool) -> None:
    """Write plan and state; several processes say the same, the first one writes after all have read."""
    among = processes()
    among.wait()
    if among.is_main:
        out.mkdir(parents=True, exist_ok=True)
        (out / PLAN).write_text(json.dumps({**asdict(plan), "finished": finished}, indent=2) + "\n")
    among.wait()


def _keep_average(pipe: TinyFlux2Pipeline, result: TrainResult, out: Path) -> None:
    """Put the averaged weights into the pipeline and save it."""
    if isinstance(result.ema, Adapted):
        average = merged(result.ema)
        pipe.transformer, pipe.class_embedder = average.transformer, average.embedder
    else:
        pipe.transformer.load_state_dict(result.ema.transformer.state_dict())
        pipe.class_embedder.load_state_dict(result.ema.embedder.state_dict())
    pipe.transformer.eval()
    if processes().is_main:
        pipe.save_pretrained(out / PIPELINE, safe_serialization=True)
