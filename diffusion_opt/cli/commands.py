"""The commands of `diffusion-opt` by name, and how they are parsed."""

from collections.abc import Callable
from typing import Annotated, Any, Union

import tyro

from diffusion_opt.cli import DESCRIPTION, cache, kernels
from diffusion_opt.cli.demo import demo, doctor
from diffusion_opt.cli.quantize import quantize
from diffusion_opt.cli.training import distill, train


def _group(help: str, commands: dict[str, Callable]) -> Callable:
    """A command that only holds others: `diffusion-opt cache search`."""

    def run(command: Any) -> None:
        return None  # by then tyro has called the chosen one

    choices = tuple(Annotated[Any, tyro.conf.subcommand(name, constructor=call)] for name, call in commands.items())
    run.__doc__ = help
    run.__annotations__["command"] = Union[choices]  # noqa: UP007 - built at run time
    return run


COMMANDS = {
    "doctor": doctor,
    "demo": demo,
    "train": train,
    "distill": distill,
    "quantize": quantize,
    "cache": _group(
        "Step caches: measure a model, search its schedule, compare with running fewer steps.",
        {"calibrate": cache.calibrate, "search": cache.search, "compare": cache.compare},
    ),
    "kernels": _group(
        "Triton kernels: what the compiler makes of them for each GPU, and which code a call runs.",
        {"report": kernels.report, "explain": kernels.explain},
    ),
}


def run(arguments: list[str] | None) -> None:
    """Parse and run one command."""
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="diffusion-opt", description=DESCRIPTION, args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )  # fmt: skip
