"""Post-training quantization through nvidia-modelopt: how good a format is, simulated.

modelopt puts a quantizer before each linear layer for its input and one for its weight. In simulation ("fake
quantization") a tensor is rounded to the format's grid and computed with in float:

    Q(x) = s clip(round(x / s), -127, 127),    s = max|x| / 127          INT8, symmetric

Weights have a scale for each output channel, inputs one for the tensor, found by calibration on real trajectories and
fixed then ("static"). This answers what a format does to the images, and nothing else: it runs slower than float32 and
stores full weights. For time, use a real kernel (`int8_cpu.py`).

Its preset, taken as it is, is far from its best on these models: it also quantizes embedders and, since modelopt
0.44, the input of every LayerNorm. So the preset's two formats are given by name to just the layers that the
family's policy chooses, before calibration, and everything else is off.
"""

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffusers import DiffusionPipeline
from torch import nn

from diffusion_opt.quantization.calibration import class_prompts, run_trajectories
from diffusion_opt.quantization.policy import as_tuple, choose

UNDO = "_diffusion_opt_modelopt_added"  # attribute of the transformer that says what `remove` must delete

FORMATS: dict[str, dict[str, dict[str, Any]]] = {
    "int8": {"weight": {"num_bits": 8, "axis": 0}, "input": {"num_bits": 8, "axis": None}},
}


def quant_config(names: list[str], format: str) -> dict[str, Any]:
    """modelopt's configuration that quantizes exactly the linear layers of these names."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in names:
        for kind, attributes in FORMATS[format].items():
            quantizer = {"quantizer_name": f"{name}.{kind}_quantizer", "parent_class": "nn.Linear"}
            entries.append({**quantizer, "cfg": dict(attributes)})
    return {"quant_cfg": entries, "algorithm": "max"}


@dataclass(frozen=True, slots=True)
class ModeloptPTQ:
    """Technique: simulated quantization of the block linears by nvidia-modelopt, for its quality and not for its time.

    Calibrates on `calibration_batches` batches of the pipeline's own samples.
    """

    format: Literal["int8"] = "int8"
    calibration_batches: int = 4
    batch_size: int = 10
    num_inference_steps: int = 10
    guidance_scale: float | None = None  # None: the pipeline's own
    prompts: Sequence[str] | None = None  # None: all classes of the pipeline in turn
    skip: Sequence[str] = ()  # regular expressions; layers whose whole name matches are left alone
    seed: int = 0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        counts = {name: getattr(self, name) for name in ("calibration_batches", "batch_size", "num_inference_steps")}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be 1 or more, got {count}")
        if self.prompts is not None and not self.prompts:
            raise ValueError("prompts must not be empty; None takes the classes of the pipeline")
        object.__setattr__(self, "skip", as_tuple("skip", self.skip))
        object.__setattr__(self, "prompts", None if self.prompts is None else as_tuple("prompts", self.prompts))

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Quantize in place, calibrate, and return the pipeline, unchanged if this raises.

        Raises ImportError if modelopt or onnx is missing (without onnx modelopt drops its attention support silently),
        ValueError if the family has no policy, nothing is left to quantize, or the model is quantized already.
        """
        transformer = pipe.transformer
        chosen = [choice for choice in choose(transformer, skip=self.skip) if choice.quantized]
        if not chosen:
            raise ValueError(f"nothing to quantize: there is no plain linear layer left beside skip={self.skip}")
        other = next((choice for choice in chosen if type(choice.layer) is not nn.Linear), None)
        if other is not None:
            raise ValueError(f"{other.name} is a {type(other.layer).__name__}, not a plain nn.Linear: undo that first")
        prompts = self.prompts or class_prompts(pipe)
        quantize = _modelopt_quantize()
        before = _attributes(transformer)

        def run(_: nn.Module) -> None:
            counts = (self.calibration_batches, self.batch_size, self.num_inference_steps)
            run_trajectories(pipe, prompts, *counts, self.guidance_scale, self.seed)

        try:
            with contextlib.redirect_stdout(io.StringIO()):  # modelopt prints what it inserts
                quantize(transformer, quant_config([choice.name for choice in chosen], self.format), run)
            _check_took_effect(transformer, [choice.name for choice in chosen])
        except BaseException:
            _undo(transformer, _added(transformer, before))
            raise
        setattr(transformer, UNDO, _added(transformer, before))
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Take every quantizer out again. Raises ValueError if there are none."""
        added = getattr(pipe.transformer, UNDO, None)
        if added is None:
            raise ValueError("cannot remove modelopt's quantizers from this pipeline: they were not applied")
        delattr(pipe.transformer, UNDO)
        _undo(pipe.transformer, added)

    def describe(self) -> str:
        return (
            f"{self.format.upper()} linears in the blocks, simulated by modelopt (quality only, not faster), "
            f"calibrated on {self.calibration_batches * self.batch_size} samples"
        )


def _modelopt_quantize():
    """modelopt's `quantize`, imported when first needed: it takes seconds, and warns of versions it has not tested."""
    for package, install in (("modelopt", "nvidia-modelopt"), ("onnx", "onnx")):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed: pip install {install}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization import quantize
    return quantize


def _check_took_effect(transformer: nn.Module, names: list[str]) -> None:
    """Raise RuntimeError unless exactly these layers have both quantizers on, with a range that was calibrated."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    on = {name for name, m in transformer.named_modules() if isinstance(m, TensorQuantizer) and m.is_enabled}
    wanted = {f"{name}.{kind}_quantizer" for name in names for kind in ("weight", "input")}
    if on != wanted:
        raise RuntimeError(f"modelopt did not do what was asked: {sorted(on ^ wanted)[0]} differs")
    never = [name for name in sorted(on) if transformer.get_submodule(name).amax is None]
    if never:
        raise RuntimeError(f"{never[0]} saw no data in calibration: is this layer used at all?")


def _attributes(transformer: nn.Module) -> dict[nn.Module, set[str]]:
    return {module: {*vars(module), *module._modules} for module in transformer.modules()}


def _added(transformer: nn.Module, before: dict[nn.Module, set[str]]) -> dict[nn.Module, set[str]]:
    """Attributes and submodules that modelopt gave to each module of before."""
    others = {"_diffusers_hook"}  # diffusers adds it in a pipeline call, and hooks put on later live there
    return {module: names - before[module] - others for module, names in _attributes(transformer).items()
            if module in before}  # fmt: skip


def _undo(transformer: nn.Module, added: dict[nn.Module, set[str]]) -> None:
    """Give each module its own class back, and delete what was added to it."""
    from modelopt.torch.opt.dynamic import DynamicModule

    for module, names in added.items():
        if isinstance(module, DynamicModule):
            module.export()
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
