"""From a subject and a plan to a student that is a pipeline; and the teachers that the repository ships.

    make_teacher("fashion", config, out)                               flow matching on the training images
    make_student(StudentPlan("fashion", "flow_map", 4, 1.5), …)        one of `methods.METHODS`
    make_student(plan, …, subject=PromptedPipeline(pipe, run))         the same for any pipeline with prompts

Both work in a folder (checkpoint, metrics), resume from it, and leave a pipeline in `<folder>/pipeline`, with the
scheduler, the times and the guidance it was made for. What decides over the weights is the subject, the plan, the
`TrainConfig`, and nothing else; the folder keeps all three and refuses to go on with others (`record.py`). The quality
each shipped model reached is in its card.
"""

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusion_opt.distillation import record
from diffusion_opt.distillation.builders import Task
from diffusion_opt.distillation.flow_matching import FlowMatching
from diffusion_opt.distillation.methods import Method, method_named
from diffusion_opt.distillation.plan import StudentPlan, sampling_of
from diffusion_opt.distillation.trajectory import OdePairs, generate_pairs
from diffusion_opt.flow import randn
from diffusion_opt.models import SIZES, TinyFlux2Pipeline, build_pipeline, velocity_model
from diffusion_opt.models.fingerprint import identity
from diffusion_opt.subjects import Beginning, ClassConditional, Sampling, Subject, denoisers
from diffusion_opt.training import TrainConfig, TrainResult, is_sharded, processes, train
from diffusion_opt.training.lora import Adapted, LoraSettings, adapters, merged, save_lora, without_adapters
from diffusion_opt.training.settings import changed, not_finite, settings_of
from diffusion_opt.training.trainer import alone

# Measured results: the model's card, data/models/<name>/README.md.
TEACHERS = {
    "fashion": TrainConfig(minutes=66, learning_rate=8e-4, warmup_steps=200, ema_decay=0.9995),
    "fashion-micro": TrainConfig(minutes=10, learning_rate=1e-3, warmup_steps=100, ema_decay=0.998),
}
PIPELINE = "pipeline"
LORA = "lora"  # the trained adapter by itself, for `pipe.load_lora_weights(folder)`


def make_teacher(
    size: str, config: TrainConfig, out: Path, device: str = "cpu", progress: bool = True
) -> tuple[TinyFlux2Pipeline, TrainResult]:
    """Train a teacher from scratch (or resume) and save it to `out/pipeline`.

    Raises ValueError for an unknown size, or if `out` holds a run with other settings.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    pipe = build_pipeline(SIZES[size], seed=config.seed).to(device)
    subject = ClassConditional(pipe, size).with_data()
    network = velocity_model(pipe).train().requires_grad_(True)
    result = train(FlowMatching(network, subject.data), config, out, progress)
    pipe.transformer.load_state_dict(result.ema.transformer.state_dict())
    pipe.class_embedder.load_state_dict(result.ema.embedder.state_dict())
    pipe.transformer.eval()
    if processes().is_main:
        pipe.save_pretrained(out / PIPELINE, safe_serialization=True)
    return pipe, result


def make_student(
    plan: StudentPlan,
    config: TrainConfig,
    out: Path,
    pairs_folder: Path | None = None,
    device: str = "cpu",
    progress: bool = True,
    method: Method | None = None,
    subject: Subject | None = None,
) -> tuple[DiffusionPipeline, TrainResult]:
    """Distill a student (or resume) and save it to `out/pipeline`; students of the way go to `out/steps-<n>/pipeline`.

    Trajectories are made in `pairs_folder`, by default `out/pairs`, and shared by all students that name it. `method`
    takes the place of the plan's, for experiments with its options; `subject` that of the teacher's name, for pipelines
    that are no class-conditional ones. Raises ValueError if a folder holds work of another plan, teacher, start, data
    or other settings, if the start does not fit the method or there is no data for it, FloatingPointError for a
    teacher that is not finite, and FolderInUseError while another run makes a student in `out`.
    """
    method = method or method_named(plan.method)
    subject = subject or ClassConditional.open(plan.teacher, device)
    plan = plan.settled(subject)
    check_method(method, subject)
    if method.images != "none":
        subject = subject.with_data(plan.num_images, plan.classes)
    check_teacher(subject)
    shared = plan.lora_rank is not None and plan.start is None and method.network in ("one time", "start")
    beginning = begin(plan, method, subject, shared)
    belongs = record.as_json({**asdict(plan), **_sources(plan, subject, beginning)})
    record.check(out, belongs)
    try:
        task = task_for(plan, method, subject, beginning, config.seed, shared)
        if method.pairs:
            task = replace(task, pairs=_pairs(task, plan, pairs_folder or out / "pairs", config, progress))
        return _fitted(plan, method, task, beginning, belongs, config, out, progress)
    finally:
        if shared:
            without_adapters(subject.network)


def _fitted(
    plan: StudentPlan,
    method: Method,
    task: Task,
    beginning: Beginning,
    belongs: dict[str, Any],
    config: TrainConfig,
    out: Path,
    progress: bool,
) -> tuple[DiffusionPipeline, TrainResult]:
    """Train the student of a task, and keep it with what it belongs to."""
    distiller = method.build(task)
    belongs |= {"settings": settings_of(distiller)}
    with alone(out, processes(), "student"):  # training holds its checkpoints; record and pipeline are held here
        record.check(out, belongs)
        belongs |= {"training": record.as_json(asdict(config))}
        record.note(out, belongs, finished=False)
        results = method.fit(task, config, out, progress, distiller)
        for steps, result in results.items():
            last, sampling = steps == plan.steps, sampling_of(plan, method, task.two_time, steps)
            folder = out if last else out / f"steps-{steps}"
            made = _keep(task.subject, beginning, result, folder, sampling, copied=not last)
        record.note(out, belongs, finished=result.finished)
    return made, result


def student_pipeline(plan: StudentPlan, method: Method, device: str = "cpu") -> TinyFlux2Pipeline:
    """The pipeline a student of a class-conditional teacher begins as, with the sampler it will have.

    Raises ValueError without a start where the method needs one, and for a start that does not fit.
    """
    subject = ClassConditional.open(plan.teacher, device)
    plan = plan.settled(subject)
    beginning = begin(plan, method, subject)
    two_time = bool(getattr(beginning.network, "two_time", False))
    return subject.sampled(beginning.pipe, sampling_of(plan, method, two_time))


def begin(plan: StudentPlan, method: Method, subject: Subject, shared: bool = False) -> Beginning:
    """The plan's student before training. Raises ValueError without a start where the method needs one."""
    if method.starts is not None and plan.start is None and subject.needs_start:
        raise ValueError(f"{plan.method} starts from a student, by default one of {method.starts[plan.steps]}; name it")
    return subject.begin(plan.start, method.network, plan.steps, plan.guidance, shared)


