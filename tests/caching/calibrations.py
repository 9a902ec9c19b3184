"""Calibrations by hand, for rules whose decisions are to be worked out on paper."""

from pathlib import Path

from diffusers import DiffusionPipeline

from diffusion_opt.caching.calibration.calibrated_run import CalibratedRun
from diffusion_opt.caching.calibration.curve import IsotonicCurve
from diffusion_opt.caching.calibration.polynomial import PolynomialCurve
from diffusion_opt.caching.calibration.step_calibration import StepCalibration


def calibration_of(
    pipe: DiffusionPipeline, table: tuple[float, ...] | None = None, ratios: tuple[float, ...] | None = None
) -> StepCalibration:
    """A calibration for the pipeline's last run, with the table and the ratios given (0.1 and 1.05 otherwise)."""
    run = CalibratedRun.of(pipe)
    return StepCalibration(
        run=run,
        num_pairs=30,
        curve=IsotonicCurve((0.0, 1.0), (0.0, 1.0)),
        r2=0.9,
        polynomial=PolynomialCurve((2.0, 0.0)),
        r2_polynomial=0.8,
        step_table=(0.1,) * (run.num_inference_steps - 1) if table is None else table,
        r2_step_table=0.95,
        magnitude_ratios=(1.0, *[1.05] * (run.num_inference_steps - 1)) if ratios is None else ratios,
    )


def saved(calibration: StepCalibration, folder: Path) -> str:
    """The path of a calibration as a technique wants it."""
    calibration.save(folder / "calibration.json")
    return str(folder / "calibration.json")
