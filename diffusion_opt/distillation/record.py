"""What a student's folder belongs to: its plan, its teacher, its start, its data and the settings of its method.

A run is resumed, and a start reused, by the name of a folder. A name says little: a teacher is trained anew under the
same path, another start is put where the old one was, a method gets other hops. So `student.json` holds all that
decides over the weights beside the `TrainConfig`, which the checkpoint holds, and each resume compares it:

    the plan    every field of `StudentPlan`
    teacher     the subject's identity: weights, scheduler, conditions
    start       the identity of the network that training begins from
    data        a fingerprint of the real samples
    settings    the numbers of the `Distiller`, such as hops, distance, alpha, warm-up of the critic
    finished    whether training came to its end

A folder with a checkpoint but without this file cannot say whose it is, and is refused too.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from diffusion_opt.datasets import read_json, write_json
from diffusion_opt.subjects.subject import described, same_source
from diffusion_opt.training import Distiller, processes
from diffusion_opt.training.checkpoint import CHECKPOINT

RECORD = "student.json"
_SOURCES = ("teacher_identity", "start_identity")
_NOT_COMPARED = ("teacher", "start", "training", "finished")  # paths: what lies there has an identity; the budget
_REMEDY = "choose another folder, or delete this one and begin anew"


def settings_of(distiller: Distiller) -> dict[str, Any]:
    """The settings of a method, as JSON has them: every field that is a number, a text, or made of these.

    Networks, data and tensors are not settings; what they are is recorded elsewhere.
    """
    found = {}
    for item in fields(distiller) if is_dataclass(distiller) else ():
        value = getattr(distiller, item.name)
        if item.init and _is_plain(value):
            found[item.name] = json.loads(json.dumps(asdict(value) if is_dataclass(value) else value))
        elif is_dataclass(owner := getattr(value, "__self__", None)):  # the loss of another method, as in rCM
            found[item.name] = settings_of(owner)
    return found | {"method": type(distiller).__name__}


def as_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(record))


def _is_plain(value: Any) -> bool:
    if is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, item.name)) for item in fields(value))
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def read(out: Path) -> dict[str, Any] | None:
    """The record of a folder, None if it holds no student. Raises CorruptFileError for a damaged one, and ValueError
    if there is a checkpoint and no record.
    """
    path = out / RECORD
    if path.is_file():
        return read_json(path, _REMEDY)
    if any(out.glob(f"{CHECKPOINT}*")):
        raise ValueError(f"{out} holds a checkpoint but no {RECORD}, so it cannot be told whose it is; {_REMEDY}")
    return None


def check(out: Path, record: Mapping[str, Any]) -> None:
    """Raises ValueError if the folder holds the student of another record; what only one of them has is not compared.

    Raises what `read` raises.
    """
    found = read(out)
    if found is None:
        return
    if missing := [name for name in _SOURCES if name not in found]:
        raise ValueError(f"{out / RECORD} does not say {missing[0]}: it is of an earlier version; {_REMEDY}")
    for name, now in record.items():
        if name in _NOT_COMPARED or name not in found:
            continue
        if name in _SOURCES:
            if not same_source(found[name], now):
                who = name.partition("_")[0]
                raise ValueError(
                    f"{out} holds a student whose {who} is {described(found[name])}, now it is {described(now)}; "
                    f"{_REMEDY}"
                )
        elif found[name] != now:
            raise ValueError(f"{out} holds a student with {_difference(name, found[name], now)}; {_REMEDY}")


def _difference(name: str, found: Any, now: Any) -> str:
    """What differs, down to the field of a setting."""
    if isinstance(found, dict) and isinstance(now, dict):
        for key in sorted({*found, *now}):
            if found.get(key) != now.get(key):
                return _difference(f"{name}.{key}", found.get(key), now.get(key))
    return f"{name}={found!r}, now {now!r}"


def note(out: Path, record: Mapping[str, Any], finished: bool) -> None:
    """Write the record; several processes say the same, the first one writes after all have read."""
    among = processes()
    among.wait()
    if among.is_main:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RECORD, {**record, "finished": finished})
    among.wait()
