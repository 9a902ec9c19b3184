"""The columns of the matrix: each technique with settings under which it must act on a tiny pipeline.

Thresholds are far above what anyone would use, because random weights change by a lot from step to step.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from diffusers import DiffusionPipeline
from matrix.bench import STEPS, Bench, Cell, Verdict, refusal
from tiny_pipelines import tiny_pipeline
from torch import Tensor, nn

from diffusion_opt.caching import (
    ChunkRegionCache,
    CompiledSchedule,
    EasyCache,
    EditRegionCache,
    FirstBlockCache,
    FixedInterval,
    GenerationRegionCache,
    GuidanceCache,
    ReferenceRegionCache,
    ScheduledCache,
    StepTable,
    StreamingRegionCache,
    TeaCache,
    calibrate_step_cache,
    compiled_schedule_report,
    edit,
    guidance_cache_report,
    region_report,
    reset_region_cache,
    step_cache_report,
    stream,
)
from diffusion_opt.caching.schedules.recording import generation_tasks
from diffusion_opt.caching.schedules.schedule import search_schedule
from diffusion_opt.caching.schedules.search import SearchSettings, measure_costs, starting_masks
from diffusion_opt.kernels.diffusers_backend import attention_backend
from diffusion_opt.quantization import PTQ, W8A8, Bfloat16, DynamicInt8, LowPrecisionAttention, pack, save_quantized
from diffusion_opt.quantization.packed.storage import load
from diffusion_opt.recipes import Compile, Solver, Student
from diffusion_opt.subjects import denoisers


def compiled_spared(bench: Bench) -> int:
    return compiled_schedule_report(bench.pipe).total_skipped


def always(technique: Any) -> Any:
    """Makes the same technique for every pipeline."""
    return lambda bench: technique


def steps_spared(bench: Bench) -> int:
    return step_cache_report(bench.pipe).total_skipped


def guidance_spared(bench: Bench) -> int:
    return guidance_cache_report(bench.pipe).total_skipped


def tokens_spared(bench: Bench) -> int:
    passes = region_report(bench.pipe).passes
    return sum(one.num_tokens - one.num_computed for one in passes)


def layers_replaced(bench: Bench) -> int:
    """Modules of classes that are not diffusers' or torch's; of two networks the one with fewer."""
    return min(sum(map(_is_ours, network.modules())) for network in bench.networks.values())


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("diffusion_opt", "modelopt"))


def weights_in_bfloat16(bench: Bench) -> int:
    counts = [Counter(p.dtype for p in network.parameters())[torch.bfloat16] for network in bench.networks.values()]
    return min(counts)


def attention_switched(bench: Bench) -> int:
    """Attention modules on a backend of ours; of two networks the one with fewer."""
    return min(
        sum(_on_our_backend(getattr(module, "processor", None)) for module in found)
        for found in (list(network.modules()) for network in bench.networks.values())
    )


def _on_our_backend(processor: object) -> bool:
    return getattr(getattr(processor, "_attention_backend", None), "value", "").startswith("diffopt")


def solver_is_ours(bench: Bench) -> int:
    return int(type(bench.pipe.scheduler).__module__.startswith("diffusion_opt"))


@dataclass
class Backend:
    """`attention_backend`, a context manager, as a technique."""

    name: str = "diffopt-dense"
    stack: ExitStack = field(default_factory=ExitStack)

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        self.stack.enter_context(attention_backend(pipe, self.name))
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        self.stack.close()


class EagerCompile:
    """`Compile` with graphs that are captured and run as they are: what inductor makes of them is torch's business."""

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        def capture(module: nn.Module) -> None:
            module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

        with patch.object(nn.Module, "compile", capture):
            return Compile().apply(pipe)

    def remove(self, pipe: DiffusionPipeline) -> None:
        Compile().remove(pipe)


def blocks_compiled(bench: Bench) -> int:
    """Compiled modules; of two networks the one with fewer."""
    return min(
        sum(module._compiled_call_impl is not None for module in network.modules())
        for network in bench.networks.values()
    )


def video(bench: Bench) -> Tensor:
    """Two frames of a stream, of which the second differs in a corner."""
    frame = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = frame.clone()
    moved[..., :8, :8] = 1
    frames = stream(bench.pipe, [frame, moved], bench.run.prompts[0], steps=2, guidance_scale=1.0)
    return torch.cat(list(frames))


def forget_regions(bench: Bench) -> None:
    """The second stream would go on where the first one ended."""
    reset_region_cache(bench.pipe)


def edited(bench: Bench) -> Tensor:
    """A picture whose upper left quarter is made anew."""
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:32, :32] = True
    return edit(bench.pipe, picture, mask, bench.run.prompts[0], steps=5, guidance_scale=1.0)


def student(bench: Bench) -> Student:
    """A pipeline of the same kind with other weights, in a folder."""
    folder = bench.folder / f"{bench.name}-student"
    denoisers(bench.pipe)
    other = tiny_pipeline(bench.name)
    with torch.no_grad():
        for network in denoisers(other).values():
            for parameter in network.parameters():
                parameter.mul_(1.05)
    other.save_pretrained(folder)
    return Student(str(folder))


