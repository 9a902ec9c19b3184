"""What the commands share: how a pipeline is opened, what is asked of it, where results go.

Two dataclasses become flags of every command on a pipeline: `Opening` (--dtype, --device, --offload, --threads) and
`Asked` (--prompts, --steps, --guidance, --height, …, --call), which turns into the `Run` that all methods take. Both
check what they can before torch is imported, so a typing error costs a moment and not the start of the libraries.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from diffusion_opt.names import SHIPPED, check_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from diffusion_opt.subjects import Run

Device = Literal["auto", "cpu", "cuda"]
Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
MaybeInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]  # without "{None}|INT", "None"
MaybeFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
MaybeText = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
MaybePath = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
Texts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="")]
Plugins = Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODULE|FILE.py [...]", help_behavior_hint="")]
RUNS = Path("runs")
_PICTURES = ("image", "mask", "video", "frame")  # in names of arguments whose texts are paths of pictures

Offload = Annotated[
    Literal["model", "sequential", "group"] | None,
    tyro.conf.arg(metavar="{model,sequential,group}", help_behavior_hint=""),
]


@dataclass(frozen=True)
class Opening:
    """How the pipeline is opened."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of all parts; auto: as it is stored
    device: Device = "auto"  # where to run; auto takes the GPU if there is one
    offload: Offload = None  # keep on the GPU only what computes
    threads: MaybeInt = None  # CPU threads of torch; default: torch's own choice
    plugin: Plugins = ()  # modules, or .py files, that bring parts of their own; see diffusion_opt/plugins.py

    def check(self, model: str) -> None:
        """Refuse what can be refused without torch. Raises ValueError for a model that cannot be one."""
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {self.threads}")
        check_model(model)

    def plugins(self) -> None:
        """Register what was installed or named. Raises ValueError as `load_plugins` does."""
        from diffusion_opt.plugins import load_plugins

        load_plugins(self.plugin)

    def open(self, model: str) -> "DiffusionPipeline":
        """The pipeline, in its place, with its progress bar off; plugins are registered before."""
        device = settle(self.device, self.threads)
        self.plugins()
        from diffusion_opt.recipes.saving import load

        pipe = load(model, dtype=self.dtype, device=device, offload=self.offload)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@dataclass(frozen=True)
