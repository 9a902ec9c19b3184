"""Teachers of the world of clips, in two stages: one that sees whole clips, and one that goes chunk by chunk.

    teacher          bidirectional: all chunks see all, one time for a clip; the real score of later distillation
    autoregressive   teacher forcing (Causal Forcing, arXiv 2602.02214): [clean | noisy] rows, a time for each noisy
                     chunk, window and sink as in use, loss on the noisy rows

Both are flow matching with x-prediction, loss = |x - x_hat|^2 / max(t, 0.4)^2: the velocity's loss, whose weight
1 / t^2 would let the smallest times rule, held from 0.4 down. In the second stage the context is noised half of the
time, and the model is told so by the context's own time: generated context is never quite clean, and a model that has
met a little noise there does not take it for the scene (GameNGen, arXiv 2408.14837). Clips never repeat.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from diffusion_opt.datasets.clips import CHUNK, clips
from diffusion_opt.flow import randn, shift_times
from diffusion_opt.models.causal import ClipModel, Layout
from diffusion_opt.training import Role, TrainConfig, TrainResult, processes, train

Stage = Literal["teacher", "autoregressive"]
STAGES: tuple[str, ...] = get_args(Stage)
MODEL = "model"  # folder of the averaged weights below that of a run


@dataclass
class ClipTeaching:
    """A `Distiller` of either stage."""

    model: ClipModel
    stage: Stage
    num_chunks: int = 8
    context_noise: float = 0.2  # most of it, a time
    unknown: float = 0.25  # share of clips whose chunk before is not given
    unsaid: float = 0.1  # share of clips without scene and picture
    shift: float = 2.0  # of times towards noise
    smallest: float = 0.4  # time below which the weight no longer grows
    window: int = field(init=False)  # of the model; a resumed run must have the same
    sink: int = field(init=False)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}")
        if self.num_chunks < 2:
            raise ValueError(f"clips need 2 chunks or more, got {self.num_chunks}")
        self.window, self.sink = self.model.window, self.model.sink

    @property
    def roles(self) -> dict[str, Role]:
        return {"model": Role(self.model)}

    def turn(self, step: int) -> str:
        return "model"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str = "model") -> dict[str, Tensor]:
        """The loss of a batch of new clips, and its part from the noisiest fifth of times."""
        model, device = self.model, generator.device
        seed = int(torch.randint(2**40, (1,), generator=generator, device=device))
        made = clips(batch_size, self.num_chunks + 1, seed)
        latents = model.codec.encode(made.frames.to(device))
        x, before = latents[:, 1:], latents[:, :-1]
        actions, scenes = made.actions[:, 1:].to(device), made.scenes.to(device)
        pictures = made.motion.pictures[:, CHUNK].to(device)
        uniform = lambda *shape: torch.rand(*shape, generator=generator, device=device)  # noqa: E731
        silent = uniform(batch_size) < self.unsaid
        scenes = torch.where(silent, len(model.words.config.scenes), scenes)
        pictures = torch.where(silent, len(model.words.config.pictures), pictures)
        text = model.words(scenes, pictures, actions)
        start = (uniform(batch_size, 1) >= self.unknown).float()
        each = self.stage == "autoregressive"
        t = torch.sigmoid(randn((batch_size, self.num_chunks if each else 1), generator))
        t = shift_times(t, self.shift).expand(-1, self.num_chunks)
        noise = randn(tuple(x.shape), generator)
        x_t = torch.lerp(x, noise, t[..., None, None, None, None])
        later = torch.ones(batch_size, self.num_chunks - 1, device=device)
        if each:
            level = uniform(batch_size, 1) * self.context_noise * (uniform(batch_size, 1) < 0.5)
            around = level[..., None, None, None, None]
            known = torch.cat([start, later], 1)
            noisy_before = torch.lerp(before, randn(tuple(before.shape), generator), around)
            context = torch.cat([noisy_before[:, 1:], x[:, -1:]], 1)  # what the next chunk sees is what it is given
            layout = Layout.teacher_forcing(self.num_chunks, model.window, model.sink)
            double = lambda rows: torch.cat([rows, rows], 1)  # noqa: E731
            found = model(
                torch.cat([context, x_t], 1), torch.cat([level.expand(-1, self.num_chunks), t], 1), double(text),
                double(noisy_before), double(known), layout,
            )[:, self.num_chunks :]  # fmt: skip
        else:
            known = torch.cat([start, 0 * later], 1)
            found = model(x_t, t, text, before, known, Layout.full(self.num_chunks))
        errors = (found - x).square().mean((2, 3, 4, 5))
        late = t > 0.8
        return {
            "loss": (errors / t.clamp(min=self.smallest).square()).mean(),
            "noisiest": (errors * late).sum().detach() / late.sum().clamp(min=1),
        }


def make_clip_teacher(
    stage: Stage, model: ClipModel, config: TrainConfig, out: Path, num_chunks: int = 8, progress: bool = True
) -> tuple[ClipModel, TrainResult]:
    """Train a stage (or resume it) and save the averaged model to `out/model`.

    Raises ValueError for an unknown stage, or if `out` holds a run with other settings.
    """
    model.train().requires_grad_(True)
    result = train(ClipTeaching(model, stage, num_chunks), config, out, progress)
    made = result.ema.eval()
    if processes().is_main:
        made.save(out / MODEL)
    return made, result