def calibrated(bench: Bench) -> StepTable:
    """A table that skips, made from a calibration of this pipeline and run."""
    found = calibrate_step_cache(bench.pipe, bench.run)
    found.save(bench.folder / f"{bench.name}-calibration.json")
    return StepTable(0.9 * sum(found.step_table), str(bench.folder / f"{bench.name}-calibration.json"))


def searched(bench: Bench) -> ScheduledCache:
    """A schedule of 3 of 5 steps that was searched on this pipeline and run."""
    settings = SearchSettings(amplify_every=0, trials=1)
    tasks = generation_tasks(bench.run, 1)
    starts = starting_masks(measure_costs(bench.pipe, tasks, settings), STEPS - 2)
    found = search_schedule(bench.pipe, tasks[0], starts, settings)
    found.save(bench.folder / f"{bench.name}-schedule.json")
    return ScheduledCache(str(bench.folder / f"{bench.name}-schedule.json"))


def ptq(format: str, bench: Bench) -> PTQ:
    return PTQ(format, run=bench.run, samples=1)


def reopened(bench: Bench) -> Verdict:
    """Quantized to NVFP4, packed, saved and opened again: the folder makes what the pipeline made."""
    before = bench.look()
    try:
        ptq("nvfp4", bench).apply(bench.pipe)
    except ValueError as error:
        return refusal(error, bench.is_untouched(before))
    made = bench.sample(pack(bench.pipe))
    save_quantized(bench.pipe, bench.folder / f"{bench.name}-packed")
    opened = load(bench.folder / f"{bench.name}-packed")
    opened.set_progress_bar_config(disable=True)
    for name, value in vars(bench.pipe).items():  # lengths of texts that some pipelines hold beside their config
        if name in vars(opened) and isinstance(value, int | str) and not name.startswith("_"):
            setattr(opened, name, value)
    bench.renew()
    return Verdict("works") if torch.equal(bench.sample(opened), made) else Verdict("fault", "reopened, it differs")


FAST: dict[str, Cell] = {
    "FixedInterval": Cell(always(FixedInterval(2)), steps_spared),
    "TeaCache": Cell(always(TeaCache(50.0)), steps_spared),
    "FirstBlockCache": Cell(always(FirstBlockCache(500.0)), steps_spared),
    "EasyCache": Cell(always(EasyCache(500.0, warmup=1)), steps_spared),
    "GuidanceCache (every 2)": Cell(always(GuidanceCache(2, "reuse")), guidance_spared),
    "GuidanceCache (interval)": Cell(always(GuidanceCache(1, interval=(0.0, 0.7))), guidance_spared),
    "StreamingRegionCache": Cell(
        always(StreamingRegionCache(threshold=0.01, probe=0.0)), tokens_spared, video, False, forget_regions
    ),
    "EditRegionCache": Cell(always(EditRegionCache()), tokens_spared, edited),
    "ReferenceRegionCache": Cell(always(ReferenceRegionCache()), tokens_spared),
    "ChunkRegionCache": Cell(always(ChunkRegionCache(9.0)), tokens_spared),
    "GenerationRegionCache": Cell(always(GenerationRegionCache()), tokens_spared),
    "DynamicInt8": Cell(always(DynamicInt8(min_width=0)), layers_replaced),
    "W8A8": Cell(always(W8A8("int8", require_fast=False)), layers_replaced),
    "Bfloat16": Cell(always(Bfloat16(require_fast=False)), weights_in_bfloat16),
    "LowPrecisionAttention": Cell(always(LowPrecisionAttention("int8")), attention_switched),
    "attention_backend": Cell(lambda bench: Backend(), attention_switched, moves=False),
    "Solver": Cell(always(Solver(4)), solver_is_ours),
}
SLOW: dict[str, Callable[[Bench], Verdict]] = {
    "calibrated StepTable": Cell(calibrated, steps_spared),
    "searched schedule": Cell(searched, steps_spared),
    "PTQ int8": Cell(partial(ptq, "int8"), layers_replaced),
    "PTQ fp8": Cell(partial(ptq, "fp8"), layers_replaced),
    "PTQ nvfp4": Cell(partial(ptq, "nvfp4"), layers_replaced),
    "packed and reopened": reopened,
    "Student": Cell(student, lambda bench: 1),
}
COMPILED: dict[str, Cell] = {
    "CompiledSchedule": Cell(
        always(CompiledSchedule((True, True, False, True, True), backend="eager")), compiled_spared
    ),
    "Compile": Cell(lambda bench: EagerCompile(), blocks_compiled, moves=False),
}
QUICK = (  # pipelines whose fast cells are tried at each run of the tests: one of each family
    "flux2-klein", "flux2-klein-kv", "flux", "sd3", "qwen-image", "z-image", "pixart", "sana", "sdxl", "wan", "wan2.2",
    "wan-vace", "ltx2-cfg", "hunyuan-video", "cogvideox",
)  # fmt: skip
TRACED = ("flux2-klein", "sd3", "wan", "wan2.2", "sdxl")  # pipelines that are compiled, which takes seconds each


def columns_of(name: str) -> dict[str, Callable[[Bench], Verdict]]:
    """All cells of a pipeline."""
    return FAST | SLOW | (COMPILED if name in TRACED else {})
