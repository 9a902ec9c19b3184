"""What a run is, read off the method itself: the plain values it was built with, and the networks it holds.

A checkpoint belongs to one run. Its `TrainConfig` is compared when it is resumed, but a method has settings of its own:
a distance, a number of hops, the guidance scale of its teacher. Methods are dataclasses, so these are their fields, and
nobody has to list them: numbers, text and their tuples count; networks, tensors, functions and what the method made
itself (`init=False`) do not; a dataclass in a field is read in the same way. A field whose metadata is `FREE` may
change between two calls. A method that is no dataclass may give its settings as a dictionary named `settings`.
"""

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_opt.training.distributed import local

FREE = {"may change on resume": True}  # metadata of a field that does not decide over the weights


def settings_of(method: object) -> dict[str, Any]:
    """The plain settings of a method by dotted name, as JSON keeps them; "class" is its class."""
    given = getattr(method, "settings", None)
    flat = dict(_flat("", given)) if isinstance(given, Mapping) else {}
    return {"class": type(method).__qualname__} | flat | dict(_flat("", method))


def changed(settings: Any, values: Mapping[str, object]) -> Any:
    """A frozen dataclass of settings with some of them changed, by name; "gan.r1_weight" is one of a part.

    A value may be text, as it comes from a command line: "0.5", "(4, 64)", "huber". Raises ValueError for a name that
    is not there or a value of another kind than the setting has; the dataclass checks the rest itself.
    """
    for name, value in values.items():
        head, _, rest = name.partition(".")
        if not is_dataclass(settings) or head not in (names := [field.name for field in fields(settings)]):
            there = "none" if not is_dataclass(settings) else ", ".join(names)
            raise ValueError(f"there is no setting {name!r}; there are {there}")
        old = getattr(settings, head)
        new = changed(old, {rest: value}) if rest else _as_kind(old, value, name)
        settings = replace(settings, **{head: new})
    return settings


def _as_kind(old: object, value: object, name: str) -> object:
    """A value of the kind of `old`: text is read as a Python literal where `old` is no text."""
    if isinstance(value, str) and not isinstance(old, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"{name} must be of the kind of {old!r}, got {value!r}") from None
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list):
        value = tuple(value)
    if old is not None and value is not None and type(value) is not type(old):
        raise ValueError(f"{name} must be of the kind of {old!r}, got {value!r}")
    return value


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Name, old and new value of the first setting that differs. None on one side stands for "not there"."""
    for name in (*now, *(name for name in before if name not in now)):
        if before.get(name) != now.get(name):
            return name, before.get(name), now.get(name)
    return None


def networks_of(method: object) -> dict[str, nn.Module]:
    """The networks that a method holds, trained or not, by the names of its fields: "student", "teacher.model"."""
    return dict(_networks("", method))


def not_finite(network: nn.Module) -> str | None:
    """Name of the first parameter or buffer of numbers that holds NaN or infinity; of a sharded network, here.

    Buffers may hold infinity on purpose, as masks do, so only NaN counts there.
    """
    for name, parameter in network.named_parameters():
        if not parameter.is_meta and not torch.isfinite(local(parameter.detach())).all():
            return name
    for name, buffer in network.named_buffers():
        if not buffer.is_meta and torch.isnan(local(buffer)).any():
            return name
    return None


def refuse_damaged(method: object) -> None:
    """Raises ValueError, naming network and tensor, if a network of the method holds NaN before training starts."""
    for place, network in networks_of(method).items():
        if (name := not_finite(network)) is not None:
            raise ValueError(
                f"the {place} of {type(method).__name__} is damaged: {name!r} holds values that are not finite; "
                "nothing can be learned with it, so load or train that network again"
            )


def _flat(prefix: str, value: object) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value) and not isinstance(value, type | nn.Module):
        for field in fields(value):
            if field.init and not FREE.items() <= field.metadata.items():
                yield from _flat(f"{prefix}.{field.name}".lstrip("."), getattr(value, field.name))
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _flat(f"{prefix}.{name}".lstrip("."), part)
    elif is_dataclass(owner := getattr(value, "__self__", None)):  # the loss of another method, as in rCM
        yield from _flat(prefix, owner)
    elif _is_plain(value):
        yield prefix, _as_json(value)


def _as_json(value: object) -> Any:
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def _networks(prefix: str, value: object) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield prefix, value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _networks(f"{prefix}.{field.name}".lstrip("."), getattr(value, field.name, None))
    elif not isinstance(value, Tensor) and not prefix:  # a method that is no dataclass
        for name, part in vars(value).items():
            yield from _networks(name, part)
