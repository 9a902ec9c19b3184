"""What quantization tests look at: errors, and whether anything was left behind."""

import torch
from small_pipelines import generate, small_pipeline
from torch import Tensor

__all__ = ["anatomy", "error", "generate", "small_pipeline"]


def error(images: Tensor, exact: Tensor) -> float:
    """Relative L2 distance, mean over samples."""
    return float(((images - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).mean())


def anatomy(transformer: torch.nn.Module) -> dict[str, tuple[int, type, tuple[str, ...]]]:
    """Identity, class and attributes of each module, to tell whether anything was left behind."""
    return {
        name: (id(module), type(module), tuple(sorted({*vars(module), *module._modules} - {"_diffusers_hook"})))
        for name, module in transformer.named_modules()
    }
