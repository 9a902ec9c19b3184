"""Chunks: groups of tokens that are decided on together, with the same slots.

Reference pictures. FLUX.2 puts their tokens behind those of the picture, each reference with its own frame number. They
do not change from step to step, but in a stock model their keys and values do (with time, and with the picture they
attend to), so reusing them is an approximation here. FLUX.2-klein-kv was trained so that it is exact: its references
attend only to themselves, at time 0, and diffusers' `Flux2KVCache` keeps their K and V from the first step on. Ours
needs no such weights and starts from the dense first step; theirs changes the model at every step, the first included.

Frames. FlowCache (arXiv 2602.10825) gives each chunk of a video TeaCache's rule of its own (arXiv 2411.19108):

    acc_c <- acc_c + d(x_c, x'_c),   d(a, b) = mean|a - b| / mean|b|;   compute chunk c when acc_c >= threshold

so still frames wait while moving ones are computed. A chunk that waits takes the velocity it had.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusion_opt.caching.region.policy import Choice, PassDone, Seen, saved_nothing


class ChunkAccumulators:
    """A running sum of relative change for each chunk; a chunk is due when its sum has reached the threshold."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.sums: Float[Tensor, " k"] | None = None
        self._previous: Float[Tensor, "b n c"] | None = None

    def due(self, tokens: Float[Tensor, "b n c"], chunks: Int[Tensor, " n"]) -> Bool[Tensor, " k"]:
        """Whether each chunk 0 … k - 1 must be computed now; its sum is set to 0 if so. All are due at first.

        `chunks` names the chunk of each token. Between calls the tokens must stay the same in number and kind.
        """
        num = int(chunks.max()) + 1
        if self._previous is None:
            self.sums = torch.zeros(num, device=tokens.device)
            due = torch.ones(num, dtype=torch.bool, device=tokens.device)
        else:
            moved = _sum_by((tokens - self._previous).float().abs().mean(dim=(0, 2)), chunks, num)
            size = _sum_by(self._previous.float().abs().mean(dim=(0, 2)), chunks, num)
            self.sums = self.sums + moved / size.clamp(min=1e-12)
            due = self.sums >= self.threshold
        self._previous = tokens
        self.sums = self.sums.masked_fill(due, 0.0)
        return due


def _sum_by(values: Float[Tensor, " n"], chunks: Int[Tensor, " n"], num: int) -> Float[Tensor, " k"]:
    return torch.zeros(num, device=values.device).index_add_(0, chunks, values)


class References:
    """Policy: the tokens of the first frame number at each step; references at the first and each R-th."""

    slot_per_step = False

    def __init__(self, refresh_every: int) -> None:
        self.refresh_every = refresh_every

    def begin(self) -> None:
        """Nothing outlives a generation."""

    def choose(self, seen: Seen) -> Choice:
        """Raises ValueError if there are no references."""
        frame = seen.positions[:, 0]
        picture = frame == frame.min()
        if bool(picture.all()):
            raise ValueError("the transformer was given one picture and no reference: pass image=, or remove the cache")
        if seen.slot is None or (self.refresh_every and seen.step % self.refresh_every == 0):
            return Choice(None, seen.missing or "refresh")
        return Choice(picture.nonzero()[:, 0], "references kept")

    def judge(self, choice: Choice, new: Float[Tensor, "b a k"], old: Float[Tensor, "b a k"]) -> bool:
        return False

    def remedy(self, passes: Sequence[PassDone]) -> str | None:
        if self.refresh_every == 1 or not saved_nothing(passes):
            return None
        return "a run of one step has no earlier one to keep references from"


class Chunks:
    """Policy: the frames that are due. Contexts of one step share the decision that the first of them took."""

    slot_per_step = False

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.begin()

    def begin(self) -> None:
        self._accumulators = ChunkAccumulators(self.threshold)
        self._decided: tuple[int, Choice] | None = None

    def choose(self, seen: Seen) -> Choice:
        if self._decided is None or self._decided[0] != seen.step:
            frames = seen.positions[:, 0] - seen.positions[:, 0].min()
            active = self._accumulators.due(seen.tokens, frames)[frames]
            index = None if bool(active.all()) else active.nonzero()[:, 0]
            self._decided = seen.step, Choice(index, seen.missing or "frames due")
        return self._decided[1]

    def judge(self, choice: Choice, new: Float[Tensor, "b a k"], old: Float[Tensor, "b a k"]) -> bool:
        return False

    def remedy(self, passes: Sequence[PassDone]) -> str | None:
        if not self.threshold or not saved_nothing(passes):
            return None
        return f"every frame changed by {self.threshold:g} or more at each step; raise the threshold"
