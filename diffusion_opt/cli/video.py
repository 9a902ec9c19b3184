"""`diffusion-opt video train`: the teachers of the world of clips."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffusion_opt.cli.options import RUNS, Device, MaybeFloat, MaybeInt, MaybePath, settle, writable


def train(
    stage: Annotated[Literal["teacher", "autoregressive"], tyro.conf.Positional],
    start: MaybePath = None,
    minutes: MaybeFloat = None,
    steps: MaybeInt = None,
    clock: Literal["wall", "process"] = "process",
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    chunks: int = 8,
    window: MaybeInt = None,
    sink: MaybeInt = None,
    dim: MaybeInt = None,
    layers: MaybeInt = None,
    patch: MaybeInt = None,
    seed: int = 0,
    checkpoint_seconds: float = 120.0,
    out: MaybePath = None,
    threads: MaybeInt = None,
    device: Device = "auto",
) -> None:
    """Train a video teacher on clips that are made on the fly; run it again to resume. Ctrl-C saves and stops.

    Args:
        stage: teacher sees whole clips; autoregressive goes chunk by chunk and starts from the teacher.
        start: folder of a model to go on from (OUT/model of the stage before); default: a new one.
        minutes: training time in all.
        steps: optimizer steps in all.
        clock: what minutes count: CPU time of the process, or wall time.
        batch_size: clips a step.
        learning_rate: its peak.
        precision: of matrix products; bfloat16 pays on GPUs and on CPUs with AMX.
        chunks: of a training clip, two frames each.
        window: chunks that one sees, itself included, in training and in use; default: 6, or that of start.
        sink: first chunks that all see; default: 1, or that of start.
        dim: width of a new model; default: 256.
        layers: of a new model; default: 4.
        patch: latents per token and side of a new model: 1 is 64 tokens per chunk, 2 is 16; default: 1.
        seed: of weights, clips and noise.
        checkpoint_seconds: time between two checkpoints.
        out: working folder; default runs/video-STAGE.
        threads: CPU threads of torch; default: torch's own choice.
        device: where to train; auto takes the GPU if there is one.
    """
    device = settle(device, threads)
    if minutes is None and steps is None:
        raise ValueError("give a budget: --minutes or --steps")
    if stage == "autoregressive" and start is None:
        raise ValueError("the autoregressive stage goes on from a teacher: --start runs/video-teacher/model")
    if start is not None and (dim, layers, patch) != (None, None, None):
        raise ValueError("--dim, --layers and --patch are of a new model; with --start they are those of its folder")
    from diffusion_opt.distillation.clip_teachers import MODEL, make_clip_teacher
    from diffusion_opt.models.causal import ClipModel
    from diffusion_opt.training import TrainConfig, process_group

    config = TrainConfig(
        steps=steps, minutes=minutes, clock=clock, batch_size=batch_size, learning_rate=learning_rate,
        precision=precision, seed=seed, checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip
    out = out or RUNS / f"video-{stage}"
    writable(out)
    if start is not None:
        model = ClipModel.open(Path(start), window, sink)
    else:
        window, sink = 6 if window is None else window, 1 if sink is None else sink
        size = {"dim": dim, "layers": layers, "patch": patch}
        given = {name: number for name, number in size.items() if number is not None}
        model = ClipModel.build(**given, window=window, sink=sink, seed=seed)
    with process_group(device) as among:
        _, result = make_clip_teacher(stage, model.to(device), config, out, chunks)
        if among.is_main:
            state = "finished" if result.finished else "stopped; run the same command to go on"
            print(f"{state} after {result.step:,} steps and {result.seconds / 60:.1f} minutes; model in {out / MODEL}")
    if result.exit_status:
        raise SystemExit(result.exit_status)
