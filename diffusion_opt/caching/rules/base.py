"""What the rules have in common: a threshold, and for three of them a running sum that is held against it.

    acc <- acc + change(step)
    skip while acc < threshold;  otherwise compute and set acc to 0

TeaCache, EasyCache and the step table are this and differ in `change` alone: a calibrated function of the input's
change, a rate measured as it goes, a constant of the step. The first-block cache compares one change with the
threshold, MagCache sums another quantity. A threshold of 0 never skips, so it changes no bit.

A rule sees the passes of one context only (the leading guidance branch), in order. It looks at nothing but `StackPass`,
so it serves every family of transformers.
"""

from abc import abstractmethod

from diffusion_opt.caching.calibration.calibrated_run import Belonging
from diffusion_opt.caching.step.stack import StackPass
from diffusion_opt.caching.step.step_cache import Rule


class ThresholdRule(Rule):
    """A rule that never skips at threshold 0.

    `belonging` is what the rule was calibrated for, checked at each new generation; None for one without calibration.
    """

    def __init__(self, threshold: float, belonging: Belonging | None = None) -> None:
        self.threshold = threshold
        self.belonging = belonging

    @property
    def active(self) -> bool:
        return self.threshold > 0

    def check(self, stack: StackPass) -> None:
        """Raise ValueError if the rule was calibrated for another kind of run than the one that begins here."""
        if self.belonging is not None:
            self.belonging.check(stack)

    def place(self, stack: StackPass, counted: int) -> int:
        """The number of a pass in the calibrated run, or as it was counted."""
        return counted if self.belonging is None else self.belonging.place(stack, counted)


class AccumulatingRule(ThresholdRule):
    """Skips while the sum of the changes since the last computed pass is below the threshold."""

    def __init__(self, threshold: float, belonging: Belonging | None = None) -> None:
        super().__init__(threshold, belonging)
        self.accumulated = 0.0

    def start(self) -> None:
        self.accumulated = 0.0

    def skip(self, stack: StackPass, forced: bool) -> bool:
        self.accumulated += self.change(stack)
        if not forced and self.accumulated < self.threshold:
            return True
        self.accumulated = 0.0
        return False

    @abstractmethod
    def change(self, stack: StackPass) -> float:
        """By how much the output is expected to have changed since the pass before."""
