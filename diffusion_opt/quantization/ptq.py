"""Post-training quantization: how good a format is, simulated on a pipeline.

    PTQ("nvfp4_svdquant").apply(pipe)                              one format for all layers the policy chooses
    PTQ(layers={"proj_out": "int8", …}).apply(pipe)                a format for each layer: mixed precision

    PTQ("fp8", run=Run(("a cat",), num_inference_steps=28, height=1024, width=1024), samples=8).apply(pipe)

Which layers, the family's policy says (`policy.py`); what a format is, `formats.py`; how it is put on, `simulate.py`.
Ranges of inputs that a format fixes beforehand come from the pipeline's own trajectories (`calibration.py`), of the run
that the user will ask for: its prompts, size, frames, picture, steps and guidance. Weights need no data, nor do formats
that round no inputs or find their ranges in each call. All denoisers of a pipeline are quantized. This answers what a
format does to the images, and nothing else: it runs slower than float32 and stores full weights. For time, use a real
kernel (`int8_cpu.py`, `w8a8.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from diffusers import DiffusionPipeline
from torch import nn

from diffusion_opt.quantization.formats import Format, format_named
from diffusion_opt.quantization.guards import FLOAT_SAVE, close_saving, open_saving
from diffusion_opt.quantization.policy import as_tuple, choose
from diffusion_opt.quantization.simulation.calibration import run_or_classes, run_trajectories
from diffusion_opt.quantization.simulation.simulate import UNDO, Ranges, restore, simulate_networks
from diffusion_opt.subjects import Run, denoisers
from diffusion_opt.training.settings import FREE

RANGES = ("max", "percentile", "mse")


@dataclass(frozen=True, slots=True)
class PTQ:
    """Technique: simulated quantization of linear layers by nvidia-modelopt, for its quality and not for its time.

    Calibrates on `samples` of the pipeline's own samples, made as `run` says.
    """

    format: str = "int8"  # a name in FORMATS; not used where `layers` says it for each layer
    layers: Mapping[str, str] | None = None  # format names by layer name; None leaves the choice to the policy
    first_blocks: int = 0  # blocks at the start of the stack that are left alone
    last_blocks: int = 0  # and at its end
    skip: Sequence[str] = ()  # regular expressions; layers whose whole name matches are left alone
    rank: int | None = None  # of the low-rank branch of nvfp4_svdquant; None: the format's own
    ranges: Ranges = "max"  # of inputs with one fixed scale: largest seen, percentile, or least squared error
    percentile: float = 99.99  # of sizes of inputs, for ranges="percentile"
    run: Run | None = None  # how the pipeline is sampled; None: all its classes, its own steps and guidance
    samples: int = 40
    progress: bool = field(default=False, metadata=FREE)

    def __post_init__(self) -> None:
        for name in {self.format, *(self.layers or {}).values()}:
            format_named(name)
        for name in ("samples", "rank"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be 1 or more, got {count}")
        if self.ranges not in RANGES:
            raise ValueError(f"ranges must be one of {', '.join(RANGES)}, got {self.ranges!r}")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile must lie in (0, 100], got {self.percentile}")
        if self.layers is not None and (self.skip or self.first_blocks or self.last_blocks):
            raise ValueError("layers names every layer itself: leave out skip, first_blocks and last_blocks")
        object.__setattr__(self, "skip", as_tuple("skip", self.skip))
        object.__setattr__(self, "run", Run(**self.run) if isinstance(self.run, Mapping) else self.run)  # from JSON
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
        """Quantize all denoisers in place, calibrate, and return the pipeline, unchanged if this raises.

        Raises ImportError if modelopt or onnx is missing (without onnx modelopt drops its attention support silently),
        ValueError if nothing is left to quantize, the model is quantized already, a LoRA is on it, the pipeline cannot
        be called as `run` says, or a layer saw too few samples.
        """
        networks = denoisers(pipe)
        formats = {name: self.formats(network) for name, network in networks.items()}
        needs_data = any(format.needs_data for own in formats.values() for format in own.values())
        loop = self._loop(pipe) if needs_data else None
        simulate_networks(networks, formats, loop, self.ranges, self.percentile, least=self.samples)
        close_saving(pipe, FLOAT_SAVE)
        return pipe

    def _loop(self, pipe: DiffusionPipeline) -> Callable[[], None]:
        """Runs the calibration once. Raises ValueError if the pipeline cannot be called so."""
        run = run_or_classes(pipe, self.run, self.samples)
        return partial(run_trajectories, pipe, run, self.samples, self.progress)

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Take every quantizer out again and put changed weights back. Raises ValueError if there are none."""
        networks = denoisers(pipe).values()
        if not all(hasattr(network, UNDO) for network in networks):
            raise ValueError("cannot remove modelopt's quantizers from this pipeline: they were not applied")
        for network in networks:
            restore(network)
        open_saving(pipe)

    def describe(self) -> str:
        names = {self.format} if self.layers is None else set(self.layers.values())
        what = f"{'+'.join(sorted(names)).upper()} linears, simulated by modelopt (quality only, not faster)"
        if not any(format_named(name).needs_data for name in names):
            return what
        return f"{what}, calibrated on {self.samples} samples"
