"""TeaCache: skip a step while the input of the network has hardly changed.

Liu et al. 2024, "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (arXiv 2411.19108). Outputs
of neighboring steps are alike, but not equally alike everywhere. How alike cannot be known without computing the
output; the change of the *timestep-modulated input* of block 0, m_t, is nearly free and goes with it:

    d(a, b) = mean|a - b| / mean|b|          relative change
    acc    <- acc + f(d(m_t, m_t'))          t' the step before t, whether computed or not
    skip while acc < threshold;  otherwise compute and set acc to 0

f turns a change of the input into the change of the output that goes with it. `calibration.py` measures it on the model
at hand; "identity" is f(d) = d, for a first look. The threshold is then, roughly, the change of the stack's residual
that is tolerated between two computed steps; 0 skips nothing and changes no bit. The published implementation pastes a
changed forward onto the transformer class and keeps its state there; here both live on the instance.
"""

from collections.abc import Callable
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.caching.curve import TeaCacheCurve, relative_change
from diffusion_opt.caching.predictors import PREDICTORS, PredictorName
from diffusion_opt.caching.stack import StackCut, StackInput, attached_cut, check_can_cut
from diffusion_opt.caching.step_cache import StepCache


class TeaCacheRule:
    """The rule above, with its running sum. `curve` is f; a calibrated one is checked at each new generation."""

    def __init__(self, threshold: float, curve: Callable[[float], float]) -> None:
        self.threshold = threshold
        self.curve = curve
        self.accumulated = 0.0
        self._previous: Float[Tensor, "b n d"] | None = None

    @property
    def active(self) -> bool:
        return self.threshold > 0

    def start(self, pipe: DiffusionPipeline | None) -> None:
        """Forget the last generation. Raises ValueError if the curve was calibrated for another kind of run."""
        self.accumulated, self._previous = 0.0, None
        if isinstance(self.curve, TeaCacheCurve) and pipe is not None:
            self.curve.check_run(pipe)

    def skip(self, stack: StackInput, forced: bool) -> bool:
        modulated = stack.modulated()
        if self._previous is not None:
            self.accumulated += self.curve(float(relative_change(modulated, self._previous).mean()))
        self._previous = modulated
        if not forced and self.accumulated < self.threshold:
            return True
        self.accumulated = 0.0
        return False


def identity(change: float) -> float:
    """f(d) = d: the change of the input stands for that of the output."""
    return change


@dataclass(frozen=True, slots=True)
class TeaCache:
    """Technique: step caching with the TeaCache rule on a FLUX.2 pipeline.

    `curve` is "identity" or the path of a curve that `calibrate_teacache` made and `save` wrote (looked up in the
    repository's data folder too). `predictor` is "reuse", as published, or "forecast".
    """

    threshold: float  # change of the residual tolerated between computed steps; 0: none, bit-identical
    predictor: PredictorName = "forecast"
    curve: str = "identity"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < float("inf"):
            raise ValueError(f"threshold must be 0 (skip nothing) or more, 0.2 for a start, got {self.threshold}")
        if self.predictor not in PREDICTORS:
            raise ValueError(f"predictor must be one of {', '.join(PREDICTORS)}, got {self.predictor!r}")

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Put the cache on the pipeline's transformer and return the pipeline.

        Raises ValueError if the transformer cannot be cut, has a cache already, or is not the calibrated one, and
        FileNotFoundError for a curve that does not exist.
        """
        check_can_cut(pipe.transformer)
        curve = identity
        if self.curve != "identity":
            curve = TeaCacheCurve.load(self.curve)
            curve.check_model(pipe)
        cache = StepCache(TeaCacheRule(self.threshold, curve), PREDICTORS[self.predictor], pipe)
        StackCut(pipe.transformer, cache).attach(pipe.transformer)
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Take the cache off again. Raises ValueError if there is none."""
        cut = attached_cut(pipe.transformer)
        if cut is None:
            raise ValueError("there is no step cache on this pipeline to remove")
        cut.detach(pipe.transformer)

    def describe(self) -> str:
        scale = "" if self.curve == "identity" else ", calibrated"
        return f"TeaCache at {self.threshold:g} with {self.predictor}{scale}"
