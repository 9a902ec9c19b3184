"""What a step cache did: every decision of a generation, and on request the arithmetic it saved, counted exactly.

    saved = 1 - sum over passes of MACs(computed or skipped) / (number of passes x MACs(computed))

A skipped pass still runs the head, the tail and what a rule probes, so skipping half the passes saves a little less
than half. The two costs are counted (`evaluation.cost`) on one pass that is computed and one that is skipped, with
inputs of the shapes the generation had; on a CPU and for small models that is soon done, for a large one it costs two
passes. Memory can be had beforehand: `anchor_bytes` is the size of what a cache will keep,

    anchors x contexts x batch x sum over streams (tokens x width) x bytes per number
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffusion_opt.caching.step.generation import DEFAULT_CONTEXT
from diffusion_opt.caching.step.stack import Shape, StackCut, StackPass, attached_cut
from diffusion_opt.evaluation.cost import count
from diffusion_opt.models.block_stack import Streams, block_stack
from diffusion_opt.subjects import denoisers


@dataclass(frozen=True, slots=True)
class StepCacheReport:
    """What a cache did in one generation: for each context the times of its passes, and whether each was computed."""

    passes: dict[str, tuple[tuple[float, bool], ...]]
    macs: dict[str, tuple[int, int]] | None = None  # of a computed and of a skipped pass of each context, if counted

    @classmethod
    def of(cls, passes: Mapping[str, Sequence[tuple[float, bool]]]) -> "StepCacheReport":
        return cls({name: tuple(seen) for name, seen in passes.items()})

    @property
    def computed(self) -> dict[str, int]:
        return {name: sum(ran for _, ran in passes) for name, passes in self.passes.items()}

    @property
    def skipped(self) -> dict[str, int]:
        return {name: sum(not ran for _, ran in passes) for name, passes in self.passes.items()}

    @property
    def total_computed(self) -> int:
        return sum(self.computed.values())

    @property
    def total_skipped(self) -> int:
        return sum(self.skipped.values())

    @property
    def dense_macs(self) -> int:
        """MACs of these passes without the cache. Raises ValueError if they were not counted."""
        return sum(self._counted()[name][0] * len(passes) for name, passes in self.passes.items())

    @property
    def used_macs(self) -> int:
        """MACs of these passes as they ran. Raises ValueError if they were not counted."""
        macs = self._counted()
        return sum(self.computed[name] * macs[name][0] + self.skipped[name] * macs[name][1] for name in self.passes)

    @property
    def saved(self) -> float:
        """Share of the arithmetic that was saved, in [0, 1). Raises ValueError if it was not counted."""
        return 1 - self.used_macs / self.dense_macs

    def _counted(self) -> dict[str, tuple[int, int]]:
        if self.macs is None:
            raise ValueError("the MACs of this report were not counted: step_cache_report(pipe, count_macs=True)")
        return self.macs

    def __str__(self) -> str:
        parts = [
            f"{name}: {self.computed[name]} computed, {self.skipped[name]} skipped ["
            + "".join("#" if ran else "." for _, ran in passes)
            + "]"
            for name, passes in self.passes.items()
        ]
        if self.macs is not None:
            parts.append(f"{self.saved:.1%} of {self.dense_macs / 1e9:.3g} GMACs saved")
        return "; ".join(parts) or "no passes yet"


def step_cache_report(pipe: DiffusionPipeline, count_macs: bool = False) -> StepCacheReport:
    """What the step cache on a pipeline did in its last generation.

    `count_macs` runs the transformer twice more for each context, on zeros of the shapes it had, to count what a
    computed and a skipped pass cost. Raises ValueError if there is no step cache, or nothing to count yet.
    """
    networks = denoisers(pipe).values()
    cuts = [attached_cut(network) for network in networks]
    if not all(hasattr(getattr(cut, "controller", None), "report") for cut in cuts):
        raise ValueError(
            "there is no step cache on this pipeline: apply one first, for example TeaCache(threshold=0.1)"
        )
    passes: dict[str, list[tuple[float, bool]]] = {}
    macs: dict[str, tuple[int, int]] = {}
    for network, cut in zip(networks, cuts, strict=True):  # of two networks one makes the earlier steps, one the later
        for name, ran in cut.controller.report().passes.items():
            passes.setdefault(name, []).extend(ran)
            if count_macs:
                macs[name] = _count(network, cut, name)
    if not count_macs:
        return StepCacheReport.of(passes)
    if not passes:
        raise ValueError("no pass has run yet, so there is nothing to count: generate once")
    return replace(StepCacheReport.of(passes), macs=macs)


class _Scripted:
    """A controller that computes, or skips with residuals of zero."""

    def __init__(self, skip: bool, probe_blocks: int) -> None:
        self.skip = skip
        self.probe_blocks = probe_blocks

    def begin(self, stack: StackPass) -> Streams | None:
        return {name: torch.zeros_like(stream) for name, stream in stack.streams.items()} if self.skip else None

    def computed(self, stack: StackPass, residual: Streams) -> None:
        pass

    def finished(self, stack: StackPass, output: Tensor) -> None:
        pass

    def end_generation(self) -> None:
        pass


@torch.no_grad()
def _count(transformer: nn.Module, cut: StackCut, name: str) -> tuple[int, int]:
    """MACs of a computed and of a skipped pass of a context, with the shapes of its last call."""
    shapes = cut.shapes[None if name == DEFAULT_CONTEXT else name]
    call = tree_map(lambda leaf: leaf.zeros() if isinstance(leaf, Shape) else leaf, shapes)
    controllers = [_Scripted(skip, cut.controller.probe_blocks) for skip in (False, True)]
    full, skipped = (count(lambda c=c: cut.rehearse(transformer, call, c)).macs for c in controllers)
    return full, skipped


def anchor_bytes(
    transformer: nn.Module,
    tokens: Mapping[str, int],
    batch: int = 1,
    num_anchors: int = 2,
    num_contexts: int = 1,
) -> int:
    """Memory that the anchors of a step cache will take, before anything runs.

    `tokens` is the number of tokens of each stream: {"hidden": 4096} for a FLUX.2 image of 1,024 x 1,024 pixels,
    {"video": 6144, "audio": 126} for LTX-2. `batch` counts samples in a pass, twice the images where guidance is
    batched; `num_anchors` is the predictor's; `num_contexts` the passes of a step, 2 with two-pass guidance.
    Raises ValueError for streams that this transformer does not have.
    """
    widths = block_stack(transformer).widths
    if set(tokens) != set(widths):
        raise ValueError(
            f"{type(transformer).__name__} has the streams {sorted(widths)}, got tokens of {sorted(tokens)}"
        )
    numbers = batch * sum(tokens[name] * width for name, width in widths.items())
    return num_contexts * num_anchors * numbers * transformer.dtype.itemsize
