"""Rounding that is computed in float: through nvidia-modelopt, on ranges taken from the pipeline's own runs."""
