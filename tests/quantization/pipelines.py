"""What quantization tests look at: simulated and packed pipelines, errors, and whether anything was left behind."""

import torch
from small_pipelines import generate, small_pipeline
from torch import Tensor

from diffusion_opt.datasets import FASHION_CLASSES
from diffusion_opt.models import TinyFlux2Pipeline
from diffusion_opt.quantization import PTQ, choose, pack
from diffusion_opt.subjects import Run

__all__ = ["anatomy", "chosen", "classes", "error", "generate", "packed", "simulated", "small_pipeline"]


def classes(**settings: object) -> Run:
    """A run of all classes of the small pipelines."""
    return Run(FASHION_CLASSES, **{"batch_size": 10} | settings)


def chosen(format: str) -> list[str]:
    """Layers that tests quantize: all that the policy chooses, two of them where the algorithm is a long search."""
    names = [choice.name for choice in choose(small_pipeline().transformer) if choice.quantized]
    return names[:2] if format == "nvfp4_svdquant" else names


def simulated(format: str = "nvfp4", seed: int = 0, **settings: object) -> TinyFlux2Pipeline:
    """A pipeline that is quantized in simulation, calibrated on next to nothing."""
    technique = PTQ(
        layers=dict.fromkeys(chosen(format), format), run=classes(num_inference_steps=1), samples=2, **settings
    )
    return technique.apply(small_pipeline(seed=seed))


def packed(format: str = "nvfp4", seed: int = 0) -> TinyFlux2Pipeline:
    """The same, packed."""
    return pack(simulated(format, seed))


def error(images: Tensor, exact: Tensor) -> float:
    """Relative L2 distance, mean over samples."""
    return float(((images - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).mean())


def anatomy(transformer: torch.nn.Module) -> dict[str, tuple[int, type, tuple[str, ...]]]:
    """Identity, class and attributes of each module, to tell whether anything was left behind."""
    return {
        name: (id(module), type(module), tuple(sorted({*vars(module), *module._modules} - {"_diffusers_hook"})))
        for name, module in transformer.named_modules()
    }
