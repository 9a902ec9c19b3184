"""What a student's folder belongs to: its plan, its teacher, its start, its data and the settings of its method.

A run is resumed, and a start reused, by the name of a folder. A name says little: a teacher is trained anew under the
same path, another start is put where the old one was, a method gets other hops. So `student.json` holds all that
decides over the weights beside the `TrainConfig`, which the checkpoint holds, and each resume compares it:

    the plan    every field of `StudentPlan`
    teacher     the subject's identity: weights, scheduler, conditions
    start       the identity of the network that training begins from
    data        a fingerprint of the real samples
    settings    the plain values of the `Distiller` (`training.settings`): hops, distance, alpha, warm-up of the critic
    finished    whether training came to its end

A folder with a checkpoint but without this file cannot say whose it is, and is refused too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_opt.datasets import read_json, write_json
from diffusion_opt.subjects.subject import described, same_source
from diffusion_opt.training import processes
from diffusion_opt.training.checkpoint import CHECKPOINT

RECORD = "student.json"
_SOURCES = ("teacher_identity", "start_identity")
_NOT_COMPARED = ("teacher", "start", "training", "finished")  # paths: what lies there has an identity; the budget
_REMEDY = "choose another folder, or delete this one and begin anew"


def as_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(record))


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
