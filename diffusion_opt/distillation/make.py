"""How the shipped models are made: one function a kind of model, with the settings that made them.

    make_teacher("fashion", …)                     flow matching on the training images
    make_student("fashion", steps=4, …)            the teacher's trajectories, then distillation along them
    make_matched_student("fashion", start, …)      distribution matching, from a one-step student of the line above

All work in a folder of `runs/` (checkpoints, metrics, trajectories), resume from it, and leave an ordinary pipeline
in `<folder>/pipeline`. The quality each reached is in the card of the shipped model.
"""

import copy
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler

from diffusion_opt.datasets import ImageData, load_fashion_mnist
from diffusion_opt.distillation.distribution import DistributionMatching
from diffusion_opt.distillation.flow_matching import FlowMatching
from diffusion_opt.distillation.trajectory import OdeDistillation, PairConfig, generate_pairs
from diffusion_opt.flow import Guided
from diffusion_opt.models import SIZES, TinyFlux2Pipeline, build_pipeline, load, velocity_model
from diffusion_opt.training import TrainConfig, TrainResult, train

# Measured results: the model's card, data/models/<name>/README.md.
TEACHERS = {
    "fashion": TrainConfig(minutes=66, learning_rate=8e-4, warmup_steps=200, ema_decay=0.9995),
    "fashion-micro": TrainConfig(minutes=10, learning_rate=1e-3, warmup_steps=100, ema_decay=0.998),
}
PAIRS = PairConfig(num_pairs=10_240, guidance_scale=2.0, num_rungs=4, num_steps=12)
STUDENTS = {
    4: TrainConfig(minutes=10, learning_rate=5e-4, warmup_steps=50, ema_decay=0.998),
    1: TrainConfig(minutes=12, learning_rate=5e-4, warmup_steps=50, ema_decay=0.998),
}
MATCHED = TrainConfig(minutes=8, learning_rate=1e-4, warmup_steps=50, ema_decay=0.98, betas=(0.0, 0.99))
PIPELINE = "pipeline"


def make_teacher(
    size: str, config: TrainConfig, out: Path, device: str = "cpu", progress: bool = True
) -> tuple[TinyFlux2Pipeline, TrainResult]:
    """Train a teacher from scratch (or resume) and save it to `out/pipeline`.

    Raises ValueError for an unknown size, or if `out` holds a run with other settings.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    pipe = build_pipeline(SIZES[size], seed=config.seed).to(device)
    data = load_fashion_mnist("train", SIZES[size].image_size)
    data = ImageData(data.images.to(device), data.labels.to(device), data.class_names)
    result = train(FlowMatching(velocity_model(pipe).train(), data), config, out, progress)
    _keep_average(pipe, result, out)
    return pipe, result


def make_student(
    teacher: str,
    steps: int,
    config: TrainConfig,
    pairs: PairConfig,
    out: Path,
    pairs_folder: Path,
    device: str = "cpu",
    progress: bool = True,
) -> tuple[TinyFlux2Pipeline, TrainResult]:
    """Distill a `steps`-step student from a teacher (shipped name or folder) and save it to `out/pipeline`.

    The trajectories in `pairs_folder` are shared by students of the same teacher. Raises ValueError if a folder holds
    work with other settings, or if `steps` does not divide the stored rungs.
    """
    pipe = load(teacher, device=device)
    size, channels = pipe.vae.config.sample_size, pipe.vae.config.in_channels
    velocity = velocity_model(pipe)
    stored = generate_pairs(
        velocity.eval(),
        (channels, size, size),
        pipe.class_embedder.num_classes,
        pairs,
        pairs_folder,
        device=device,
        progress=progress,
    ).to(device)
    student = copy.deepcopy(velocity).train()
    result = train(OdeDistillation(student, stored, steps), config, out, progress)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.register_to_config(is_distilled=True, default_steps=steps, default_guidance=1.0)
    _keep_average(pipe, result, out)
    return pipe, result


def make_matched_student(
    teacher: str,
    start: str,
    config: TrainConfig,
    guidance_scale: float,
    out: Path,
    device: str = "cpu",
    progress: bool = True,
) -> tuple[TinyFlux2Pipeline, TrainResult]:
    """Distill a one-step student by distribution matching, from the one-step student `start`; save `out/pipeline`.

    Raises ValueError if `start` takes more than one step.
    """
    pipe, source = load(start, device=device), load(teacher, device=device)
    if pipe.config.default_steps != 1:
        raise ValueError(
            f"{start} takes {pipe.config.default_steps} steps; distribution matching starts from a 1-step student"
        )
    velocity = velocity_model(source).eval().requires_grad_(False)
    size, channels = pipe.vae.config.sample_size, pipe.vae.config.in_channels
    method = DistributionMatching(
        student=copy.deepcopy(velocity_model(pipe)).train().requires_grad_(True),
        fake_score=copy.deepcopy(velocity).train().requires_grad_(True),
        teacher=Guided(velocity, guidance_scale),
        image_shape=(channels, size, size),
        num_classes=pipe.class_embedder.num_classes,
    )
    result = train(method, config, out, progress)
    _keep_average(pipe, result, out)
    return pipe, result


def _keep_average(pipe: TinyFlux2Pipeline, result: TrainResult, out: Path) -> None:
    """Put the averaged weights into the pipeline and save it."""
    average = result.ema
    pipe.transformer.load_state_dict(average.transformer.state_dict())
    pipe.class_embedder.load_state_dict(average.embedder.state_dict())
    pipe.transformer.eval()
    pipe.save_pretrained(out / PIPELINE, safe_serialization=True)
