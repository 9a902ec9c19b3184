"""`diffusion-opt train` and `diffusion-opt distill`: make the teacher and its students."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from diffusion_opt.cli.options import (
    RUNS,
    Asked,
    Device,
    MaybeFloat,
    MaybeInt,
    MaybePath,
    MaybeText,
    Plugins,
    check_model,
    plugins_wanted,
    settle,
    writable,
)
from diffusion_opt.names import check_method

if TYPE_CHECKING:
    from diffusion_opt.training import TrainResult


def train(
    what: Annotated[Literal["teacher", "autoencoder"], tyro.conf.Positional],
    model: Literal["fashion", "fashion-micro", "portraits"] = "fashion",
    minutes: MaybeFloat = None,
    steps: MaybeInt = None,
    seed: int = 0,
    batch_size: MaybeInt = None,
    learning_rate: MaybeFloat = None,
    start: MaybeText = None,
    autoencoder: MaybePath = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    clock: Literal["wall", "process"] = "wall",
    checkpoint_seconds: float = 60.0,
    out: MaybePath = None,
    threads: MaybeInt = None,
    device: Device = "auto",
) -> None:
    """Train a teacher by flow matching, or the decoder of an autoencoder; run it again to resume.

    Without a budget it uses the one that made the shipped model. A budget in steps is repeatable to the bit, one in
    minutes follows the clock. Ctrl-C saves and stops, with exit status 130.

    Args:
        what: the teacher, or the decoder of its autoencoder, for models that are asked for in words; students are made
            by `diffusion-opt distill`.
        model: size of the model.
        minutes: training time in all.
        steps: optimizer steps in all.
        seed: of weights, batches and noise.
        batch_size: pictures per step; default: the model's own.
        learning_rate: its peak; default: the model's own.
        start: shipped name or folder of a pipeline to go on from, with a new optimizer; default: fresh weights.
        autoencoder: FOLDER that `train autoencoder` left (runs/autoencoder-<model>/vae), whose decoder the teacher's
            pipeline takes; default: that one, if it is there.
        precision: of matrix products; auto: bfloat16 where the device has units for it (GPUs, CPUs with AMX) and the
            model is asked for in words, float32 elsewhere.
        clock: what minutes count: wall time, or CPU time of the process.
        checkpoint_seconds: time between two checkpoints; 0: after each step.
        out: working folder; default runs/<what>-<model>.
        threads: CPU threads of torch; default: torch's own choice.
        device: where to train; auto takes the GPU if there is one.
    """
    from dataclasses import replace

    given = {"batch_size": batch_size, "learning_rate": learning_rate, "minutes": minutes, "steps": steps}
    given = {name: value for name, value in given.items() if value is not None}
    if {"minutes", "steps"} & given.keys():
        given = {"minutes": None, "steps": None} | given
    given |= {"seed": seed, "checkpoint_seconds": checkpoint_seconds, "clock": clock}
    if start is not None:
        check_model(start)
    device = settle(device, threads)
    out = out or RUNS / f"{what}-{model}"
    writable(out)
    from diffusion_opt.datasets import CAPTIONED
    from diffusion_opt.training import process_group

    with process_group(device) as among:
        if model in {one.name for one in CAPTIONED}:
            decoder = autoencoder or RUNS / f"autoencoder-{model}" / "vae"
            result = _train_captioned(
                what, model, given, precision, out, start, decoder, autoencoder is not None, device
            )
        else:
            from diffusion_opt.distillation.make import TEACHERS, make_teacher

            if what != "teacher" or start is not None or autoencoder is not None:
                raise ValueError(f"{model} has no autoencoder and starts from fresh weights: train its teacher")
            config = replace(TEACHERS[model], precision="float32" if precision == "auto" else precision, **given)
            _, result = make_teacher(model, config, out, device)
        if among.is_main:
            _say(result, out, "vae" if what == "autoencoder" else "pipeline")
    _end(result.exit_status)


def _train_captioned(
    what: str,
    model: str,
    given: dict[str, Any],
    precision: str,
    out: Path,
    start: str | None,
    decoder: Path,
    needs_decoder: bool,
    device: str,
) -> "TrainResult":
    """Train one half of a model that is asked for in words."""
    from dataclasses import replace

    import torch

    from diffusion_opt.distillation.text_to_image import begin, make_autoencoder, make_text_to_image_teacher
    from diffusion_opt.quantization.faster.bfloat16 import fast_here

    if needs_decoder and not (decoder / "config.json").is_file():
        raise ValueError(f"--autoencoder {decoder} is no folder of an autoencoder: train it first")
    begun = begin(model, RUNS / f"{model}-pictures", out / "start", start, given["seed"], device)
    config = getattr(begun.world, what)
    if precision == "auto":
        precision = "bfloat16" if what == "teacher" and fast_here(torch.device(device)) else "float32"
    config = replace(config, precision=precision, **given)
    print(f"training in {precision}, {len(begun.data):,} pictures")
    if what == "autoencoder":
        return make_autoencoder(begun, config, out)[1]
    decoder = decoder if (decoder / "config.json").is_file() else None
    return make_text_to_image_teacher(begun, config, out, decoder)[1]


def distill(
    steps: int,
    teacher: str = "fashion",
    method: str = "ode",
    start: MaybeText = None,
    minutes: MaybeFloat = None,
    updates: MaybeInt = None,
    clock: Literal["wall", "process"] = "wall",
    precision: Literal["float32", "bfloat16"] = "float32",
    batch_size: MaybeInt = None,
    learning_rate: MaybeFloat = None,
    guidance: MaybeFloat = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    fake_updates: MaybeInt = None,
    pairs: MaybeInt = None,
    data_limit: MaybeInt = None,
    classes: tuple[str, ...] = (),
    lora: MaybeInt = None,
    times: tuple[float, ...] = (),
    prompts: tuple[str, ...] = (),
    height: MaybeInt = None,
    width: MaybeInt = None,
    num_frames: MaybeInt = None,
    negative_prompt: MaybeText = None,
    call: MaybePath = None,
    latents: MaybePath = None,
    pictures: MaybePath = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    accumulate: MaybeInt = None,
    shard: bool = False,
    set: tuple[str, ...] = (),
    plugin: Plugins = (),
    seed: int = 0,
    checkpoint_seconds: float = 60.0,
    out: MaybePath = None,
    threads: MaybeInt = None,
    device: Device = "auto",
) -> None:
    """Distill a few-step student from a teacher; run it again to resume. Ctrl-C saves and stops.

    `torchrun --nproc-per-node 8 -m diffusion_opt.cli distill …` shares each batch among processes.

    Methods that follow the teacher's paths:
        finetune: no student: the teacher trained on with real samples, sampled and guided as before.
        guidance: one pass does the work of the two of guidance; as many steps as the teacher.
        ode: regression along stored paths of the teacher (knowledge distillation).
        reflow: straight lines between noise and the picture that the teacher makes of it.
        progressive: half as many steps with each stage, 8, 4, 2, 1; all students of the way are kept.
        flow_map: jumps between any two times: one student for 1, 2, 4 and more steps.
        shortcut: a flow map that learns each jump from two of its own, half as long.
        mean_flow: a flow map in the limit of short hops, by an exact derivative, which is unstable on FLUX.2.
        mean_flow_difference: the same by a difference over 0.02 of time, which is stable there.
        mean_flow_data: the exact one, taught by the images and not by the teacher.
        consistency: jumps from any time to the picture, taught by the teacher's short hops.
        tcm: a consistency student goes on, for the noisy part of time alone; one step.
        consistency_training: the same, with hops along the images and not along the teacher's path.
        scm: consistency in the limit of short hops, its tangent scaled; unstable on FLUX.2 likewise.
        lcm: consistency with the guidance scale as an input of the student.
        refine: pictures of a student of one step, finished by one pass of the teacher: takes off grain.

    Methods that match the teacher's distribution; they start from a student, which is made first if it is not there:
        dmd2: moves the student's distribution to the teacher's; a fake score follows the student.
        dmd2_gan: the same, with a discriminator that sees real pictures.
        f_distill: the same, with weights that make it descend the forward KL and so cover modes.
        sid: descends the difference of the two scores itself, through both networks.
        sida: sid with a discriminator that sees real pictures.
        refine: pictures of a student of one step, finished by one pass of the teacher: takes off grain.
        ladd: a discriminator on the teacher's features alone, student against real pictures.
        rcm: distribution matching and a loss along the teacher's path together.

    Args:
        steps: of the student; each is one network pass.
        teacher: shipped name, folder or hub name of the teacher: a class-conditional model, or any pipeline of FLUX.2,
            SD3, Wan, LTX or LTX-2, which needs --prompts.
        method: one of the names above.
        start: student to start from (shipped name or folder); default: the teacher, or what the method needs.
        minutes: training time in all, without trajectories and start; default: the method's own.
        updates: optimizer steps in all, repeatable to the bit; with minutes, the first one reached.
        clock: what minutes count: wall time, or CPU time of the process.
        precision: of matrix products; bfloat16 is faster on GPUs and on CPUs with AMX, far slower on others.
        batch_size: images per step, over all processes; default: the method's own.
        learning_rate: its peak; default: the method's own.
        guidance: guidance scale that is distilled into the student; default: the teacher's own.
        guidance_interval: times at which it counts, 1 is noise; without the noisiest ones pictures are more varied.
        fake_updates: of the fake score, or the discriminator, between two of the student; default: the method's own, 4.
        pairs: trajectories to make, for methods that learn from them.
        data_limit: number of training images to use; default: all.
        classes: use images of these classes only.
        lora: train adapters of this rank only and fold them in at the end; they are also saved by themselves.
        times: at which the student is trained and sampled, from 1 down, as many as steps; for matching methods.
        prompts: of a pipeline with prompts: texts, or one FILE with a prompt a line.
        height: pixels of what the student makes; default: the pipeline's own.
        width: pixels.
        num_frames: of a clip.
        negative_prompt: what stands for no prompt in guidance; default: the empty one.
        call: JSON FILE of further arguments of the pipeline's call; pictures by their paths.
        latents: safetensors FILE of real samples, "latents" and "prompts", for methods that learn from pictures.
        pictures: FOLDER of pictures with captions beside them (cat.png, cat.txt), which are then the prompts.
        dtype: in which the teacher is opened; auto: as it is stored. Class-conditional models compute in float32.
        accumulate: micro-batches per step, over all processes.
        shard: share whole networks in training among the processes.
        set: settings of the method's own, as name=value: --set alpha=1.2 warmup=100 gan.r1_weight=100.
        plugin: modules, or .py files, that bring methods or subjects of their own; see `diffusion_opt/plugins.py`.
        seed: of trajectories and batches.
        checkpoint_seconds: time between two checkpoints; 0: after each step.
        out: working folder; default runs/<teacher>-<steps>step-<method>, see the last line of the output.
        threads: CPU threads of torch; default: torch's own choice.
        device: where to train; auto takes the GPU if there is one.
    """
    from dataclasses import replace

    asked = Asked(prompts, call=call)
    if not plugins_wanted(plugin):  # otherwise names may be theirs
        check_method(method)
    if ":" not in teacher or not plugins_wanted(plugin):
        check_model(teacher)
    if start is not None:
        check_model(start)
    device = settle(device, threads)
    from diffusion_opt.distillation.make import StudentPlan, make_student
    from diffusion_opt.distillation.methods import PAIRS, method_named
    from diffusion_opt.distillation.opening import Samples, check_served, open_subject, preset_for
    from diffusion_opt.distillation.starts import pairs_folder, usual_folder, with_start
    from diffusion_opt.plugins import load_plugins
    from diffusion_opt.training import process_group

    load_plugins(plugin)
    name, chosen = method.replace("-", "_"), method_named(method)
    plan = StudentPlan(teacher, name, steps, guidance, start, None, data_limit, classes, lora)
    plan = replace(plan, guidance_interval=guidance_interval, fake_updates=fake_updates, times=times or None)
    plan = replace(plan, method_settings=_settings(set))
    samples, arguments = Samples(latents, pictures), asked.arguments()
    check_served(teacher, chosen, samples, arguments)
    subject = open_subject(
        teacher, asked.texts(), samples, device, dtype, guidance_scale=guidance, height=height,
        width=width, num_frames=num_frames, negative_prompt=negative_prompt,
        arguments=arguments,
    )  # fmt: skip
    plan = plan.settled(subject)
    if pairs is not None or (chosen.pairs and seed):
        number = PAIRS.num_pairs if pairs is None else pairs
        plan = replace(plan, pairs=replace(plan.pair_config, seed=seed, num_pairs=number))
    config = replace(preset_for(chosen, steps, subject), seed=seed, clock=clock, precision=precision)
    config = replace(config, checkpoint_seconds=checkpoint_seconds, accumulate=accumulate)
    if minutes is not None or updates is not None:
        config = replace(config, minutes=minutes, steps=updates)
    given = {"batch_size": batch_size, "learning_rate": learning_rate}
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    if shard and lora is not None:
        raise ValueError("--shard shares whole networks in training; adapters are whole on each process: leave it out")
    if shard:
        matched = chosen.kind == "distribution" and name != "ladd"  # whose critic is small
        config = replace(config, sharded=("student", "fake_score") if matched else ("student",))
    out = out or usual_folder(plan, RUNS, subject)
    writable(out)
    with process_group(device) as among:
        plan, ready = with_start(plan, RUNS, seed, device, subject=subject)
        if ready:
            trajectories = pairs_folder(plan, RUNS, subject) if chosen.pairs else None
            _, result = make_student(plan, config, out, trajectories, device, subject=subject)
        if among.is_main:
            print("stopped; run the same command to go on") if not ready else _say(result, out)
    _end(result.exit_status if ready else 128 + signal.SIGINT)


def _settings(given: tuple[str, ...]) -> dict[str, str]:
    """Names and values of `--set`. Raises ValueError for anything but name=value."""
    if wrong := [text for text in given if not text.partition("=")[0] or "=" not in text]:
        raise ValueError(f"--set takes name=value, got {wrong[0]!r}")
    return {name.replace("-", "_"): value for name, _, value in (text.partition("=") for text in given)}


def _end(status: int) -> None:
    """Tell the shell that a run is not finished, so that `distill … && next` does not go on with it."""
    if status:
        raise SystemExit(status)


def _say(result: "TrainResult", out: Path, left: str = "pipeline") -> None:
    state = "finished" if result.finished else "stopped; run the same command to go on"
    if result.alarm is not None:
        state = f"ended by an alarm, {result.alarm},"
    print(f"{state} after {result.step:,} steps and {result.seconds / 60:.1f} minutes; {left} in {out / left}")
