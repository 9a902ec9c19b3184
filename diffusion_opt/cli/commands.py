"""The commands of `diffusion-opt` by name, and how they are parsed.

Commands are looked up here and imported when they are called, so a typing error is answered before torch, diffusers
and modelopt are loaded. tyro turns the signature and docstring of each into its options. The call itself happens
outside of tyro, because tyro reports an exception of a nested call as an error of parsing.
"""

import contextlib
import functools
import importlib
import inspect
import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from diffusion_opt import __version__
from diffusion_opt.names import nearest


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command is, and what the overview says of it."""

    target: str  # module:function
    arguments: str
    says: str


_CLI = "diffusion_opt.cli."
COMMANDS = {
    "doctor": Command(_CLI + "demo:doctor", "", "what this machine has, and what will be slow on it"),
    "demo": Command(_CLI + "demo:demo", "", "every technique on the shipped model, measured"),
    "generate": Command(_CLI + "generate:generate", "MODEL", "pictures or clips"),
    "plan": Command(_CLI + "plan:plan", "MODEL", "bytes and arithmetic, before a weight is read"),
    "advise": Command(_CLI + "advise:advise", "MODEL", "what applies to it, in which order, what to type"),
    "measure": Command(_CLI + "measure:measure", "MODEL", "speed, cost, memory, and what judges say"),
    "search": Command(_CLI + "search:search", "MODEL", "the fastest recipe within a loss of quality"),
    "apply": Command(_CLI + "apply:apply", "MODEL", "put a recipe on, and save what opens with it"),
    "cache calibrate": Command(_CLI + "cache:calibrate", "MODEL", "what TeaCache, MagCache and step tables need"),
    "cache search": Command(_CLI + "cache:search", "MODEL", "which steps to compute, for each budget"),
    "cache compare": Command(_CLI + "cache:compare", "MODEL", "every cache beside running fewer steps"),
    "quantize": Command(_CLI + "quantize:quantize", "MODEL", "fewer bits, by calibration or training; saved packed"),
    "distill": Command(_CLI + "training:distill", "--teacher MODEL", "a student of few steps"),
    "train": Command(_CLI + "training:train", "teacher", "a shipped model from scratch"),
    "video train": Command(_CLI + "video:train", "STAGE", "a teacher of steered clips"),
    "kernels report": Command(_CLI + "kernels:report", "", "what each Triton kernel compiles to on each GPU"),
    "kernels explain": Command(_CLI + "kernels:explain", "", "which attention code runs on this machine"),
}
SECTIONS = {
    "Start here": ("doctor", "demo"),
    "With any pipeline (MODEL: a shipped name, a folder, or a name of the hub)": (
        "generate", "plan", "advise", "measure", "search", "apply", "cache calibrate", "cache search", "cache compare",
        "quantize",
    ),
    "Make models": ("distill", "train", "video train"),
    "Look inside": ("kernels report", "kernels explain"),
}  # fmt: skip
EXAMPLES = (
    'diffusion-opt generate fashion --prompts sneaker "ankle boot"',
    'diffusion-opt cache search DIR --prompts "a cat" --steps 28 --budgets 14 --out runs/cat',
    "diffusion-opt quantize DIR --format fp8 --prompts prompts.txt --out runs/fp8",
)


def run(arguments: list[str] | None) -> None:
    """Parse and run one command; without any, say which there are."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
    elif arguments[0] in ("-V", "--version"):
        print(f"diffusion-opt {__version__}")
    else:
        name, rest = find(arguments)
        module, _, function = COMMANDS[name].target.partition(":")
        parsed(f"diffusion-opt {name}", getattr(importlib.import_module(module), function), rest)()


def overview() -> str:
    """The commands, what each is for, and three of them typed out: fits one screen of 80 columns."""
    lines = [f"diffusion-opt {__version__}: make diffusion models faster, and see what it costs in quality", ""]
    for title, names in SECTIONS.items():
        lines.append(title)
        for name in names:
            command = COMMANDS[name]
            lines.append(f"  {f'{name} {command.arguments}'.strip():24s} {command.says}")
        lines.append("")
    lines += ["Examples", *(f"  {line}" for line in EXAMPLES), ""]
    return "\n".join([*lines, "`diffusion-opt COMMAND --help` explains the options of a command."])


def find(arguments: list[str]) -> tuple[str, list[str]]:
    """The command that is meant and what is left for it. Raises ValueError with the nearest name for another word."""
    first = arguments[0]
    if first in COMMANDS:
        return first, arguments[1:]
    members = [name.split()[1] for name in COMMANDS if name.startswith(f"{first} ")]
    if not members:
        names = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
        raise ValueError(f"no command {first!r}{nearest(first, names)}: there are {', '.join(names)}")
    second = arguments[1] if len(arguments) > 1 else "--help"
    if second in ("-h", "--help"):
        for member in members:
            print(f"  diffusion-opt {first} {member:10s} {COMMANDS[f'{first} {member}'].says}")
        raise SystemExit(0)
    if second not in members:
        raise ValueError(f"no command '{first} {second}'{nearest(second, members)}: there are {', '.join(members)}")
    return f"{first} {second}", arguments[2:]


def parsed(prog: str, call: Callable[..., None], arguments: list[str]) -> Callable[[], None]:
    """The call with its options, still to be made. Raises ValueError, in one line, for options it does not take."""
    import tyro

    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # tyro draws its frames by what the stream can hold
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(_deferred(call), prog=prog, args=arguments, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as end:
        if end.code in (None, 0):  # help, on standard output
            raise
        raise ValueError(f"{_first_words(said)}; see `{prog} --help`") from None


def _first_words(said: io.TextIOWrapper) -> str:
    """What tyro's framed message says before its first rule, and the options that it thinks were meant."""
    said.seek(0)
    lines = [line.strip("│╰╯ \n") for line in said if line.strip()][1:]  # the first is the title
    parts = [list(part) for rule, part in groupby(lines, lambda line: not line.strip("─-")) if not rule]
    text = " ".join(line for line in parts[0] if line) if parts else "unknown options"
    text = text.partition(" Got errors")[0].replace("no type matching {None}|", "no ").rstrip(". ")
    if "invalid choice" in text:
        got = re.search(r"choice '([^']*)'", text)[1]
        choices = re.findall(r"'([^']*)'", text.partition("one of")[2])
        return text.replace(f"'{got}'", f"'{got}'{nearest(got, choices)}", 1)
    meant = [line.split()[0] for part in parts[1:] for line in part if line.startswith("--")]
    return text + (f" (did you mean {' or '.join(dict.fromkeys(meant))}?)" if "Unrecognized" in text and meant else "")


def _deferred(call: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The same signature, but what it gives is the call still to be made."""

    @functools.wraps(call)
    def defer(*positional: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(call, *positional, **named)

    defer.__signature__ = inspect.signature(call)
    return defer
