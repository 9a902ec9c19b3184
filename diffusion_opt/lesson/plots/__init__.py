"""Figures of the course, in one style.

Each function returns a closed matplotlib figure: a notebook cell that ends with the call shows it once, and nothing
keeps it alive in pyplot. Colors are those of Okabe and Ito, which remain apart for color-blind readers; lines differ
in marker as well, so they do in print. Values stand at the bars and names at the lines where there is room.

    image_grid, image_rows      pictures, alone or one row for each way of making them
    panels                      a few pictures, large
    curves                      error or quality against cost, with reference slopes
    stacked_shares, bars        where the time goes
    roofline                    arithmetic per second against arithmetic per byte
    paths                       trajectories in the plane
    matrices                    scores, masks, errors as pictures
    fits, masks                 what a cache decides by, and which steps it computed
"""

from diffusion_opt.lesson.plots.decisions import fits, masks
from diffusion_opt.lesson.plots.lines import curves
from diffusion_opt.lesson.plots.matrices import matrices
from diffusion_opt.lesson.plots.panels import panels
from diffusion_opt.lesson.plots.pictures import image_grid, image_rows
from diffusion_opt.lesson.plots.plane import paths
from diffusion_opt.lesson.plots.shares import bars, roofline, stacked_shares

__all__ = [
    "bars",
    "curves",
    "fits",
    "image_grid",
    "image_rows",
    "masks",
    "matrices",
    "panels",
    "paths",
    "roofline",
    "stacked_shares",
]
