"""From what a user names to a `Subject`: a class-conditional model, or any pipeline with prompts.

One door for the command and for scripts. The class of the folder decides: a class-conditional pipeline brings its
conditions along and refuses prompts; every other one needs them. `presets_for` gives the settings from which a run on a
large pipeline starts; the presets of the methods are minutes of two CPU cores on a small model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusion_opt.datasets import read_json
from diffusion_opt.distillation.methods import Method
from diffusion_opt.models import TinyFlux2Pipeline, load
from diffusion_opt.models.zoo import configs_of, locate
from diffusion_opt.names import add
from diffusion_opt.subjects import ClassConditional, PromptedPipeline, Run, Subject
from diffusion_opt.subjects.plan import skeleton
from diffusion_opt.subjects.prompted import NO_DATA, NO_PLACE
from diffusion_opt.subjects.real_samples import captioned, encoded, latents_of
from diffusion_opt.subjects.recording import check_kind, check_pictures
from diffusion_opt.training import TrainConfig

LARGE = TrainConfig(steps=2000, batch_size=8, learning_rate=2e-5, warmup_steps=50, betas=(0.0, 0.999), ema_decay=0.98)


OPENERS: dict[str, Callable[..., Subject]] = {}  # of plugins, by the word before the colon


def register(name: str, opener: Callable[..., Subject]) -> None:
    """Add a kind of subject from outside, see `diffusion_opt.plugins`: it opens every teacher called `name:…`.

    `opener` is called like `open_subject`, its `teacher` being what follows the colon, and gives a `Subject` whose name
    is the whole. Raises ValueError for a name that is taken or is no word.
    """
    add("subject", name, opener, OPENERS)


@dataclass(frozen=True, slots=True)
class Samples:
    """Where a user's real samples are: one of the two, or neither."""

    latents: Path | None = None
    pictures: Path | None = None

    def __post_init__(self) -> None:
        if self.latents is not None and self.pictures is not None:
            raise ValueError("give latents or pictures, not both")


def open_subject(
    teacher: str,
    prompts: tuple[str, ...] = (),
    samples: Samples = Samples(),
    device: str = "cpu",
    dtype: Any = "auto",
    **asked: Any,
) -> Subject:
    """The teacher as a subject; `asked` are fields of `Run` (guidance_scale, height, width, num_frames, …).

    Raises ValueError for prompts, samples or sizes given to a class-conditional teacher, and for a pipeline without
    prompts; and as `ClassConditional` and `PromptedPipeline` do.
    """
    kind, colon, rest = teacher.partition(":")
    if colon and kind in OPENERS:
        return OPENERS[kind](rest, prompts, samples, device, dtype, **asked)
    if class_of(teacher) == TinyFlux2Pipeline.__name__:
        sizes = [name for name, value in asked.items() if name != "guidance_scale" and value not in (None, {})]
        given = ["prompts"] * bool(prompts) + ["samples"] * (samples != Samples()) + sizes
        if given:
            raise ValueError(f"{teacher} has classes and a size of its own: leave out {', '.join(given)}")
        return ClassConditional.open(teacher, device)
    pipe, data = load(teacher, dtype=dtype), None
    if samples.pictures is not None:
        paths, captions = captioned(samples.pictures)
        if prompts:
            raise ValueError("the captions of the pictures are the prompts: leave out the prompts")
        if not (asked.get("height") and asked.get("width")):
            raise ValueError("pictures are encoded at one size: give height and width")
        data, prompts = encoded(pipe.to(device), paths, captions, asked["height"], asked["width"])
    if not prompts:
        raise ValueError(f"{teacher} has no classes of its own: give prompts")
    if samples.latents is not None:
        data = latents_of(samples.latents, prompts)
    run = Run(prompts, **{name: value for name, value in asked.items() if value is not None})
    return PromptedPipeline(pipe, run, name=teacher, data=data, device=device)


def check_served(teacher: str, method: Method, samples: Samples = Samples(), arguments: Any = None) -> None:
    """Refuse what cannot be distilled before a weight is read or downloaded: all that its configs tell.

    Raises ValueError with the reason and what to do instead.
    """
    if teacher.partition(":")[0] in OPENERS:
        return
    folder = configs_of(teacher)
    index = folder / "model_index.json"
    if not index.is_file() or read_json(index, "").get("_class_name") == TinyFlux2Pipeline.__name__:
        return
    pipe = skeleton(folder)
    check_kind(pipe)
    check_pictures(pipe, Run(("",), arguments=arguments or {}))
    what = {"two times": "the length of a jump", "guidance": "the scale that a student is to have"}.get(method.network)
    if what is not None:
        raise ValueError(NO_PLACE.format(kind=type(pipe).__name__, what=what))
    if method.images != "none" and samples == Samples():
        raise ValueError(NO_DATA.format(name=teacher))


def class_of(teacher: str) -> str:
    """The pipeline's class, as its folder says. Raises FileNotFoundError for a folder without a pipeline."""
    index = locate(teacher) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{index.parent} is not a diffusers pipeline: it has no model_index.json")
    return str(read_json(index, "restore it with git or download it anew").get("_class_name"))


def preset_for(method: Method, steps: int, subject: Subject) -> TrainConfig:
    """The settings to start from: the method's own for class-conditional teachers, `LARGE` for pipelines."""
    if isinstance(subject, ClassConditional):
        return method.presets[steps]
    own = method.presets[steps]
    return replace(LARGE, betas=own.betas if method.kind == "trajectory" else LARGE.betas)
