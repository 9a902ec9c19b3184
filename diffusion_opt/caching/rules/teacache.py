"""TeaCache: skip a step while the input of the network has hardly changed.

Liu et al. 2024, "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (arXiv 2411.19108). Outputs
of neighboring steps are alike, but not equally alike everywhere. How alike cannot be known without computing the
output; the change of the *timestep-modulated input* of block 0, m_t, is nearly free and goes with it:

    d(a, b) = mean|a - b| / mean|b|          relative change
    acc    <- acc + f(d(m_t, m_t'))          t' the step before t, whether computed or not
    skip while acc < threshold;  otherwise compute and set acc to 0

f turns a change of the input into the change of the output that goes with it. `calibration.py` measures it on the model
at hand; "identity" is f(d) = d, for a first look; a published polynomial goes by its name (`polynomial.py`). The
threshold is then, roughly, the change of the stack's residual that is tolerated between two computed steps; 0 skips
nothing and changes no bit. The published implementation pastes a changed forward onto the transformer class and keeps
its state there; here both live on the instance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.caching.calibration.calibrated_run import Belonging, check_near
from diffusion_opt.caching.calibration.curve import identity, relative_change
from diffusion_opt.caching.calibration.polynomial import PUBLISHED
from diffusion_opt.caching.calibration.step_calibration import StepCalibration
from diffusion_opt.caching.rules.base import AccumulatingRule
from diffusion_opt.caching.step.predictors import PredictorName
from diffusion_opt.caching.step.stack import StackPass
from diffusion_opt.caching.step.technique import StepCacheTechnique, check_predictor, check_threshold


class TeaCacheRule(AccumulatingRule):
    """The rule above. `curve` is f; of a calibrated one, `belonging` is checked at each new generation."""

    def __init__(self, threshold: float, curve: Callable[[float], float], belonging: Belonging | None = None) -> None:
        super().__init__(threshold, belonging)
        self.curve = curve
        self._previous: Float[Tensor, "b n d"] | None = None

    def start(self) -> None:
        super().start()
        self._previous = None

    def change(self, stack: StackPass) -> float:
        modulated, previous = stack.modulated(), self._previous
        self._previous = modulated
        return 0.0 if previous is None else self.curve(float(relative_change(modulated, previous).mean()))


@dataclass(frozen=True, slots=True)
class TeaCache(StepCacheTechnique):
    """Technique: step caching with the TeaCache rule.

    `curve` is "identity", the name of a polynomial that was published for this family (`polynomial.PUBLISHED`), or the
    shipped name or path of a calibration that `calibrate_step_cache` made, of which `fit` chooses the curve. As
    published, `predictor` is "reuse"; "forecast" is our default.
    """

    threshold: float  # change of the residual tolerated between computed steps; 0: none, bit-identical
    predictor: PredictorName = "forecast"
    curve: str = "identity"
    fit: Literal["isotonic", "polynomial"] = "isotonic"  # of a calibration; the polynomial is the published way
    near: float = 0.0  # how far a run may be from the calibrated one (`calibrated_run.py`)

    def __post_init__(self) -> None:
        check_threshold(self.threshold, for_a_start=0.2)
        check_predictor(self.predictor)
        if self.fit not in ("isotonic", "polynomial"):
            raise ValueError(f"fit must be isotonic or polynomial, got {self.fit!r}")
        if self.fit == "polynomial" and not self.calibrated:
            raise ValueError(f"fit chooses between the curves of a calibration, and {self.curve!r} is none")
        check_near(self.near)
        if self.near and not self.calibrated:
            raise ValueError(f"near is a distance from a calibrated run, and {self.curve!r} knows none")

    @property
    def calibrated(self) -> bool:
        """Whether `curve` names a calibration, and so a file."""
        return self.curve != "identity" and self.curve not in PUBLISHED

    def rule(self, pipe: DiffusionPipeline) -> TeaCacheRule:
        """Warns (UserWarning) of a polynomial that is negative or falls where it will be used."""
        if self.curve == "identity":
            return TeaCacheRule(self.threshold, identity)
        if self.curve in PUBLISHED:
            return TeaCacheRule(self.threshold, PUBLISHED[self.curve].load(self.curve, pipe.transformer))
        calibration = StepCalibration.load(self.curve)
        belonging = Belonging(calibration.run, pipe, self.near)
        calibration.warn_of_curve()
        if self.fit == "polynomial":
            calibration.polynomial.warn(f"of {self.curve}")
            return TeaCacheRule(self.threshold, calibration.polynomial, belonging)
        return TeaCacheRule(self.threshold, calibration.curve, belonging)

    def describe(self) -> str:
        named = ", calibrated" + (" polynomial" if self.fit == "polynomial" else "") if self.calibrated else ""
        if self.curve in PUBLISHED:
            named = f", polynomial of {self.curve}"
        return f"TeaCache at {self.threshold:g} with {self.predictor}{named}"
