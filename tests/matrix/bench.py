"""A tiny pipeline on the bench: what it makes untouched, and whether it is still untouched.

A cell of the matrix is one technique on one pipeline. It works if the technique can be applied, does something, makes
the same twice, and leaves the pipeline bit for bit as it was. It is refused if a ValueError says why before anything
was touched. It is idle if it works and warns that there is nothing for it to do here. Anything else is a fault.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import tiny_pipeline, tiny_run
from torch import Tensor, nn

from diffusion_opt.subjects import Run

STEPS = 5
MORE_STEPS = {"wan2.2": 9}  # its first network makes four of them
Status = Literal["works", "refused", "idle", "fault"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a cell, and why where it did not work."""

    status: Status
    reason: str = ""


@dataclass
class Bench:
    """One pipeline of `tiny_pipelines`, and a folder for what techniques save."""

    name: str
    folder: Path

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        return tiny_pipeline(self.name)

    @cached_property
    def run(self) -> Run:
        """One sample, so that a cell is cheap."""
        return tiny_run(self.name, MORE_STEPS.get(self.name, STEPS), batch_size=1)

    @cached_property
    def plain(self) -> Tensor:
        """What the pipeline makes untouched."""
        return self.sample()

    @cached_property
    def networks(self) -> dict[str, nn.Module]:
        """The denoisers by name, of SDXL its UNet."""
        names = ("transformer", "transformer_2", "unet")
        return {name: part for name in names if (part := getattr(self.pipe, name, None)) is not None}

    def sample(self, pipe: DiffusionPipeline | None = None) -> Tensor:
        return self.run.generate(pipe or self.pipe, [0])

    def look(self) -> dict[str, Any]:
        """What of the pipeline a technique could change: its parts, their modules, hooks and instance attributes."""
        seen: dict[str, Any] = {name: id(part) for name, part in self.pipe.components.items()}
        for part, network in self.networks.items():
            for path, module in network.named_modules(remove_duplicate=False):
                own = sorted(set(vars(module)) - {"_is_hf_initialized"})
                seen[f"{part}.{path}"] = id(module), id(getattr(module, "processor", None)), own
        return seen

    def is_untouched(self, before: dict[str, Any]) -> bool:
        return self.look() == before

    def renew(self) -> None:
        """Begin again with a fresh pipeline, after a fault."""
        for name in ("pipe", "networks"):
            self.__dict__.pop(name, None)


Make = Callable[[Bench], Any]  # a technique, after whatever it has to be calibrated on
Effect = Callable[[Bench], int]  # passes spared, layers replaced, …
Sample = Callable[[Bench], Tensor]


@dataclass(frozen=True, slots=True)
class Cell:
    """The check of one technique on one pipeline."""

    make: Make
    effect: Effect  # counted while the technique is on, after generations
    sample: Sample = Bench.sample
    moves: bool = True  # whether the output must differ from the untouched pipeline's
    between: Callable[[Bench], None] = lambda bench: None  # before the second generation

    def __call__(self, bench: Bench) -> Verdict:
        plain, before = bench.plain, bench.look()
        try:
            untouched = plain if self.sample is Bench.sample else self.sample(bench)
            technique = self.make(bench)
            technique.apply(bench.pipe)
        except ValueError as error:
            return refusal(error, bench.is_untouched(before))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                first = self.sample(bench)
            except ValueError as error:  # what depends on the arguments of the call can be refused no earlier
                technique.remove(bench.pipe)
                return refusal(error, torch.equal(bench.sample(), plain), "at the call: ")
            self.between(bench)
            again = self.sample(bench)
        effect = self.effect(bench)
        technique.remove(bench.pipe)
        faults = {
            "not finite": not first.isfinite().all(),
            "a second call differs from the first": not torch.equal(first, again),
            "the output is that of the untouched pipeline": self.moves and effect and torch.equal(first, untouched),
            "after its removal the output differs": not torch.equal(bench.sample(), plain),
        }
        if found := [fault for fault, is_so in faults.items() if is_so]:
            return Verdict("fault", "; ".join(found))
        return Verdict("works") if effect else _idle(said)


def refusal(error: ValueError, untouched: bool, when: str = "") -> Verdict:
    """A ValueError as a verdict: it must have a reason and leave no trace."""
    reason = " ".join(str(error).split())
    if not untouched:
        return Verdict("fault", f"refused with traces left behind: {reason}")
    return (
        Verdict("refused", when + reason)
        if len(reason) > 20
        else Verdict("fault", f"refused without a reason: {reason!r}")
    )


def _idle(said: list[warnings.WarningMessage]) -> Verdict:
    ours = [" ".join(str(one.message).split()) for one in said if one.category is UserWarning]
    return Verdict("idle", ours[0]) if ours else Verdict("fault", "it has no effect and says nothing")


def verdict(cell: Callable[[Bench], Verdict], bench: Bench) -> Verdict:
    """The verdict on a cell, whatever happens in it; after a fault the bench has a fresh pipeline."""
    try:
        found = cell(bench)
    except Exception as error:  # any kind: what is not a refusal is a fault, and the matrix goes on
        found = Verdict("fault", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    if found.status == "fault":
        bench.renew()
    return found
