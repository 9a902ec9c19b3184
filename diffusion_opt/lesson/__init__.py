"""What notebooks need and nothing else does: settings, figures, live controls, exercise checks and solutions."""

from diffusion_opt.lesson import checks, plots, profiling, regions, solutions
from diffusion_opt.lesson.explore import explore
from diffusion_opt.lesson.settings import Settings, budget, settings

__all__ = ["Settings", "budget", "checks", "explore", "plots", "profiling", "regions", "settings", "solutions"]
