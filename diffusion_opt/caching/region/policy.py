"""When to compute everything and which tokens otherwise: one policy for each use of the region cache.

    Streaming   frame after frame, same prompt and noise. Slot of a step = the same step of the frame before. Tokens
                whose input differs, with their neighbors, decided at the first step and kept for the whole frame: a
                token that is not computed follows its old trajectory exactly, so no later step can differ.
    Masked      one generation, tokens under a mask. Slot = the step before (own trajectory), refreshed every R steps.
    Changing    one generation, the share of tokens whose input moved most since they were last computed. The honest
                lesson: everything moves, and a step cache does better for the same work.
    Reference   one generation with reference pictures, whose tokens are computed once (`chunks.py`).
    Chunks      one generation, frames that moved too far since they were last computed (`chunks.py`).

In streaming a random 10 % of the inactive tokens can be computed too. They heal what they replace, and they tell what
the others lack: if their velocity moved by more than `alarm`, relative to its size, the rest of the frame is computed
in full. RAS (Liu et al. 2025, arXiv 2502.10389) and SpotEdit choose tokens by other scores, without such a control.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusion_opt.caching.region.detect import FULL_ABOVE, bucket_size, change_scores, dilate, fill_bucket, nearness
from diffusion_opt.caching.region.slots import Slot


@dataclass(frozen=True, slots=True)
class Seen:
    """One pass, before it is computed."""

    step: int  # of the generation, in this context
    tokens: Float[Tensor, "b n c"]  # model input
    positions: Int[Tensor, "n 3"]
    slot: Slot | None  # None: nothing usable is stored, everything will be computed
    missing: str  # why, if so
    mask: Bool[Tensor, " n"] | None  # the region the caller set


@dataclass(frozen=True, slots=True)
class Choice:
    """Tokens to compute, rising, or None for all; and those among them that are only there as a probe."""

    index: Int[Tensor, " a"] | None
    reason: str
    probed: Bool[Tensor, " a"] | None = None


class PassDone(Protocol):
    """What a policy is told of a pass that was made."""

    step: int
    num_computed: int
    num_tokens: int
    reason: str


class Policy(Protocol):
    """Chooses the tokens of each pass."""

    slot_per_step: bool  # a slot for each step (the next generation uses it), or one for all steps of a generation

    def begin(self) -> None:
        """A new generation."""
        ...

    def choose(self, seen: Seen) -> Choice:
        """The tokens to compute; only asked for some of them where `seen.slot` is not None."""
        ...

    def judge(self, choice: Choice, new: Float[Tensor, "b a k"], old: Float[Tensor, "b a k"]) -> bool:
        """Whether the velocities of a partial pass say that it must be done in full."""
        ...

    def remedy(self, passes: Sequence[PassDone]) -> str | None:
        """What to change if these passes of a generation computed all tokens; None if they need not have saved any."""
        ...


def saved_nothing(passes: Sequence[PassDone]) -> bool:
    """Whether a generation of several passes computed every token in all of them."""
    return len(passes) > 1 and all(done.num_computed >= done.num_tokens for done in passes)


def never_partial(passes: Sequence[PassDone], refresh_every: int) -> bool:
    """Whether a policy that computes all tokens at every `refresh_every`-th step (0: at the first) came to no other."""
    steps = max(done.step for done in passes) + 1
    return refresh_every == 1 or steps < 2


class _NoJudge:
    def judge(self, choice: Choice, new: Float[Tensor, "b a k"], old: Float[Tensor, "b a k"]) -> bool:
        return False


def rounded(active: Bool[Tensor, " n"], positions: Int[Tensor, "n 3"], reason: str) -> Choice:
    """The active tokens and the nearest others that the bucket has room for; everything if they are too many."""
    size = bucket_size(num := int(active.sum()), len(active))
    if size == len(active):
        return Choice(None, f"{reason}: too many")
    if size == num:
        return Choice(active.nonzero()[:, 0], reason)
    return Choice(fill_bucket(active, nearness(active, positions), size), reason)


class Streaming:
    """See above. `generator` draws the probes; `refresh_every` counts frames, 0 for never."""

    slot_per_step = True

    def __init__(
        self,
        threshold: float | None,
        ring: int,
        refresh_every: int,
        probe: float,
        alarm: float,
        generator: torch.Generator,
    ) -> None:
        self.threshold, self.ring, self.refresh_every = threshold, ring, refresh_every
        self.measured = 0.0  # what stands in for a threshold that was not given
        self.probe, self.alarm, self.generator = probe, alarm, generator
        self._choice: Choice | None = None  # of the generation under way
        self._partial_frames = 0  # since the last full one

    def begin(self) -> None:
        self._choice = None

    def choose(self, seen: Seen) -> Choice:
        if self._choice is None:
            self._choice = self._decide(seen)
            self._partial_frames = 0 if self._choice.index is None else self._partial_frames + 1
        return self._choice

    def judge(self, choice: Choice, new: Float[Tensor, "b a k"], old: Float[Tensor, "b a k"]) -> bool:
        if choice.probed is None or not bool(choice.probed.any()):
            return False
        moved = (new - old)[:, choice.probed].float().norm() / old[:, choice.probed].float().norm().clamp(min=1e-12)
        if float(moved) <= self.alarm:
            return False
        self._choice, self._partial_frames = Choice(None, "alarm"), 0
        return True

    def _decide(self, seen: Seen) -> Choice:
        if seen.slot is None:
            return Choice(None, seen.missing)
        if self.refresh_every and self._partial_frames + 1 >= self.refresh_every:
            return Choice(None, "refresh")
        changed = seen.mask
        if changed is None:
            threshold = self.measured if self.threshold is None else self.threshold
            changed = change_scores(seen.tokens, seen.slot.tokens) > threshold
        active = dilate(changed, seen.positions, self.ring)
        if not bool(active.any()):
            return Choice(active.nonzero()[:, 0], "nothing changed")
        probed = self._draw(~active)
        choice = rounded(active | probed, seen.positions, "changed")
        return choice if choice.index is None else Choice(choice.index, choice.reason, probed[choice.index])

    def remedy(self, passes: Sequence[PassDone]) -> str | None:
        """A frame in which too much had changed is suspicious if it is the first that could have saved anything."""
        if not passes or passes[0].reason != "changed: too many":
            return None
        used = self.measured if self.threshold is None else self.threshold
        return (
            f"more than {FULL_ABOVE:.0%} of the tokens changed by more than {used:g}. If less of the picture moved, "
            "the VAE spreads a change over all of it: give StreamingRegionCache a threshold, .01 for a start"
        )

    def _draw(self, idle: Bool[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """A random share of the inactive tokens."""
        candidates = idle.nonzero()[:, 0]
        order = torch.randperm(len(candidates), generator=self.generator).to(idle.device)
        probed = torch.zeros_like(idle)
        probed[candidates[order[: round(self.probe * len(candidates))]]] = True
        return probed


class Masked(_NoJudge):
    """See above. Raises ValueError at a pass without a mask."""

    slot_per_step = False

    def __init__(self, ring: int, refresh_every: int) -> None:
        self.ring, self.refresh_every = ring, refresh_every

    def begin(self) -> None:
        """Nothing outlives a generation."""

    def choose(self, seen: Seen) -> Choice:
        if seen.mask is None:
            raise ValueError("no region is set: call the pipeline through `edit`, or `set_region(pipe, mask)` first")
        if seen.slot is None or seen.step % self.refresh_every == 0:
            return Choice(None, seen.missing or "refresh")
        return rounded(dilate(seen.mask, seen.positions, self.ring), seen.positions, "mask")

    def remedy(self, passes: Sequence[PassDone]) -> str | None:
        if not saved_nothing(passes) or self.refresh_every == 1:
            return None
        if never_partial(passes, self.refresh_every):
            return "a run of one step is a refresh; edit in two or more"
        return f"the region, with its neighbors, is more than {FULL_ABOVE:.0%} of the picture; mark less"


class Changing(_NoJudge):
    """See above."""

    slot_per_step = False

    def __init__(self, share: float, refresh_every: int) -> None:
        self.share, self.refresh_every = share, refresh_every

    def begin(self) -> None:
        """Nothing outlives a generation."""

    def choose(self, seen: Seen) -> Choice:
        if seen.slot is None or seen.step % self.refresh_every == 0:
            return Choice(None, seen.missing or "refresh")
        scores = change_scores(seen.tokens, seen.slot.tokens)
        nobody = torch.zeros_like(scores, dtype=torch.bool)
        return Choice(fill_bucket(nobody, scores, round(self.share * len(scores))), "moved most")

    def remedy(self, passes: Sequence[PassDone]) -> str | None:
        if not saved_nothing(passes) or self.refresh_every == 1 or self.share == 1:
            return None
        return "a run of one step has none to take tokens from"
