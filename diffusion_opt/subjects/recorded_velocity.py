"""The transformer of any pipeline as a velocity model, from a `Recording` of how the pipeline calls it.

Samples are what the pipeline's scheduler moves: packed latents of FLUX.2, latents (C, F, H, W) of Wan. Several streams
are one vector, the first one first, because noise, interpolation and losses treat each number alike. A prompt is a
class: label i stands for the text of prompt i, the label after the last for the empty (or the negative) prompt. Texts
are encoded once, by the pipeline itself, and stay as a table; the text encoder can leave the memory.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from diffusion_opt.flow import ClassCondition
from diffusion_opt.subjects.recording import Recording


class Texts(nn.Module):
    """The arguments that change with the prompt, a row for each prompt and a last one for the empty prompt.

    Texts of different lengths are filled up to the longest where the call has a mask for them, as Qwen-Image's has.
    Raises ValueError for those without a mask.
    """

    def __init__(self, texts: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        texts = filled_up(texts)
        self.names: list[str] = []
        for name, value in texts[0].items():
            if not isinstance(value, Tensor) or all(_equal(text[name], value) for text in texts[1:]):
                continue
            shapes = {tuple(text[name].shape) for text in texts}
            if len(shapes) > 1:
                raise ValueError(
                    f"the prompts have texts of different lengths ({name}: {sorted(shapes)}): they cannot stand in one "
                    "table; use a pipeline that pads its texts"
                )
            self.names.append(name)
            self.register_buffer(name, torch.cat([text[name] for text in texts]), persistent=False)
        if not self.names and len(texts) > 1:
            raise ValueError("the transformer gets the same text for every prompt: are they all the same?")
        for name, value in texts[0].items():
            if not isinstance(value, Tensor) and any(text[name] != value for text in texts[1:]):
                raise ValueError(f"{name!r} changes with the prompt and is no tensor: {value!r}")

    def __deepcopy__(self, memo: dict) -> "Texts":
        return self  # constant and large: copies of a network share it

    @property
    def num_prompts(self) -> int:
        """Prompts without the empty one."""
        return len(getattr(self, self.names[0])) - 1

    def forward(self, labels: Tensor) -> dict[str, Tensor]:
        return {name: getattr(self, name)[labels] for name in self.names}


def filled_up(texts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The texts with zeros behind those that are shorter than the longest, hidden by `NAME_mask` of NAME."""
    found = [dict(text) for text in texts]
    for name, value in texts[0].items():
        mask = f"{name}_mask"
        if mask not in texts[0] or not isinstance(value, Tensor) or value.ndim != 3:
            continue
        longest = max(text[name].shape[1] for text in texts)
        if all(text[name].shape[1] == longest for text in texts):
            continue
        for text in found:
            own = text[name].shape[1]
            given = text[mask] if text[mask] is not None else text[name].new_ones(1, own, dtype=torch.bool)
            text[name] = functional.pad(text[name], (0, 0, 0, longest - own))
            text[mask] = functional.pad(given, (0, longest - own))
    return found


class RecordedVelocity(nn.Module):
    """VelocityModel over samples of `sample_shape` under `ClassCondition`s that name prompts of a table."""

    def __init__(self, transformer: nn.Module, recording: Recording, texts: Texts) -> None:
        super().__init__()
        self.transformer, self.texts, self.sign = transformer, texts, recording.sign
        self.streams = {name: tuple(sample.shape[1:]) for name, sample in recording.streams.items()}
        self._fixed = {  # in a list of no module: they neither train nor are saved with the network
            name: value for name, value in recording.others.items() if name not in texts.names
        }
        self._scales = {name: value.clone() for name, value in recording.times.items()}

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample; of several streams the number of all their numbers."""
        shapes = list(self.streams.values())
        return shapes[0] if len(shapes) == 1 else (sum(math.prod(shape) for shape in shapes),)

    def split(self, x: Float[Tensor, "b *s"]) -> list[Tensor]:
        """The streams of samples. Raises ValueError for samples of another shape."""
        if tuple(x.shape[1:]) != self.sample_shape:
            raise ValueError(f"a sample is {self.sample_shape}, got {tuple(x.shape[1:])}")
        shapes = list(self.streams.values())
        if len(shapes) == 1:
            return [x]
        parts = x.split([math.prod(shape) for shape in shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def join(self, streams: Sequence[Tensor]) -> Float[Tensor, "b *s"]:
        """The inverse of `split`."""
        return streams[0] if len(self.streams) == 1 else torch.cat([stream.flatten(1) for stream in streams], dim=1)

    def forward(
        self,
        x_t: Float[Tensor, "b *s"],
        t: Float[Tensor, " b"],
        condition: ClassCondition | None = None,
        r: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b *s"]:
        """Velocity at times t (B,), in float32 or the samples' type if that is wider.

        Raises ValueError without a condition, for one of other prompts, and with a target time r.
        """
        if condition is None:
            raise ValueError("this model always has a text stream: pass condition.drop() for no condition, not None")
        if condition.num_classes != self.texts.num_prompts:
            raise ValueError(f"the condition names one of {condition.num_classes} prompts, the model knows "
                             f"{self.texts.num_prompts}")  # fmt: skip
        if r is not None:
            raise ValueError("a stock transformer knows one time and has no slot for a target time r")
        batch, dtype, device = len(x_t), self.transformer.dtype, x_t.device
        given = {name: _batched(value, batch, device) for name, value in self._fixed.items()}
        given |= self.texts(condition.labels)
        given |= {name: _time(value.to(device), t) for name, value in self._scales.items()}
        given |= dict(zip(self.streams, (part.to(dtype) for part in self.split(x_t)), strict=True))
        output = self.transformer(**given | {"return_dict": False})
        outputs = output[: len(self.streams)] if isinstance(output, tuple) else (output,)
        return self.sign * self.join(outputs).to(torch.promote_types(x_t.dtype, torch.float32))


def _time(at_one: Tensor, t: Float[Tensor, " b"]) -> Tensor:
    """The time argument of times t, from its value (1, …) or () at t = 1."""
    at_one = at_one.reshape(1, *at_one.shape[1:]) if at_one.ndim else at_one.reshape(1)
    return (at_one.float() * t.float().reshape(-1, *(1,) * (at_one.ndim - 1))).to(at_one.dtype)


def _batched(value: Any, batch: int, device: torch.device) -> Any:
    """An argument of one sample for a batch: tensors of one row are repeated."""
    if isinstance(value, Tensor):
        value = value.to(device)
        return value.expand(batch, *value.shape[1:]) if value.ndim and len(value) == 1 else value
    if isinstance(value, list | tuple):
        return type(value)(_batched(part, batch, device) for part in value)
    return value


def _equal(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one, other)
