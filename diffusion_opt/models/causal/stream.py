"""A video that a person steers: frames one by one, the newest action wins, for as long as somebody asks for more.

    with diffusion_opt.stream(model, "frog", "beach", steps=2) as frames:
        for frame in frames:                                   # (3, 64, 64) in [-1, 1]
            show(frame)
            frames.press("left")                               # counts from the next chunk on
            print(frames.frames_per_second, frames.latency_s)

A chunk is made when its first frame is asked for, with the action pressed last: no queue of old ones builds up. Each
chunk takes `steps` passes from noise (Euler on t_i = 1, …, 0); the finished chunk before it is kept in the same pass as
the first of them (`CausalWan.write_and_denoise`), so one step is one pass. Speed counts all that a frame takes here,
decoding included; latency is from a press to the first frame that could show it.
"""

import time
from collections.abc import Iterator
from itertools import pairwise
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.datasets.clips import ACTIONS, CHUNK, PICTURES, SCENES, SIZE, number_of
from diffusion_opt.models.causal.clip_model import SMALLEST_TIME, ClipModel
from diffusion_opt.models.causal.key_values import Precision


class Stream:
    """See the module's head; made by `stream`. It holds its model until `stop`, or the end of a `with` block."""

    def __init__(
        self, model: ClipModel, picture: str, scene: str, steps: int, precision: Precision, seed: int, fused: bool
    ) -> None:
        numbers = number_of(picture, PICTURES, "picture"), number_of(scene, SCENES, "scene")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be an integer, 1 or more, got {steps!r}")
        if not isinstance(model, ClipModel):
            raise ValueError(f"a stream needs a ClipModel, got {model!r}: open a folder with ClipModel.open")
        if model.stream_under_way is not None:
            raise ValueError(
                "a stream of this model is under way: call model.stream_under_way.stop(), or open the model once more"
            )
        self.model, self.steps, self.fused = model, steps, fused
        self.cache = model.causal.new_cache(precision)
        self.generator = torch.Generator().manual_seed(seed)
        self.picture, self.scene = (torch.tensor([number]) for number in numbers)
        self.action, self._pressed_at = 0, None
        self._before: Tensor | None = None  # latents of the chunk before the last
        self._last: tuple[Tensor, Tensor] | None = None  # input and text of the last chunk, not yet kept
        self._latents: Tensor | None = None  # of the last chunk
        self._frames: list[Tensor] = []
        self._started, self.first_frame_s, self.latency_s = time.perf_counter(), None, None
        self.num_frames, self._busy_s, self.stopped = 0, 0.0, False
        model.stream_under_way = self

    def press(self, action: str) -> None:
        """Steer: the last action pressed before a chunk is made is that of the chunk.

        Raises ValueError for another word than an action, and after `stop`.
        """
        self._check_running()
        self.action, self._pressed_at = number_of(action, ACTIONS, "action"), time.perf_counter()

    @property
    def frames_per_second(self) -> float:
        """Frames made, over the time it took to make them; NaN before the first."""
        return self.num_frames / self._busy_s if self._busy_s else float("nan")

    def _check_running(self) -> None:
        if self.stopped:
            raise ValueError("this stream was stopped; begin another one")

    @torch.no_grad()
    def start_from(self, frames: Float[Tensor, "f 3 h w"]) -> None:
        """Go on from real frames, an even number. Raises ValueError for other sizes, and once frames were made."""
        if self._latents is not None:
            raise ValueError("this stream has begun: real frames come before the first generated one")
        self._check_running()
        if frames.shape[1:] != (3, SIZE, SIZE) or len(frames) < CHUNK or len(frames) % CHUNK:
            raise ValueError(
                f"frames must be (a multiple of {CHUNK}, 3, {SIZE}, {SIZE}), got {tuple(frames.shape)}: a chunk is "
                f"{CHUNK} frames"
            )
        tube = self.model.codec.encode(frames[None])
        for k in range(tube.shape[1]):
            self._keep_last()
            self._finish(tube[:, k], self._text(first=k == 0))

    def __iter__(self) -> Iterator[Tensor]:
        return self

    @torch.no_grad()
    def __next__(self) -> Float[Tensor, "3 h w"]:
        """The next frame. Raises ValueError after `stop`."""
        self._check_running()
        if not self._frames:
            begun = time.perf_counter()
            pressed, self._pressed_at = self._pressed_at, None
            self._frames = list(self._next_chunk())
            now = time.perf_counter()
            self._busy_s, self.num_frames = self._busy_s + now - begun, self.num_frames + CHUNK
            if self.first_frame_s is None:
                self.first_frame_s = now - self._started
            if pressed is not None:
                self.latency_s = now - pressed
        return self._frames.pop(0)

    def stop(self) -> None:
        """Give the model back."""
        self.stopped = True
        if self.model.stream_under_way is self:
            self.model.stream_under_way = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _text(self, first: bool) -> Float[Tensor, "1 3 d"]:
        return self.model.words(self.scene, self.picture, torch.tensor([[self.action]]), first)[:, 0]

    def _given(self, x: Tensor, before: Tensor | None) -> Tensor:
        known = torch.full((1,), float(before is not None))
        return self.model.channels(x, torch.zeros_like(x) if before is None else before, known)

    def _keep_last(self) -> None:
        if self._last is not None:
            self.model.causal.write(*self._last, self.cache)
            self._last = None

    def _finish(self, x: Tensor, text: Tensor) -> None:
        self._last = (self._given(x, self._latents), text)
        self._latents = x

    def _next_chunk(self) -> Float[Tensor, "f 3 h w"]:
        """Denoise a chunk and decode it."""
        codec, causal = self.model.codec, self.model.causal
        side = SIZE // codec.config.tube[1] if self._latents is None else self._latents.shape[-1]
        x = torch.randn(1, codec.config.latent_channels, 1, side, side, generator=self.generator)
        before, text = self._latents, self._text(first=self._latents is None)
        times = torch.linspace(1, 0, self.steps + 1).tolist()
        if not self.fused:
            self._keep_last()
        for t, following in pairwise(times):
            noisy = self._given(x, before)
            if self._last is not None:
                last, self._last = self._last, None
                clean = causal.write_and_denoise(*last, noisy, t, text, self.cache)
            else:
                clean = causal.denoise(noisy, t, text, self.cache)
            x = clean + (x - clean) * following / max(t, SMALLEST_TIME)
        self._finish(x, text)
        return codec.decode(x[:, None])[0].clamp(-1, 1)


def stream(
    model: ClipModel,
    picture: str = "frog",
    scene: str = "beach",
    steps: int = 1,
    precision: Precision = "native",
    seed: int = 0,
    fused: bool = True,
) -> Stream:
    """Begin a stream. Raises ValueError for unknown names, no steps, and a model with a stream under way."""
    return Stream(model, picture, scene, steps, precision, seed, fused)
