"""What a search looks for, and how much it may spend.

The two judges are kept apart on purpose. The search asks one judge about few samples of its own noise, many times; what
it finds is therefore a little too good by that judge and on that noise. The verdict asks another judge about more
samples of noise that the search never saw, once.
"""

from dataclasses import dataclass, field
from typing import Literal

from diffusers import DiffusionPipeline

from diffusion_opt.evaluation.judges import Number
from diffusion_opt.evaluation.judges.real import SHIPPED_REAL
from diffusion_opt.models.pipeline import TinyFlux2Pipeline


@dataclass(frozen=True, slots=True)
class Objective:
    """Which cost is made small, which judge's number must stay, and how much worse it may become.

    A judge's number is named as in `Measurement.judged`: "fashion.distance", "paired.pixel". Its loss is how much
    larger it is than the teacher's, as a share of that; a paired number is 0 for the teacher and 1 for an unrelated
    picture, and is its own loss. Raises ValueError for one judge in both places.
    """

    cost: Literal["macs", "time"] = "macs"
    tolerance: float = 0.05
    judge: str = "paired.pixel"  # of the search
    verdict: str = "paired.perceptual"  # of what it found
    real: str | None = None  # real pictures: a shipped name or a folder, for judges that need them
    students: tuple[str, ...] = field(default=())  # names or folders of students that may take the network's place

    def __post_init__(self) -> None:
        if self.tolerance <= 0:
            raise ValueError(f"tolerance is a share above 0 such as 0.05, got {self.tolerance}")
        if self.cost not in ("macs", "time"):
            raise ValueError(f"cost must be macs or time, got {self.cost!r}")
        for name in (self.judge, self.verdict):
            if "." not in name:
                raise ValueError(f"name a judge's number, such as fashion.distance or paired.pixel, got {name!r}")
        if self.judge == self.verdict:
            raise ValueError(f"{self.judge} cannot praise what it chose: give the verdict to another judge's number")
        object.__setattr__(self, "students", tuple(self.students))

    @classmethod
    def for_pipeline(cls, pipe: DiffusionPipeline, **settings: object) -> "Objective":
        """Shipped models have two judges and real pictures; other pipelines are compared with their own pictures."""
        sizes = {size: name for name, size in SHIPPED_REAL.items()}
        if isinstance(pipe, TinyFlux2Pipeline) and (size := pipe.vae.config.sample_size) in sizes:
            own = {"judge": "fashion.distance", "verdict": "imagenet.distance", "real": sizes[size]}
            return cls(**own | {name: value for name, value in settings.items() if value is not None})
        return cls(**{name: value for name, value in settings.items() if value is not None})


@dataclass(frozen=True, slots=True)
class Budget:
    """How much a search may spend. Raises ValueError for counts that make no sense."""

    trials: int = 60
    samples: int = 16  # a trial makes
    survivors: int = 6  # recipes of the front that are measured in full
    verdict_samples: int = 200
    rounds: int = 3  # timed turns of each survivor
    seed: int = 0  # of the sampler

    def __post_init__(self) -> None:
        for name in ("trials", "survivors", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("samples", "verdict_samples"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, because a judge compares distributions; got 1 or less")


def loss(name: str, number: Number, teacher: Number | None) -> float:
    """How much worse than the teacher a number is: a share of the teacher's, a paired number itself.

    Raises ValueError without the teacher's number where it is needed.
    """
    if name.startswith("paired."):
        return number.value
    if teacher is None:
        raise ValueError(f"{name} is compared with the teacher's, which was not measured")
    return number.value / teacher.value - 1
