"""Every cache of ours beside those of diffusers and cache-dit, and beside fewer steps, at equal arithmetic."""
