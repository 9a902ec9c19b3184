"""The control: TeaCache without a signal.

    acc <- acc + table[i],   table[i] = mean of d(r_i, r_{i-1}) over the prompts of a calibration
    skip while acc < threshold;  otherwise compute and set acc to 0

Everything is as in TeaCache, except that the change of the residual is not guessed from the run but looked up by the
number of the step. If a rule that looks at the run is worth its trouble it must do better than this one, at the same
number of computed steps. Calibrations print how much of the residual's change each of the two explains.
"""

from dataclasses import dataclass

from diffusers import DiffusionPipeline

from diffusion_opt.caching.calibration.calibrated_run import Belonging, check_near
from diffusion_opt.caching.calibration.step_calibration import StepCalibration
from diffusion_opt.caching.rules.base import AccumulatingRule
from diffusion_opt.caching.step.predictors import PredictorName
from diffusion_opt.caching.step.stack import StackPass
from diffusion_opt.caching.step.technique import StepCacheTechnique, check_predictor, check_threshold


class StepTableRule(AccumulatingRule):
    """The rule above. `table` has the change from each step to the next, so one entry less than there are steps."""

    def __init__(self, threshold: float, table: tuple[float, ...], belonging: Belonging | None = None) -> None:
        super().__init__(threshold, belonging)
        self.table = table
        self._index = 0

    def start(self) -> None:
        super().start()
        self._index = 0

    def change(self, stack: StackPass) -> float:
        """Raises ValueError in a run of more steps than the table knows."""
        index = self.place(stack, self._index)
        self._index += 1
        if index > len(self.table):
            raise ValueError(f"the table knows {len(self.table) + 1} steps, this run has more: calibrate anew")
        return self.table[index - 1] if index else 0.0


@dataclass(frozen=True, slots=True)
class StepTable(StepCacheTechnique):
    """Technique: step caching by a calibrated table of the steps, with no run-time signal.

    `calibration` is the shipped name or the path of a calibration that `calibrate_step_cache` made.
    """

    threshold: float  # change of the residual tolerated between computed steps; 0: none, bit-identical
    calibration: str
    predictor: PredictorName = "forecast"
    near: float = 0.0  # how far a run may be from the calibrated one (`calibrated_run.py`)

    def __post_init__(self) -> None:
        check_threshold(self.threshold, for_a_start=0.2)
        check_predictor(self.predictor)
        check_near(self.near)

    def rule(self, pipe: DiffusionPipeline) -> StepTableRule:
        found = StepCalibration.load(self.calibration)
        return StepTableRule(self.threshold, found.step_table, Belonging(found.run, pipe, self.near))

    def describe(self) -> str:
        return f"step table at {self.threshold:g} with {self.predictor}"