class Asked:
    """What is asked of the pipeline; what is left out is left to it."""

    prompts: Texts = ()  # texts, or one FILE with a prompt a line; default: the classes of a shipped model
    steps: MaybeInt = None  # denoising steps
    guidance: MaybeFloat = None  # guidance scale
    height: MaybeInt = None  # pixels
    width: MaybeInt = None  # pixels
    num_frames: MaybeInt = None  # of a clip
    negative_prompt: MaybeText = None  # what guidance leads away from
    call: MaybePath = None  # JSON FILE of further arguments of the pipeline's call; pictures by their paths
    batch_size: MaybeInt = None  # prompts in one call; default: 10 of a shipped model, otherwise 1
    seed: int = 0  # of the first sample; sample i has seed + i

    def check(self, model: str) -> None:
        """Refuse what can be refused without torch. Raises ValueError naming the flag."""
        for flag in ("steps", "height", "width", "num_frames", "batch_size"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, got {value}")
        texts = self.texts()
        if not texts and model not in SHIPPED and _class_of(model) != "TinyFlux2Pipeline":
            raise ValueError(f"{model} has no classes of its own to ask for: give --prompts (texts, or a file of them)")
        if self.call is not None:
            self._further()

    def texts(self) -> tuple[str, ...]:
        """The prompts; those of the file, if one was named. Raises ValueError for a file without any."""
        if len(self.prompts) != 1 or not _is_file(self.prompts[0]):
            return self.prompts
        lines = Path(self.prompts[0]).read_text(encoding="utf-8").splitlines()
        if not (texts := tuple(line.strip() for line in lines if line.strip())):
            raise ValueError(f"--prompts {self.prompts[0]} is a file without a line of text")
        return texts

    def run(self, pipe: "DiffusionPipeline") -> "Run":
        """All of it for this pipeline. Raises ValueError if its call does not take what was given."""
        from diffusion_opt.subjects import Run

        run = Run.for_pipeline(
            pipe, self.texts(), num_inference_steps=self.steps, guidance_scale=self.guidance, height=self.height,
            width=self.width, num_frames=self.num_frames, negative_prompt=self.negative_prompt,
            batch_size=self.batch_size or (10 if hasattr(pipe, "class_embedder") else 1), seed=self.seed,
            arguments=self.arguments(),
        )  # fmt: skip
        return complete(run, pipe)

    def _further(self) -> dict[str, Any]:
        """The JSON of --call. Raises ValueError if it is none, or no object, or names a picture that is not there."""
        try:
            found = json.loads(Path(self.call).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"--call {self.call} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"--call {self.call} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f'--call {self.call} must hold an object, {{"name of an argument": value, …}}')
        for name, value in found.items():
            for path in _paths(name, value):
                if not (self.call.parent / path).is_file():
                    raise ValueError(f"--call {self.call}: {name} is {path}, which is not there")
        return found

    def arguments(self) -> dict[str, Any]:
        """Further arguments with their pictures opened."""
        if self.call is None:
            return {}
        opened = {}
        for name, value in self._further().items():
            pictures = [_opened(self.call.parent / path) for path in _paths(name, value)]
            opened[name] = value if not pictures else (pictures if isinstance(value, list) else pictures[0])
        return opened


OPENING, ASKED = Opening(), Asked()  # as the flags are where none is given


def complete(run: "Run", pipe: "DiffusionPipeline") -> "Run":
    """The run with the pipeline's own steps and guidance where it says none."""
    import inspect

    said = {"num_inference_steps": "default_steps", "guidance_scale": "default_guidance"}
    parameters = inspect.signature(type(pipe).__call__).parameters
    missing = {}
    for name, setting in said.items():
        if getattr(run, name) is None and name in parameters:
            missing[name] = pipe.config.get(setting, parameters[name].default)
    return replace(run, **{name: value for name, value in missing.items() if value is not None})


def check_model(model: str) -> None:
    """Raise ValueError unless this is a shipped name, the folder of a pipeline, or may be a name of the hub."""
    check_name(model)
    if model not in SHIPPED and Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        inside = sorted(path.parent.name for path in Path(model).glob("*/model_index.json"))
        hint = f"; it holds {', '.join(inside)}" if inside else ""
        raise ValueError(f"{model} is a folder without a pipeline (no model_index.json){hint}")


def plugins_wanted(plugin: tuple[str, ...]) -> bool:
    """Whether names may be those of plugins, so that only what is registered can tell."""
    from diffusion_opt.plugins import installed

    return bool(plugin) or bool(installed())


def settle(device: Device, threads: int | None) -> str:
    """Set torch's threads and choose the device. Raises ValueError if a GPU was asked for and there is none."""
    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch sees no NVIDIA GPU here; leave the flag out, or see `diffusion-opt doctor`"
        )
    return device


def writable(folder: Path) -> None:
    """Make a folder before the long work starts. Raises ValueError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # of a name of its own: several processes may ask at once
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); choose another folder with --out") from error


def _class_of(model: str) -> str | None:
    """The pipeline class of a folder, if it is one."""
    index = Path(model) / "model_index.json"
    return json.loads(index.read_text()).get("_class_name") if index.is_file() else None


def _is_file(text: str) -> bool:
    return len(text) < 256 and "\n" not in text and Path(text).is_file()


def _paths(name: str, value: Any) -> list[str]:
    """The texts of an argument that stand for pictures."""
    if not any(word in name for word in _PICTURES):
        return []
    values = value if isinstance(value, list) else [value]
    return values if values and all(isinstance(item, str) for item in values) else []


def _opened(path: Path) -> "Image":
    """A picture in full, in RGB unless it is gray."""
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("L" if picture.mode in ("1", "L") else "RGB")
