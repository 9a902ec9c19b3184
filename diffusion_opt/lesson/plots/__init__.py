"""Figures of the course, in one style.

Each function returns a closed matplotlib figure: a notebook cell that ends with the call shows it once, and nothing
keeps it alive in pyplot. Colors are those of Okabe and Ito, which remain apart for color-blind readers; lines differ
in marker as well, so they do in print. Values stand at the bars and names at the lines where there is room.

    image_grid, image_rows      pictures, alone or one row for each way of making them
    panels                      a few pictures, large
    curves                      error or quality against cost, with reference slopes
    stacked_shares, bars        where the time goes
    roofline                    arithmetic per second against arithmetic per byte
    paths, clouds               trajectories and points in the plane
    fields                      arrows in the plane: scores, velocities
    matrices                    scores, masks, errors as pictures
    fits, masks                 what a cache decides by, and which steps it computed
    number_lines                what a number format can hold, and where numbers are rounded to
    intervals                   estimates with their intervals, one named row for each
    ranges                      how the inputs of layers spread at each time
"""

from diffusion_opt.lesson.plots.decisions import fits, masks
from diffusion_opt.lesson.plots.fields import fields
from diffusion_opt.lesson.plots.intervals import intervals
from diffusion_opt.lesson.plots.lines import curves
from diffusion_opt.lesson.plots.matrices import matrices
from diffusion_opt.lesson.plots.number_lines import number_lines
from diffusion_opt.lesson.plots.panels import panels
from diffusion_opt.lesson.plots.pictures import image_grid, image_rows
from diffusion_opt.lesson.plots.plane import paths
from diffusion_opt.lesson.plots.ranges import ranges
from diffusion_opt.lesson.plots.shares import bars, roofline, stacked_shares
from diffusion_opt.lesson.plots.trajectories import clouds

__all__ = [
    "bars",
    "clouds",
    "curves",
    "fields",
    "fits",
    "image_grid",
    "image_rows",
    "intervals",
    "masks",
    "matrices",
    "number_lines",
    "panels",
    "paths",
    "ranges",
    "roofline",
    "stacked_shares",
]
