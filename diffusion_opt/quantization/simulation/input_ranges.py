"""A fixed range for inputs that is better than the largest value ever seen.

One scale for all inputs of a layer has to choose: a range that reaches the largest value gives every other value coarse
steps, a smaller one saturates the few that lie beyond it. Two rules cut the tail:

    percentile     the range that holds 99.99 % (or another share) of the sizes seen
    least error    the range r for which  sum_bins count (Q_r(x) - x)^2  is smallest, Q_r the format's own rounding

Both read a histogram of |x| with 2048 bins up to the largest size, filled by one more run of the calibration data. The
rounding is asked of the quantizer itself, so the second rule serves any format. modelopt's `HistogramCalibrator` has
these rules by name, but `quantize` cannot ask for them, and its bins grow with the data; here the largest size is known
before, since the first run found it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

NUM_BINS = 2048
FRACTIONS = torch.linspace(0.1, 1.0, 91)  # of the largest size: the ranges that the search for least error tries


class InputHistograms:
    """Histograms of the sizes of what enters layers; `largest` names the layers and gives the top of each."""

    def __init__(self, largest: Mapping[str, float]) -> None:
        self._largest = dict(largest)
        self._counts = {name: torch.zeros(NUM_BINS, dtype=torch.float64) for name in largest}

    @contextlib.contextmanager
    def watching(self, transformer: nn.Module) -> Iterator[None]:
        """Inside, every pass through the layers is counted."""
        handles = [
            transformer.get_submodule(name).register_forward_pre_hook(self._count(name)) for name in self._counts
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def percentile(self, name: str, share: float) -> float:
        """The size that `share` percent of all inputs of a layer do not exceed, to the width of a bin."""
        reached = self._counts[name].cumsum(0)
        index = int(torch.searchsorted(reached, reached[-1] * share / 100))
        return self._largest[name] * (min(index, NUM_BINS - 1) + 1) / NUM_BINS

    def least_error(self, name: str, rounded: Callable[[Tensor, float], Tensor]) -> float:
        """The range for which the squared error of `rounded(sizes, range)` is smallest over all inputs of a layer."""
        largest = self._largest[name]
        centers = (torch.arange(NUM_BINS) + 0.5) * (largest / NUM_BINS)
        ranges = (FRACTIONS * largest).tolist()
        errors = [float(((rounded(centers, r) - centers).double().square() * self._counts[name]).sum()) for r in ranges]
        return ranges[min(range(len(ranges)), key=errors.__getitem__)]

    def _count(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sizes = args[0].detach().float().abs().flatten().cpu()
            self._counts[name] += torch.histc(sizes, NUM_BINS, 0, self._largest[name])

        return hook
