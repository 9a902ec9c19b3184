"""What is distilled: the one thing that stands between a teacher with its data and the methods.

A method must run on clothes in ten classes, on a user's FLUX.2 with a file of prompts, and on points in the plane, and
must not know which. A `Subject` answers what it has to ask:

    network          the teacher as a velocity model, frozen and without guidance
    guided           the same with guidance, whatever that is for this family: two passes, or a scale as an input
    sample_shape     of one sample as the network sees it; several streams (video and sound) are one vector
    conditions       classes or prompts, numbered; a drawn condition can be dropped, which asks for none
    data             real samples with their conditions, or None
    identity         what all this is, for everything that is stored: weights, scheduler, prompts, shape
    begin, finish    a student's network to train, and the pipeline folder that it ends as

`Sampling` is the other half of a student: the times it is trained for and what happens between them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol, Self

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.flow import ALL_TIMES, VelocityModel
from diffusion_opt.subjects.conditions import Conditions, Samples

Takes = Literal["one time", "two times", "guidance", "start"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """With which steps a student is sampled.

    Raises ValueError for a ladder that does not fall from 1 towards 0, and if none of them has the default steps.
    """

    steps: int  # by default
    ladders: tuple[tuple[float, ...], ...] = ()  # times it is trained for, 1 first and the final 0 left out; none: any
    renoise: bool = False  # between two times: predict the picture and noise it again; else follow the path
    as_teacher: bool = False  # with the teacher's own scheduler, whatever that is
    keeps_guidance: bool = False  # guided as the teacher is, because none was distilled in

    def __post_init__(self) -> None:
        for ladder in self.ladders:
            check_ladder(ladder)
        if self.ladders and self.steps not in map(len, self.ladders):
            raise ValueError(f"a student of {self.steps} steps needs a ladder of as many times, got {self.ladders}")


def check_ladder(times: tuple[float, ...]) -> None:
    """Raises ValueError unless the times fall from 1 and leave out the final 0."""
    if not times or times[0] != 1 or times[-1] <= 0 or any(t <= r for t, r in pairwise(times)):
        raise ValueError(f"a ladder falls from 1.0 and leaves out the final 0, got {tuple(times)}")


@dataclass
class Beginning:
    """A student before training: the network that is trained, and the pipeline that it is a part of."""

    pipe: DiffusionPipeline
    network: nn.Module  # a velocity model; `two_time` says whether it takes a second time


class Subject(Protocol):
    """A teacher with what can be asked of it; see the top of this file."""

    name: str
    network: nn.Module
    sample_shape: tuple[int, ...]
    conditions: Conditions
    data: Samples | None
    default_guidance: float
    needs_start: bool  # whether distribution methods must start from a student that makes pictures already

    batch: int | None  # samples that the teacher makes at a time outside training; None: as many as are asked for
    num_reference: int  # pictures of the teacher that alarms compare with; 0: none, where they cost too much

    def refuses(self, takes: Takes, needs_data: bool) -> str | None:
        """Why this subject cannot serve a method whose network takes these inputs; None if it can."""
        ...

    def guided(self, scale: float, interval: tuple[float, float] = ALL_TIMES) -> VelocityModel:
        """The teacher with guidance. Raises ValueError for a scale or an interval that this family cannot have."""
        ...

    def identity(self) -> Mapping[str, str]:
        """What a store of this teacher's pictures belongs to; "name" is for messages, see `same_source`."""
        ...

    def with_data(self, num: int | None = None, classes: tuple[str, ...] = ()) -> Self:
        """The same subject with its real samples: the first `num` of these classes, all by default.

        Raises ValueError if it has none, or no such classes.
        """
        ...

    def begin(self, start: str | None, takes: Takes, steps: int, guidance: float, shared: bool = False) -> Beginning:
        """A student of so many steps as it starts: from the teacher, or from a student in a folder.

        `shared`: it will be an adapter, so its network is the teacher's own. Raises ValueError for a start that does
        not fit, and for an input that this family's networks cannot take.
        """
        ...

    def sampled(self, pipe: DiffusionPipeline, sampling: Sampling) -> DiffusionPipeline:
        """Give a student's pipeline the scheduler, times and defaults of its sampling."""
        ...

    def finish(
        self, beginning: Beginning, trained: nn.Module, sampling: Sampling, folder: Path | None
    ) -> DiffusionPipeline:
        """Put trained weights (a network like `beginning.network`) into the pipeline, and save it to a folder."""
        ...

    def decode(self, x: Float[Tensor, "b *s"]) -> Tensor:
        """Samples as pictures (B, C, H, W) or clips (B, F, C, H, W) in [-1, 1]."""
        ...


def same_source(found: Mapping[str, str] | None, now: Mapping[str, str] | None) -> bool:
    """Whether two identities are of one subject; their names, which are paths, do not count."""
    one, other = ({key: value for key, value in (side or {}).items() if key != "name"} for side in (found, now))
    return one == other


def described(source: Mapping[str, str] | None) -> str:
    """An identity in a few words: name and model."""
    if not source:
        return "nothing that is known"
    return f"{source.get('name', 'a model')!r} (model {source.get('model', 'unknown')})"
