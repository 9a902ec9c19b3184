"""A class-conditional pipeline as a subject: the shipped models, and any `TinyFlux2Pipeline` of other classes.

Its classes are in the pipeline and its samples are pixels. Real images come from the data set with exactly its classes,
size and channels (`datasets.data_for`), or are given; methods that learn from none need none. The pipeline's own fields
say how a student is sampled: `ladders`, `default_steps`, `flow_map`, `guidance_range`.
"""

import copy
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.datasets import DATA_SETS, ImageData, data_for
from diffusion_opt.flow import ALL_TIMES, Guided
from diffusion_opt.models import TinyFlux2Pipeline, flow_map_transformer, load, set_ladders, velocity_model
from diffusion_opt.models.fingerprint import identity, scheduler_fingerprint
from diffusion_opt.subjects.conditions import Classes
from diffusion_opt.subjects.subject import Beginning, Sampling, Takes

GUIDANCE_RANGE = (1.0, 3.0)  # of students that take the scale as an input


class ClassConditional:
    """A `Subject` around a class-conditional pipeline. `data` are images of exactly its classes.

    Raises ValueError for images of other classes, another size or another number of channels.
    """

    needs_start = True
    batch = None
    num_reference = 128

    def __init__(self, pipe: TinyFlux2Pipeline, name: str, data: ImageData | None = None) -> None:
        self.pipe, self.name = pipe, name
        self.network = velocity_model(pipe).eval().requires_grad_(False)
        self.sample_shape = image_shape(pipe)
        self.conditions = Classes(pipe.class_embedder.num_classes)
        self.default_guidance = pipe.config.default_guidance
        self.data = None if data is None else self._fitting(data)

    @classmethod
    def open(cls, name: str, device: str = "cpu") -> "ClassConditional":
        """A shipped model or a folder, without images. Raises ValueError for a pipeline of another class."""
        pipe = load(name, device=device)
        if not isinstance(pipe, TinyFlux2Pipeline):
            raise ValueError(
                f"{name} is a {type(pipe).__name__}, which has no classes of its own: it is distilled with prompts, "
                "subject=PromptedPipeline(pipe, Run(prompts, …))"
            )
        return cls(pipe, name)

    @property
    def device(self) -> torch.device:
        """Where the teacher is, and its images with it."""
        return next(self.network.parameters()).device

    def with_data(self, num: int | None = None, classes: tuple[str, ...] = ()) -> "ClassConditional":
        """The same subject with the first `num` images of these classes: of those it was given, or of the data set of
        its classes. Raises ValueError if there is no such data set.
        """
        names = tuple(self.pipe.class_embedder.config.class_names)
        data = self.data or data_for(DATA_SETS, names, self.sample_shape).training(self.sample_shape)
        other = copy.copy(self)
        other.data = self._fitting(data.part(num, classes))
        return other

    def refuses(self, takes: Takes, needs_data: bool) -> str | None:
        """Every method is served."""
        return None

    def guided(self, scale: float, interval: tuple[float, float] = ALL_TIMES) -> Guided:
        """Two passes, mixed by the scale."""
        return Guided(self.network, scale, interval)

    def identity(self) -> dict[str, str]:
        parts = {"transformer": self.pipe.transformer, "class_embedder": self.pipe.class_embedder}
        return {
            "name": self.name,
            "model": identity(parts).model,
            "scheduler": scheduler_fingerprint(self.pipe.scheduler),
            "conditions": ", ".join(self.pipe.class_embedder.config.class_names),
        }

    def begin(self, start: str | None, takes: Takes, steps: int, guidance: float, shared: bool = False) -> Beginning:
        pipe = copy.deepcopy(self.pipe) if start is None else load(start, device=str(self.device))
        check_start(pipe, start or self.name, takes, steps)
        if takes in ("two times", "guidance") and not pipe.transformer.config.guidance_embeds:
            pipe.transformer = flow_map_transformer(pipe.transformer)
        if takes == "two times":
            pipe.register_to_config(flow_map=True)
        if takes == "guidance":
            pipe.register_to_config(guidance_range=list(GUIDANCE_RANGE), default_guidance=guidance)
        if shared:
            return Beginning(pipe, self.network)
        return Beginning(pipe, velocity_model(pipe).train().requires_grad_(True))

    def sampled(self, pipe: TinyFlux2Pipeline, sampling: Sampling) -> TinyFlux2Pipeline:
        own = pipe.config.guidance_range is not None or sampling.keeps_guidance
        guidance = pipe.config.default_guidance if own else 1.0
        if sampling.ladders:
            set_ladders(pipe, sampling.ladders, sampling.renoise)
        elif not sampling.as_teacher:
            pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
            pipe.register_to_config(is_distilled=True)
        pipe.register_to_config(default_steps=sampling.steps, default_guidance=guidance)
        return pipe

    def finish(
        self, beginning: Beginning, trained: nn.Module, sampling: Sampling, folder: Path | None
    ) -> TinyFlux2Pipeline:
        pipe = beginning.pipe
        pipe.transformer, pipe.class_embedder = trained.transformer.eval(), trained.embedder.eval()
        self.sampled(pipe, sampling)
        if folder is not None:
            pipe.save_pretrained(folder, safe_serialization=True)
        return pipe

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Samples are pixels."""
        return x

    def _fitting(self, data: ImageData) -> ImageData:
        names = tuple(self.pipe.class_embedder.config.class_names)
        if data.class_names != names:
            raise ValueError(
                f"the images are of {', '.join(data.class_names)}, {self.name} draws {', '.join(names)}: give images "
                "of the same classes, in the same order"
            )
        if data.images.shape[1:] != self.sample_shape:
            raise ValueError(
                f"the images are (channels, height, width) = {tuple(data.images.shape[1:])}, {self.name} draws "
                f"{self.sample_shape}"
            )
        return data.to(self.device)


def image_shape(pipe: TinyFlux2Pipeline) -> tuple[int, int, int]:
    """Channels, height and width of what the pipeline draws."""
    size = pipe.vae.config.sample_size
    return pipe.vae.config.in_channels, size, size


def check_start(pipe: TinyFlux2Pipeline, name: str, takes: Takes, steps: int) -> None:
    """Raises ValueError if a student of so many steps, whose network takes these inputs, cannot start from `pipe`."""
    if pipe.config.guidance_range is not None or (takes == "one time" and pipe.config.flow_map):
        slot = "a jump" if pipe.config.flow_map else "a guidance scale"
        raise ValueError(f"this method cannot start from {name}: its network takes {slot} as an input")
    most = max(map(len, pipe.config.ladders)) if pipe.config.ladders else pipe.config.default_steps
    fixed = pipe.config.is_distilled and not pipe.config.flow_map
    if takes == "start" and steps > 1 and fixed and most == 1:
        raise ValueError(f"{name} was made for one step, which is too few to start {steps} steps from")