def task_for(
    plan: StudentPlan, method: Method, subject: Subject, beginning: Beginning, seed: int = 0, shared: bool = False
) -> Task:
    """What a method is built from. With `shared` student and fake score are adapters on the teacher's own network."""
    lora = None if plan.lora_rank is None else LoraSettings(plan.lora_rank)
    student, fake = beginning.network, None
    if lora is not None:
        both = ("student", "fake_score") if shared and method.kind == "distribution" else ("student",)
        roles = adapters(student, both, lora)
        student, fake = roles["student"], roles.get("fake_score")
    two_time = bool(getattr(student, "two_time", False))
    ladders = sampling_of(plan, method, two_time).ladders
    times = next((one for one in ladders if len(one) == plan.steps), ())
    return Task(
        student=student,
        subject=subject,
        guidance=plan.guidance,
        steps=plan.steps,
        times=times,
        lora=lora,
        fake=fake,
        guidance_interval=plan.guidance_interval,
        fake_updates=plan.fake_updates,
        settings=changed(method.settings, plan.method_settings),
        seed=seed,
    )


def check_method(method: Method, subject: Subject) -> None:
    """Raises ValueError, with the reason, if the subject cannot serve the method."""
    if reason := subject.refuses(method.network, method.images != "none"):
        raise ValueError(reason)


@torch.no_grad()
def check_teacher(subject: Subject) -> None:
    """Raises FloatingPointError if the teacher's weights, or its velocity at noise, are not finite."""
    if (name := not_finite(subject.network)) is not None:
        raise FloatingPointError(f"the teacher {subject.name!r} holds NaN or infinity in {name}: nothing was made")
    device = next(subject.network.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    noise, times = randn((1, *subject.sample_shape), generator), torch.full((1,), 0.5, device=device)
    if not subject.network(noise, times, subject.conditions.draw(1, generator)).isfinite().all():
        raise FloatingPointError(
            f"the teacher {subject.name!r} gives a velocity that is not finite, from noise at t = 0.5: nothing was made"
        )


def _sources(plan: StudentPlan, subject: Subject, beginning: Beginning) -> dict[str, Any]:
    """Of what model, start and data a student is."""
    start = None
    if plan.start is not None:
        start = {"name": plan.start, "model": identity(denoisers(beginning.pipe)).model}
    data = None if subject.data is None else subject.data.fingerprint()
    return {"teacher_identity": dict(subject.identity()), "start_identity": start, "data": data}


def _pairs(task: Task, plan: StudentPlan, folder: Path, config: TrainConfig, progress: bool) -> OdePairs:
    subject, device = task.subject, next(task.network.parameters()).device
    halves = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
    with processes().main_first(), halves:
        pairs = generate_pairs(
            subject.guided, subject.sample_shape, subject.conditions, plan.pair_config, folder,
            source=subject.identity(), device=device, progress=progress,
        )  # fmt: skip
    return pairs.to(device)


def _keep(
    subject: Subject, beginning: Beginning, result: TrainResult, out: Path, sampling: Sampling, copied: bool
) -> DiffusionPipeline:
    """Put the averaged weights into the pipeline and save it; of an adapter also the adapter alone."""
    if copied:
        beginning = replace(beginning, pipe=copy.deepcopy(beginning.pipe))
    trained, writes = result.ema, processes().is_main
    if isinstance(trained, Adapted):
        if writes:
            save_lora(trained, out / LORA)
        if is_sharded(trained.base):  # its whole weights are on no process: the adapter is what there is
            return beginning.pipe
        trained = result.ema = merged(trained)
    if any(weight.is_meta for weight in trained.parameters()):  # sharded: the first process alone has the average
        return beginning.pipe
    return subject.finish(beginning, trained, sampling, out / PIPELINE if writes else None)
