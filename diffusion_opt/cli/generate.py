"""`diffusion-opt generate`: pictures or clips from any pipeline, with or without techniques.

    diffusion-opt generate fashion --prompts sneaker                        runs/generate/0-sneaker.png
    diffusion-opt generate DIR --prompts prompts.txt --steps 28 --height 1024 --width 1024
    diffusion-opt generate DIR --prompts "a cat" --recipe fast.json         with the techniques of a recipe

Sample i has prompt i (in turn) and the noise of seed + i, whatever the batches; its file is named after both.
"""

import re
import time
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusion_opt.cli.options import RUNS, Asked, MaybeInt, MaybePath, Model, Opening, writable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

ClipFormat = Literal["webp", "gif", "mp4"]


def generate(
    model: Model,
    asked: Asked,
    opening: Opening,
    samples: MaybeInt = None,
    recipe: MaybePath = None,
    out: Path = RUNS / "generate",
    clip: ClipFormat = "webp",
    fps: float = 16.0,
) -> None:
    """Make pictures (PNG) or clips from a pipeline and write each to a file named after its seed and prompt.

    Args:
        model: shipped name, folder or hub name.
        samples: how many; default: one of each prompt.
        recipe: JSON file of techniques to apply first, see `diffusion_opt.Recipe`.
        out: folder for the files.
        clip: file format of clips; mp4 needs the package imageio-ffmpeg.
        fps: frames per second of clips.
    """
    opening.check(model)
    asked.check(model)
    if samples is not None and samples < 1:
        raise ValueError(f"--samples must be at least 1, got {samples}")
    if fps <= 0:
        raise ValueError(f"--fps must be above 0, got {fps:g}")
    if clip == "mp4":
        _check_mp4()
    if recipe is not None and not recipe.is_file():
        raise ValueError(f"--recipe {recipe} is not there")
    writable(out)
    pipe = opening.open(model)
    run = asked.run(pipe)
    if recipe is not None:
        from diffusion_opt.recipes import Recipe

        chosen = Recipe.load(recipe)
        chosen.apply(pipe)
        print(f"with {chosen.describe()}")
    pipe.set_progress_bar_config(disable=None)
    begun, written = time.perf_counter(), 0
    for indices in run.batches(samples or len(run.prompts)):
        output = pipe(**run.call(indices))
        for index, sample in zip(indices, _samples(output, pipe), strict=True):
            stem = out / f"{run.seed + index}-{_slug(run.prompts[index % len(run.prompts)])}"
            print(f"written to {sample.write(stem, clip, fps)}", flush=True)
            written += 1
    print(f"{written} in {time.perf_counter() - begun:.1f} s")


@dataclass(frozen=True)
class Sample:
    """What a pipeline made of one prompt: a picture, or a clip, perhaps with sound."""

    frames: "list[Image]"
    is_clip: bool
    sound: Any = None  # (channels, samples) in [-1, 1]
    rate: int = 0  # samples of sound a second

    def write(self, stem: Path, clip: ClipFormat, fps: float) -> Path:
        """The file it was written to; sound goes to a WAV file beside it."""
        if not self.is_clip:
            path = stem.with_name(f"{stem.name}.png")
            self.frames[0].save(path)
            return path
        path = stem.with_name(f"{stem.name}.{clip}")
        if clip == "mp4":
            _mp4(self.frames, path, fps)
        else:
            first, *others = self.frames
            first.save(path, save_all=True, append_images=others, duration=1000 / fps, loop=0)
        if self.sound is not None:
            _wav(self.sound, self.rate, path.with_suffix(".wav"))
        return path


def _samples(output: Any, pipe: "DiffusionPipeline") -> Iterator[Sample]:
    """The samples of a call's output, whichever of diffusers' output classes it is."""
    frames = getattr(output, "frames", None)
    if frames is None:
        for image in output.images:
            yield Sample([image], False)
        return
    sound = getattr(output, "audio", None)
    rate = 0 if sound is None else int(pipe.vocoder.config.output_sampling_rate)
    for index, clip in enumerate(frames):
        yield Sample(_pictures(clip), True, None if sound is None else sound[index], rate)


def _pictures(clip: Any) -> "list[Image]":
    """A clip as PIL pictures; some pipelines give arrays (frames, height, width, channels) in [0, 1]."""
    from PIL import Image

    if isinstance(clip, list):
        return clip
    return [Image.fromarray((frame * 255).round().clip(0, 255).astype("uint8")) for frame in clip]


def _check_mp4() -> None:
    if find_spec("imageio_ffmpeg") is None:  # what diffusers writes the file with
        raise ValueError("--clip mp4 needs imageio-ffmpeg (pip install imageio imageio-ffmpeg): take webp or gif")


def _mp4(frames: "list[Image]", path: Path, fps: float) -> None:
    from diffusers.utils import export_to_video

    export_to_video(frames, str(path), fps=round(fps))


def _wav(sound: Any, rate: int, path: Path) -> None:
    """16-bit samples, the channels in turn."""
    samples = (sound.float().clamp(-1, 1) * 32767).round().short().cpu()
    samples = samples if samples.ndim == 2 else samples[None]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.T.contiguous().numpy().tobytes())


def _slug(prompt: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", str(prompt).lower()).strip("-")[:48] or "empty"
