"""The region cache as techniques: what to recompute (a policy) and how to store the rest, as plain settings.

    StreamingRegionCache     frame after frame; what changed is found on the model input         -> `stream`
    EditRegionCache          a region of a given picture is made anew                            -> `edit`
    ReferenceRegionCache     reference pictures are computed once, the picture at each step
    ChunkRegionCache         frames of a video are computed when they have moved enough
    GenerationRegionCache    plain generation: for the comparison that it loses to a step cache

Each is applied to a diffusers pipeline with a FLUX.2, LTX-2, LTX-Video or Wan transformer and removed from it without a
trace. All but the first live within one generation and need one slot a context; streaming needs one for each step too
(`planner.py` says what that takes). The settings round-trip through JSON.

In a recipe they exclude step caches, guidance caches and compiled schedules: those take whole passes. Each waits for a
call of its own kind (frames, a mask, reference pictures, a video); the one that takes plain generation is no gain.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, Flux2Transformer2DModel
from jaxtyping import Bool
from torch import Tensor

from diffusion_opt.caching.region.chunks import Chunks, References
from diffusion_opt.caching.region.policy import Changing, Masked, Policy, Streaming
from diffusion_opt.caching.region.session import RegionReport, attach, attached_session, detach
from diffusion_opt.caching.region.slots import Precision, check_precision
from diffusion_opt.caching.step.technique import check_one_transformer


class RegionTechnique(ABC):
    """`apply` and `remove` for the frozen dataclasses below, each of which has fields `precision` and `offload`."""

    __slots__ = ()

    precision: Precision
    offload: bool

    @abstractmethod
    def policy(self) -> Policy:
        """What chooses the tokens, with fresh state."""

    @abstractmethod
    def describe(self) -> str:
        """One line for tables."""

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Put the cache on the pipeline's transformer and return the pipeline.

        Raises ValueError if there is not exactly one transformer, its class is unknown, its attention processors are
        not the stock ones, it has a cache, or the pipeline makes no calls of the kind that the cache is for.
        """
        check_one_transformer(pipe, "region caches")
        self.check(pipe)
        attach(pipe.transformer, self.policy(), self.precision, self.offload, pipe)
        return pipe

    def check(self, pipe: DiffusionPipeline) -> None:  # noqa: B027
        """Raise ValueError for a pipeline that this cache cannot be meant for; most are meant for all."""

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Take the cache off again. Raises ValueError if there is none."""
        detach(pipe.transformer)

    def _stored(self) -> str:
        return ("" if self.precision == "native" else f", {self.precision}") + (", offloaded" if self.offload else "")


def _check(technique: RegionTechnique, **at_least: int) -> None:
    check_precision(technique.precision)
    for name, least in at_least.items():
        if getattr(technique, name) < least:
            raise ValueError(f"{name} must be {least} or more, got {getattr(technique, name)}")


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is a share of the tokens, 0 to 1, got {share}")


@dataclass(frozen=True, slots=True)
class StreamingRegionCache(RegionTechnique):
    """Technique: frame after frame with the same prompt and noise, only changed tokens are computed.

    Through a real VAE the change of one corner is a small change of the whole picture: its norms see all of it. So
    `stream` measures what such a change does to far tokens, once, and what is no larger does not count (`vae_spread`).
    A VAE that is local, as the shipped one, spreads nothing, and any change counts.
    """

    threshold: float | None = None  # relative change of a token's input that counts; None: as `stream` measures it
    ring: int = 1  # neighbors of changed tokens, in tokens
    refresh_every: int = 0  # a full frame after so many; 0: only when needed
    probe: float = 0.1  # share of the unchanged tokens computed too, as a check
    alarm: float = 0.1  # relative change of their velocity at which the frame is computed in full
    precision: Precision = "native"  # of stored keys and values
    offload: bool = False  # keep them in host memory
    seed: int = 0  # draws the probes

    def __post_init__(self) -> None:
        _check(self, ring=0, refresh_every=0)
        _check_share("probe", self.probe)
        if (self.threshold is not None and self.threshold < 0) or self.alarm <= 0:
            raise ValueError(
                f"threshold must be 0 (any change) or more, and alarm above 0, got {self.threshold} and {self.alarm}"
            )

    def policy(self) -> Policy:
        generator = torch.Generator().manual_seed(self.seed)
        return Streaming(self.threshold, self.ring, self.refresh_every, self.probe, self.alarm, generator)

    def describe(self) -> str:
        probe = f", probe {self.probe:.0%}" if self.probe else ""
        return f"streaming region cache, ring {self.ring}{probe}{self._stored()}"


@dataclass(frozen=True, slots=True)
class EditRegionCache(RegionTechnique):
    """Technique: only tokens under a mask are computed, and all of them every `refresh_every` steps."""

    ring: int = 1  # tokens around the mask
    refresh_every: int = 4  # steps; few-step models need 2
    precision: Precision = "native"
    offload: bool = False

    def __post_init__(self) -> None:
        _check(self, ring=0, refresh_every=1)

    def policy(self) -> Policy:
        return Masked(self.ring, self.refresh_every)

    def describe(self) -> str:
        return f"edit region cache, ring {self.ring}, all tokens every {self.refresh_every} steps{self._stored()}"


@dataclass(frozen=True, slots=True)
class GenerationRegionCache(RegionTechnique):
    """Technique: the tokens that moved most are computed. A lesson: for the same work a step cache errs less."""

    share: float = 0.5  # of the tokens
    refresh_every: int = 6  # steps
    precision: Precision = "native"
    offload: bool = False

    def __post_init__(self) -> None:
        _check(self, refresh_every=1)
        _check_share("share", self.share)

    def policy(self) -> Policy:
        return Changing(self.share, self.refresh_every)

    def describe(self) -> str:
        return (
            f"the {self.share:.0%} of the tokens that moved most, all every {self.refresh_every} steps{self._stored()}"
        )


@dataclass(frozen=True, slots=True)
class ReferenceRegionCache(RegionTechnique):
    """Technique: reference pictures are computed at the first step and every `refresh_every` steps (0: once)."""

    refresh_every: int = 0
    precision: Precision = "native"
    offload: bool = False

    def __post_init__(self) -> None:
        _check(self, refresh_every=0)

    def check(self, pipe: DiffusionPipeline) -> None:
        """Raise ValueError unless pictures can stand beside the one that is made, as in FLUX.2."""
        if not isinstance(pipe.transformer, Flux2Transformer2DModel):
            raise ValueError(
                f"reference pictures are a thing of FLUX.2, and {type(pipe.transformer).__name__} has none: the later "
                "frames of a video are no references. ChunkRegionCache decides frame by frame"
            )

    def policy(self) -> Policy:
        return References(self.refresh_every)

    def describe(self) -> str:
        often = f"every {self.refresh_every} steps" if self.refresh_every else "once"
        return f"reference pictures computed {often}{self._stored()}"


@dataclass(frozen=True, slots=True)
class ChunkRegionCache(RegionTechnique):
    """Technique: a frame is computed when its summed relative change has reached `threshold`."""

    threshold: float  # 0: every frame at each step, bit-identical
    precision: Precision = "native"
    offload: bool = False

    def __post_init__(self) -> None:
        _check(self)
        if self.threshold < 0:
            raise ValueError(f"threshold must be 0 (compute every frame) or more, got {self.threshold}")

    def policy(self) -> Policy:
        return Chunks(self.threshold)

    def describe(self) -> str:
        return f"frames computed after a change of {self.threshold:g}{self._stored()}"


def set_region(pipe: DiffusionPipeline, mask: Bool[Tensor, " n"] | None) -> None:
    """Name the tokens to compute, for the edit cache, or for the streaming cache in place of its own detection.

    None takes the region back. Raises ValueError if the pipeline has no region cache.
    """
    attached_session(pipe.transformer).mask = mask


def region_report(pipe: DiffusionPipeline) -> RegionReport:
    """What the region cache did in the last generation. Raises ValueError if there is none."""
    return attached_session(pipe.transformer).report()


def reset_region_cache(pipe: DiffusionPipeline) -> None:
    """Forget all slots: the next pass is full. Needed after a change that the cache cannot see (a swapped module)."""
    attached_session(pipe.transformer).reset()
