"""`diffusion-opt`: one command, thin over the package's functions. `diffusion-opt --help` lists what it can do."""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, Union

import tyro

from diffusion_opt.cli import cache, kernels
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


def main(arguments: list[str] | None = None) -> None:
    """Entry point: expected failures end in one line on standard error and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="diffusion-opt", description=__doc__, args=arguments,
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"diffusion-opt: {error}", file=sys.stderr)
        raise SystemExit(2) from None
