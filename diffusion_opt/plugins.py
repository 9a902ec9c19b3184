"""The door for what others write: parts from outside the package, by name like our own.

A plugin is a module with a function `register()` that adds to the package's lists:

    from diffusion_opt.distillation import methods, opening
    from diffusion_opt.evaluation import judges
    from diffusion_opt.recipes import recipe

    def register() -> None:
        methods.register("imm", methods.Method("moments of two jumps agree", "trajectory", build=build, …))
        recipe.register("fused_projections", FusedProjections, recipe.STORED)       a technique: in recipes
        judges.register("brightness", BrightnessJudge)                              measure --judges brightness
        opening.register("mirrored", open_mirrored)                                 distill --teacher mirrored:fashion

It comes in by a flag of every command on a model, `--plugin my_module` (a module that can be imported, or a path to a
.py file), or, installed, by an entry point of the group `diffusion_opt.plugins`, which names the function:

    [project.entry-points."diffusion_opt.plugins"]
    imm = "my_module:register"

Importing a module changes nothing, here as everywhere; `register` does, once. Methods bring settings of their own, a
frozen dataclass: `--set name=value` changes them, the plan records them, and a resumed run compares them.
`examples/imm_plugin.py` is a method, `examples/parts_plugin.py` a technique, a judge and a subject.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

GROUP = "diffusion_opt.plugins"


def installed() -> tuple[metadata.EntryPoint, ...]:
    """The entry points of what is installed."""
    return tuple(metadata.entry_points(group=GROUP))


def load_plugins(modules: Iterable[str] = ()) -> tuple[str, ...]:
    """Register the installed plugins and these modules; returns the names of all.

    Raises ValueError for a module that cannot be found or has no `register`.
    """
    entries = installed()
    for entry in entries:
        entry.load()()
    wanted = tuple(modules)
    for name in wanted:
        _register_of(name)()
    return (*(entry.name for entry in entries), *wanted)


def _register_of(name: str) -> Callable[[], None]:
    module = _from_file(Path(name)) if name.endswith(".py") else _by_name(name)
    register = getattr(module, "register", None)
    if not callable(register):
        raise ValueError(f"plugin {name!r} has no function register(); see the top of diffusion_opt/plugins.py")
    return register


def _by_name(name: str) -> object:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise ValueError(f"there is no module {name!r} to import as a plugin; give its name, or its .py file")
    return importlib.import_module(name)


def _from_file(path: Path) -> object:
    """The module in a file, one and the same each time: its classes are looked up by identity."""
    name = f"diffusion_opt_plugin_{path.stem}"
    if name in sys.modules and sys.modules[name].__file__ == str(path.resolve()):
        return sys.modules[name]
    if not path.is_file():
        raise ValueError(f"there is no plugin at {path}")
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it runs
    spec.loader.exec_module(module)
    return module
