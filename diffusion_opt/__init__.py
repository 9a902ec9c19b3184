"""Make diffusion and flow models fast: quantization, caching, distillation, kernels, and all of them combined.

The front door. Names are imported when first used, so `import diffusion_opt` costs milliseconds:

    import diffusion_opt
    pipe = diffusion_opt.load("fashion")                          # a small FLUX.2, shipped with the repository
    fast = diffusion_opt.Recipe.load("fast.json").apply(pipe)     # quantized, cached, distilled: whatever it lists
    pipe("sneaker").images[0]
    diffusion_opt.save(pipe, "runs/fast")                         # opens by load("runs/fast"), recipe and all
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_DOOR = {
    "load": "diffusion_opt.recipes.saving",  # models.load, for packed weights and saved recipes too
    "save": "diffusion_opt.recipes.saving",
    "velocity_model": "diffusion_opt.models",
    "stream": "diffusion_opt.models.causal",
    "Recipe": "diffusion_opt.recipes",
    "apply": "diffusion_opt.recipes",
    "measure": "diffusion_opt.recipes",
    "search": "diffusion_opt.recipes.search",
    "preset": "diffusion_opt.recipes.presets",
    "advise": "diffusion_opt.recipes.advice",
    "Objective": "diffusion_opt.recipes.search",
    "Budget": "diffusion_opt.recipes.search",
}
__all__ = ["__version__", *_DOOR]


def __getattr__(name: str) -> Any:
    if name in _DOOR:
        return getattr(importlib.import_module(_DOOR[name]), name)
    raise AttributeError(f"module 'diffusion_opt' has no attribute {name!r}; it has {', '.join(sorted(_DOOR))}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_DOOR])
