"""Post-training quantization: how good a format is, simulated on a pipeline.

    PTQ("nvfp4_svdquant").apply(pipe)                              one format for all layers the policy chooses
    PTQ(layers={"proj_out": "int8", …}).apply(pipe)                a format for each layer: mixed precision

Which layers, the family's policy says (`policy.py`); what a format is, `formats.py`; how it is put on, `simulate.py`.
Ranges of inputs that a format fixes beforehand come from the pipeline's own trajectories (`calibration.py`). Weights
need no data. This answers what a format does to the images, and nothing else: it runs slower than float32 and stores
full weights. For time, use a real kernel (`int8_cpu.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from torch import nn

from diffusion_opt.quantization.formats import Format, format_named
from diffusion_opt.quantization.policy import as_tuple, choose
from diffusion_opt.quantization.simulation.calibration import class_prompts, run_trajectories
from diffusion_opt.quantization.simulation.simulate import Ranges, restore, simulate

RANGES = ("max", "percentile", "mse")


@dataclass(frozen=True, slots=True)
class PTQ:
    """Technique: simulated quantization of linear layers by nvidia-modelopt, for its quality and not for its time.

    Calibrates on `calibration_batches` batches of the pipeline's own samples.
    """

    format: str = "int8"  # a name in FORMATS; not used where `layers` says it for each layer
    layers: Mapping[str, str] | None = None  # format names by layer name; None leaves the choice to the policy
    first_blocks: int = 0  # blocks at the start of the stack that are left alone
    last_blocks: int = 0  # and at its end
    skip: Sequence[str] = ()  # regular expressions; layers whose whole name matches are left alone
    rank: int | None = None  # of the low-rank branch of nvfp4_svdquant; None: the format's own
    ranges: Ranges = "max"  # of inputs with one fixed scale: largest seen, percentile, or least squared error
    percentile: float = 99.99  # of sizes of inputs, for ranges="percentile"
    prompts: Sequence[str] | None = None  # None: all classes of the pipeline in turn
    calibration_batches: int = 4
    batch_size: int = 10
    num_inference_steps: int | None = None  # None: the pipeline's own, right for few-step students
    guidance_scale: float | None = None  # None: the pipeline's own
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        for name in {self.format, *(self.layers or {}).values()}:
            format_named(name)
        counts = {name: getattr(self, name) for name in ("calibration_batches", "batch_size", "num_inference_steps")}
        for name, count in {**counts, "rank": self.rank}.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be 1 or more, got {count}")
        if self.ranges not in RANGES:
            raise ValueError(f"ranges must be one of {', '.join(RANGES)}, got {self.ranges!r}")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile must lie in (0, 100], got {self.percentile}")
        if self.prompts is not None and not self.prompts:
            raise ValueError("prompts must not be empty; None takes the classes of the pipeline")
        if self.layers is not None and (self.skip or self.first_blocks or self.last_blocks):
            raise ValueError("layers names every layer itself: leave out skip, first_blocks and last_blocks")
        object.__setattr__(self, "skip", as_tuple("skip", self.skip))
        object.__setattr__(self, "prompts", None if self.prompts is None else as_tuple("prompts", self.prompts))
        object.__setattr__(self, "layers", None if self.layers is None else dict(self.layers))

    def formats(self, transformer: nn.Module) -> dict[str, Format]:
        """The format of each layer that would be quantized, by name. Raises ValueError if there is none."""
        if self.layers is not None:
            names = self.layers
        else:
            choices = choose(transformer, skip=self.skip, first_blocks=self.first_blocks, last_blocks=self.last_blocks)
            names = {choice.name: self.format for choice in choices if choice.quantized}
            if not names:
                raise ValueError(
                    f"nothing to quantize: there is no plain linear layer left beside skip={self.skip}, "
                    f"first_blocks={self.first_blocks}, last_blocks={self.last_blocks}"
                )
        found = {name: format_named(format) for name, format in names.items()}
        if self.rank is None:
            return found
        if not any(format.rank for format in found.values()):
            raise ValueError(f"rank={self.rank} is for a format with a low-rank branch; nvfp4_svdquant has one")
        return {name: format.with_rank(self.rank) if format.rank else format for name, format in found.items()}

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Quantize in place, calibrate, and return the pipeline, unchanged if this raises.

        Raises ImportError if modelopt or onnx is missing (without onnx modelopt drops its attention support silently),
        ValueError if the family has no policy, nothing is left to quantize, or the model is quantized already.
        """
        prompts = self.prompts or class_prompts(pipe)

        def run() -> None:
            counts = (self.calibration_batches, self.batch_size, self.num_inference_steps)
            run_trajectories(pipe, prompts, *counts, self.guidance_scale, self.seed, self.progress)

        simulate(pipe.transformer, self.formats(pipe.transformer), run, self.ranges, self.percentile)
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Take every quantizer out again and put changed weights back. Raises ValueError if there are none."""
        restore(pipe.transformer)

    def describe(self) -> str:
        what = self.format if self.layers is None else "+".join(sorted(set(self.layers.values())))
        return (
            f"{what.upper()} linears, simulated by modelopt (quality only, not faster), "
            f"calibrated on {self.calibration_batches * self.batch_size} samples"
        )
