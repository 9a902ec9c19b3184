"""What all step caches share as techniques: put a cut with a cache on the transformer, take it off again.

A technique is a rule's settings and the name of a predictor; `rule` makes the rule for one pipeline. State lives in the
`StepCache` that `apply` puts there, never in the technique, so one technique can serve many pipelines.
"""

from abc import ABC, abstractmethod
from typing import get_args

from diffusers import DiffusionPipeline, Flux2KleinKVPipeline
from torch import nn

from diffusion_opt.caching.step.predictors import PREDICTORS, PredictorName
from diffusion_opt.caching.step.stack import StackCut, attached_cut, check_can_cut
from diffusion_opt.caching.step.step_cache import Rule, StepCache
from diffusion_opt.subjects import denoisers


class StepCacheTechnique(ABC):
    """`apply` and `remove` for the frozen dataclasses of `rules`, each of which has a field `predictor`."""

    __slots__ = ()

    predictor: PredictorName

    @abstractmethod
    def rule(self, pipe: DiffusionPipeline) -> Rule:
        """A fresh rule for this pipeline. Raises ValueError if it is not the one the rule was calibrated on."""

    @abstractmethod
    def describe(self) -> str:
        """One line for tables."""

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Put a cache on each denoising transformer of the pipeline and return the pipeline.

        Wan 2.2 has two, each for a part of the steps. They share nothing: what one computed cannot stand in for the
        other, so each begins with computed steps. Raises ValueError if a transformer cannot be cut, has a cache
        already, or is not the calibrated one, and FileNotFoundError for a calibration that does not exist.
        """
        networks = whole_passes(pipe, "step caches")
        for network in networks:
            check_can_cut(network)
        cuts = [StackCut(network, StepCache(self.rule(pipe), PREDICTORS[self.predictor]), pipe) for network in networks]
        for network, cut in zip(networks, cuts, strict=True):
            cut.attach(network)
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        """Take the cache off again. Raises ValueError if there is none."""
        networks = list(denoisers(pipe).values())
        cuts = [attached_cut(network) for network in networks]
        if None in cuts:
            raise ValueError("there is no step cache on this pipeline to remove")
        for network, cut in zip(networks, cuts, strict=True):
            cut.detach(network)


def whole_passes(pipe: DiffusionPipeline, caches: str) -> list[nn.Module]:
    """The denoising transformers, whose passes are all of one kind.

    Raises ValueError if there is none, and for `Flux2KleinKVPipeline`, which has a cache of its own in its weights.
    """
    if getattr(pipe, "transformer", None) is None:
        raise ValueError(f"{caches} act on a pipeline's transformer, and {type(pipe).__name__} has none")
    if isinstance(pipe, Flux2KleinKVPipeline):
        raise ValueError(
            f"{type(pipe).__name__} keeps keys and values of its references from the first step on, by weights that "
            f"were trained for it, and {caches} do not go with that: use Flux2KleinPipeline"
        )
    return list(denoisers(pipe).values())


def check_one_transformer(pipe: DiffusionPipeline, caches: str = "step caches") -> None:
    """Raise ValueError unless one transformer makes all steps, and makes them whole."""
    if len(whole_passes(pipe, caches)) > 1:
        raise ValueError(
            f"this {type(pipe).__name__} has two transformers, each for a part of the steps, and what one computed "
            f"cannot stand in for the other: {caches} serve pipelines with one"
        )


def check_predictor(name: str) -> None:
    """Raise ValueError unless a predictor has this name."""
    if name not in PREDICTORS:
        raise ValueError(f"predictor must be one of {', '.join(get_args(PredictorName))}, got {name!r}")


def check_threshold(threshold: float, for_a_start: float) -> None:
    """Raise ValueError unless a threshold is finite and 0 or more."""
    if not 0 <= threshold < float("inf"):
        raise ValueError(f"threshold must be 0 (skip nothing) or more, {for_a_start:g} for a start, got {threshold}")
