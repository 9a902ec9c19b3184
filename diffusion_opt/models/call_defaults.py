"""What a pipeline is called with where the caller does not say: the steps, times and guidance of a student or a solver.

diffusers keeps such defaults in the signature of a pipeline class's `__call__`, so `pipe("a cat")` takes 50 steps
whatever network or solver was put on. Here one pipeline gets defaults of its own:

    set_call_defaults(pipe, "Solver", num_inference_steps=12)
    pipe("a cat")                                       # 12 steps
    pipe("a cat", num_inference_steps=20)               # what is said still counts
    drop_call_defaults(pipe, "Solver")                  # the class, and with it the call, is what it was

Python looks `__call__` up on the class, so the instance's class becomes a subclass of the same name whose call fills in
what was left out, as FSDP2 does with modules; `inspect.signature` shows the new defaults, nothing changes for other
instances, and several owners may come and go in any order. During such a call a re-noising scheduler draws from the
caller's generator, so a student repeats its seed. `save_pretrained` writes the defaults to `call.json` beside
`model_index.json`, and `load` puts them on again.
"""

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffusion_opt.datasets import CorruptFileError, read_json, write_json
from diffusion_opt.models.ladder import seeded_steps

FILE = "call.json"
STORED = "stored"  # owner of the defaults that came with the folder
_BY_OWNER = "_diffusion_opt_call_defaults"  # in the pipeline's __dict__: owner -> name -> value


def set_call_defaults(pipe: DiffusionPipeline, owner: str, **defaults: Any) -> None:
    """Let calls of this pipeline take these values for arguments that are left out; those of a later owner win.

    Raises ValueError if the pipeline's call has no argument of a name.
    """
    taken = inspect.signature(_plain_class(pipe).__call__).parameters
    for name in defaults:
        if name not in taken:
            raise ValueError(f"{type(pipe).__name__} takes no {name!r}, so it can have no default for it")
    by_owner = pipe.__dict__.setdefault(_BY_OWNER, {})
    by_owner.pop(owner, None)
    by_owner[owner] = defaults
    _renew(pipe)


def drop_call_defaults(pipe: DiffusionPipeline, owner: str) -> None:
    """Take the defaults of an owner back; those of others stay."""
    pipe.__dict__.get(_BY_OWNER, {}).pop(owner, None)
    _renew(pipe)


def call_defaults(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The defaults that this pipeline has beyond those of its class."""
    return {name: value for own in pipe.__dict__.get(_BY_OWNER, {}).values() for name, value in own.items()}


def save_call_defaults(pipe: DiffusionPipeline, folder: str | Path) -> None:
    """Write the defaults beside the pipeline, if it has any."""
    if defaults := call_defaults(pipe):
        write_json(Path(folder) / FILE, defaults)


def load_call_defaults(pipe: DiffusionPipeline, folder: Path) -> None:
    """Put on the defaults that were saved with the folder. Raises CorruptFileError if the file is not what it was."""
    path = folder / FILE
    if not path.is_file():
        return
    defaults = read_json(path, "save the pipeline again")
    if not isinstance(defaults, dict):
        raise CorruptFileError(f"{path} holds no arguments of a call; save the pipeline again")
    set_call_defaults(pipe, STORED, **defaults)


def _plain_class(pipe: DiffusionPipeline) -> type[DiffusionPipeline]:
    """The class of the pipeline without defaults of its own."""
    return getattr(type(pipe), "_diffusion_opt_plain", type(pipe))


def _renew(pipe: DiffusionPipeline) -> None:
    """Give the pipeline the class that its present defaults ask for."""
    plain, defaults = _plain_class(pipe), call_defaults(pipe)
    if not defaults:
        pipe.__dict__.pop(_BY_OWNER, None)
    pipe.__class__ = _with_defaults(plain, defaults) if defaults else plain


def _with_defaults(plain: type[DiffusionPipeline], defaults: Mapping[str, Any]) -> type[DiffusionPipeline]:
    """A subclass of the same name whose call fills in `defaults`."""
    signature = inspect.signature(plain.__call__)
    shown = [
        parameter.replace(default=defaults[name]) if name in defaults else parameter
        for name, parameter in signature.parameters.items()
    ]

    @functools.wraps(plain.__call__)
    def call(self: DiffusionPipeline, *arguments: Any, **settings: Any) -> Any:
        said = signature.bind_partial(self, *arguments, **settings).arguments
        _check_times(said, defaults)
        left_out = {name for name in defaults if name not in said or settings.get(name, "by place") is None}
        settings |= {name: defaults[name] for name in left_out}
        with seeded_steps(self.scheduler, settings.get("generator")):
            return plain.__call__(self, *arguments, **settings)

    def save_pretrained(self: DiffusionPipeline, save_directory: str | Path, *arguments: Any, **settings: Any) -> None:
        plain.save_pretrained(self, save_directory, *arguments, **settings)
        save_call_defaults(self, save_directory)

    call.__signature__ = signature.replace(parameters=shown)
    members = {
        "__call__": call, "save_pretrained": save_pretrained, "_diffusion_opt_plain": plain,
        "__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__,
    }  # fmt: skip
    return type(plain.__name__, (plain,), members)


def _check_times(said: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError if the caller asks for other steps than those whose times are the pipeline's own."""
    steps, sigmas = said.get("num_inference_steps"), defaults.get("sigmas")
    if steps is not None and sigmas is not None and said.get("sigmas") is None and steps != len(sigmas):
        raise ValueError(f"this pipeline was made for {len(sigmas)} steps at times {sigmas}, got {steps} steps")
