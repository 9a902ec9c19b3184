"""`python -m diffusion_opt.cli` is `diffusion-opt`."""

from diffusion_opt.cli import main

main()
